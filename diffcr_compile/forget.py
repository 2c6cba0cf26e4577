"""Fake tensors that outlive a dry run: a forward may keep what it makes in a cache outside its model (a dictionary of a module's,
``functools.lru_cache``), and would take it for real the next time."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_DEPTH = 4
"""Containers within each other that are looked through for a cache."""


class _Runs(threading.local):
    """The modes of this thread's dry runs that nobody has looked after yet."""

    def __init__(self) -> None:
        self.modes: list[weakref.ref[FakeTensorMode]] = []

    def alive(self) -> list[FakeTensorMode]:
        return [mode for reference in self.modes if (mode := reference()) is not None]


_RUNS = _Runs()


def note_run(mode: FakeTensorMode) -> None:
    """Have :func:`forget_fakes` look after the fake tensors of a dry run. They keep their mode alive, and nothing else does."""
    _RUNS.modes.append(weakref.ref(mode))


def forget_fakes() -> bool:
    """Take what this thread's dry runs have left of fake tensors out of dictionaries, attributes, variables of modules and
    ``lru_cache``; whether there was any.

    Caches are emptied of it, or whole; a variable or an attribute that held it is None, as before the first call of code that makes
    its tables once. To be called when nothing of the runs themselves is left; it costs nothing where nothing else is.
    """
    # cycles of a run that has just ended are young: the whole heap is seldom looked through
    for generation in range(3):
        if _RUNS.alive():
            gc.collect(generation)
    modes = {id(mode) for mode in _RUNS.alive()}
    _RUNS.modes.clear()
    found: list[Any] = []
    if modes:
        found = [item for item in gc.get_objects() if type(item) is FakeTensor and id(item.fake_mode) in modes]
    held, left = found, bool(found)
    for _ in range(_DEPTH):
        held = _take_out(held, ours=(found, held)) if held else []
    return left


def _take_out(held: list[Any], ours: Iterable[Any]) -> list[Any]:
    """Let what refers to these objects forget them; returns the containers that are to be forgotten in their turn."""
    ids, known = {id(item) for item in held}, {id(item) for item in ours}
    containers = []
    for owner in gc.get_referrers(*held):
        if id(owner) in known:
            continue
        if isinstance(owner, functools._lru_cache_wrapper):
            owner.cache_clear()
        elif type(owner) in (tuple, list, set, frozenset):
            containers.append(owner)
        elif isinstance(owner, dict):
            _clear_entries(owner, ids)
        elif hasattr(owner, "__dict__"):
            _clear_attributes(owner, ids)
    return containers


def _clear_entries(owner: dict[Any, Any], ids: set[int]) -> None:
    namespace = next((item for item in gc.get_referrers(owner) if _is_namespace(item, owner)), None)
    if namespace is not None:
        _clear_attributes(namespace, ids)
    else:
        for key in [key for key, value in owner.items() if id(value) in ids]:
            del owner[key]


def _is_namespace(item: Any, entries: dict[Any, Any]) -> bool:
    return isinstance(item, type) or getattr(item, "__dict__", None) is entries


def _clear_attributes(owner: Any, ids: set[int]) -> None:
    for name in [name for name, value in vars(owner).items() if id(value) in ids]:
        setattr(owner, name, None)
