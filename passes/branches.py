"""Branches: modules whose *caller* adds their output to what they were given, as in ``x = x + gate * attn(norm(x))``.

Their skip value is zero: a skipped token takes nothing from the branch and stays as it is. The proof is in the caller's
graph: every way out of the branch leads, through moves, casts and gates alone, into a sum whose other side the branch's own
input was made from.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from .analysis import Refused
from .block import to_expression
from .residual import ancestors, is_move, operator_name

_GATES = {"mul", "mul_", "div", "dropout"}
"""Operators that a zero passes through."""
_REORDERS = {"cat", "concat", "stack", "permute", "transpose", "swapaxes", "movedim", "t"}
"""Moves that may leave the shape as it is, and the tokens elsewhere."""
_CASTS = {"to", "_to_copy", "type_as"}


def prove_added(graph: fx.Graph, branch: str) -> None:
    """Refuses unless the caller whose exported ``graph`` this is adds the output of its submodule ``branch``."""
    inside = {node for node in graph.nodes if _lies_in(node, branch)}
    if not inside:
        raise Refused("no output is an input plus something, and it does not show in its caller's graph")
    given = {operand for node in inside for operand in node.all_input_nodes if operand not in inside}
    carried = ancestors(given)
    for node in inside:
        for user in _users(node):
            if user not in inside and not _ends_in_sum(node, user, carried):
                raise Refused("no output is an input plus something, and its caller does not just add it to the tokens")


def _ends_in_sum(value: fx.Node, user: fx.Node, carried: set[fx.Node]) -> bool:
    """Whether ``value`` goes from ``user`` on into sums with what the branch was given, whatever way it takes."""
    name = operator_name(user.target) if user.op == "call_function" else ""
    if name in ("add", "add_", "iadd", "addcmul") and not _keeps_places(value, user):
        return False
    if name in ("add", "add_", "iadd"):
        others = [operand for operand in user.args[:2] if operand is not value]
        return len(others) == 1 and _uncast(others[0]) in carried
    if name == "addcmul":
        return _uncast(user.args[0]) in carried and user.args[0] is not value
    if (name in _GATES or is_move(name)) and _keeps_places(value, user):
        return bool(_users(user)) and all(_ends_in_sum(user, following, carried) for following in _users(user))
    return False


def _users(node: fx.Node) -> list[fx.Node]:
    """What takes a value, but for what only checks its dtype."""
    return [user for user in node.users if not operator_name(user.target).startswith("_assert")]


def _uncast(value: Any) -> Any:
    """What a value was before casts, in which the stream and the branch may be added."""
    while isinstance(value, fx.Node) and value.op == "call_function" and operator_name(value.target) in _CASTS:
        value = value.args[0]
    return value


def _keeps_places(value: fx.Node, user: fx.Node) -> bool:
    """Whether a value's tokens are where they were: its shape is the same (a width that is made from another input's may be written
    otherwise), or one of several outputs is taken."""
    before, after = value.meta.get("val"), user.meta.get("val")
    if isinstance(before, list | tuple):
        return operator_name(user.target) == "getitem"
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or operator_name(user.target) in _REORDERS:
        return False
    if len(before.shape) != len(after.shape):
        return False
    apart = [to_expression(a) - to_expression(b) for a, b in zip(before.shape, after.shape, strict=True)]
    return not any(apart[:-1]) and all(difference == 0 or difference.free_symbols for difference in apart[-1:])


def _lies_in(node: fx.Node, branch: str) -> bool:
    """Whether a node was traced in the submodule ``branch`` of the exported caller, or below it."""
    names = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return any(name == f"block.{branch}" or name.startswith(f"block.{branch}.") for name in names)
