"""Tiny denoisers of audio and of molecules."""

from __future__ import annotations

import torch
from zoo_base import Draw, Inputs, config, entry, rotary


@entry(
    "StableAudioDiTModel",
    config(num_attention_heads=4, attention_head_dim=16, num_key_value_attention_heads=2, num_layers=3, sample_size=24),
    config(in_channels=6, out_channels=6, cross_attention_dim=32, time_proj_dim=18, global_states_input_dim=22),
    config(cross_attention_input_dim=20),
)
def stable_audio(draw: Draw) -> Inputs:
    cos, sin = rotary(torch.arange(25)[:, None], (8,))
    return {
        "hidden_states": draw.normal(6, 24),
        "timestep": draw.fractions(),
        "encoder_hidden_states": draw.normal(7, 20),
        "global_hidden_states": draw.normal(1, 22),
        "rotary_embedding": (cos, sin),
    }


@entry(
    "StableAudio3DiTModel",
    config(io_channels=6, embed_dim=64, depth=3, num_heads=4, cond_token_dim=20, global_cond_dim=22),
    config(local_add_cond_dim=10, timestep_features_dim=18, num_memory_tokens=5),
    note="memory tokens stand before the sequence",
)
def stable_audio3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 24),
        "timestep": draw.fractions(),
        "encoder_hidden_states": draw.normal(7, 20),
        "global_hidden_states": draw.normal(22),
        "encoder_attention_mask": draw.mask(7),
        "local_add_cond": draw.normal(10, 24),
    }


@entry(
    "AceStepTransformer1DModel",
    config(hidden_size=64, intermediate_size=72, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2),
    config(head_dim=16, in_channels=18, audio_acoustic_hidden_dim=6, encoder_hidden_size=20, sliding_window=5),
    note="sliding-window and full attention in turn; the mask is made from the length",
)
def ace_step(draw: Draw) -> Inputs:
    timestep = draw.fractions()
    return {
        "hidden_states": draw.normal(48, 6),
        "timestep": timestep,
        "timestep_r": timestep,
        "encoder_hidden_states": draw.normal(7, 20),
        "context_latents": draw.normal(48, 12),
    }


@entry(
    "LongCatAudioDiTTransformer",
    config(dit_dim=64, dit_depth=3, dit_heads=4, dit_text_dim=20, latent_dim=6),
)
def longcat_audio(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(24, 6),
        "encoder_hidden_states": draw.normal(7, 20),
        "encoder_attention_mask": draw.mask(7),
        "timestep": draw.fractions(),
        "attention_mask": draw.mask(24),
        "latent_cond": draw.normal(24, 6),
    }


@entry(
    "MiniMaxMusic3Transformer1DModel",
    config(in_channels=6, condition_dim=20, num_layers=3, num_attention_heads=4, attention_head_dim=16),
    config(ff_inner_dim=72, rotary_dim=8, fourier_embedding_dim=18),
    note="the timestep is a token",
)
def minimax_music3(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw.normal(6, 24),
        "timestep": draw.fractions(),
        "encoder_hidden_states": draw.normal(24, 20),
    }


@entry(
    "T5FilmDecoder",
    config(input_dims=6, targets_length=24, d_model=64, num_layers=3, num_heads=4, d_kv=16, d_ff=72),
)
def t5_film(draw: Draw) -> Inputs:
    return {
        "encodings_and_masks": [(draw.normal(7, 64), draw.mask(7)), (draw.normal(9, 64), draw.mask(9))],
        "decoder_input_tokens": draw.normal(24, 6),
        "decoder_noise_time": draw.fractions(),
    }


@entry(
    "RFD4ProteinaTransformer",
    config(nlayers=6, token_dim=64, nheads=4, dim_cond=22, pair_repr_dim=18, latent_dim=6, token_type_emb_dim=10),
    config(t_emb_dim=16, xt_pair_dist_dim=12, tri_mult_c=8, num_sequence_classes=13, num_token_types=5),
    config(feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"), feats_pair_repr=("xt_bb_ca_pair_dists",)),
    config(feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining")),
    note="protein design: a bias for every pair of tokens, updated by triangle products between the blocks",
)
def rfd4_proteina(draw: Draw) -> Inputs:
    valid = draw.mask(17)
    time = draw.fractions()
    return {
        "bb_ca": draw.normal(17, 3),
        "local_latents": draw.normal(17, 6),
        "bb_ca_time": time,
        "local_latents_time": time**2,
        "padding_mask": valid,
        "token_type": draw.integers(5, 17),
        "conditioning": {"is_in_context_conditioning": ~valid, "supports_local_latent": valid},
    }
