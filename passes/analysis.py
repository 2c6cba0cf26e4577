"""The data that flows through the passes, and the runner that owns order, timing, logging and before/after text.

A pass is a plain function ``(state) -> state`` named verb + object; it looks and returns new frozen data, and none before
the last changes the model. A pass on a block says "this one stays dense" by raising :class:`Refused`.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..arguments import Path
from ..config import DiffCRConfig
from ..context import ContextGraph
from ..plan import BlockPlan, Refusal, Site, TimestepPlan

log = logging.getLogger("diffcr_compile")


class Refused(Exception):
    """Raised by a pass on a block: it stays dense, for the reason given. Kept as data, never shown to a user as an error."""


class NotJoined(Refused):
    """Refused for want of an input that an output is joined to; its caller may join them."""


class TensorInfo:
    """A tensor as it was seen in a call: a leaf, and so no dataclass. ``value``: its values, kept for integers and booleans where
    they are known."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, value: torch.Tensor | None = None) -> None:
        self.shape, self.dtype, self.value = shape, dtype, value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorInfo) and (self.shape, self.dtype) == (other.shape, other.dtype)

    def __hash__(self) -> int:
        return hash((self.shape, self.dtype))

    def __repr__(self) -> str:
        return f"{self.dtype} {self.shape}"


def describe(leaf: Any) -> Any:
    """A leaf of a call as it is kept: tensors by their :class:`TensorInfo`, with values where they may index."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    indexes = not (leaf.dtype.is_floating_point or leaf.dtype.is_complex)
    has_values = not leaf.is_meta and not isinstance(leaf, FakeTensor)
    return TensorInfo(tuple(leaf.shape), leaf.dtype, leaf if indexes and has_values else None)


@dataclass(frozen=True)
class Call:
    """One call of one module: its bound arguments and its output, with a :class:`TensorInfo` for each tensor.

    in_order: how many calls ended before it. attends: whether it multiplied activations with activations, as attention does.
    num_operators: how many operators it ran. writes: whether it put other leaves into the lists and dictionaries it was given.
    """

    fqn: str
    arguments: dict[str, Any]
    output: Any
    in_order: int
    attends: bool = True
    num_operators: int = 0
    writes: bool = False


@dataclass(frozen=True)
class ModelAnalysis:
    """What is known of a model so far; each pass fills in its part. batch_axes: of every module, the axes of its first call's
    tensors that one more sample makes longer. nested: modules that are called with nested tensors where nobody watches."""

    model: nn.Module
    config: DiffCRConfig
    inputs: dict[str, Any]
    filter_fn: Callable[[nn.Module, str], bool]
    calls: dict[str, tuple[Call, ...]] = field(default_factory=dict)
    batch_axes: dict[str, dict[Path, int]] = field(default_factory=dict)
    nested: frozenset[str] = frozenset()
    module_flops: dict[str, int] = field(default_factory=dict)
    timestep: TimestepPlan | None = None
    timestep_note: str = ""
    timestep_reach: tuple[tuple[Path, float | None], ...] = ()
    input_batch_axes: dict[Path, int] = field(default_factory=dict)
    output_batch_axes: tuple[int, ...] = ()
    families: tuple[BlockPlan, ...] = ()
    context_graphs: tuple[ContextGraph | None, ...] = ()
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()


State = TypeVar("State")


def release_memory() -> None:
    """Give back to the system what has been freed, which the C library would keep beside what large passes leave behind."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def run_passes(passes: Sequence[Callable[[State], State]], state: State) -> State:
    """Run ``passes`` in order. Logs (logger ``diffcr_compile``) each one's number, name and seconds; at debug level the
    state before and after, where it changed. An exception names the pass it came from."""
    for number, step in enumerate(passes, start=1):
        start, before = time.perf_counter(), str(state) if log.isEnabledFor(logging.DEBUG) else ""
        try:
            state = step(state)
        except Exception as error:
            error.add_note(f"raised by pass {number} of {len(passes)}, {step.__name__}")
            raise
        release_memory()
        log.info("pass %d/%d %s: %.2f s", number, len(passes), step.__name__, time.perf_counter() - start)
        if before and (after := str(state)) != before:
            log.debug("before %s:\n%s\nafter:\n%s", step.__name__, before, after)
    return state
