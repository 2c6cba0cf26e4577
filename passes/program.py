"""Write the routed program of a block as an FX graph.

Before, the block is one call::

    out = block(x, temb, rope)

After, with K = k of N tokens kept::

    scores = score_tokens(x, router)            # (B, N)
    kept = select_tokens(scores, k)             # (B, K)
    x_kept = take_tokens(x, kept)               # and so for every input that follows the tokens
    rope_kept = take_shared_tokens(rope, kept)
    out = call_block(block, (x_kept, temb, rope_kept))
    out = gate_exact(out, x_kept, take_scores(scores, kept))
    out = put_tokens(x, kept, out)

Kept tokens are the block's own result on them (what ``verify`` proves), skipped ones keep their bits (``put_tokens``).
Lossy at k < N by design; at k = N it is never run. With full context ``block`` is the rewritten graph of ``context.py``, called on
all tokens and on the kept ones; with reuse the tokens are put into what the memory foretells instead of into ``x``, and the
memory is brought up to date.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .. import memory, primitives
from ..arguments import map_leaves, unbind_arguments
from ..config import DiffCRConfig
from ..plan import PLACEHOLDERS, BlockPlan, LeafPlan, TokenAxis
from ..routed import Program

_GATES = {"exact": primitives.gate_exact, "sigmoid": primitives.gate_sigmoid}
_CALLS: dict[str, Callable[..., Any]] = {"vmap": primitives.call_per_sample, "loop": primitives.call_in_loop}


def write_program(plan: BlockPlan, config: DiffCRConfig) -> Program:
    """The program of ``plan``: a graph with the placeholders block, router, k, with reuse the block's memory, and one per leaf, in
    order; it returns the block's output tensors and the positions kept."""
    graph = _Writer(plan, config).write()
    return Program(plan, fx.GraphModule({}, graph, class_name=f"Routed{plan.kind}"))


def _held(remembered: memory.Memory, index: int) -> torch.Tensor:
    return remembered.context[index]


