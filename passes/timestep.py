"""Find the timestep input by dataflow: the model input that reaches the sine or cosine of an embedding.

The constant that the input is multiplied by on its way (1000 where a model takes 0..1) gives its range in training.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..arguments import Path, iterate_leaves
from ..errors import CaptureError
from ..plan import TimestepPlan
from .analysis import ModelAnalysis

TRAINING_STEPS = 1000.0
"""Timesteps at which sinusoidal embeddings are evaluated in training run over 0..1000 (DDPM, and all that followed)."""

_aten = torch.ops.aten
_SINUSOIDS = {_aten.sin.default, _aten.cos.default}
_PRODUCTS = {_aten.mul.Tensor: 1, _aten.mul.Scalar: 1, _aten.div.Tensor: -1, _aten.div.Scalar: -1}
_MOVES = {
    "_to_copy", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "clone", "slice", "select", "detach",
    "alias", "repeat", "flatten", "permute", "transpose", "t", "cat", "lift_fresh", "copy_", "index", "repeat_interleave",
}  # fmt: skip
_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level", "noise_labels")

Origins = dict[Path, float | None]
"""Inputs that a tensor was made from, each with the constant it was multiplied by (None: something else happened to it)."""


class SinusoidTracker(TorchDispatchMode):
    """Follows the inputs of a run; ``reached``: those that met a sine or cosine, with their constant; counts its operators."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.reached: Origins = {}
        self.num_operators = 0
        self._by_id: dict[int, tuple[weakref.ref[Tensor], Origins]] = {}

    @contextlib.contextmanager
    def track(self, leaves: dict[Path, Any]) -> Iterator[None]:
        """Run the body with ``leaves`` (path -> value) as the inputs to follow."""
        for path, leaf in leaves.items():
            if isinstance(leaf, Tensor) and leaf.ndim <= 2:
                self._set(leaf, {path: 1.0})
        with self:
            yield

    def _set(self, tensor: Tensor, origins: Origins) -> None:
        self._by_id[id(tensor)] = (weakref.ref(tensor), origins)

    def _get(self, tensor: Tensor) -> Origins:
        reference, origins = self._by_id.get(id(tensor), (None, {}))
        return origins if reference is not None and reference() is tensor else {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operators += 1
        output = func(*args, **(kwargs or {}))
        origins: Origins = {}
        for _, leaf in iterate_leaves([args, kwargs or {}]):
            if isinstance(leaf, Tensor):
                for path, scale in self._get(leaf).items():
                    origins[path] = scale if origins.get(path, scale) == scale else None
        if origins:
            if func in _SINUSOIDS:
                for path, scale in origins.items():
                    self.reached.setdefault(path, scale)
            origins = {path: _rescale(func, args, scale) for path, scale in origins.items()}
            for _, leaf in iterate_leaves(output):
                if isinstance(leaf, Tensor):
                    self._set(leaf, origins)
        return output


def _rescale(func: Any, args: Any, scale: float | None) -> float | None:
    """The constant after one more operator. A product with a table of frequencies leaves it: the table starts at one."""
    if scale is None:
        return None
    if func in _PRODUCTS:
        factors = [float(argument) for argument in args if isinstance(argument, int | float)]
        return scale * factors[0] ** _PRODUCTS[func] if factors else scale
    packet = getattr(func, "overloadpacket", func)
    return scale if getattr(packet, "__name__", "") in _MOVES else None


def find_timestep(analysis: ModelAnalysis) -> ModelAnalysis:
    """Fill in ``timestep`` and ``timestep_note``.

    Candidates have one value for all, one per sample, or one per token of each sample. Where several are left (a guidance
    scale is embedded like a timestep), a telling name decides, then the order of the inputs.
    """
    config = analysis.config
    reached = dict(analysis.timestep_reach)
    if config.timestep_argument is not None:
        path: Path = (config.timestep_argument,)
        if config.timestep_argument not in analysis.inputs:
            raise CaptureError(
                f"timestep_argument names {config.timestep_argument!r}, which is not among the inputs the model was run "
                f"with: {', '.join(analysis.inputs)}."
            )
    else:
        leaves = dict(iterate_leaves(analysis.inputs))
        candidates = [path for path in reached if _is_timestep_like(leaves[path], path in analysis.input_batch_axes)]
        if not candidates:
            return replace(
                analysis, timestep_note="no input reaches a sinusoidal embedding: one ratio per block for all timesteps"
            )
        path = min(candidates, key=_name_rank)
    if len(path) > 1:
        return replace(
            analysis, timestep_note=f"timestep input {path} is nested: one ratio per block for all timesteps"
        )
    scale = reached.get(path)
    if config.timestep_range is not None:
        low, high = config.timestep_range
    elif scale:
        low, high = 0.0, TRAINING_STEPS / scale
    else:
        note = f"range of timestep input {path[0]!r} unknown (name it: DiffCRConfig(timestep_range=...)): one ratio per block"
        return replace(analysis, timestep_note=note)
    plan = TimestepPlan(str(path[0]), low, high)
    return replace(analysis, timestep=plan, timestep_note=f"timestep input {path[0]!r}, {low:g}..{high:g}")


def _is_timestep_like(leaf: Tensor, has_batch_axis: bool) -> bool:
    if leaf.dtype.is_complex or leaf.dtype == torch.bool:
        return False
    return leaf.numel() == 1 or has_batch_axis


def _name_rank(path: Path) -> tuple[int, int]:
    name = str(path[-1])
    named = next((rank for rank, hint in enumerate(_NAMES) if name == hint), len(_NAMES))
    return named, len(path)
