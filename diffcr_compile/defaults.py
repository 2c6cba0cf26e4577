"""Where the package's own tensors are made and its proofs run, whatever device, dtype or autocast the user has put around it.

Constructors name their device and dtype; inside :func:`on_cpu` code that names none makes its tensors on the CPU. The default dtype
belongs to the whole process, and is left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, in this thread, the CPU is the default device. Where it is anyway nothing is entered: under the mode that torch sets
    a device by, its own layers run unfused."""
    with contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, in this thread, operators take the dtypes that they are given: a proof in float32 under an autocast would tell
    rounding from nothing, and a graph traced under it holds its casts."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Inside, as :func:`on_cpu` and :func:`without_autocast`: where proofs run."""
    with on_cpu(), without_autocast():
        yield


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast around this casts to on a type of device, None without."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextlib.contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Inside, in this thread, autocast keeps no casts of weights: it would until its outermost context ends, whatever becomes of
    the weights meanwhile, and those under fake tensors would be taken for real afterwards."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
