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
def as_written() -> Iterator[None]:
    """Inside, as :func:`on_cpu`, and operators take the dtypes that they are given: a proof in float32 under the user's autocast
    would tell rounding from nothing."""
    with on_cpu(), torch.autocast("cpu", enabled=False):
        yield


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
