"""Tiny image denoisers."""

from __future__ import annotations

import torch
from torch import Tensor
from zoo_base import Draw, Inputs, config, entry, grid, image_ids, rotary


@entry(
    "DiTTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=10, num_embeds_ada_norm=11),
)
def dit(draw: Draw) -> Inputs:
    return {"hidden_states": draw.normal(4, 10, 10), "timestep": draw.steps(), "class_labels": draw.integers(11)}


@entry(
    "PixArtTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8),
    config(cross_attention_dim=32, caption_channels=20),
)
def pixart(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(4, 8, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_attention_mask": draw.mask(7),
        "timestep": draw.steps(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@entry(
    "SD3Transformer2DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=7, sample_size=12, in_channels=6, out_channels=6),
    config(joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=22, pos_embed_max_size=9),
    config(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm"),
    note="three blocks with a second attention, three plain ones, and the last, which drops the text",
)
def sd3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 8, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "pooled_projections": draw.normal(22),
        "timestep": draw.steps(),
    }


@entry(
    "FluxTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, in_channels=12),
    config(joint_attention_dim=20, pooled_projection_dim=22, guidance_embeds=True, axes_dims_rope=(4, 6, 6)),
)
def flux(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "pooled_projections": draw.normal(22),
        "timestep": draw.fractions(),
        "img_ids": image_ids(4, 6),
        "txt_ids": torch.zeros(7, 3),
        "guidance": draw.guidance(),
    }


@entry(
    "SanaTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8, in_channels=6, out_channels=6),
    config(num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=20),
)
def sana(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 4, 6),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_attention_mask": draw.mask(7),
        "timestep": draw.steps(),
    }


@entry(
    "HunyuanDiT2DModel",
    config(num_attention_heads=4, attention_head_dim=8, hidden_size=32, num_layers=8, sample_size=8, in_channels=6),
    config(patch_size=2, cross_attention_dim=20, cross_attention_dim_t5=24, pooled_projection_dim=22),
    config(text_len=5, text_len_t5=7),
    note="long skips from the first three blocks to the last three",
)
def hunyuan_dit(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 8, 12),
        "timestep": draw.steps().float(),
        "encoder_hidden_states": draw.normal(5, 20),
        "text_embedding_mask": draw.mask(5),
        "encoder_hidden_states_t5": draw.normal(7, 24),
        "text_embedding_mask_t5": draw.mask(7),
        "image_meta_size": draw.constant(1024, 1536, 1024, 1536, 0, 0),
        "style": draw.integers(1),
        "image_rotary_emb": rotary(grid(4, 6), (4, 4)),
    }


@entry(
    "AuraFlowTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_mmdit_layers=3, num_single_dit_layers=3, sample_size=12),
    config(joint_attention_dim=20, caption_projection_dim=48, pos_embed_max_size=36),
)
def aura_flow(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(4, 8, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.fractions(),
    }


@entry(
    "Lumina2Transformer2DModel",
    config(hidden_size=32, num_layers=3, num_refiner_layers=2, num_attention_heads=4, num_kv_heads=2, sample_size=12),
    config(in_channels=6, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16), cap_feat_dim=20),
    note="samples of one text length, as in a batch of one, run without a mask",
)
def lumina2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 8, 12),
        "timestep": draw.fractions(),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_attention_mask": draw.mask(7),
    }


@entry(
    "QwenImageTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, in_channels=12, out_channels=3),
    config(joint_attention_dim=20, axes_dims_rope=(4, 6, 6)),
)
def qwen_image(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_hidden_states_mask": draw.mask(7),
        "timestep": draw.fractions(),
        "img_shapes": [[(1, 4, 6)]] * draw.batch,
    }


@entry(
    "Transformer2DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8, in_channels=4, out_channels=8),
    config(patch_size=2, norm_type="ada_norm_single", norm_elementwise_affine=False, num_embeds_ada_norm=11),
    config(cross_attention_dim=32, caption_channels=20, attention_bias=True),
    note="the patched form, once used for DiT and PixArt; the other forms are stages of a UNet",
)
def patched_transformer_2d(draw: Draw) -> Inputs:
    return pixart(draw)


