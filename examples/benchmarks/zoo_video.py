"""Tiny video denoisers."""

from __future__ import annotations

import torch
from zoo_base import Draw, Inputs, config, entry, grid, rotary


@entry(
    "WanTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=3, in_channels=6, out_channels=6),
    config(text_dim=20, freq_dim=16, ffn_dim=72, rope_max_seq_len=32),
)
def wan(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 2, 6, 8),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(7, 20),
    }


@entry(
    "LTXVideoTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, in_channels=6, out_channels=6),
    config(cross_attention_dim=32, caption_channels=20),
)
def ltx(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 6),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(7),
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


@entry(
    "CogVideoXTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=3, in_channels=6, out_channels=6),
    config(text_embed_dim=20, time_embed_dim=22, max_text_seq_length=7, use_rotary_positional_embeddings=True),
    config(sample_width=8, sample_height=6, sample_frames=5),
)
def cogvideox(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(2, 6, 6, 8),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.steps(),
        "image_rotary_emb": rotary(grid(2, 3, 4), (4, 4, 4)),
    }


@entry(
    "SkyReelsV2Transformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=3, in_channels=6, out_channels=6),
    config(text_dim=20, freq_dim=16, ffn_dim=72, rope_max_seq_len=32),
    note="diffusion forcing: a timestep per frame",
)
def skyreels_v2(draw: Draw) -> Inputs:
    return wan(draw) | {
        "timestep": draw.steps(2) - torch.tensor([1, 0]),
        "enable_diffusion_forcing": True,
    }


@entry(
    "ChronoEditTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=3, in_channels=6, out_channels=6),
    config(text_dim=20, freq_dim=16, ffn_dim=72, rope_max_seq_len=32),
)
def chrono_edit(draw: Draw) -> Inputs:
    return wan(draw)


@entry(
    "WanVACETransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=6, in_channels=6, out_channels=6),
    config(text_dim=20, freq_dim=16, ffn_dim=72, rope_max_seq_len=32, vace_layers=[0, 2, 4], vace_in_channels=10),
)
def wan_vace(draw: Draw) -> Inputs:
    return wan(draw) | {"control_hidden_states": draw.normal(10, 2, 6, 8)}


@entry(
    "WanAnimateTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=6, in_channels=16, latent_channels=6),
    config(out_channels=6, text_dim=20, freq_dim=16, ffn_dim=72, image_dim=None, rope_max_seq_len=32),
    config(motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=10),
    config(motion_dim=3, motion_encoder_dim=14, face_encoder_hidden_dim=16, face_encoder_num_heads=2),
    config(inject_face_latents_blocks=2),
)
def wan_animate(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(16, 3, 4, 8),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(7, 20),
        "pose_hidden_states": draw.normal(6, 2, 4, 8),
        "face_pixel_values": draw.normal(3, 5, 16, 16),
    }


@entry(
    "WanAnimate2Transformer3DModel",
    config(dim=48, num_heads=4, num_layers=3, in_dim=10, out_dim=6, text_len=9, text_dim=20, freq_dim=16),
    config(ffn_dim=72, use_img_emb=False),
    note="the pass over the reference, which fills a cache of keys and values and ignores the timestep; the pass over "
    "the video would need a compiled flex BlockMask",
)
def wan_animate2(draw: Draw) -> Inputs:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    captions = zip(draw.normals(7, 20), draw.lengths(7).tolist(), strict=True)
    return {
        "hidden_states": draw.normals(6, 2, 6, 8),
        "timestep": draw.steps(),
        "encoder_hidden_states": [caption[:length] for caption, length in captions],
        "condition_latents": draw.normals(4, 2, 6, 8),
        "kv_cache": WanAnimate2KVCache(3),
        "kv_cache_mode": "extract",
        "seq_len": 24,
        "offset_grid_sizes": torch.tensor([[2, 3, 4]]),
    }


@entry(
    "AnyFlowTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=3, in_channels=6, out_channels=6),
    config(text_dim=20, freq_dim=16, ffn_dim=72, rope_max_seq_len=32),
    note="a timestep per frame",
)
def any_flow(draw: Draw) -> Inputs:
    timestep = draw.steps(2)
    return {
        "hidden_states": draw.normal(2, 6, 6, 8),
        "timestep": timestep,
        "r_timestep": timestep // 2,
        "encoder_hidden_states": draw.normal(7, 20),
    }


@entry(
    "AnyFlowFARTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, in_channels=6, out_channels=6),
    config(text_dim=20, freq_dim=16, ffn_dim=72, rope_max_seq_len=32, chunk_partition=(1, 1, 1), full_chunk_limit=2),
    note="flex attention with a chunk-causal BlockMask; a timestep per frame; the oldest chunk is compressed",
)
def any_flow_far(draw: Draw) -> Inputs:
    timestep = draw.steps(3)
    return {
        "hidden_states": draw.normal(3, 6, 4, 8),
        "timestep": timestep,
        "r_timestep": timestep // 2,
        "encoder_hidden_states": draw.normal(7, 20),
        "chunk_partition": [1, 1, 1],
    }


