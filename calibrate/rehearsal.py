"""Learning on top of reuse: before a batch is learned from, the steps before it are sampled again, for what they leave in memory.

Dense forwards would not do: they leave every token one step old, and ratios far above a half then seem to cost next to nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from ..errors import CalibrationError
from ..layout import grids_of_call
from ..region import advance, in_one_region, pin_region, regions_of_call, timestep_value
from ..routed import ModelRouting
from ..sharding import is_sharded
from ..trajectory import Trajectory
from .batches import Batch

REHEARSED = 4
"""Steps that are sampled again before one is learned from: as old as a token can be then, and as ``sensitivity`` measures."""

NO_TRAJECTORY = (
    "no batch continues another's trajectory, so what reuse does can't be told. Expected the denoiser's inputs in the order of "
    "sampling, as diffcr_compile.record collects them."
)


def find_predecessors(model: nn.Module, state: ModelRouting, batches: Iterable[Batch]) -> list[list[int]]:
    """For each batch, in the order of sampling, the places of the last ``REHEARSED`` before it in its trajectory, oldest first:
    none for a first step.

    Raises CalibrationError where no batch has any.
    """
    timestep, trajectory = state.plan.timestep, Trajectory()
    past: dict[int, list[int]] = {}
    found: list[list[int]] = []
    for place, batch in enumerate(batches):
        if timestep is None:
            break
        advance(trajectory, model, timestep, batch)
        if trajectory.first:
            past[trajectory.slot] = []
        found.append(past[trajectory.slot][-REHEARSED:])
        past[trajectory.slot].append(place)
    if not any(found):
        raise CalibrationError(NO_TRAJECTORY)
    return found


@contextlib.contextmanager
def rehearsed(
    model: nn.Module, state: ModelRouting, before: Sequence[int], place: int, read: Callable[[int], Batch]
) -> Iterator[None]:
    """Inside, forwards on the batch at ``place``, and their backward, find in memory what a sampling that began with the batches
    ``before`` it leaves at the present table, and change nothing of it. ``read`` gives the batch at a place, when it is run."""
    timestep = state.plan.timestep
    assert timestep is not None
    current, trajectory = state.current, Trajectory(fills=True, degree=state.degree)
    current.trajectory = trajectory
    learning, state.learning = state.learning, None
    state.sync_with_masters()
    # processes that share a model must run it equally often: the first step, which is dense and forgets, is taken again
    repeats = REHEARSED - len(before) if is_sharded(model) else 0
    try:
        for number, each in enumerate(map(read, [before[0]] * repeats + list(before))):
            region = in_one_region(regions_of_call(model, state, each))
            trajectory.grids[0] = grids_of_call(each)
            trajectory.step(timestep_value(each, timestep, model), first=number <= repeats)
            with torch.no_grad(), pin_region(state, region, tuple(block.ratios[region] for block in state.blocks)):
                model(**each)
    finally:
        current.trajectory, state.learning = None, learning
    trajectory.fills, batch = False, read(place)
    trajectory.step(timestep_value(batch, timestep, model), first=False)
    state.rehearsal = trajectory
    try:
        yield
    finally:
        state.rehearsal = None
