"""Which input holds the routed tokens, and which axes of the others follow them.

Export has proved which sizes must be equal, so following the tokens is reading: an axis that is the token symbol is indexed
with the stream; one that is a sum holding it is a joint sequence, whose order the concatenation in the graph tells.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator
from dataclasses import replace

import sympy
from torch import fx

from ..arguments import Path, leaf_name
from ..plan import PLACEHOLDERS, LeafPlan, OutputPlan, Size, StatePlan, TokenAxis
from .analysis import NotJoined, Refused, TensorInfo
from .block import BlockAnalysis
from .residual import residual_sources


def find_stream(block: BlockAnalysis) -> BlockAnalysis:
    """Fill in ``stream``, ``token`` and ``batch``: the longest input that attention mixes and an output is joined to.

    Longest in the captured call: where text and image tokens meet in one attention, the image is routed.
    """
    joined = {index for output in block.graph_outputs for index in _joined_leaves(block, output)}
    if block.is_branch:
        joined = {index for index, dims in enumerate(block.leaf_dims) if _is_answered(block, dims)}
    candidates = []
    for index, (_, leaf) in enumerate(block.call_leaves):
        if index in joined and isinstance(leaf, TensorInfo) and leaf.dtype.is_floating_point:
            for axis, size in enumerate(block.leaf_dims[index]):
                if size in block.token_symbols:
                    candidates.append((-leaf.shape[axis], index, axis))
    if not candidates:
        raise NotJoined(
            "no output is an input plus something along the attention's tokens"
            if not joined
            else "the attention's tokens are no axis of an input that an output is joined to (reshaped grid, windows)"
        )
    _, stream, axis = min(candidates)
    dims = block.leaf_dims[stream]
    others = [size for size in dims if size.free_symbols and size != dims[axis]]
    if not others and block.fixed_batch is None and axis == 1 and len(dims) == 3:
        return find_stream(_free_fixed_batch(block, int(dims[0])))
    if not others:
        raise Refused(
            "its token input has no batch axis, or one of fixed size (samples that are packed in one sequence can't be told apart)"
        )
    if len(others) > 1 or not others[0].is_Symbol:
        raise Refused(f"its token input has more than a batch and a token axis: {_text(dims)}")
    if axis == len(dims) - 1 or dims[-1].free_symbols:
        raise Refused(f"the width of its token input is not its last axis, or not fixed: {_text(dims)}")
    return replace(block, stream=stream, token=dims[axis], batch=others[0])


def _free_fixed_batch(block: BlockAnalysis, size: int) -> BlockAnalysis:
    """The block with every leading axis of the captured batch size taken for the batch; the proof, at another size, decides."""
    block = replace(block, fixed_batch=size)
    return replace(block, leaf_dims=tuple(block.free_batch(dims) for dims in block.leaf_dims))


def plan_leaves(block: BlockAnalysis) -> BlockAnalysis:
    """Fill in ``leaves`` and ``outputs``. Refuses an axis that holds the token count in a product or quotient."""
    names = _axis_names(block)
    placeholders = _placeholder_names([path for path, _ in block.call_leaves])
    leaves = []
    for index, (path, leaf) in enumerate(block.call_leaves):
        dims = block.leaf_dims[index]
        axes = tuple(
            token_axis_of(block, axis, size, leaf_name(path)) for axis, size in enumerate(dims) if _holds(block, size)
        )
        batch_axis = dims.index(block.batch) if block.batch in dims else None
        text = tuple(_axis_text(size, names) for size in dims)
        leaves.append(LeafPlan(path, placeholders[index], isinstance(leaf, TensorInfo), text, axes, batch_axis))
    outputs = tuple(_plan_output(block, output, names) for output in block.graph_outputs)
    return replace(block, leaves=tuple(leaves), outputs=outputs)


def _placeholder_names(paths: list[Path]) -> list[str]:
    """A name for each leaf in the graphs of its block: of its own, and no word of Python."""
    taken, names = {*PLACEHOLDERS, "kept"}, []
    for path in paths:
        name = leaf_name(path)
        while keyword.iskeyword(name) or not taken.isdisjoint((name, f"{name}_kept")):
            name += "_"
        names.append(name)
        taken |= {name, f"{name}_kept"}
    return names


def plan_state(block: BlockAnalysis, dims: tuple[sympy.Expr, ...], name: str) -> StatePlan:
    """How a tensor of the block's graph, keys or values, is remembered. Refuses one without an axis of its own for samples and for
    tokens, and one with another axis that is not of fixed size."""
    axes = [axis for axis, size in enumerate(dims) if _holds(block, size)]
    if block.batch not in dims or len(axes) != 1:
        raise Refused(f"keys or values without a batch and a token axis: {_text(dims)}")
    batch_axis = dims.index(block.batch)
    if any(size.free_symbols for axis, size in enumerate(dims) if axis not in (axes[0], batch_axis)):
        raise Refused(f"keys or values with more than a batch and a token axis: {_text(dims)}")
    text = tuple(_axis_text(size, _axis_names(block)) for size in dims)
    return StatePlan(text, batch_axis, token_axis_of(block, axes[0], dims[axes[0]], name))


def _holds(block: BlockAnalysis, size: sympy.Expr) -> bool:
    return block.token in size.free_symbols


def _plan_output(block: BlockAnalysis, output: fx.Node, names: dict[sympy.Symbol, str]) -> OutputPlan:
    dims = block.dims(output)
    text = tuple(_axis_text(size, names) for size in dims)
    if block.batch not in dims:
        raise Refused(f"an output has no batch axis: {_text(dims)}")
    routed = any(_holds(block, size) for size in dims)
    joined = sorted(_joined_leaves(block, output), key=lambda index: (index != block.stream, index))
    source = joined[0] if joined else None
    if routed and ((source is None and not block.is_branch) or dims.count(block.token) != 1):
        raise NotJoined(f"an output follows the tokens but is no input plus something: {_text(dims)}")
    return OutputPlan(text, dims.index(block.batch), routed, None if block.is_branch else source, block.is_branch)


def _is_answered(block: BlockAnalysis, dims: tuple[sympy.Expr, ...]) -> bool:
    """Whether some output has the same axes, the width aside."""
    return len(dims) > 1 and any(block.dims(output)[:-1] == dims[:-1] for output in block.graph_outputs)


def _joined_leaves(block: BlockAnalysis, output: fx.Node) -> Iterator[int]:
    """Leaves of the output's own shape that reach it through residual adds."""
    sources = residual_sources(output)
    placeholders = iter(block.graph_inputs)
    for index, (_, leaf) in enumerate(block.call_leaves):
        if (
            isinstance(leaf, TensorInfo)
            and next(placeholders) in sources
            and block.leaf_dims[index] == block.dims(output)
        ):
            yield index


