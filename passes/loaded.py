"""Prove a plan that was loaded, on the block at hand: under the same names and shapes its code may be another than when the plan
was made, in another version of a library.

Nothing is exported: the plan names the size of every axis, and a call tells what the others are. The proof is the analysis's own.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ..arguments import map_leaves
from ..defaults import as_written
from ..plan import BlockPlan, LeafPlan
from .analysis import Call, Refused, TensorInfo, describe
from .block import BlockAnalysis, Dims
from .export import duplicate
from .verify import Trial, first_line

_LENGTH = re.compile(r"[BN]|t\d+")
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


@as_written()
def prove_loaded(module: nn.Module, fqn: str, plan: BlockPlan, values: list[Any]) -> None:
    """Refuses a block for which its plan does not hold; ``values``: the leaves of a call of it. Modes that watch operators (a count
    of FLOPs) see nothing of it."""
    with _disable_current_modes():
        block = _planned(module, fqn, plan, [describe(value) for value in values])
        try:
            trial = Trial(replace(block, module=duplicate(block)))
            trial.check_permutation(plan)
            trial.check_program(plan)
        except Exception as error:  # whatever the block's code does
            raise Refused(first_line(error)) from error


def _planned(module: nn.Module, fqn: str, plan: BlockPlan, leaves: list[Any]) -> BlockAnalysis:
    """The analysis of a block as far as its plan tells it."""
    call = Call(
        fqn,
        map_leaves(lambda _, index: None if index is None else leaves[index], plan.arguments),
        plan.output_template,
        in_order=0,
    )
    dims = tuple(_dims(known, leaf) for known, leaf in zip(plan.leaves, leaves, strict=True))
    stream = dims[plan.stream]
    return BlockAnalysis(
        module,
        fqn,
        call,
        config=None,  # type: ignore[arg-type]  # of what to look for, which is found
        leaf_dims=dims,
        stream=plan.stream,
        token=stream[plan.token_axis],
        batch=stream[plan.batch_axis],
        leaves=plan.leaves,
        outputs=plan.outputs,
    )


def _dims(known: LeafPlan, leaf: Any) -> Dims:
    """A leaf's shape in symbols; a size that is written in another way than sums, products and quotients is what it is here."""
    if not isinstance(leaf, TensorInfo):
        return ()
    return tuple(_read_size(text, size) for text, size in zip(known.dims, leaf.shape, strict=True))


def _read_size(text: str, size: int) -> sympy.Expr:
    try:
        return _expression(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        return sympy.Integer(size)


def _expression(node: ast.expr) -> sympy.Expr:
    """An expression in the names of lengths. Files are read by this: nothing in it is run. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and _LENGTH.fullmatch(node.id):
        return sympy.Symbol(node.id, integer=True, positive=True)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return sympy.Integer(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_expression(node.left), _expression(node.right))
    raise ValueError(ast.dump(node))