@entry(
    "PriorTransformer",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, embedding_dim=20, num_embeddings=9),
    note="denoises one embedding; the causal mask has the length baked in",
)
def prior(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(20),
        "timestep": draw.steps(),
        "proj_embedding": draw.normal(20),
        "encoder_hidden_states": draw.normal(9, 20),
        "attention_mask": draw.mask(9),
    }


@entry(
    "LuminaNextDiT2DModel",
    config(hidden_size=32, num_layers=3, num_attention_heads=4, num_kv_heads=2, sample_size=8, multiple_of=16),
    config(cross_attention_dim=20),
)
def lumina_next(draw: Draw) -> Inputs:
    cos, sin = rotary(grid(8, 8), (4, 4))
    return {
        "hidden_states": draw.normal(4, 8, 12),
        "timestep": draw.fractions(),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_mask": draw.mask(7),
        "image_rotary_emb": torch.complex(cos, sin)[:, ::2].reshape(8, 8, 4),
        "cross_attention_kwargs": {},
    }


@entry(
    "CogView3PlusTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, in_channels=6, out_channels=6, sample_size=12),
    config(text_embed_dim=20, time_embed_dim=22, condition_dim=10, pos_embed_max_size=9),
)
def cogview3_plus(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 8, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.steps(),
        "original_size": draw.constant(64, 96),
        "target_size": draw.constant(64, 96),
        "crop_coords": draw.constant(0, 0),
    }


@entry(
    "CogView4Transformer2DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, in_channels=6, out_channels=6, sample_size=12),
    config(text_embed_dim=20, time_embed_dim=22, condition_dim=10, pos_embed_max_size=9, rope_axes_dim=(16, 16)),
)
def cogview4(draw: Draw) -> Inputs:
    return cogview3_plus(draw)


@entry(
    "GlmImageTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, in_channels=6, out_channels=6),
    config(text_embed_dim=20, time_embed_dim=22, condition_dim=10, prior_vq_quantizer_codebook_size=50),
)
def glm_image(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 8, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "prior_token_id": draw.integers(50, 24),
        "prior_token_drop": torch.zeros(draw.batch, 24, dtype=torch.bool),
        "timestep": draw.steps(),
        "target_size": draw.constant(64, 96),
        "crop_coords": draw.constant(0, 0),
    }


@entry(
    "BriaTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, in_channels=12),
    config(joint_attention_dim=20, axes_dims_rope=[4, 6, 6]),
)
def bria(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.steps(),
        "img_ids": image_ids(4, 6),
        "txt_ids": torch.zeros(7, 3),
    }


@entry(
    "BriaFiboTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, in_channels=12),
    config(joint_attention_dim=20, axes_dims_rope=[4, 6, 6], text_encoder_dim=22),
)
def bria_fibo(draw: Draw) -> Inputs:
    return bria(draw) | {
        "text_encoder_layers": [draw.normal(7, 22) for _ in range(6)],
        "joint_attention_kwargs": {"attention_mask": _with_image(draw.mask(7), 24)[:, None, None]},
    }


@entry(
    "BriaFibo2Transformer2DModel",
    config(in_channels=6, dim=64, n_layers=6, n_refiner_layers=2, n_heads=4, cap_feat_dim=20),
    config(injection_layer_ids=(1, 3, 5), min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2),
    config(gist_min_text_len=5, gist_max_text_len=9, axes_dims=(4, 6, 6), axes_lens=(32, 16, 16)),
    note="text squeezed to as many gist tokens as its length asks for; gists of one number come first, without a mask",
)
def bria_fibo2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 8, 12),
        "timestep": draw.fractions(),
        "encoder_hidden_states": draw.normal(4, 9, 20),
        "encoder_attention_mask": draw.mask(9),
    }


