"""What is known of one candidate block; the state that the block passes fill in, from its export to the finished plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..arguments import Path, iterate_leaves, map_leaves, positional_names, signature_of
from ..config import DiffCRConfig
from ..context import ContextGraph
from ..plan import BlockPlan, LeafPlan, Lift, OutputPlan
from .analysis import Call, TensorInfo

Dims = tuple[sympy.Expr, ...]
"""A tensor's shape, each size an expression in the symbols of the exported graph."""


FIXED_BATCH = sympy.Symbol("batch", integer=True, positive=True)
"""The batch size of a block whose export fixed it."""


@dataclass(frozen=True)
class BlockAnalysis:
    """A candidate block.

    leaves: the leaves of its call that are not None, in order; leaf_dims and output_dims: shapes of the tensor ones and of
    the tensor outputs; graph_inputs: the graph's placeholder of each tensor leaf; program: what the graph was
    taken from. token and batch: the symbols of the routed
    tokens' length and of the batch size. is_branch: its caller adds what it returns, as proved in the caller's graph.
    fixed_batch: the batch size of the captured call, where the block's code counts to it (a loop over samples) and export
    fixed it. layout: rank and token axis of its token input, where this one attends to nothing (a feed-forward).
    """

    module: nn.Module
    fqn: str
    call: Call
    config: DiffCRConfig
    graph: fx.Graph | None = None
    leaf_dims: tuple[Dims, ...] = ()
    graph_inputs: tuple[fx.Node, ...] = ()
    graph_outputs: tuple[fx.Node, ...] = ()
    attention: str = ""
    token_symbols: frozenset[sympy.Symbol] = frozenset()
    token: sympy.Symbol | None = None
    batch: sympy.Symbol | None = None
    stream: int = -1
    leaves: tuple[LeafPlan, ...] = ()
    outputs: tuple[OutputPlan, ...] = ()
    is_branch: bool = False
    layout: tuple[int, int] | None = None
    fixed_batch: int | None = None
    plan: BlockPlan | None = None
    program: ExportedProgram | None = None
    context_graph: ContextGraph | None = None
    context_proof: ContextGraph | None = None

    @property
    def kind(self) -> str:
        """The class name, for messages."""
        return type(self.module).__name__

    @property
    def call_leaves(self) -> list[tuple[Path, Any]]:
        """Leaves of the call that are not None, with their paths."""
        return [(path, leaf) for path, leaf in iterate_leaves(self.call.arguments) if leaf is not None]

    @property
    def captured_sizes(self) -> dict[sympy.Symbol, int]:
        """What each symbol stood for in the captured call."""
        return {
            size: number
            for dims, (_, leaf) in zip(self.leaf_dims, self.call_leaves, strict=True)
            if isinstance(leaf, TensorInfo)
            for size, number in zip(dims, leaf.shape, strict=True)
            if size.is_Symbol
        }

    def dims(self, value: Any) -> Dims:
        """Shape of a node of the graph, or of a tensor."""
        shape = value.meta["val"].shape if isinstance(value, fx.Node) else value.shape
        return self.free_batch(tuple(to_expression(size) for size in shape))

    def free_batch(self, dims: Dims) -> Dims:
        """A shape with a leading axis of the fixed batch size taken for the batch."""
        if self.fixed_batch is None or not dims or dims[0] != self.fixed_batch:
            return dims
        return (FIXED_BATCH, *dims[1:])

    def draft_plan(self, lift: Lift) -> BlockPlan:
        """The plan as known after the leaves are planned, for one form of lifting, not yet proved."""
        leaves = dict(enumerate(self.leaves))
        indices = iter(range(len(leaves)))
        outputs = iter(range(len(self.outputs)))
        stream = self.leaves[self.stream]
        assert stream.batch_axis is not None
        return BlockPlan(
            kind=self.kind,
            positional=positional_names(type(self.module)),
            signature=signature_of(map_leaves(as_meta, self.call.arguments)),
            arguments=map_leaves(lambda _, leaf: None if leaf is None else next(indices), self.call.arguments),
            leaves=self.leaves,
            output_template=map_leaves(
                lambda _, leaf: next(outputs) if isinstance(leaf, TensorInfo) else None, self.call.output
            ),
            outputs=self.outputs,
            stream=self.stream,
            token_axis=stream.token_axes[0].axis,
            batch_axis=stream.batch_axis,
            width=int(self.leaf_dims[self.stream][-1]),
            attention=self.attention,
            lift=lift,
            error=float("nan"),
        )


def to_expression(size: Any) -> sympy.Expr:
    """A size, symbolic or not, as an expression."""
    return sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)


def as_meta(_: Path, leaf: Any) -> Any:
    """A described tensor as one on the meta device; other leaves as they are."""
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, TensorInfo) else leaf
