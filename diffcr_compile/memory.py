"""What a routed block remembers under ``skip="reuse"``: each token's last updates, when they were made, and how old they are.

A skipped token takes the update that its last ones, as a polynomial in the timestep, foretell. One :class:`Memory` per routed
block and slot of a trajectory (``trajectory.py``); all writes are in place, so that compiled graphs and CUDA graphs see the same
buffers at every step. Axes: B batch, N tokens, K kept tokens, D width, H = degree + 1 updates remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .config import DiffCRConfig
from .plan import BlockPlan
from .primitives import flat_rows, lay_along, put_tokens

MAX_REACH = 2.0
"""Extrapolation goes at most this many times the distance between a token's last two updates beyond the last one: further on a
straight line says little, and few or uneven steps would blow it up. Nor is a parabola taken through updates of which the last
two lie more than this many times as far apart as the two before: a token takes their straight line."""

_EPSILON = 1e-12


class Memory(NamedTuple):
    """updates: for each routed output, newest first, (H, B N, D) in the output's own order of batch and tokens. times: timesteps
    of those updates, float32 (H, B, N). age: forwards since a token was last kept, float32 (B, N). rank: order in which tokens of
    the same age are kept, float32 (N,) in [0, 1). now: the timestep, float32 (1,) or (B,). degree: of the polynomial that is
    followed, float32 () from 0 (the last update is repeated) to H - 1, between two degrees a mix of both. context: with stale
    context, keys and values of all tokens as their attention takes them. beside: updates of the streams that are not routed (text
    beside the picture), newest first, (H, ...) in the stream's own shape, for when the block is skipped whole; beside_times:
    timesteps of those, float32 (H, B), or (H, 0) where there are none."""

    updates: tuple[Tensor, ...]
    times: Tensor
    age: Tensor
    rank: Tensor
    now: Tensor
    degree: Tensor
    beside_times: Tensor
    context: tuple[Tensor, ...] = ()
    beside: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        held = (*self.updates, self.times, self.age, *self.context, *self.beside, self.beside_times)
        return sum(tensor.nbytes for tensor in held)


def allocate(plan: BlockPlan, values: list[Any], config: DiffCRConfig, now: Tensor) -> Memory:
    """Empty memory for a block's call with these leaves."""
    stream = values[plan.stream]
    batch, num_tokens = stream.shape[plan.batch_axis], stream.shape[plan.token_axis]
    num_updates, dtype = config.extrapolation + 1, _memory_dtype(config, stream)
    updates = []
    for output in plan.outputs:
        if output.routed:
            width = int(output.dims[-1])
            updates.append(stream.new_zeros(num_updates, batch * num_tokens, width, dtype=dtype))
    times = torch.zeros(num_updates, batch, num_tokens, dtype=torch.float32, device=stream.device)
    age = torch.zeros(batch, num_tokens, dtype=torch.float32, device=stream.device)
    rank = torch.zeros(num_tokens, dtype=torch.float32, device=stream.device)
    degree = torch.tensor(float(config.extrapolation), dtype=torch.float32, device=stream.device)
    context = tuple(stream.new_zeros(shape, dtype=dtype) for shape in _context_shapes(plan, values))
    beside = tuple(
        stream.new_zeros((num_updates, *values[source].shape), dtype=dtype) for source in plan.beside.values()
    )
    beside_times = times.new_zeros(num_updates, batch if beside else 0)
    return Memory(tuple(updates), times, age, rank, now, degree, beside_times, context, beside)


def _context_shapes(plan: BlockPlan, values: list[Any]) -> list[tuple[int, ...]]:
    """Shapes of the keys and values that are remembered of a call with these leaves."""
    stream, shapes = values[plan.stream], []
    for state in plan.states:
        others = sum(values[index].shape[axis] for index, axis in (*state.tokens.before, *state.tokens.after))
        sizes = {
            state.batch_axis: stream.shape[plan.batch_axis],
            state.tokens.axis: stream.shape[plan.token_axis] + others,
        }
        shapes.append(tuple(sizes[axis] if axis in sizes else int(size) for axis, size in enumerate(state.dims)))
    return shapes


def _memory_dtype(config: DiffCRConfig, stream: Tensor) -> torch.dtype:
    return stream.dtype if config.memory_dtype is None else getattr(torch, config.memory_dtype)