class _Writer:
    """Builds one graph; every method appends nodes and returns the last."""

    def __init__(self, plan: BlockPlan, config: DiffCRConfig) -> None:
        self.plan, self.config = plan, config
        self.graph = fx.Graph()
        self.memory: fx.Node | None = None

    def write(self) -> fx.Graph:
        plan = self.plan
        *names, remembered = PLACEHOLDERS
        block, router, k = map(self.graph.placeholder, names)
        if self.config.skip == "reuse":
            self.memory = self.graph.placeholder(remembered)
        self.leaves = [self.graph.placeholder(leaf.name) for leaf in plan.leaves]
        axes = (plan.token_axis, plan.batch_axis)
        scores = self._call("scores", primitives.score_tokens, self.leaves[plan.stream], router, *axes)
        if self.config.guidance == "shared":
            scores = self._call("shared_scores", primitives.share_scores, scores)
        self.kept = self._call("kept", primitives.select_tokens, self._priority(scores), k)
        self._joint: dict[TokenAxis, fx.Node] = {}
        taken = [self._take(index, leaf) for index, leaf in enumerate(plan.leaves)]
        given = list(taken)
        if plan.in_place:
            given[plan.stream] = self.graph.call_method("clone", (taken[plan.stream],))
        results = self._call_block(block, given)
        outputs = []
        self.updates: list[fx.Node] = []
        for index, output in enumerate(plan.outputs):
            result = self._call(f"out_{index}", operator.getitem, results, index)
            if output.routed:
                result = self._put(index, result, taken, scores)
            outputs.append(result)
        if self.memory is not None:
            places = [(output.dims.index("N"), output.batch_axis) for output in plan.outputs if output.routed]
            self._call("remembered", memory.remember_tokens, self.memory, self.kept, self.updates, places)
            self._remember_context(results)
            beside = [
                self._call(f"update_{index}", operator.sub, outputs[index], self.leaves[source])
                for index, source in plan.beside.items()
            ]
            if beside:
                self._call("remembered_beside", memory.remember_beside, self.memory, beside)
        self.graph.output((tuple(outputs), self.kept))
        self.graph.lint()
        return self.graph

    def _call(self, name: str, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.create_node("call_function", function, args, name=name)

    def _priority(self, scores: fx.Node) -> fx.Node:
        """What the kept tokens have most of."""
        if self.config.selection == "turn":
            return self._call("priority", memory.oldest_first, self.memory)
        if self.config.selection == "score and turn":
            return self._call("priority", memory.older_and_higher, scores, self.memory)
        return scores

    def _indices(self, axis: TokenAxis) -> fx.Node:
        """Kept positions along an axis: those of the stream, or theirs within a joint sequence."""
        if not axis.joint:
            return self.kept
        key = TokenAxis(0, axis.before, axis.after)
        if key not in self._joint:
            before, after = self._length(axis.before), self._length(axis.after)
            num_tokens = self._size(self.plan.stream, self.plan.token_axis)
            self._joint[key] = self._call("kept_joint", primitives.place_indices, self.kept, before, num_tokens, after)
        return self._joint[key]

    def _length(self, sizes: tuple[tuple[int, int], ...]) -> Any:
        total: Any = 0
        for index, axis in sizes:
            size = self._size(index, axis)
            total = size if total == 0 else self._call("length", operator.add, total, size)
        return total

    def _size(self, index: int, axis: int) -> fx.Node:
        return self.graph.call_method("size", (self.leaves[index], axis))

    def _take(self, index: int, leaf: LeafPlan) -> fx.Node:
        """The leaf with its token axes indexed by what is kept; as it is where it has none."""
        node, batch_axis, shift = self.leaves[index], self._batch_axis(leaf), 0
        for axis in leaf.token_axes:
            name, indices = f"{leaf.name}_kept", self._indices(axis)
            if batch_axis is None:
                node = self._call(name, primitives.take_shared_tokens, node, indices, axis.axis)
                batch_axis, shift = 0, 1
            else:
                node = self._call(name, primitives.take_tokens, node, indices, axis.axis + shift, batch_axis)
        return node

    def _batch_axis(self, leaf: LeafPlan) -> int | None:
        """The leaf's axis over samples; for the inserted form, an axis of size one that can be widened."""
        if leaf.batch_axis is None and self.plan.lift == "inserted axis":
            place = self.plan.batch_axis
            return place if place < len(leaf.dims) and leaf.dims[place] == "1" else None
        return leaf.batch_axis

    def _call_block(self, block: fx.Node, taken: list[fx.Node]) -> fx.Node:
        if self.plan.context != "kept":
            return self._call_context(block, taken)
        bound = map_leaves(lambda _, index: None if index is None else taken[index], self.plan.arguments)
        args, kwargs = unbind_arguments(self.plan.positional, bound)
        if self.plan.lift not in _CALLS:
            return self._call("results", primitives.call_block, block, args, kwargs)
        leaves = [leaf for leaf in self.plan.leaves if leaf.is_tensor]
        axes = tuple(0 if leaf.batch_axis is None and leaf.token_axes else leaf.batch_axis for leaf in leaves)
        own_batch = tuple(leaf.batch_axis is not None for leaf in leaves)
        out_axes = tuple(output.batch_axis for output in self.plan.outputs)
        return self._call("results", _CALLS[self.plan.lift], block, args, kwargs, axes, own_batch, out_axes)

    def _call_context(self, block: fx.Node, taken: list[fx.Node]) -> fx.Node:
        """The rewritten graph, on the positions kept, on all tokens, on the kept ones, and on the keys and values remembered."""
        plan = self.plan
        states = [self._call(f"held_{index}", _held, self.memory, index) for index in range(len(plan.states))]
        tensors = [
            (leaf, node, kept)
            for leaf, node, kept in zip(plan.leaves, self.leaves, taken, strict=True)
            if leaf.is_tensor
        ]
        moving = [(leaf, kept) for leaf, _, kept in tensors if leaf.token_axes]
        args = (self.kept, *(node for _, node, _ in tensors), *(kept for _, kept in moving), *states)
        if plan.lift not in _CALLS:
            return self._call("results", primitives.call_block, block, args, {})
        state_axes = tuple(state.batch_axis for state in plan.states)
        side_axes = (*(leaf.batch_axis for leaf, _, _ in tensors), *(leaf.batch_axis or 0 for leaf, _ in moving))
        axes = (0, *side_axes, *state_axes)
        side_own = (*(True for _ in tensors), *(leaf.batch_axis is not None for leaf, _ in moving))
        own_batch = (True, *side_own, *(True for _ in states))
        out_axes = (*(output.batch_axis for output in plan.outputs), *state_axes)
        return self._call("results", _CALLS[plan.lift], block, args, {}, axes, own_batch, out_axes)

    def _remember_context(self, results: fx.Node) -> None:
        """Note the kept tokens' keys and values, which the rewritten graph returns after the block's outputs."""
        states, first = self.plan.states, len(self.plan.outputs)
        if states:
            fresh = [
                self._call(f"fresh_{index}", operator.getitem, results, first + index) for index in range(len(states))
            ]
            kept = [self._indices(state.tokens) for state in states]
            places = [(state.tokens.axis, state.batch_axis) for state in states]
            self._call("remembered_context", memory.remember_context, self.memory, kept, fresh, places)

    def _put(self, index: int, result: fx.Node, taken: list[fx.Node], scores: fx.Node) -> fx.Node:
        """Gate the stream's result, and put it back among the tokens that were skipped."""
        output = self.plan.outputs[index]
        axes = (output.dims.index("N"), output.batch_axis)
        if output.source is None:
            before = self._call("blank_kept", torch.zeros_like, result)
            num_tokens = self._size(self.plan.stream, self.plan.token_axis)
            base = self._call("blank", primitives.blank_tokens, result, num_tokens, axes[0])
        else:
            before, base = taken[output.source], self.leaves[output.source]
        skipped = before
        gates = index == self.plan.routed_output and self.config.selection != "turn"
        if self.memory is not None:
            routed = len(self.updates)
            base = self._call(f"resumed_{index}", memory.resume_tokens, base, self.memory, routed, *axes)
            if gates:
                skipped = self._call(f"resumed_{index}_kept", primitives.take_tokens, base, self.kept, *axes)
        if gates:
            kept_scores = self._call("kept_scores", primitives.take_scores, scores, self.kept)
            result = self._call(f"gated_{index}", _GATES[self.config.gate], result, skipped, kept_scores, *axes)
        if self.memory is not None:
            self.updates.append(self._call(f"update_{index}", operator.sub, result, before))
        return self._call(f"routed_{index}", primitives.put_tokens, base, self.kept, result, *axes)