@entry(
    "HeliosTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=3, in_channels=6, out_channels=6),
    config(text_dim=20, freq_dim=16, ffn_dim=72, rope_dim=(4, 4, 4)),
    note="history frames at three resolutions stand before the frames to denoise",
)
def helios(draw: Draw) -> Inputs:
    frames = torch.arange(10).expand(draw.batch, -1)
    return wan(draw) | {
        "indices_latents_history_long": frames[:, :4],
        "indices_latents_history_mid": frames[:, 4:6],
        "indices_latents_history_short": frames[:, 6:8],
        "indices_hidden_states": frames[:, 8:],
        "latents_history_long": draw.normal(6, 4, 6, 8),
        "latents_history_mid": draw.normal(6, 2, 6, 8),
        "latents_history_short": draw.normal(6, 2, 6, 8),
    }


@entry(
    "LTX2VideoTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, in_channels=6, out_channels=6),
    config(cross_attention_dim=32, audio_in_channels=5, audio_out_channels=5, audio_num_attention_heads=2),
    config(audio_attention_head_dim=8, audio_cross_attention_dim=16, caption_channels=20),
    note="two streams, video and audio",
)
def ltx2(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 6),
        "audio_hidden_states": draw.normal(13, 5),
        "encoder_hidden_states": draw.normal(7, 20),
        "audio_encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.steps().float(),
        "encoder_attention_mask": draw.mask(7),
        "audio_encoder_attention_mask": draw.mask(7),
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "fps": 25.0,
        "audio_num_frames": 13,
    }


@entry(
    "SanaWMLTX2RefinerTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, in_channels=6, out_channels=6),
    config(cross_attention_dim=32, audio_in_channels=5, audio_out_channels=5, audio_num_attention_heads=2),
    config(audio_attention_head_dim=8, audio_cross_attention_dim=16, caption_channels=20),
    note="the audio half of its blocks exists but is not run; a timestep per token",
)
def sana_wm_refiner(draw: Draw) -> Inputs:
    cos, sin = rotary(torch.arange(24)[:, None], (32,))
    return {
        "hidden_states": draw.normal(24, 6),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.steps(24).float(),
        "video_rotary_emb": (cos.expand(draw.batch, -1, -1), sin.expand(draw.batch, -1, -1)),
        "encoder_attention_mask": draw.mask(7),
    }


@entry(
    "ConsisIDTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=6, in_channels=6, out_channels=6),
    config(text_embed_dim=20, time_embed_dim=22, max_text_seq_length=7, use_rotary_positional_embeddings=True),
    config(sample_width=8, sample_height=6, sample_frames=5, is_train_face=True, cross_attn_interval=2),
    config(cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=18, LFE_vit_dim=14, LFE_depth=5),
    config(LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=6, LFE_output_dim=32, LFE_ff_mult=2),
)
def consis_id(draw: Draw) -> Inputs:
    return cogvideox(draw) | {"id_cond": draw.normal(18), "id_vit_hidden": [draw.normal(9, 14) for _ in range(5)]}


@entry(
    "AllegroTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=3, in_channels=6, out_channels=6),
    config(cross_attention_dim=48, sample_height=6, sample_width=8, sample_frames=2, caption_channels=20),
)
def allegro(draw: Draw) -> Inputs:
    tables = [rotary(torch.arange(size)[:, None], (4,)) for size in (2, 3, 4)]
    return {
        "hidden_states": draw.normal(6, 2, 6, 8),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(7),
        "image_rotary_emb": (tuple(tables), tuple(grid(2, 3, 4).T[:, None])),
    }


@entry(
    "LatteTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, in_channels=6, out_channels=10, patch_size=2),
    config(sample_size=8, cross_attention_dim=32, caption_channels=20, video_length=5, norm_type="ada_norm_single"),
    config(attention_bias=True, norm_elementwise_affine=False),
    note="spatial and temporal blocks in turn: frames, then places, join the batch axis",
)
def latte(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 5, 6, 8),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(7, 20),
    }


@entry(
    "CosmosTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=3, in_channels=6, out_channels=6),
    config(text_embed_dim=20, adaln_lora_dim=10, max_size=(4, 16, 16)),
    note="the padding mask has no batch axis",
)
def cosmos(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 2, 6, 8),
        "timestep": draw.fractions(),
        "encoder_hidden_states": draw.normal(7, 20),
        "fps": 24,
        "padding_mask": torch.zeros(1, 1, 6, 8),
    }


