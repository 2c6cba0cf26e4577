"""What the attributes of a module say, comparable: between the layers of a model, and between two moments."""

from __future__ import annotations

import types
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
    return tuple(
        (name, setting(value))
        for name, value in sorted(vars(module).items())
        if name not in _INNER
        and (positions or type(value) is not int)
        and (wrappers or not name.startswith("_") or _is_plain(value))
    )


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers and text alone."""
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | str | int | float)


def setting(value: Any, depth: int = 3) -> object:
    """What an attribute says, comparable between the layers of a model: an object's own attributes count, not which it is."""
    if value is None or isinstance(value, bool | str | int | float | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, Tensor):
        return fingerprint(value)
    if isinstance(value, nn.Module):
        return type(value)
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return id(value)
    if depth == 0:
        return type(value)
    if isinstance(value, dict):
        return tuple((repr(key), setting(item, depth - 1)) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), tuple(setting(item, depth - 1) for item in value)
    own = sorted(getattr(value, "__dict__", {}).items())
    return type(value), tuple((name, setting(item, depth - 1)) for name, item in own)


_HASHED = 1 << 16
"""Tensors of at most this many values are compared by all of them, larger ones by shape and sum."""


def fingerprint(tensor: Tensor) -> object:
    """Shape, dtype, and values where they are at hand."""
    kind = tuple(tensor.shape), tensor.dtype
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_complex():
        return kind
    values = tensor.detach().flatten()
    return kind, tuple(values.tolist()) if values.numel() <= _HASHED else float(values.double().sum())
