"""Without compiled graphs for the time being: torch's stance is the whole process's, and what is watched must run in Python."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_inside = 0
_stance: contextlib.AbstractContextManager[None] | None = None


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