@entry(
    "EasyAnimateTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=6, mmdit_layers=3, in_channels=6, out_channels=6),
    config(patch_size=2, sample_width=8, sample_height=6, time_embed_dim=22, text_embed_dim=20),
)
def easy_animate(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 2, 6, 8),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(7, 20),
    }


@entry(
    "HunyuanVideoTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, num_refiner_layers=2),
    config(in_channels=6, out_channels=6, text_embed_dim=20, pooled_projection_dim=18, rope_axes_dim=(4, 6, 6)),
)
def hunyuan_video(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 2, 6, 8),
        "timestep": draw.steps().float(),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_attention_mask": draw.mask(7),
        "pooled_projections": draw.normal(18),
        "guidance": draw.guidance() * 1000,
    }


@entry(
    "HunyuanVideo15Transformer3DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_refiner_layers=2, in_channels=13),
    config(out_channels=6, text_embed_dim=20, text_embed_2_dim=22, image_embed_dim=18, rope_axes_dim=(4, 6, 6)),
    note="asks whether the image embeddings of the whole batch are zero",
)
def hunyuan_video15(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(13, 2, 3, 4),
        "timestep": draw.steps().float(),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_attention_mask": draw.mask(7),
        "encoder_hidden_states_2": draw.normal(5, 22),
        "encoder_attention_mask_2": draw.mask(5),
        "image_embeds": draw.normal(9, 18),
    }


@entry(
    "HunyuanVideoFramepackTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=3, num_refiner_layers=2),
    config(in_channels=6, out_channels=6, text_embed_dim=20, pooled_projection_dim=22, rope_axes_dim=(4, 6, 6)),
    config(has_image_proj=True, image_proj_dim=18, has_clean_x_embedder=True),
    note="history frames at three resolutions stand before the frames to denoise; a batch of one drops padding",
)
def hunyuan_framepack(draw: Draw) -> Inputs:
    frames = torch.arange(10)
    return hunyuan_video(draw) | {
        "pooled_projections": draw.normal(22),
        "image_embeds": draw.normal(5, 18),
        "indices_latents": frames[8:],
        "latents_clean": draw.normal(6, 2, 6, 8),
        "indices_latents_clean": frames[6:8],
        "latents_history_2x": draw.normal(6, 2, 6, 8),
        "indices_latents_history_2x": frames[4:6],
        "latents_history_4x": draw.normal(6, 4, 6, 8),
        "indices_latents_history_4x": frames[:4],
    }


@entry(
    "Kandinsky5Transformer3DModel",
    config(in_visual_dim=6, out_visual_dim=6, in_text_dim=20, in_text_dim2=18, time_dim=22, model_dim=48, ff_dim=72),
    config(num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 4, 4)),
    note="channels last",
)
def kandinsky5(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(2, 6, 8, 6),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": draw.steps().float(),
        "pooled_projections": draw.normal(18),
        "visual_rope_pos": [torch.arange(size) for size in (2, 3, 4)],
        "text_rope_pos": torch.arange(7),
        "scale_factor": (1.0, 2.0, 2.0),
    }


@entry(
    "Kandinsky6Transformer3DModel",
    config(in_visual_dim=6, out_visual_dim=6, in_text_dim=20, in_text_dim2=18, time_dim=22, model_dim=48, ff_dim=72),
    config(num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 4, 4), visual_cond=False),
    config(in_audio_dim=5, out_audio_dim=5),
    note="channels last; two streams, video and audio",
)
def kandinsky6(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(2, 6, 8, 6),
        "encoder_hidden_states": draw.normal(7, 20),
        "pooled_projections": draw.normal(18),
        "timestep": draw.steps().float(),
        "audio_hidden_states": draw.normal(13, 5),
        "encoder_attention_mask": draw.mask(7),
    }


@entry(
    "Kandinsky6SRTransformer3DModel",
    config(in_visual_dim=6, out_visual_dim=10, time_dim=22, model_dim=48, ff_dim=72, num_visual_blocks=3),
    config(axes_dims=(4, 4, 4), nabla_window=(3, 3, 3)),
    note="channels last; flex attention over blocks of 64 tokens chosen from the values, so 128 tokens at least",
)
def kandinsky6_sr(draw: Draw) -> Inputs:
    return {"hidden_states": draw.normal(1, 8, 16, 13), "timestep": draw.steps().float()}


@entry(
    "MochiTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=8, num_layers=3, in_channels=6, pooled_projection_dim=18),
    config(text_embed_dim=24, time_embed_dim=22),
)
def mochi(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 2, 6, 8),
        "encoder_hidden_states": draw.normal(7, 24),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(7),
    }


