"""What every entry of the zoo is made of: the registry, models built by class name, and common forms of input."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision_operators
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Inputs = dict[str, Any]
_TORCHVISION = torchvision_operators.define()


@dataclass(frozen=True)
class Entry:
    """One tiny denoiser.

    ``build()`` constructs the model in eval mode, float32, on the CPU; its weights come from the global generator,
    which the caller seeds. It raises ``ImportError`` where the installed diffusers lacks the class. ``inputs(batch)``
    returns keyword arguments of ``model.forward`` for ``batch`` samples that differ, the same ones at every call.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    note: str = ""


MakeInputs = Callable[["Draw"], Inputs]
ZOO: dict[str, Entry] = {}


def config(**arguments: Any) -> dict[str, Any]:
    """A group of constructor arguments for ``entry``."""
    return arguments


def entry(name: str, *groups: dict[str, Any], note: str = "") -> Callable[[MakeInputs], MakeInputs]:
    """Register the decorated input function under the diffusers class ``name``, built from ``groups`` of arguments."""

    def register(make_inputs: MakeInputs) -> MakeInputs:
        arguments = {key: value for group in groups for key, value in group.items()}
        ZOO[name] = Entry(name, partial(_build, name, arguments), lambda batch: make_inputs(Draw(batch)), note)
        return make_inputs

    return register


class _BlankEmpty(TorchFunctionMode):
    """Fill new floating-point tensors of ``torch.empty`` with NaN, so that uninitialised parameters can be seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.fill_(math.nan) if func is torch.empty and out.is_floating_point() else out


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Construct ``name``; parameters left zero or uninitialised become small noise, so that no path is silent."""
    with _BlankEmpty():
        model = _find_class(name)(**arguments).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(std=0.1)
    return model


def _find_class(name: str) -> type[nn.Module]:
    for module in ("diffusers", "diffusers.models.transformers"):
        found: type[nn.Module] | None = getattr(importlib.import_module(module), name, None)
        if found is not None:
            return found
    raise ImportError(f"the installed diffusers has no class {name}")


class Draw:
    """Seeded values for the inputs of ``batch`` samples; all of them have the batch axis B first."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.generator = torch.Generator().manual_seed(batch)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values, float32 ``(B, *shape)``."""
        return torch.randn(self.batch, *shape, generator=self.generator)

    def normals(self, *shape: int) -> list[Tensor]:
        """One standard normal tensor per sample, without batch axis: B times ``shape``."""
        return list(self.normal(*shape))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in ``[0, high)``, int64 ``(B, *shape)``."""
        return torch.randint(high, (self.batch, *shape), generator=self.generator)

    def steps(self, *shape: int) -> Tensor:
        """Timesteps in ``[1, 1000)``, int64 ``(B,)``, no two alike; with ``shape``, repeated to ``(B, *shape)``."""
        values = torch.randperm(998, generator=self.generator)[: self.batch] + 1
        return values.reshape(self.batch, *[1] * len(shape)).expand(self.batch, *shape).clone()

    def fractions(self, *shape: int) -> Tensor:
        """Timesteps in ``(0, 1)``, float32, otherwise like ``steps``."""
        return self.steps(*shape) / 1000

    def mask(self, length: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """Right-padded mask ``(B, length)``, true where valid; samples lack one, no, two tokens in turn."""
        return (torch.arange(length) < self.lengths(length)[:, None]).to(dtype)

    def lengths(self, length: int) -> Tensor:
        """Valid lengths, int64 ``(B,)``: ``length`` less one, none, two in turn."""
        return length - torch.tensor([1, 0, 2])[torch.arange(self.batch) % 3]

    def constant(self, *values: float) -> Tensor:
        """The same values for each sample, float32 ``(B, len(values))``."""
        return torch.tensor(values, dtype=torch.float32).expand(self.batch, -1).clone()

    def guidance(self, low: float = 1.0, high: float = 6.0) -> Tensor:
        """Guidance scales, float32 ``(B,)``."""
        return low + (high - low) * torch.rand(self.batch, generator=self.generator)


def grid(*sizes: int) -> Tensor:
    """Positions of a grid's cells in row-major order, int64 ``(prod(sizes), len(sizes))``."""
    return torch.cartesian_prod(*[torch.arange(size) for size in sizes]).reshape(-1, len(sizes))


def image_ids(height: int, width: int, columns: int = 3) -> Tensor:
    """Rotary ids of image tokens, float32 ``(height * width, columns)``: row and column in the columns 1 and 2."""
    ids = torch.zeros(height * width, columns)
    ids[:, 1:3] = grid(height, width).float()
    return ids


def rotary(positions: Tensor, dims: Sequence[int], theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines, float32 ``(N, sum(dims))`` each, of ``positions`` ``(N, len(dims))``; interleaved."""
    angles = [
        positions[:, axis, None].float() * theta ** -(torch.arange(0, dim, 2) / dim) for axis, dim in enumerate(dims)
    ]
    table = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return table.cos(), table.sin()