def blank(plan: BlockPlan, values: list[Any]) -> Memory:
    """Memory that foretells nothing, for a forward outside any trajectory: its skipped tokens bypass the block."""
    now = torch.zeros(1, dtype=torch.float32, device=values[plan.stream].device)
    return allocate(plan, values, DiffCRConfig(skip="reuse", extrapolation=0), now)


def fits(memory: Memory, plan: BlockPlan, values: list[Any]) -> bool:
    """Whether memory is of this call's batch, tokens and device. (Its dtype may be another: a stream that its blocks widen is
    narrower where one was skipped.)"""
    stream = values[plan.stream]
    shape = (stream.shape[plan.batch_axis], stream.shape[plan.token_axis])
    shapes = [tuple(memory.age.shape), *(tuple(held.shape) for held in memory.context)]
    shapes += [tuple(held.shape[1:]) for held in memory.beside]
    beside = [tuple(values[source].shape) for source in plan.beside.values()]
    return shapes == [shape, *_context_shapes(plan, values), *beside] and memory.age.device == stream.device


def is_of_dtype(memory: Memory, plan: BlockPlan, values: list[Any], config: DiffCRConfig) -> bool:
    """Whether memory would be made in the dtype it has, were it made for this call."""
    return memory.updates[0].dtype == _memory_dtype(config, values[plan.stream])


def writable(memory: Memory) -> Memory:
    """The memory, copied where it was made in inference mode and this is outside."""
    if torch.is_inference_mode_enabled() or not memory.age.is_inference():
        return memory
    return pytree.tree_map(lambda tensor: tensor.clone(), memory)


def oldest_first(memory: Memory) -> Tensor:
    """Priority of every token, float32 (B, N): its age, and among the same age its place in the interleaved order."""
    return memory.age - memory.rank


def older_and_higher(scores: Tensor, memory: Memory) -> Tensor:
    """Priority of every token, float32 (B, N): a point for each forward since it was kept, and its router's score in (0, 1)."""
    return memory.age + scores.sigmoid()


def resume_tokens(x: Tensor, memory: Memory, index: int, token_axis: int, batch_axis: int) -> Tensor:
    """``x`` plus what the memory foretells of the update of each of its tokens, for routed output ``index``."""
    history = memory.updates[index]
    axes = (min(token_axis, batch_axis), max(token_axis, batch_axis))
    rows = (x.shape[axes[0]], x.shape[axes[1]])
    result = x
    weights = _weights(memory.times, memory.now.unsqueeze(-1), memory.degree)
    for update, weight in zip(history, weights, strict=True):
        update = update.unflatten(0, rows).movedim((0, 1), axes).to(x.dtype)
        result = (
            result + update
            if weight is None
            else result + lay_along(weight, x, token_axis, batch_axis).to(x.dtype) * update
        )
    return result


def resume_beside(x: Tensor, memory: Memory, index: int, batch_axis: int) -> Tensor:
    """``x`` plus what the memory foretells of the update of a stream that is not routed, the ``index``-th of those."""
    result = x
    weights = _weights(memory.beside_times, memory.now, memory.degree)
    for update, weight in zip(memory.beside[index], weights, strict=True):
        if weight is not None:
            shape = [-1 if axis == batch_axis else 1 for axis in range(x.ndim)]
            update = weight.view(shape).to(x.dtype) * update.to(x.dtype)
        result = result + update.to(x.dtype)
    return result


def foretell(updates: list[Tensor], times: Tensor, now: Tensor) -> Tensor:
    """What updates (B, N, D), newest first, made at ``times`` (H, B, N) or so, foretell for the timestep ``now`` (1,) or (B,)."""
    weights = _weights(times, now.unsqueeze(-1), torch.tensor(len(times) - 1, dtype=times.dtype, device=times.device))
    parts = (
        update if weight is None else weight.unsqueeze(-1) * update
        for update, weight in zip(updates, weights, strict=True)
    )
    return torch.stack(list(parts)).sum(dim=0)


def _weights(times: Tensor, now: Tensor, degree: Tensor) -> Sequence[Tensor | None]:
    """Weight (B, N) of each remembered update: the Newton polynomial of this degree through them, at the present timestep.

    A token with fewer different times than the degree asks for takes the polynomial of those that it has.
    """
    if len(times) == 1:
        return [None]
    ahead = now - times[0]
    gap = times[0] - times[1]
    reach = (MAX_REACH * gap).abs()
    ahead = ahead.clamp(-reach, reach)
    slope = degree.clamp(0, 1) * _safe_divide(ahead, gap)
    weights = [1 + slope, -slope]
    if len(times) == 3:
        gap2, span = times[1] - times[2], times[0] - times[2]
        even = (gap2.abs() > _EPSILON) & (gap.abs() > _EPSILON) & (gap.abs() <= MAX_REACH * gap2.abs() + _EPSILON)
        bend = _safe_divide(ahead * (ahead + gap), span) * even
        bend = (degree - 1).clamp(0, 1) * bend
        first, second = _safe_divide(bend, gap), _safe_divide(bend, gap2)
        weights = [weights[0] + first, weights[1] - first - second, second]
    return weights


