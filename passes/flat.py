"""Models without block modules: find the blocks in the graph, between residual adds, and make modules of them.

A denoiser written as one flat forward is exported whole. Its *stream* is the longest chain of sums of one shape, each adding
something to the one before::

    r1 = r0 + f1(r0, cond);  r2 = r1 + f2(r1, cond);  r3 = r2 + f1'(r2, cond);  ...

What lies between two sums is a segment; segments that repeat with a period make a block each. The model keeps its class, its
parameters and their names; it gains modules without parameters of their own (weights are inputs of theirs) and a forward on the
instance that runs the exported graph where anything is skipped, and else the original.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..arguments import Path, bind_arguments, iterate_leaves, map_leaves, positional_names, signature_of
from ..config import DiffCRConfig
from ..errors import UnsupportedError
from ..guards import Guards
from ..routed import routing_of
from ..settings import settings_of
from .analysis import Call, Refused, TensorInfo
from .block import BlockAnalysis, as_meta
from .export import export_block, guards_of
from .outline import Region, attends
from .residual import ancestors, operator_name

BLOCKS = "diffcr_blocks"
"""Name of the submodule that holds the blocks that were found."""

_LONGEST_PERIOD = 6
_SUMS = ("add", "add_", "iadd")


@dataclass(eq=False)
class Flat:
    """What was changed, and how to take it back."""

    model: nn.Module
    forward: Callable[..., Any]

    def undo(self) -> None:
        """The model as it was. A forward that someone else has since set on the instance stays: the one below it passes."""
        if BLOCKS in self.model._modules:
            del self.model._modules[BLOCKS]
            if getattr(vars(self.model).get("forward"), "__func__", None) is self.forward:
                del vars(self.model)["forward"]


class _Blocks(nn.Module):
    """Holds the blocks that were found; has no state of its own."""


def outline_flat(model: nn.Module, call: Call, batch_axes: dict[Path, int]) -> Flat:
    """Make modules of the repeated residual segments in the graph of a model's ``call``, whose leaves have these axes over samples
    (the first where none are known). Refuses a model that has none, or that can't be exported."""
    if "forward" in vars(model):
        raise Refused("it has no blocks below it, and its forward is not its class's")
    # A model may be longer than what is exported as one block.
    block = export_block(BlockAnalysis(model, "", replace(call, num_operators=0), DiffCRConfig()))
    graph = _graph_on_model(block)
    parts = _repeated_segments(graph)
    if not parts:
        raise Refused("no module takes and returns tokens, and no repeated residual sum in its graph attends")
    holder = _Blocks()
    kinds: dict[str, type[nn.Module]] = {}
    for index, nodes in enumerate(parts):
        region = Region(f"{BLOCKS}.{index}", nodes)
        body = region.write() if region.movable else None
        if body is None:
            raise Refused(f"segment {index} of its graph can't be made a module")
        compiled = fx.GraphModule({}, body)
        if compiled.code not in kinds:
            kinds[compiled.code] = type(
                "Segment", (nn.Module,), {"forward": type(compiled).forward, "__module__": __name__}
            )
        region.replace_by_call()
        holder.add_module(str(index), kinds[compiled.code]())
    graph.lint()
    run = type(fx.GraphModule(_with_blocks(model, holder), graph)).forward
    model.add_module(BLOCKS, holder.train(model.training))
    guards = guards_of(block, batch_axes or {path: 0 for path, _ in block.call_leaves})
    forward = _flat_forward(type(model), run, block.call, guards, _settings(model))
    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    return Flat(model, forward)


def _flat_forward(
    kind: type[nn.Module], run: Callable[..., Any], call: Call, guards: Guards, settings: object
) -> Callable[..., Any]:
    """The forward to bind: the graph's where a block routes, or may be seen to; else the original."""
    base, names, known = kind.forward, positional_names(kind), _fixed(call.arguments)

    @functools.wraps(base)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = routing_of(self)
        routed = state is not None and state.plan is not None  # else the blocks are being looked for
        untouched = routed and not (state.dense or state.learning or state.observers or state.routes)
        if untouched or BLOCKS not in self._modules:
            return base(self, *args, **kwargs)
        if self.training:
            raise UnsupportedError(
                f"{type(self).__name__} was exported in evaluation mode, and what its forward does otherwise in training (dropout) "
                "is not in that graph. Call eval() on it, which leaves gradients on, or set its ratios to 0."
            )
        bound = bind_arguments(names, args, kwargs)
        if _fixed(bound) != known:
            raise UnsupportedError(
                f"{type(self).__name__} was exported for calls with {', '.join(call.arguments)}, and is called "
                f"with {', '.join(bound)}, or with other values of its flags and numbers. Restore it and transform it with "
                "example_inputs of this kind."
            )
        if not torch.compiler.is_compiling() and _settings(self) != settings:
            raise UnsupportedError(
                f"the graph of {type(self).__name__} holds what was set on it, and its dtypes, when it was transformed, and has "
                "changed since. Restore it and transform it anew, or put back what it was."
            )
        tensors = [leaf for _, leaf in iterate_leaves(bound) if isinstance(leaf, Tensor)]
        if not guards.hold(tensors):
            raise UnsupportedError(
                f"the graph of {type(self).__name__} holds where {guards.broken(tensors)}: in this call it may do something else. "
                "Restore it and transform it with example_inputs of this kind."
            )
        outputs = iter(run(self, *tensors))
        return map_leaves(lambda _, leaf: next(outputs) if isinstance(leaf, TensorInfo) else leaf, call.output)

    return forward


