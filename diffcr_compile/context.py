"""Context from every token at run time: a block's own graph, rewritten so that skipped tokens give keys and values as well
(``passes/context.py``).

The graph shares the block's parameters by name, but not its code: what replaces submodules, processors or dtypes later (LoRA,
quantisation) would be passed by. So each graph belongs to one state of the block's modules, and a block in another state gets
another graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .guards import Guards
from .settings import Same, own_attributes, setting, settings_of

ContextKey = tuple[Any, ...]

MOST_STATES = 64
"""States of its modules that a block's graph is written for (an adapter's scale that changes from step to step)."""

MOST_GRAPHS = 8
"""Graphs that are written for other sizes of one kind of call: a length that the block's code counts to would have it exported at
each."""


@dataclass(frozen=True, eq=False)
class ContextGraph:
    """A block as a function of all tokens and of the kept ones (shared between the layers of a family, never copied).

    graph: placeholders are the block's ``attributes`` (names of parameters and buffers), ``constants``, the positions kept (B, K),
    the call's tensors, those of them that follow the tokens once more, indexed, and the keys and values that are remembered;
    returns the block's output tensors at the kept tokens, then the kept tokens' keys and values. given: the open settings of the
    call that it was exported with; guards: what holds of the sizes of its tensors. fill: where any are remembered, the block as it
    is; takes the attributes, constants and tensors, returns the outputs and keys and values of all tokens.
    """

    graph: fx.GraphModule
    attributes: tuple[str, ...]
    constants: tuple[Tensor, ...]
    given: tuple[object, ...]
    guards: Guards
    fill: fx.GraphModule | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextGraph:
        return self

    def __call__(self, module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._call(self.graph, module, tensors)

    def run_dense(self, module: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The block's outputs, then what is remembered of all tokens."""
        assert self.fill is not None
        return self._call(self.fill, module, tensors)

    def _call(self, graph: fx.GraphModule, module: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return graph.forward(*(_attribute(module, name) for name in self.attributes), *self.constants, *tensors)

    def on(self, device: torch.device) -> ContextGraph:
        """The same on another device: an export writes the one that it saw into every tensor that the graph makes."""
        constants = tuple(constant.to(device) for constant in self.constants)
        fill = None if self.fill is None else _on(self.fill, device)
        return ContextGraph(_on(self.graph, device), self.attributes, constants, self.given, self.guards, fill)

    def bind(self, module: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
        """The graph with the parameters of ``module``."""

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self(module, *tensors)

        return call


def _on(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
        )
    return fx.GraphModule(module, graph)


def context_key(module: nn.Module) -> ContextKey:
    """What a rewritten graph depends on beside the kind of call: the block's modules, what is set on them, dtypes and device."""
    parts = tuple((type(part), part.training, settings_of(part, wrappers=False)) for part in module.modules())
    hooks = tuple(
        Same(hook)
        for part in module.modules()
        if part is not module
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )
    return parts, hooks, tuple((parameter.dtype, parameter.device) for parameter in module.parameters())


Parts = tuple[tuple[dict[Any, Any], Any, Any], ...]
"""Modules, parameters and settings, each with the dictionary that holds it, and its name there."""


def parts_of(module: nn.Module) -> Parts:
    """What a block is made of now: its modules and parameters, and what is set on them (an adapter's scale), as far down as
    objects and dictionaries on a module."""
    found: list[tuple[dict[Any, Any], Any, Any]] = []
    for part in module.modules():
        for holder in (part._modules, part._parameters):
            found += [(holder, name, held) for name, held in holder.items()]
        for name, value in own_attributes(part, wrappers=False):
            found.append((vars(part), name, value))
            inner = value if isinstance(value, dict) else getattr(value, "__dict__", None)
            if isinstance(inner, dict):
                found += [(inner, key, held) for key, held in inner.items()]
    return tuple(found)


def are_in_place(parts: Parts) -> bool:
    """Whether none has been replaced since: what is quick enough to be asked in every forward."""
    return all(holder.get(name) is held for holder, name, held in parts)


def open_settings(leaves: Iterable[Any]) -> tuple[object, ...]:
    """What a call's leaves say that their signature leaves open, beside tensors: an export writes it into its graph."""
    return tuple(setting(leaf) for leaf in leaves if not isinstance(leaf, Tensor | bool | int | str))


def _attribute(module: nn.Module, name: str) -> Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