@entry(
    "MotifVideoTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=16, num_layers=3, num_single_layers=6, num_decoder_layers=3),
    config(in_channels=13, out_channels=6, text_embed_dim=20, image_embed_dim=18, rope_axes_dim=(4, 6, 6)),
    config(enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
)
def motif_video(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(13, 2, 6, 8),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_attention_mask": draw.mask(7),
        "image_embeds": draw.normal(5, 18),
    }


@entry(
    "SanaVideoTransformer3DModel",
    config(num_attention_heads=4, attention_head_dim=12, num_layers=3, in_channels=6, out_channels=6, sample_size=8),
    config(num_cross_attention_heads=4, cross_attention_head_dim=12, cross_attention_dim=48, caption_channels=20),
    config(rope_max_seq_len=32),
)
def sana_video(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 2, 6, 8),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_attention_mask": draw.mask(7),
        "timestep": draw.steps(),
    }


@entry(
    "MiniMaxH3Transformer3DModel",
    config(num_attention_heads=4, attention_head_dim=16, hidden_size=48, num_layers=3, num_refiner_layers=2),
    config(ffn_dim=72, in_channels=6, audio_in_channels=5, text_dim=20, freq_dim=16, time_embed_hidden_dim=26),
    config(time_embed_dim=22, rope_freq_dim=2),
    note="one sequence of text, video and audio; its layout and its timesteps (one per modality) serve the whole batch",
)
def minimax_h3(draw: Draw) -> Inputs:
    video, text, audio = 0, 1, 2
    tags = torch.tensor([text] * 7 + [video] * 24 + [audio] * 13)
    positions = torch.cat([grid(7, 1, 1), grid(2, 3, 4) + torch.tensor([7, 0, 0]), grid(13, 1, 1) + 7])
    return {
        "hidden_states": draw.normal(24, 24),
        "audio_hidden_states": draw.normal(13, 5),
        "encoder_hidden_states": draw.normal(7, 20),
        "timestep": torch.tensor([0.3, 0.0, 0.7]),
        "timestep_indices": tags,
        "token_tags": tags,
        "position_ids": positions.float(),
        "video_indices": (tags == video).nonzero()[:, 0],
        "audio_indices": (tags == audio).nonzero()[:, 0],
        "text_indices": (tags == text).nonzero()[:, 0],
    }


@entry(
    "Cosmos3OmniTransformer",
    config(head_dim=16, hidden_size=64, intermediate_size=72, num_attention_heads=4, num_key_value_heads=2),
    config(num_hidden_layers=3, latent_channel=6, patch_latent_dim=24, vocab_size=50, rope_axes_dim=[3, 3, 2]),
    note="no batch axis: one packed sequence of text and `batch` videos, which attend to one another",
)
def cosmos3(draw: Draw) -> Inputs:
    num_text, shape, num_tokens = 7, (2, 3, 4), 24
    length = num_text + num_tokens * draw.batch
    videos = [grid(*shape) + torch.tensor([num_text + index * shape[0], 0, 0]) for index in range(draw.batch)]
    text = torch.arange(num_text)[:, None].expand(-1, 3)
    return {
        "input_ids": torch.randint(50, (num_text,), generator=draw.generator),
        "text_indexes": torch.arange(num_text),
        "position_ids": torch.cat([text, *videos]).T.contiguous(),
        "und_len": num_text,
        "sequence_length": length,
        "vision_tokens": [latents[None] for latents in draw.normals(6, 2, 6, 8)],
        "vision_token_shapes": [shape] * draw.batch,
        "vision_sequence_indexes": torch.arange(num_text, length),
        "vision_mse_loss_indexes": torch.arange(num_text, length),
        "vision_timesteps": draw.steps(num_tokens).flatten().float(),
        "vision_noisy_frame_indexes": [torch.arange(shape[0])] * draw.batch,
    }


@entry(
    "SanaWMTransformer3DModel",
    config(hidden_size=64, num_attention_heads=4, linear_head_dim=16, num_layers=6, softmax_every_n=2, in_channels=6),
    config(caption_channels=20, chunk_plucker_channels=10, chunk_plucker_post_attn_blocks=6, mlp_ratio=2.0),
    note="recurrent linear attention and softmax attention in turn; a timestep per frame; camera rays in the attention",
)
def sana_wm(draw: Draw) -> Inputs:
    pose = torch.eye(4).expand(draw.batch, 3, 4, 4).clone()
    pose[..., :3, 3] = draw.normal(3, 3)
    lens = torch.tensor([4.0, 4.0, 2.0, 1.5]).expand(draw.batch, 3, 4)
    return {
        "hidden_states": draw.normal(6, 3, 3, 4),
        "timestep": draw.steps(1, 3),
        "encoder_hidden_states": draw.normal(1, 7, 20),
        "encoder_attention_mask": draw.mask(7),
        "camera_conditions": torch.cat([pose.flatten(2), lens], dim=-1),
        "chunk_plucker": draw.normal(10, 3, 3, 4),
    }
