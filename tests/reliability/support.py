"""What the reliability tests share: how many cases a profile runs, and models transformed once per set of options."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import Shape, TinyDiT, original, tiny_inputs
from torch import Tensor

import diffcr_compile
from diffcr_compile import DiffCRConfig

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def cases(quick: int, nightly: int) -> int:
    """How many cases to run: few in CI, many with ``HYPOTHESIS_PROFILE=nightly``."""
    return nightly if NIGHTLY else quick


@functools.cache
def _transformed(shape: Shape, options: tuple[tuple[str, Any], ...]) -> TinyDiT:
    config = DiffCRConfig(**{"num_regions": 4, **dict(options)})
    return diffcr_compile.transform(original(shape), config, example_inputs=tiny_inputs(shape))


def transformed(shape: Shape, dtype: torch.dtype = torch.float32, **options: Any) -> TinyDiT:
    """A copy of a model that was transformed once with these options of ``DiffCRConfig``."""
    return copy.deepcopy(_transformed(shape, tuple(sorted(options.items())))).to(dtype)


def randomise_routers(model: TinyDiT, seed: int = 0) -> TinyDiT:
    """The model with routers drawn from ``seed``, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            weight = block.diffcr_router.weight
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def routed_like(source: TinyDiT, plain: TinyDiT, folder: Path) -> TinyDiT:
    """``plain`` routed as ``source`` is, by the artefact of ``source``: nothing of ``source`` itself is in the result."""
    diffcr_compile.save(source, folder)
    return diffcr_compile.load(plain, folder)


def sample(model: Callable[..., Tensor], shape: Shape, steps: tuple[float, ...], **options: Any) -> list[Tensor]:
    """Outputs along a trajectory, without gradients; the tokens change a little from step to step."""
    outputs = []
    with torch.no_grad():
        for step in steps:
            inputs = tiny_inputs(shape, timestep=step, **options)
            inputs["x"] = inputs["x"] * (1 + step / 1000)
            outputs.append(model(**inputs))
    return outputs
