"""Calibrate the transformer of a diffusers pipeline on one recorded run, and run the pipeline with it.

    python examples/02_pipeline.py

The pipeline is FLUX's, tiny and with random weights, and its prompt embeddings are given, so that nothing is downloaded. Of a
real one, only ``build_pipeline`` and the embeddings differ: FluxPipeline.from_pretrained(...), and pipe("a lighthouse at dusk").
"""

import numpy as np
import torch
from diffusers.models import AutoencoderKL, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

import diffcr_compile
from diffcr_compile import DiffCRConfig

BUDGET = 0.7
PIXELS = 64


def build_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, shift_factor=0.0)
    vae.register_to_config(scaling_factor=1.0)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: FluxPipeline, seed: int) -> np.ndarray:
    """One picture (height, width, 3) in [0, 1]."""
    prompt = {
        "prompt_embeds": torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(7)),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=torch.Generator().manual_seed(8)),
    }
    result = pipe(
        **prompt,
        height=PIXELS,
        width=PIXELS,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return result.images[0]


def main() -> None:
    pipe = build_pipeline()
    dense = generate(pipe, seed=0)
    with diffcr_compile.record(pipe.transformer) as batches:
        generate(pipe, seed=1)
    config = DiffCRConfig(skip="reuse")  # keys and values of all tokens, those of skipped ones too
    diffcr_compile.transform(pipe.transformer, config, example_inputs=batches[0])
    report = diffcr_compile.calibrate(pipe.transformer, batches, budget=BUDGET)
    print(report)
    picture = generate(pipe, seed=0)
    print(f"picture: {picture.shape[1]}x{picture.shape[0]} pixels, values {picture.min():.2f} to {picture.max():.2f}")
    print(f"mean squared difference from the dense picture: {np.square(picture - dense).mean():.2e}")
    print(f"share of the dense FLOPs: {report.share:.4f} (budget {BUDGET})")


if __name__ == "__main__":
    main()