@entry(
    "ChromaTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, in_channels=12),
    config(joint_attention_dim=20, axes_dims_rope=(4, 6, 6), approximator_num_channels=16),
    config(approximator_hidden_dim=22, approximator_layers=1),
)
def chroma(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.fractions(),
        "img_ids": image_ids(4, 6),
        "txt_ids": torch.zeros(7, 3),
        "attention_mask": _with_image(draw.mask(7, torch.float32), 24),
    }


@entry(
    "OvisImageTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, in_channels=12),
    config(out_channels=12, joint_attention_dim=20, axes_dims_rope=(4, 6, 6)),
)
def ovis_image(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.fractions(),
        "img_ids": image_ids(4, 6),
        "txt_ids": _text_ids(7),
    }


@entry(
    "LongCatImageTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, in_channels=12),
    config(joint_attention_dim=20, pooled_projection_dim=22, axes_dims_rope=[4, 6, 6]),
)
def longcat_image(draw: Draw) -> Inputs:
    return ovis_image(draw)


@entry(
    "Flux2Transformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, in_channels=12),
    config(joint_attention_dim=20, timestep_guidance_channels=18, axes_dims_rope=(4, 4, 4, 4)),
    note="rotary ids carry a batch axis, but those of the first sample serve all",
)
def flux2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.fractions(),
        "img_ids": image_ids(4, 6, columns=4).expand(draw.batch, -1, -1),
        "txt_ids": _last_axis_ids(7).expand(draw.batch, -1, -1),
        "guidance": draw.guidance(),
    }


@entry(
    "Flux3Transformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, in_channels=12),
    config(cond_in_channels=10, joint_attention_dim=20, timestep_channels=18, axes_dims_rope=(4, 4, 4, 4)),
)
def flux3(draw: Draw) -> Inputs:
    condition_ids = image_ids(3, 5, columns=4)
    condition_ids[:, 0] = 10
    return {
        "hidden_states": draw.normal(24, 12),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.fractions(),
        "img_ids": image_ids(4, 6, columns=4),
        "txt_ids": _last_axis_ids(7),
        "image_cond_hidden_states": draw.normal(15, 10),
        "image_cond_ids": condition_ids,
    }


@entry(
    "ErnieImageTransformer2DModel",
    config(hidden_size=64, num_attention_heads=4, num_layers=3, ffn_hidden_size=72, in_channels=12, out_channels=12),
    config(text_in_dim=20, rope_axes_dim=(4, 6, 6)),
    note="sequence first inside",
)
def ernie_image(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(12, 4, 6),
        "timestep": draw.steps().float(),
        "text_bth": draw.normal(7, 20),
        "text_lens": draw.lengths(7),
    }


@entry(
    "HiDreamImageTransformer2DModel",
    config(
        num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, in_channels=6, patch_size=2
    ),
    config(caption_channels=[20, 22], text_emb_dim=18, axes_dims_rope=(4, 6, 6), max_resolution=(12, 12)),
    config(llama_layers=[0, 1, 2, 3, 4, 4]),
    note="24 image tokens padded to 36; mixture of experts; the language model's states have the batch second",
)
def hidream(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 8, 12),
        "timesteps": draw.steps(),
        "encoder_hidden_states_t5": draw.normal(5, 20),
        "encoder_hidden_states_llama3": draw.normal(5, 7, 22).transpose(0, 1).contiguous(),
        "pooled_embeds": draw.normal(18),
    }


@entry(
    "HunyuanImageTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, num_refiner_layers=2),
    config(in_channels=6, out_channels=6, text_embed_dim=20, text_embed_2_dim=22, rope_axes_dim=(8, 8)),
)
def hunyuan_image(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 4, 6),
        "timestep": draw.steps().float(),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_attention_mask": draw.mask(7),
        "encoder_hidden_states_2": draw.normal(5, 22),
        "encoder_attention_mask_2": draw.mask(5),
    }