def token_axis_of(block: BlockAnalysis, axis: int, size: sympy.Expr, name: str) -> TokenAxis:
    """The token axis of a tensor called ``name``, of this size: the tokens', or a joint one. Refuses products and quotients."""
    if size == block.token:
        return TokenAxis(axis)
    segments = _segments(block, size)
    if segments is None or segments.count(block.token) != 1:
        raise Refused(f"axis {axis} of {name!r} is {size} long, where {block.token} tokens are routed")
    place = segments.index(block.token)
    before = tuple(_size_of(block, segment, name) for segment in segments[:place])
    after = tuple(_size_of(block, segment, name) for segment in segments[place + 1 :])
    return TokenAxis(axis, before, after)


def _segments(block: BlockAnalysis, size: sympy.Expr) -> list[sympy.Expr] | None:
    """A sum of lengths in the order in which the graph concatenates them; None where it is no such sum."""
    if size.is_Symbol or size.is_Integer:
        return [size]
    if not size.is_Add or not all(term.is_Symbol or term.is_Integer for term in size.args):
        return None
    assert block.graph is not None
    for node in block.graph.nodes:
        if node.op != "call_function" or "cat" not in str(node.target) or not isinstance(node.args[0], list | tuple):
            continue
        axis = node.args[1] if len(node.args) > 1 else 0
        if block.dims(node)[axis] == size:
            parts = [_segments(block, block.dims(operand)[axis]) for operand in node.args[0]]
            if all(part is not None for part in parts):
                return [segment for part in parts for segment in part]  # type: ignore[union-attr]
    return None


def _size_of(block: BlockAnalysis, symbol: sympy.Expr, name: str) -> Size:
    """A leaf and axis of exactly this length."""
    for index, dims in enumerate(block.leaf_dims):
        if symbol in dims:
            return index, dims.index(symbol)
    raise Refused(f"input {name!r} joins the tokens with others whose length no input has")


def _axis_names(block: BlockAnalysis) -> dict[sympy.Symbol, str]:
    names = {block.batch: "B", block.token: "N"}
    for dims in block.leaf_dims:
        for symbol in sorted((s for size in dims for s in size.free_symbols), key=str):
            names.setdefault(symbol, f"t{len(names) - 2}")
    return names


def _axis_text(size: sympy.Expr, names: dict[sympy.Symbol, str]) -> str:
    return str(size.xreplace({symbol: sympy.Symbol(name) for symbol, name in names.items()})).replace(" ", "")


def _text(dims: tuple[sympy.Expr, ...]) -> str:
    return "[" + ", ".join(map(str, dims)) + "]"
