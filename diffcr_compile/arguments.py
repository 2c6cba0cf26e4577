"""A call's arguments as named leaves: the one way in which capture, routed blocks and ``record`` look at a call.

A *bound call* is a dictionary from parameter name to value, whether the caller passed it by position or by name
(surplus positional arguments of a ``*args`` parameter are named ``*0``, ``*1``, ...). A *leaf* is anything below it that
is no tuple, list, dict or dataclass; its *path* is the parameter's name followed by indices and keys.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Path = tuple[str | int, ...]
Signature = tuple[tuple[Path, int | str], ...]

ExampleInputs = dict[str, Any] | tuple[tuple[Any, ...], dict[str, Any]]
"""How a user gives the inputs of a model: keyword arguments of its forward, or (args, kwargs)."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def positional_names(owner: nn.Module | type[nn.Module]) -> tuple[str, ...]:
    """Names of what ``owner.forward`` takes by position, without the module, which a class's takes first."""
    parameters = inspect.signature(owner.forward).parameters.values()
    names = tuple(parameter.name for parameter in parameters if parameter.kind in _POSITIONAL)
    return names[1:] if isinstance(owner, type) else names


def bind_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bound call of ``f(*args, **kwargs)`` where ``names`` are ``f``'s positional parameters; the order of keys is theirs,
    then alphabetical, however the caller wrote the call."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    bound = {name: given.pop(name) for name in names if name in given}
    for index, value in enumerate(args[len(names) :]):
        bound[f"*{index}"] = value
    for key in sorted(given):
        bound[key] = given[key]
    return bound


def bind_inputs(model: nn.Module, inputs: ExampleInputs) -> dict[str, Any]:
    """The bound call of ``model.forward`` that ``example_inputs`` stand for. Raises TypeError for what is neither form, and for an
    argument that is given twice."""
    names = positional_names(model)
    match inputs:
        case dict():
            return bind_arguments(names, (), inputs)
        case (tuple() | list() as args, dict() as kwargs):
            twice = [name for name in names[: len(args)] if name in kwargs]
            if twice:
                raise TypeError(
                    f"example_inputs give {type(model).__name__}.forward several values for {', '.join(map(repr, twice))}: by "
                    "position, and by name"
                )
            return bind_arguments(names, tuple(args), kwargs)
    raise TypeError(
        f"example_inputs must be a dict of keyword arguments of {type(model).__name__}.forward, or (args, kwargs); "
        f"found {type(inputs).__name__}"
    )


def unbind_arguments(names: tuple[str, ...], bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inverse of :func:`bind_arguments`: by position as far as the leading names are present, the rest by name."""
    args: list[Any] = []
    for name in names:
        if name not in bound:
            break
        args.append(bound[name])
    surplus = [key for key in bound if key.startswith("*")]
    args.extend(bound[key] for key in surplus)
    taken = {*names[: len(args)], *surplus}
    return tuple(args), {key: value for key, value in bound.items() if key not in taken}


def unbind_as(
    names: tuple[str, ...], bound: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inverse of :func:`bind_arguments` for a bound call with the keys of ``(args, kwargs)``, written as that one is."""
    keys = (*names, *(f"*{index}" for index in range(len(args) - len(names))))
    return tuple(bound[key] for key in keys[: len(args)]), {key: bound[key] for key in kwargs}


def iterate_leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf below ``value``, in order, with its path. ``None`` is a leaf; an empty container has none."""
    if isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from iterate_leaves(item, (*path, index))
    elif is_record(value):
        for name in record_fields(value):
            yield from iterate_leaves(getattr(value, name), (*path, name))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from iterate_leaves(item, (*path, key))
    else:
        yield path, value


def given_leaves(bound: dict[str, Any]) -> list[Any]:
    """The leaves of a bound call, in order; one that is ``None`` counts as absent."""
    return [leaf for _, leaf in iterate_leaves(bound) if leaf is not None]


def map_leaves(function: Callable[[Path, Any], Any], value: Any, path: Path = ()) -> Any:
    """``value`` with every leaf replaced by ``function(path, leaf)``; containers are made anew."""
    if isinstance(value, tuple | list):
        items = [map_leaves(function, item, (*path, index)) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_record(value):
        names = record_fields(value)
        return type(value)(**{name: map_leaves(function, getattr(value, name), (*path, name)) for name in names})
    if isinstance(value, dict):
        mapped = {key: map_leaves(function, item, (*path, key)) for key, item in value.items()}
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, mapped)
        return type(value)(mapped)
    return function(path, value)


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass, as model outputs are (those that are dictionaries too, among them)."""
    return hasattr(type(value), "__dataclass_fields__")


def record_fields(value: Any) -> tuple[str, ...]:
    """Names of the fields that a dataclass is made from."""
    return tuple(name for name, entry in type(value).__dataclass_fields__.items() if entry.init)


def signature_of(bound: dict[str, Any]) -> Signature:
    """What a routing plan is valid for: each leaf's path with a tensor's rank (or that it is nested), a flag's, integer's or text's
    value, whether a float is zero, or the name of the leaf's type.

    ``None`` counts as absent: a block may be called with an optional argument left out or given as ``None``.
    """
    return tuple((path, _kind_of(leaf)) for path, leaf in iterate_leaves(bound) if leaf is not None)


def _kind_of(leaf: Any) -> int | str:
    if isinstance(leaf, torch.Tensor):
        return "nested tensor" if leaf.is_nested else leaf.ndim
    if isinstance(leaf, bool | int | str):
        return f"{type(leaf).__name__} {leaf!r}"
    if isinstance(leaf, float):
        return "float" if leaf else "float 0"
    return type(leaf).__name__


def leaf_name(path: Path) -> str:
    """``("rope", 0)`` as ``rope_0``: a valid identifier for graphs and messages."""
    text = "_".join(str(part).replace("*", "arg") for part in path)
    return "".join(character if character.isalnum() else "_" for character in text)
