"""Whether code runs in Python or in a graph, and how to make it: torch's stance and its flags are the whole process's, a forward is
a thread's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_inside = 0
_stance: contextlib.AbstractContextManager[None] | None = None


def in_a_graph() -> bool:
    """Whether this thread is tracing what it runs for torch.compile or torch.export. ``torch.compiler.is_compiling`` alone says so
    too while any other thread compiles anything."""
    return torch.compiler.is_dynamo_compiling() or (
        torch.compiler.is_compiling() and torch._guards.TracingContext.try_get() is not None
    )


@contextlib.contextmanager
def force_eager() -> Iterator[None]:
    """Inside, whatever was compiled runs eagerly, in all threads; the stance that was there comes back when the last of those
    that overlap has ended, in whatever order they end."""
    global _inside, _stance
    with _lock:
        if _inside == 0:
            _stance = torch.compiler.set_stance("force_eager")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                assert _stance is not None
                _stance.__exit__(None, None, None)
