"""Routed, quantised by torchao and cached by diffusers, one on top of the other.

    python examples/07_quantise_and_cache.py

The order: transform and calibrate first, then `quantize_`, then the cache. The model is tiny and has random weights.
"""

import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models import WanTransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import diffcr_compile
from diffcr_compile import DiffCRConfig

BUDGET, STEPS, THRESHOLD = 0.7, 16, 0.1


@torch.no_grad()
def sample(model: WanTransformer3DModel, seed: int) -> Tensor:
    """(2, 4, 2, 16, 16) latents: two videos of two frames."""
    generator = torch.Generator().manual_seed(seed)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 2, 16, 16), (2, 8, 32)))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps:
        with model.cache_context("cond"):
            noise = model(
                hidden_states=latents,
                encoder_hidden_states=text,
                timestep=timestep.expand(2),
                return_dict=False,
            )[0]
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return latents


def show(name: str, model: WanTransformer3DModel, dense: Tensor) -> None:
    """Distance from the dense latents, and how many of all block calls ran."""
    with diffcr_compile.trace(model) as seen:
        latents = sample(model, seed=0)
    calls = sum(len(kept) for kept in seen.kept.values())
    distance = (latents - dense).square().mean() / dense.square().mean()
    print(f"{name:32} distance from dense {distance:.1e}, block calls {calls} of {len(seen.kept) * STEPS}")


def main() -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4, "in_channels": 4, "out_channels": 4}
    model = WanTransformer3DModel(text_dim=32, freq_dim=32, ffn_dim=128, rope_max_seq_len=32, **sizes).eval()
    with diffcr_compile.record(model) as batches:
        sample(model, seed=1)
    dense = sample(model, seed=0)
    # Keys and values from kept tokens: a block's own code runs then, whatever its weights become later.
    diffcr_compile.transform(model, DiffCRConfig(skip="reuse", context="kept"), example_inputs=batches[0])
    report = diffcr_compile.calibrate(model, batches, budget=BUDGET)
    print(f"share of the dense FLOPs: {report.share:.4f} (budget {BUDGET})")
    show("routed", model, dense)
    quantize_(model, Int8WeightOnlyConfig())  # the routers are vectors and stay as they are
    show("routed, int8 weights", model, dense)
    model.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))  # what apply_first_block_cache does
    show("routed, int8 weights, cached", model, dense)


if __name__ == "__main__":
    main()
