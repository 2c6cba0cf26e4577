"""Outline: give a model that came as one graph its blocks back, as modules that can be routed like any other.

A ``torch.export`` module or an FX ``GraphModule`` runs one flat graph; what its nodes were traced from is noted on them
(``nn_module_stack``). Before::

    x1 = linear(x, blocks.0.qkv.weight, ...);  ...;  x9 = add(x8, x);  x10 = linear(x9, blocks.1.qkv.weight, ...)

After, with the nodes of each repeated module that attends moved into it::

    x9 = blocks.0(x, cond);  x17 = blocks.1(x9, cond)

The containers that hold the parameters stay the objects they are, under their names, and gain a forward; values are the same to
the bit, since the same operators run in the same order. :class:`Outlined` takes it back.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .analysis import log

_ATTENDS = ("scaled_dot_product", "softmax", "attention", "matmul", "bmm", "einsum")
_SIZE = torch.ops.aten.sym_size.int


@dataclass(eq=False)
class Outlined:
    """What was changed, and how to take it back."""

    model: nn.Module
    before: fx.Graph | None = None
    classes: list[tuple[nn.Module, type]] = field(default_factory=list)

    def undo(self) -> None:
        """The model as it was."""
        for container, kind in self.classes:
            container.__class__ = kind
        if self.before is not None:
            self.model.graph = self.before  # type: ignore[assignment]
        self.classes, self.before = [], None


def outline_blocks(model: nn.Module) -> Outlined:
    """Move the repeated, attending parts of a graph module's graph into the containers of their parameters."""
    outlined = Outlined(model)
    if not isinstance(model, fx.GraphModule):
        return outlined
    before, graph = model.graph, fx.Graph()
    graph.output(graph.graph_copy(before, {}))
    graph._codegen = before._codegen
    kinds: dict[Any, type] = {}
    for path, kind in _repeated_parts(graph):
        nodes = [node for node in graph.nodes if _lies_in(node, path)]
        try:
            container = model.get_submodule(path)
        except AttributeError:
            continue
        if type(container) is not nn.Module:
            continue
        region = Region(path, nodes)
        if not region.movable:
            log.info("%s is not outlined: its nodes are mixed with others", path)
            continue
        body = region.write()
        if body is None:
            log.info("%s is not outlined: it takes sizes that none of its inputs has", path)
            continue
        compiled = fx.GraphModule(container, body)
        key = (kind, compiled.code)
        if key not in kinds:
            name = kind.rpartition(".")[2]
            kinds[key] = type(name, (nn.Module,), {"forward": type(compiled).forward, "__module__": __name__})
        region.replace_by_call()
        outlined.classes.append((container, type(container)))
        container.__class__ = kinds[key]
    if outlined.classes:
        outlined.before = before
        graph.lint()
        model.graph = graph
    return outlined


def _repeated_parts(graph: fx.Graph) -> list[tuple[str, str]]:
    """(path, class name) of the outermost parts whose class occurs more than once and that attend."""
    kinds: dict[str, str] = {}
    attending: set[str] = set()
    for node in graph.nodes:
        for path, kind in _stack(node):
            kinds[path] = kind
            if attends(node):
                attending.add(path)
    repeated = {kind for kind in kinds.values() if list(kinds.values()).count(kind) > 1}
    chosen: list[tuple[str, str]] = []
    for path, kind in sorted(kinds.items(), key=lambda item: item[0].count(".")):
        inside = any(path.startswith(f"{outer}.") for outer, _ in chosen)
        if path and kind in repeated and path in attending and not inside:
            chosen.append((path, kind))
    return chosen


def attends(node: fx.Node) -> bool:
    """Whether a node may be part of attention."""
    return any(part in str(node.target).lower() for part in _ATTENDS) or node.target is operator.matmul


def _stack(node: fx.Node) -> Iterator[tuple[str, str]]:
    """(path, class name) of every module that a node was traced in, from the root on."""
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        yield path.removeprefix("L['self'].").removeprefix("L['self']"), name


def _lies_in(node: fx.Node, path: str) -> bool:
    return node.op not in ("placeholder", "output", "get_attr") and any(found == path for found, _ in _stack(node))


class Region:
    """The nodes of one part: what they take from outside and give to it."""

    def __init__(self, path: str, nodes: list[fx.Node]) -> None:
        self.path, self.nodes = path, nodes
        self.inside = set(nodes)
        given = dict.fromkeys(
            operand for node in nodes for operand in node.all_input_nodes if operand not in self.inside
        )
        self.attributes = [node for node in given if node.op == "get_attr" and str(node.target).startswith(f"{path}.")]
        outside = [node for node in given if node not in self.attributes]
        self.sizes = [node for node in outside if not _may_be_tensor(node)]
        self.inputs = [node for node in outside if _may_be_tensor(node)]
        self.outputs = [node for node in nodes if any(user not in self.inside for user in node.users)]

    @property
    def movable(self) -> bool:
        """Whether all that it takes is there before all that it gives is used."""
        if not self.outputs or not self.inputs:
            return False
        order = {node: index for index, node in enumerate(self.nodes[0].graph.nodes)}
        users = [user for node in self.outputs for user in node.users if user not in self.inside]
        self.first_user = min(users, key=order.__getitem__)
        return all(order[node] < order[self.first_user] for node in (*self.inputs, *self.sizes, *self.nodes))

    def write(self) -> fx.Graph | None:
        """The part as a graph of its own; None where a size that it takes is none of its inputs'."""
        graph = fx.Graph()
        values: dict[fx.Node, Any] = {}
        for index, node in enumerate(self.inputs):
            values[node] = graph.placeholder(f"x{index}")
        for node in self.attributes:
            values[node] = graph.get_attr(str(node.target).removeprefix(f"{self.path}."))
        for node in self.sizes:
            if not self._write_size(graph, node, values):
                return None
        for node in self.nodes:
            values[node] = graph.create_node(
                node.op,
                str(node.target).removeprefix(f"{self.path}.") if node.op == "call_module" else node.target,
                fx.map_arg(node.args, values.__getitem__),
                fx.map_arg(node.kwargs, values.__getitem__),
            )
        results = [values[node] for node in self.outputs]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        graph.lint()
        return graph

    def _write_size(self, graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
        """A size from outside, read off an input that has it."""
        wanted = str(node.meta.get("val"))
        for source in self.inputs:
            shape = getattr(source.meta.get("val"), "shape", ())
            for axis, size in enumerate(shape):
                if str(size) == wanted:
                    values[node] = graph.call_function(_SIZE, (values[source], axis))
                    return True
        return False

    def replace_by_call(self) -> None:
        """In the root's graph: one call of the part instead of its nodes."""
        graph = self.nodes[0].graph
        with graph.inserting_before(self.first_user):
            call = graph.call_module(self.path, tuple(self.inputs))
            results = [call]
            if len(self.outputs) > 1:
                results = [graph.call_function(operator.getitem, (call, index)) for index in range(len(self.outputs))]
        for node, result in zip(self.outputs, results, strict=True):
            result.meta.update(node.meta)
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in self.inside)
        for node in reversed(self.nodes):
            if not node.users:
                graph.erase_node(node)


def _may_be_tensor(node: fx.Node) -> bool:
    """Whether a value from outside is a tensor: as far as it is known, all but sizes are."""
    value = node.meta.get("val")
    return not isinstance(value, torch.SymInt | int | float | bool) or isinstance(value, Tensor)
