"""What the attributes of a module say, comparable: between the layers of a model, and between two moments."""

from __future__ import annotations

import functools
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn

_INNER = {"training", "forward", *vars(nn.Module())}
"""Attributes that every module has."""


def settings_of(module: nn.Module, *, positions: bool = True, wrappers: bool = True) -> tuple[tuple[str, object], ...]:
    """Every attribute of a module's own that may change what it does.

    Without ``positions``: but the integers (the number of a layer). Without ``wrappers``: but objects under private names, where
    hooks of offload and caches keep what changes from call to call.
    """
    own = sorted(own_attributes(module, wrappers=wrappers), key=lambda item: item[0])
    return tuple((name, setting(value)) for name, value in own if positions or type(value) is not int)


def own_attributes(module: nn.Module, *, wrappers: bool = True) -> list[tuple[str, Any]]:
    """The attributes that :func:`settings_of` describes, as they are."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if name not in _INNER and (wrappers or not name.startswith("_") or _is_plain(value))
    ]


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers and text alone."""
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | str | int | float)


class Same:
    """Equal to another of the same object alone, while that lives: its number (``id``) goes to another object then."""

    def __init__(self, value: Any) -> None:
        try:
            self._value: Any = weakref.ref(value)
        except TypeError:  # of a class that has no room for weak references
            self._value = lambda: value
        self._number = id(value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Same) and self._value() is other._value() is not None)

    def __hash__(self) -> int:
        return self._number


def setting(value: Any, depth: int = 3) -> object:
    """What an attribute says, comparable between the layers of a model: an object's own attributes count, not which it is."""
    if value is None or isinstance(value, bool | str | int | float | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, Tensor):
        return fingerprint(value)
    if isinstance(value, nn.Module):
        return type(value)
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return Same(value)
    if depth == 0:
        return type(value)
    if isinstance(value, types.MethodType):
        return Same(value.__func__), setting(value.__self__, depth - 1)
    if isinstance(value, functools.partial):
        return type(value), setting((value.func, value.args, value.keywords), depth - 1)
    if isinstance(value, dict):
        return tuple((repr(key), setting(item, depth - 1)) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), tuple(setting(item, depth - 1) for item in value)
    slots = (name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name))
    own = {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}
    return type(value), tuple((name, setting(item, depth - 1)) for name, item in sorted(own.items()))


def _slots(kind: type) -> tuple[str, ...]:
    named = vars(kind).get("__slots__", ())
    return (named,) if isinstance(named, str) else tuple(named)


_HASHED = 1 << 16
"""Tensors of at most this many values are compared by all of them, larger ones by shape and sum."""


def fingerprint(tensor: Tensor) -> object:
    """Shape, dtype, and values where they are at hand."""
    kind = tuple(tensor.shape), tensor.dtype
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return kind
    values = (torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()).flatten()
    return kind, tuple(values.tolist()) if values.numel() <= _HASHED else float(values.double().sum())