def _fixed(bound: dict[str, Any]) -> Any:
    """What the graph is written for in a call: ranks of tensors, and the values of all else."""
    values = [leaf for _, leaf in iterate_leaves(bound) if not isinstance(leaf, Tensor | TensorInfo | None)]
    return signature_of(map_leaves(as_meta, bound)), values


def _settings(model: nn.Module) -> object:
    """What its graph holds of a model beside weights: settings of its modules (but for integers, which may count calls), dtypes."""
    parts = [part for name, part in model.named_modules() if name.partition(".")[0] != BLOCKS]
    dtypes = tuple(parameter.dtype for part in parts for parameter in part.parameters(recurse=False))
    settings = (settings_of(part, positions=False, wrappers=False) for part in parts)
    return tuple(tuple(pair for pair in own if pair[0] != "forward") for own in settings), dtypes


def _graph_on_model(block: BlockAnalysis) -> fx.Graph:
    """The exported graph with the model's parameters as attributes of the model, and its tensor inputs as placeholders."""
    assert block.program is not None
    signature, graph = block.program.graph_signature, fx.Graph()
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    values: dict[fx.Node, Any] = {}
    for node in block.program.graph.nodes:
        if node.op == "placeholder" and node.name in signature.user_inputs:
            values[node] = graph.placeholder(node.name)
            values[node].meta = dict(node.meta)
    for node in block.program.graph.nodes:
        if node.op == "placeholder":
            if node.name in held:
                values[node] = graph.get_attr(held[node.name].removeprefix("block."))
                values[node].meta = dict(node.meta)
            elif node not in values:
                raise Refused("its graph holds constants")
        elif node.op == "call_function" and "_assert" not in str(node.target):
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in block.graph_outputs))
    return graph


def _repeated_segments(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes of each block: runs of residual segments that repeat, and attend."""
    chain = _stream(graph)
    segments = [_between(graph, start, end) for start, end in itertools.pairwise(chain)]
    kinds = [tuple(str(node.target) for node in segment) for segment in segments]
    for period in range(1, _LONGEST_PERIOD + 1):
        for offset in range(period):
            starts = range(offset, len(segments) - period + 1, period)
            if len(starts) < 2 or any(kinds[i : i + period] != kinds[offset : offset + period] for i in starts):
                continue
            if any(attends(node) for segment in segments[offset : offset + period] for node in segment):
                return [_between(graph, chain[i], chain[i + period]) for i in starts]
    return []


def _stream(graph: fx.Graph) -> list[fx.Node]:
    """The longest chain in which each node adds something of its own shape to the one before."""
    longest: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or operator_name(node.target) not in _SUMS or not _is_stream(node):
            continue
        before = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and _shape(arg) == _shape(node)]
        chains = [longest.get(arg, [arg]) for arg in before]
        longest[node] = [*max(chains, key=len, default=[]), node]
    return max(longest.values(), key=len, default=[])


def _between(graph: fx.Graph, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """What is computed from ``start``, and for ``end`` alone: other uses leave a node outside."""
    before, after = ancestors([start]), ancestors([end])
    elsewhere: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op == "output" or (node is not end and any(user in elsewhere for user in node.users)):
            elsewhere.add(node)
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node in after
        and node not in before
        and (node is end or node not in elsewhere)
    ]


def _is_stream(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim >= 3 and value.dtype.is_floating_point


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else None


def _with_blocks(model: nn.Module, holder: nn.Module) -> nn.Module:
    """A stand-in that has the model's attributes and the blocks: what the graph's code is written against."""
    standin = nn.Module()
    vars(standin).update(vars(model))
    standin._modules = {**model._modules, BLOCKS: holder}
    return standin
