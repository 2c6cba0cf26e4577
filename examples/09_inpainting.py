"""Inpainting: calibrate with a loss of one's own, whose batches hold more than the model takes.

    python examples/09_inpainting.py

The denoiser sees [noisy picture, mask, picture without what is masked] as three channels. What is hidden counts four times as much
as the rest; the errors of both are printed apart.
"""

from typing import Any

import inpainting
import torch
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CalibrationConfig

BUDGET, STEPS, INSIDE_WEIGHT = 0.75, 16, 4.0
REGIONS = (125, 375, 625, 875)  # a batch of one timestep runs in one piece
TAKEN = ("hidden_states", "timestep", "class_labels")


def draw(timestep: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What the model takes, and beside it ``velocity`` and ``mask``, each (8, 1, 32, 32)."""
    hidden = inpainting.draw(8, generator)
    batch = inpainting.noised(hidden, generator, torch.full((8,), timestep), targets=True)
    return {**batch, "mask": hidden.masks}


def errors(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean squared errors of the velocity inside and outside the mask."""
    squares, mask = (model(**taken(batch)).sample - batch["velocity"]).square(), batch["mask"]
    return (squares * mask).sum() / mask.sum(), (squares * (1 - mask)).sum() / (1 - mask).sum()


def taken(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in TAKEN}


def inpainting_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inside, outside = errors(model, batch)
    return INSIDE_WEIGHT * inside + outside


@torch.no_grad()
def show(name: str, model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    inside, outside = torch.tensor([errors(model, batch) for batch in batches]).mean(dim=0).tolist()
    print(f"{name:10} error inside the mask {inside:.4f}, outside {outside:.4f}")


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    model = inpainting.load_model()
    batches = [draw(timestep, generator) for timestep in REGIONS * 3]
    held_out = [draw(timestep, generator) for timestep in REGIONS * 2]
    show("dense", model, held_out)

    diffcr_compile.transform(model, example_inputs=taken(batches[0]))
    config = CalibrationConfig(steps=STEPS)
    report = diffcr_compile.calibrate(model, batches, budget=BUDGET, loss=inpainting_loss, config=config)
    print(f"share of the dense FLOPs: {report.share:.4f} (budget {BUDGET})")
    show("calibrated", model, held_out)


if __name__ == "__main__":
    main()