@entry(
    "JoyImageEditTransformer3DModel",
    config(hidden_size=64, num_attention_heads=4, num_layers=3, in_channels=6, text_dim=20, rope_dim_list=[4, 6, 6]),
    note="two items per sample: the reference and the target",
)
def joy_image_edit(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(2, 6, 1, 6, 8),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(7, 20),
    }


@entry(
    "JoyImageEditPlusTransformer3DModel",
    config(hidden_size=64, num_attention_heads=4, num_layers=3, in_channels=6, text_dim=20, rope_dim_list=[4, 6, 6]),
    note="target and reference patches of another size in one padded sequence",
)
def joy_image_edit_plus(draw: Draw) -> Inputs:
    shapes = [[(1, 4, 6), (1, 2, 3)], [(1, 4, 6), (1, 2, 4)], [(1, 4, 6), (1, 1, 4)]]
    return {
        "hidden_states": draw.normal(32, 6, 1, 2, 2),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_hidden_states_mask": draw.mask(7, torch.float32),
        "shape_list": [shapes[sample % 3] for sample in range(draw.batch)],
    }


@entry(
    "Krea2Transformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, in_channels=12, num_key_value_heads=2),
    config(intermediate_size=72, timestep_embed_dim=18, text_hidden_dim=20, num_text_layers=5),
    config(text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=26, axes_dims_rope=(4, 6, 6)),
)
def krea2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 12),
        "encoder_hidden_states": draw.normal(7, 5, 20),
        "timestep": draw.fractions(),
        "position_ids": torch.cat([torch.zeros(7, 3), image_ids(4, 6)]),
        "encoder_attention_mask": draw.mask(7),
    }


@entry(
    "NucleusMoEImageTransformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=7, in_channels=12, out_channels=3),
    config(num_key_value_heads=2, joint_attention_dim=20, axes_dims_rope=(4, 6, 6), num_experts=5),
    config(moe_intermediate_dim=26, capacity_factors=2.0),
    note="experts choose among the tokens of a sample, so its tokens depend on one another in the feed-forward too",
)
def nucleus_moe(draw: Draw) -> Inputs:
    return qwen_image(draw)


@entry(
    "OmniGenTransformer2DModel",
    config(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, num_layers=3, intermediate_size=72),
    config(in_channels=6, pad_token_id=0, vocab_size=50, max_position_embeddings=64, pos_embed_max_size=9),
    config(original_max_position_embeddings=64, rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}),
    config(time_step_dim=18),
    note="one sequence of left-padded text, timestep and image; the first sample's rotary positions serve all, so all "
    "samples have the same padding; a mask of every pair",
)
def omnigen(draw: Draw) -> Inputs:
    num_text, num_image, num_padding = 7, 24, 1
    position = torch.arange(num_text + 1 + num_image)
    allowed = (position[None, :] <= position[:, None]) | (position[:, None] > num_text)
    padding = position < num_padding
    mask = (allowed & ~padding[None, :]) | padding[:, None]
    return {
        "hidden_states": draw.normal(6, 8, 12),
        "timestep": draw.fractions(),
        "input_ids": draw.integers(49, num_text) + 1,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.float().expand(draw.batch, -1, -1).clone(),
        "position_ids": (position - num_padding).clamp(min=0).expand(draw.batch, -1).clone(),
    }


@entry(
    "PRXTransformer2DModel",
    config(hidden_size=64, num_heads=4, depth=3, in_channels=6, context_in_dim=20, axes_dim=[8, 8]),
)
def prx(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 8, 12),
        "timestep": draw.fractions(),
        "encoder_hidden_states": draw.normal(7, 20),
        "attention_mask": draw.mask(7),
    }


