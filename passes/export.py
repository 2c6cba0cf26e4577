"""Export one block alone, with every dimension of every input its own symbol.

The shape solver then does the unification: sizes that the graph needs to be equal come out as one symbol, lengths that
are joined as a sum, and what the block fixes (its width, a grid) as a number.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..arguments import Path, iterate_leaves, leaf_name, map_leaves, positional_names, unbind_arguments
from ..guards import Guards
from ..routed import STATE
from .analysis import Call, Refused, TensorInfo
from .block import BlockAnalysis

LONGEST = 1200
"""Operators of a call that are exported. A recurrence over three frames runs 1440, and takes minutes (the shape solver's time grows
with the loop); the longest block that can be routed in a denoiser of diffusers runs 812."""


class _FlatCall(nn.Module):
    """A block as a function of the tensors of its call, in order; its output's tensors as a tuple."""

    def __init__(self, block: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.block = block
        self._positional = positional_names(type(block))
        self._arguments = arguments

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        bound = map_leaves(lambda _, leaf: next(remaining) if isinstance(leaf, TensorInfo) else leaf, self._arguments)
        args, kwargs = unbind_arguments(self._positional, bound)
        try:
            output = self.block(*args, **kwargs)
        except GuardOnDataDependentSymNode as error:  # as it is, torch.export would print the graph so far
            raise Refused(f"it reads values of its tensors, {_untraced(error)}") from error
        found: list[Tensor] = []
        map_leaves(lambda _, leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, output)
        return tuple(found)


def export_block(block: BlockAnalysis, *, as_it_is: bool = False) -> BlockAnalysis:
    """Fill in ``graph``, its inputs, outputs and their shapes; ``as_it_is``: of the modes that its modules are in (dropout), not of
    evaluation. Refuses what torch.export can't take, with its reason."""
    if block.call.num_operators > LONGEST:
        raise Refused(
            f"it runs {block.call.num_operators} operators in one call (a loop over frames or tokens), too many to export"
        )
    flat, tensors = _FlatCall(duplicate(block), block.call.arguments), _examples(block)
    dynamic = tuple(dict.fromkeys(range(tensor.ndim), Dim.AUTO) for tensor in tensors)
    refusals: list[Refused] = []
    # Some blocks go by values in evaluation alone; what the graph of training suggests is proved on the real one anyway.
    for training in (None if as_it_is else False, True):
        if training is not None:
            flat.train(training)
        try:
            with torch.no_grad(), _quiet():
                program = export(flat, tensors, dynamic_shapes=(dynamic,), strict=False)
            program.example_inputs = None  # programs are kept while blocks are looked for
            break
        except Exception as error:  # torch.export raises whatever the block's code does
            refusals.append(error if isinstance(error, Refused) else Refused(_untraced(error)))
    else:
        raise refusals[0]
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = tuple(nodes[name] for name in program.graph_signature.user_inputs)
    outputs = tuple(nodes[name] for name in program.graph_signature.user_outputs if name is not None)
    return replace(
        block,
        program=program,
        graph=program.graph,
        graph_inputs=inputs,
        graph_outputs=outputs,
        leaf_dims=_dims_by_leaf(block, inputs),
    )


def trace_around(block: BlockAnalysis, parts: dict[str, tuple[Call, ...]]) -> fx.Graph:
    """A block's graph, with the sizes of its call, where each of ``parts`` (name below the block -> its calls) stands for what it
    returned: a value of that shape which depends on all its tensors. Refuses what torch.export can't take then either."""
    module = duplicate(block).eval()
    for name, calls in parts.items():
        module.get_submodule(name).forward = _stand_in(calls)  # type: ignore[method-assign]
    flat, tensors = _FlatCall(module, block.call.arguments), _examples(block)
    try:
        with torch.no_grad(), _quiet():
            return export(flat, tensors, strict=False).graph
    except Exception as error:  # torch.export raises whatever the block's code does
        raise Refused(_untraced(error)) from error


def guards_of(block: BlockAnalysis, batch_axes: Mapping[Path, int | None]) -> Guards:
    """What the graph takes for granted of the sizes of its call's tensors: what export noted, and what it does not note, that a
    size is one or is not. Of the axes over samples, given by leaf, the latter is not asked."""
    assert block.program is not None
    leaves = [
        (path, dims)
        for (path, leaf), dims in zip(block.call_leaves, block.leaf_dims, strict=True)
        if isinstance(leaf, TensorInfo)
    ]
    noted = [guard.replace("L['tensors']", "tensors") for guard in block.program._guards_code if "stride" not in guard]
    sizes: dict[str, None] = {}
    for index, (path, dims) in enumerate(leaves):
        for axis, size in enumerate(dims):
            if batch_axes.get(path) != axis:
                sizes[f"tensors[{index}].size()[{axis}] " + (f"== {size}" if size.is_number else "> 1")] = None
    return Guards(tuple(leaf_name(path) for path, _ in leaves), tuple(dict.fromkeys([*noted, *sizes])))


def _untraced(error: Exception) -> str:
    first_line = "".join(str(error).strip().splitlines()[:1])[:200]
    return f"torch.export can't trace it ({type(error).__name__}: {first_line})"


def _stand_in(calls: tuple[Call, ...]) -> Callable[..., Any]:
    remaining = itertools.chain(calls, itertools.repeat(calls[-1]))

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [leaf for _, leaf in iterate_leaves([args, kwargs]) if isinstance(leaf, Tensor)]
        value: Any = sum(leaf.reshape(-1)[:1].to(torch.complex64).sum() for leaf in given)
        return map_leaves(
            lambda _, leaf: (
                value.real.to(leaf.dtype).expand(leaf.shape).clone() if isinstance(leaf, TensorInfo) else leaf
            ),
            next(remaining).output,
        )

    return forward


def duplicate(block: BlockAnalysis) -> nn.Module:
    """The block's module objects copied, their parameters shared, without the block's own hooks: they will run around its routed
    forward, as around any other."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*block.module.parameters(), *block.module.buffers())}
    routing = vars(block.module).get(STATE)
    memo[id(routing)] = routing
    module = copy.deepcopy(block.module, memo)
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()
    vars(module).pop(STATE, None)  # a block that is routed already, and met again, is looked at as it was
    return module


def _examples(block: BlockAnalysis) -> tuple[Tensor, ...]:
    device = next((tensor.device for tensor in block.module.parameters()), torch.device("cpu"))
    return tuple(_example(leaf, device) for _, leaf in block.call_leaves if isinstance(leaf, TensorInfo))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without this thread's warnings that a size of one is fixed (it is), and that code of a library is not the user's."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno >= logging.ERROR

    loggers = [
        logging.getLogger(f"torch.{name}") for name in ("_export.non_strict_utils", "fx.experimental.symbolic_shapes")
    ]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)


def _dims_by_leaf(block: BlockAnalysis, inputs: tuple[fx.Node, ...]) -> tuple[Any, ...]:
    remaining = iter(inputs)
    return tuple(block.dims(next(remaining)) if isinstance(leaf, TensorInfo) else () for _, leaf in block.call_leaves)


def _example(info: TensorInfo, device: torch.device) -> Tensor:
    if info.value is not None:
        return info.value.to(device)
    return torch.zeros(info.shape, dtype=info.dtype, device=device)
