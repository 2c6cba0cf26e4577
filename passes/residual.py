"""Join outputs to inputs: an output that is an input plus something lets a skipped token leave as it came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

_SUMS = {"add": 2, "add_": 2, "iadd": 2, "addcmul": 1, "addcmul_": 1, "sub": 1, "sub_": 1}
"""Sums, with the number of leading operands that they carry: x + y both, x + a b and x - y only x."""
_MOVES = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "to", "_to_copy", "type_as", "clone", "contiguous",
    "slice", "split", "split_with_sizes", "chunk", "unbind", "narrow", "select", "cat", "concat", "unsqueeze", "squeeze",
    "expand", "alias", "detach", "dropout", "flatten", "unflatten", "clip", "clamp", "nan_to_num", "getitem", "swapaxes",
    "movedim", "stack",
}  # fmt: skip
"""Operators that move values, or keep them where nothing overflows (clamping in half precision)."""
_NORMS = {"layer_norm", "native_layer_norm", "rms_norm"}
"""Norms over the width: where one is taken of a sum (``x = norm(x + f(x))``, a layer that is normed last), the stream goes on
through it."""


def residual_sources(output: fx.Node) -> set[fx.Node]:
    """Placeholders that reach ``output`` through sums, norms of sums, and moves alone."""
    sources, seen, stack = set(), set(), [output]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            sources.add(node)
        elif node.op == "call_function":
            stack.extend(_operands(node))
    return sources


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    name = operator_name(node.target)
    if name in _SUMS:
        operands = node.args[: _SUMS[name]]
    elif is_move(name) or _is_nothing(name, node) or _is_normed_sum(name, node):
        operands = node.args[:1]
    else:
        operands = ()
    for operand in operands:
        if isinstance(operand, fx.Node):
            yield operand
        elif isinstance(operand, list | tuple):
            yield from (item for item in operand if isinstance(item, fx.Node))


def _is_nothing(name: str, node: fx.Node) -> bool:
    return name in ("mul", "div") and isinstance(node.args[1], int | float) and node.args[1] == 1


def _is_normed_sum(name: str, node: fx.Node) -> bool:
    value = node.args[0] if name in _NORMS else None
    return isinstance(value, fx.Node) and value.op == "call_function" and operator_name(value.target) in _SUMS


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and everything that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def is_move(name: str) -> bool:
    """Whether an operator moves values about without changing them."""
    return name in _MOVES


def operator_name(target: Any) -> str:
    """``add`` for ``aten.add.Tensor``."""
    packet = getattr(target, "overloadpacket", target)
    return getattr(packet, "__name__", str(packet))