@entry(
    "ZImageTransformer2DModel",
    config(dim=48, n_layers=3, n_refiner_layers=2, n_heads=4, n_kv_heads=4, in_channels=6, cap_feat_dim=20),
    config(axes_dims=[4, 4, 4], axes_lens=[64, 16, 16]),
    note="lists of samples in and out; sequences are padded to multiples of 32",
)
def z_image(draw: Draw) -> Inputs:
    captions = zip(draw.normals(7, 20), draw.lengths(7).tolist(), strict=True)
    return {
        "x": draw.normals(6, 1, 8, 12),
        "t": draw.fractions(),
        "cap_feats": [caption[:length] for caption, length in captions],
    }


@entry(
    "QwenImage21Transformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, in_channels=12, out_channels=12),
    config(context_in_dim=20, axes_dims_rope=(4, 6, 6)),
    note="one causal sequence of text, a condition image and the target; its layout is that of the first sample",
)
def qwen_image21(draw: Draw) -> Inputs:
    num_text, condition_slot, target_slots = 7, 2, 6
    image_slots = torch.zeros(draw.batch, num_text + target_slots, dtype=torch.bool)
    image_slots[:, condition_slot] = True
    image_slots[:, num_text:] = True
    return {
        "hidden_states": draw.normal(28, 12),
        "encoder_hidden_states": draw.normal(num_text, 20),
        "timestep": draw.fractions(),
        "img_shapes": [[(1, 2, 2), (1, 4, 6)]] * draw.batch,
        "img_mask": image_slots,
        "encoder_hidden_states_mask": draw.mask(num_text),
    }


@entry(
    "Ideogram4Transformer2DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, in_channels=12, intermediate_size=72),
    config(adaln_dim=18, llm_features_dim=20, mrope_section=(3, 3, 2)),
    note="one sequence of left-padded text and image; padding is a segment of its own",
)
def ideogram4(draw: Draw) -> Inputs:
    num_text, num_image, pad_segment, image_role, text_role, image_offset = 7, 24, -1, 2, 3, 65536
    text_index = torch.arange(num_text) - (num_text - draw.lengths(num_text)[:, None])
    is_text = _with_image(text_index >= 0, num_image)
    image_positions = (grid(1, 4, 6) + image_offset).expand(draw.batch, -1, -1)
    indicator = torch.full((draw.batch, num_text + num_image), image_role)
    indicator[:, :num_text] = (text_index >= 0) * text_role
    return {
        "hidden_states": draw.normal(num_text + num_image, 12),
        "timestep": draw.fractions(),
        "encoder_hidden_states": draw.normal(num_text + num_image, 20),
        "position_ids": torch.cat([text_index.clamp(min=0)[..., None].expand(-1, -1, 3), image_positions], dim=1),
        "segment_ids": torch.where(is_text, 1, pad_segment),
        "indicator": indicator,
    }


@entry(
    "UniDiffuserModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=6, sample_size=10, patch_size=2, in_channels=6),
    config(out_channels=6, text_dim=20, clip_img_dim=18, num_text_tokens=7, use_data_type_embedding=True),
    note="long skips; text and image are denoised together, each with its own timestep, which are tokens",
)
def uni_diffuser(draw: Draw) -> Inputs:
    return {
        "latent_image_embeds": draw.normal(6, 10, 10),
        "image_embeds": draw.normal(1, 18),
        "prompt_embeds": draw.normal(7, 20),
        "timestep_img": draw.steps(),
        "timestep_text": draw.steps(),
        "data_type": 1,
    }


def _with_image(text_mask: Tensor, num_image_tokens: int) -> Tensor:
    """``text_mask`` (B, T) followed by valid image tokens: (B, T + N)."""
    return torch.cat([text_mask, text_mask.new_ones(len(text_mask), num_image_tokens)], dim=1)


def _text_ids(num_tokens: int) -> Tensor:
    """Rotary ids of text tokens, float32 (T, 3): their index as row and column."""
    index = torch.arange(num_tokens).float()
    return torch.stack([torch.zeros(num_tokens), index, index], dim=1)


def _last_axis_ids(num_tokens: int) -> Tensor:
    """Rotary ids of text tokens, float32 (T, 4): their index in the last column."""
    return grid(1, 1, 1, num_tokens).float()