def _safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero where the denominator is."""
    empty = denominator.abs() <= _EPSILON
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


@torch.no_grad()
def remember_tokens(memory: Memory, kept: Tensor, updates: list[Tensor], axes: list[tuple[int, int]]) -> None:
    """Note the updates of the kept tokens (B, K), one tensor for each routed output with its (token axis, batch axis)."""
    for history, update, (token_axis, batch_axis) in zip(memory.updates, updates, axes, strict=True):
        rows = _rows_of(kept, memory, token_axis, batch_axis)
        order = (min(token_axis, batch_axis), max(token_axis, batch_axis))
        values = update.detach().movedim(order, (0, 1)).flatten(0, 1).to(history.dtype)
        values = torch.cat([values.unsqueeze(0), history[:-1].index_select(1, rows)])
        levels = torch.arange(len(history), device=rows.device).unsqueeze(1)
        # one write into the whole buffer: of one into a part of it a graph makes a copy of all, and copies that back
        history.index_put_((levels, rows.unsqueeze(0)), values)
    times, places = memory.times, kept.expand(len(memory.times), *kept.shape)
    now = memory.now.unsqueeze(-1).expand(kept.shape)
    times.scatter_(2, places, torch.cat([now.unsqueeze(0), times[:-1].gather(2, places[1:])]))
    memory.age.add_(1).scatter_(1, kept, 0.0)


@torch.no_grad()
def remember_all(memory: Memory, updates: list[Tensor], axes: list[tuple[int, int]], *, first: bool) -> None:
    """Note the updates of all tokens after a dense call; ``first``: of a trajectory, so that nothing before counts."""
    for history, update, (token_axis, batch_axis) in zip(memory.updates, updates, axes, strict=True):
        order = (min(token_axis, batch_axis), max(token_axis, batch_axis))
        values = update.detach().movedim(order, (0, 1)).flatten(0, 1)
        for later in range(len(history) - 1, 0, -1):
            history[later].copy_(values if first else history[later - 1])
        history[0].copy_(values)
    times = memory.times
    for later in range(len(times) - 1, 0, -1):
        times[later].copy_(memory.now.unsqueeze(-1).expand(times[0].shape) if first else times[later - 1])
    times[0].copy_(memory.now.unsqueeze(-1).expand(times[0].shape))
    memory.age.zero_()


@torch.no_grad()
def remember_beside(memory: Memory, updates: list[Tensor], *, first: bool = False) -> None:
    """Note the updates of the streams that are not routed, after a call that was not skipped; ``first``: of a trajectory."""
    if not updates:
        return
    now = memory.now.expand(memory.beside_times.shape[1])
    for held, latest in (*zip(memory.beside, updates, strict=True), (memory.beside_times, now)):
        for later in range(len(held) - 1, 0, -1):
            held[later].copy_(latest.detach() if first else held[later - 1])
        held[0].copy_(latest.detach())


@torch.no_grad()
def remember_context(memory: Memory, kept: list[Tensor], fresh: list[Tensor], axes: list[tuple[int, int]]) -> None:
    """Note keys and values of kept tokens, each with its positions (B, K) and its (token axis, batch axis)."""
    for held, positions, tokens, places in zip(memory.context, kept, fresh, axes, strict=True):
        held.copy_(put_tokens(held, positions, tokens.to(held.dtype), *places))


@torch.no_grad()
def remember_all_context(memory: Memory, fresh: Sequence[Tensor]) -> None:
    """Note keys and values of all tokens after a dense call."""
    for held, tokens in zip(memory.context, fresh, strict=True):
        held.copy_(tokens)


def _rows_of(kept: Tensor, memory: Memory, token_axis: int, batch_axis: int) -> Tensor:
    batch, num_tokens = memory.age.shape
    return flat_rows(kept, batch, num_tokens, batch_first=batch_axis < token_axis).flatten()
