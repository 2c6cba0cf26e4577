"""Inpainting of handwritten digits: the denoiser of `digits.py`, shown a mask and what lies outside it beside the noisy picture.

The mask is a square of a quarter of the canvas, at a random place. Pictures, classifier and schedule are those of `digits.py`;
`train_inpainting.py` made the weights in `weights/`, from those of `digits.py`.

Shapes: B pictures (B, 1, 32, 32), values in [-1, 1], background -1; masks (B, 1, 32, 32), 1 where the picture is hidden.
"""

from pathlib import Path
from typing import NamedTuple

import digits
import torch
from diffusers.models import DiTTransformer2DModel
from digits import build_scheduler as build_scheduler
from digits import class_accuracy as class_accuracy
from digits import distance as distance
from digits import frechet_distance as frechet_distance
from digits import load_classifier as load_classifier
from digits import pictures as pictures
from safetensors.torch import load_file
from torch import Tensor, nn

MODEL_FILE = digits.WEIGHTS / "inpainting_dit.safetensors"

CANVAS_SIZE = digits.CANVAS_SIZE
NUM_CLASSES = digits.NUM_CLASSES
EMPTY = digits.EMPTY
MASK_SIZE = 16  # pixels
INPUTS = 3  # channels: noisy picture, mask, what is not masked


class Hidden(NamedTuple):
    """Pictures and masks (B, 1, 32, 32), and labels (B,): what is to be completed, and what was there."""

    pictures: Tensor
    masks: Tensor
    labels: Tensor

    @property
    def known(self) -> Tensor:
        """The two channels that stay the same while sampling: the mask, and the pictures with 0 beneath it (B, 2, 32, 32)."""
        return torch.cat([self.masks, self.pictures * (1 - self.masks)], dim=1)


def draw(num: int, generator: torch.Generator, *, train: bool = True) -> Hidden:
    """Digits, a square of each hidden."""
    images, labels = digits.pictures(num, generator, train=train)
    masks = torch.zeros_like(images)
    corners = torch.randint(CANVAS_SIZE - MASK_SIZE + 1, (num, 2), generator=generator).tolist()
    for mask, (top, left) in zip(masks, corners, strict=True):
        mask[:, top : top + MASK_SIZE, left : left + MASK_SIZE] = 1
    return Hidden(images, masks, labels)


def subjects(number: int, first: int = 0) -> tuple[Hidden, Tensor]:
    """Held-out pictures to complete, always the same, from the given one on; and their labels (B,)."""
    hidden = draw(first + number, torch.Generator().manual_seed(5), train=False)
    chosen = Hidden(*(part[first:] for part in hidden))
    return chosen, chosen.labels


def build_model() -> DiTTransformer2DModel:
    """An untrained DiT as that of `digits.py`, but for two more channels that it takes."""
    return DiTTransformer2DModel(**{**digits.build_model().config, "in_channels": INPUTS})


def load_model(path: Path = MODEL_FILE) -> DiTTransformer2DModel:
    """The trained DiT, float32, in evaluation mode."""
    model = build_model()
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def sample(
    model: nn.Module,
    hidden: Hidden,
    *,
    steps: int = 20,
    guidance: float = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Complete pictures by deterministic DDIM; outside the masks they come back as they are. As `digits.sample` else."""

    def denoise(hidden_states: Tensor, **inputs: Tensor) -> tuple[Tensor]:
        known = hidden.known.repeat(len(hidden_states) // len(hidden.labels), 1, 1, 1)
        return model(hidden_states=torch.cat([hidden_states, known], dim=1), **inputs)

    images = digits.sample(
        denoise,  # type: ignore[arg-type]
        hidden.labels,
        steps=steps,
        guidance=guidance,
        noise=noise,
        generator=generator,
    )
    return torch.where(hidden.masks.bool(), images, hidden.pictures)


def calibration_batches(
    num_batches: int, batch_size: int, seed: int = 0, *, targets: bool = False
) -> list[dict[str, Tensor]]:
    """Keyword arguments of the denoiser's forward: training pictures, noised to uniformly random timesteps.

    Each batch holds hidden_states (B, 3, 32, 32), timestep (B,) in 0..999 and class_labels (B,) in 0..9; with targets also the
    velocity (B, 1, 32, 32) that should be predicted.
    """
    generator = torch.Generator().manual_seed(seed)
    return [noised(draw(batch_size, generator), generator, targets=targets) for _ in range(num_batches)]


def noised(
    hidden: Hidden, generator: torch.Generator, timesteps: Tensor | None = None, *, targets: bool
) -> dict[str, Tensor]:
    """One such batch, of given pictures, at given timesteps (B,) or random ones."""
    scheduler, noise = build_scheduler(), torch.randn(hidden.pictures.shape, generator=generator)
    if timesteps is None:
        timesteps = torch.randint(1000, hidden.labels.shape, generator=generator)
    noisy = scheduler.add_noise(hidden.pictures, noise, timesteps)  # type: ignore[arg-type]
    batch = {
        "hidden_states": torch.cat([noisy, hidden.known], dim=1),
        "timestep": timesteps,
        "class_labels": hidden.labels,
    }
    if targets:
        batch["velocity"] = scheduler.get_velocity(hidden.pictures, noise, timesteps)  # type: ignore[arg-type]
    return batch


def errors(images: Tensor, hidden: Hidden) -> tuple[float, float]:
    """Mean squared errors of completed pictures (B, 1, 32, 32), or of what else should equal the hidden ones: inside the masks and
    outside."""
    squares = (images - hidden.pictures).square()
    inside, outside = hidden.masks, 1 - hidden.masks
    return ((squares * inside).sum() / inside.sum()).item(), ((squares * outside).sum() / outside.sum()).item()
