"""Where the package's own tensors are made, whatever device or dtype the user has made the default one.

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
