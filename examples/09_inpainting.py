"""Inpainting: calibrate with a loss of one's own, whose batches hold more than the model takes.

    python examples/09_inpainting.py

The denoiser sees [noisy picture, mask, picture without what is masked] as three channels and predicts the picture. It is trained
here for some seconds, so that there is something to lose. Errors inside and outside the mask are printed apart.
"""

from typing import Any

import digits
import torch
from diffusers.models import DiTTransformer2DModel
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CalibrationConfig

BUDGET, TRAINING_STEPS, STEPS, INSIDE_WEIGHT = 0.75, 60, 16, 4.0
REGIONS = (125, 375, 625, 875)  # a batch of one timestep runs in one piece


def draw(timestep: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What the model takes, and beside it ``picture`` and ``mask``, each (8, 1, 32, 32)."""
    picture, labels = digits.pictures(8, generator)
    mask = torch.zeros_like(picture)
    for one, (top, left) in zip(mask, torch.randint(16, (8, 2), generator=generator).tolist(), strict=True):
        one[:, top : top + 16, left : left + 16] = 1
    noise = torch.randn(picture.shape, generator=generator)
    timesteps = torch.full((8,), timestep)
    noisy = digits.build_scheduler().add_noise(picture, noise, timesteps)
    inputs = torch.cat([noisy, mask, picture * (1 - mask)], dim=1)
    return {"hidden_states": inputs, "timestep": timesteps, "class_labels": labels, "picture": picture, "mask": mask}


def errors(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean squared errors inside and outside the mask."""
    taken = {name: batch[name] for name in ("hidden_states", "timestep", "class_labels")}
    squares, mask = (model(**taken).sample - batch["picture"]).square(), batch["mask"]
    return (squares * mask).sum() / mask.sum(), (squares * (1 - mask)).sum() / (1 - mask).sum()


def inpainting_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inside, outside = errors(model, batch)
    return INSIDE_WEIGHT * inside + outside


@torch.no_grad()
def show(name: str, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    inside, outside = torch.tensor([errors(model, batch) for batch in batches]).mean(dim=0).tolist()
    print(f"{name:10} error inside the mask {inside:.4f}, outside {outside:.4f}")


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4, "sample_size": 32, "patch_size": 4}
    model = DiTTransformer2DModel(in_channels=3, out_channels=1, num_embeds_ada_norm=10, norm_num_groups=1, **sizes)
    model.eval()  # in training mode a DiT drops labels at random
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(TRAINING_STEPS):
        inpainting_loss(model, draw(REGIONS[step % 4], generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    batches = [draw(timestep, generator) for timestep in REGIONS * 3]
    held_out = [draw(timestep, generator) for timestep in REGIONS * 2]
    show("dense", model, held_out)

    diffcr_compile.transform(model, example_inputs={name: batches[0][name] for name in list(batches[0])[:3]})
    config = CalibrationConfig(steps=STEPS, learning_rate=5e-4)
    report = diffcr_compile.calibrate(model, batches, budget=BUDGET, loss=inpainting_loss, config=config)
    print(f"share of the dense FLOPs: {report.share:.4f} (budget {BUDGET})")
    show("calibrated", model, held_out)


if __name__ == "__main__":
    main()
