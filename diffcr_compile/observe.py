"""Watch a model: what its denoiser is fed (``record``), and which tokens its blocks keep (``trace``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Path, bind_arguments, map_leaves, positional_names
from .routed import routing_of, settle


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Collect what ``model`` is called with inside: a list of keyword dictionaries, detached copies on the CPU.

    Works on plain and on transformed models; runs eagerly. The list is what ``calibrate`` takes as batches.
    """
    batches: list[dict[str, Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is model:
            batches.append(map_leaves(_to_cpu, bind_arguments(positional_names(type(model).forward), args, kwargs)))

    with _eagerly(model):
        handle = model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        try:
            yield batches
        finally:
            handle.remove()


@dataclass
class Trace:
    """kept: by block name, one int64 CPU tensor (B, K) per call, the kept tokens' positions in rising order."""

    kept: dict[str, list[Tensor]] = field(default_factory=dict)


@contextlib.contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Collect which tokens each block keeps inside; runs eagerly. A dense call keeps all N, a skipped block none.

    Raises NotTransformedError; CaptureError where the blocks have not been looked for yet.
    """
    state = settle(model)
    seen = Trace({block.fqn: [] for block in state.blocks})

    def observe(fqn: str, kept: Tensor) -> None:
        seen.kept[fqn].append(kept.detach().cpu())

    with _eagerly(model):
        state.observers.append(observe)
        try:
            yield seen
        finally:
            state.observers.remove(observe)


@contextlib.contextmanager
def _eagerly(model: nn.Module) -> Iterator[None]:
    """Without what ``lower`` put in place, for the time being."""
    state = routing_of(model)
    lowered = None if state is None else state.lowered
    if lowered is not None:
        lowered.remove(model)
    with torch.compiler.set_stance("force_eager"):
        try:
            yield
        finally:
            if lowered is not None:
                lowered.install(model)


def _to_cpu(_: Path, leaf: Any) -> Any:
    return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf
