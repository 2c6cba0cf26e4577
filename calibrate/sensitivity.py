"""Without training: how much each block suffers from skipping in each timestep region, measured on dense forwards.

With ``skip="reuse"`` the forwards are those of a sampling trajectory, in order: what a skipped token would have taken, had it been
refreshed some steps ago, against the update that it gets. With ``skip="identity"``: each block as it runs at each ratio; with
context from every token, where kept ones come out as from the dense block, the updates that the router would leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import iterate_leaves
from ..errors import CalibrationError
from ..learning import dense
from ..memory import foretell
from ..observe import watch_calls
from ..primitives import score_tokens, share_scores
from ..ratios import BIN, SCALE
from ..region import advance, regions_of_call
from ..routed import BlockRouting, ModelRouting, forward_at, router_vector
from ..sharding import whole
from ..trajectory import Trajectory
from .batches import as_routers_see
from .objective import Finite
from .processes import sum_over_processes
from .rehearsal import NO_TRAJECTORY

BINS = range(0, SCALE + 1, BIN)

OLDEST = 4
"""Ages, in steps, up to which an update is compared; what is older is taken to suffer as the square of its age."""

MEASURED_TOKENS = 512
"""Tokens of a sample, evenly apart, whose updates are kept for the steps after: those of a large model would fill its memory."""


@torch.no_grad()
def measure_suffering(
    model: nn.Module,
    state: ModelRouting,
    batches: Iterable[dict[str, Any]],
    name: Callable[[], str] = lambda: "a batch",
) -> Tensor:
    """Squared error that each ratio brings into the residual stream, as a share of the stream's own square.

    Returns float64 (num_regions, num_blocks, bins): mean over the forwards of each region, of all processes. name: of the batch
    read last. Raises CalibrationError where outputs are not finite, and where reuse is to be measured and no forward continues
    another's trajectory.
    """
    trajectory = Trajectory()
    meters = [_Meter(block, model, state, trajectory) for block in state.blocks]
    outputs = Finite(name)
    seen = batches if state.config.skip == "reuse" else as_routers_see(model, state, batches)
    with dense(model), watch_calls(model, state, after=lambda block, *call: meters[block.index].observe(*call)):
        for batch in seen:
            if state.plan.timestep is not None:
                advance(trajectory, model, state.plan.timestep, batch)
            for meter in meters:
                meter.regions = regions_of_call(model, state, batch)
            outputs.look_at(model(**batch))
    outputs.check()
    for meter in meters:
        sum_over_processes([meter.total, meter.count])
    if state.config.skip == "reuse" and not any(bool(meter.count.any()) for meter in meters):
        raise CalibrationError(NO_TRAJECTORY)
    return torch.stack([meter.mean() for meter in meters], dim=1)


class _Meter:
    """Sums for one block, by region and bin."""

    def __init__(self, block: BlockRouting, model: nn.Module, state: ModelRouting, trajectory: Trajectory) -> None:
        self.block, self.config, self.trajectory = block, state.config, trajectory
        self.module = model.get_submodule(block.fqn)
        self.regions: list[int] = [0]
        self.history: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.ratios = torch.tensor(BINS, dtype=torch.float64, device="cpu") / SCALE
        self.total = torch.zeros(state.num_regions, len(self.ratios), dtype=torch.float64, device="cpu")
        self.count = torch.zeros(state.num_regions, dtype=torch.float64, device="cpu")

    def mean(self) -> Tensor:
        """(num_regions, bins); a region without forwards takes the mean of the others."""
        mean = self.total / self.count.clamp(min=1).unsqueeze(1)
        seen = self.count > 0
        mean[~seen] = mean[seen].mean(dim=0) if bool(seen.any()) else 0.0
        return mean

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        program, values = self.block.read_call(args, kwargs)
        plan, index = program.plan, program.plan.routed_output
        axes = (plan.outputs[index].batch_axis, plan.outputs[index].dims.index("N"))

        def routed(output: Any) -> Tensor:
            tensors = [leaf for _, leaf in iterate_leaves(output) if isinstance(leaf, Tensor)]
            return tensors[index].movedim(axes, (0, 1)).double()

        def run_at(ratio: int) -> Tensor:
            own, named = self.block.own_tokens(args, kwargs)
            return routed(forward_at(self.module, ratio, own, named))

        result, before = routed(output), program.before(index, values).movedim(axes, (0, 1)).double()
        update, scale = result - before, _squares(values[plan.stream].double()).mean() + _squares(result).mean()
        if self.config.skip == "reuse":
            errors = self._stale_errors(update[:, :: -(-update.shape[1] // MEASURED_TOKENS)])
        elif plan.context == "kept":  # kept tokens miss the keys of skipped ones
            errors = torch.stack([_squares(run_at(ratio) - result).mean(dim=1) for ratio in BINS], dim=1)
        else:
            scores = score_tokens(
                values[plan.stream], whole(router_vector(self.module)), plan.token_axis, plan.batch_axis
            )
            errors = self._omitted(update, share_scores(scores) if self.config.guidance == "shared" else scores)
        if errors is not None:
            self._add(errors / scale.clamp(min=1e-12))

    def _add(self, errors: Tensor) -> None:
        """errors: (B, bins)."""
        regions = torch.tensor(self.regions, device="cpu").expand(len(errors))
        self.total.index_add_(0, regions, errors.cpu())
        self.count.index_add_(0, regions, torch.ones(len(errors), dtype=torch.float64, device="cpu"))

    def _omitted(self, update: Tensor, scores: Tensor) -> Tensor:
        """Mean square, over all tokens, of the updates that are left out at each ratio."""
        squares = _squares(update).gather(1, scores.argsort(dim=1))
        sums = torch.cat([torch.zeros_like(squares[:, :1]), squares.cumsum(dim=1)], dim=1)
        places = (self.ratios * squares.shape[1]).long().to(sums.device)
        return sums[:, places] / squares.shape[1]

    def _stale_errors(self, update: Tensor) -> Tensor | None:
        """Mean square, over all tokens, of what reuse gets wrong at each ratio; None where nothing goes before."""
        past = self.history.setdefault(self.trajectory.slot, [])
        if self.trajectory.first or (past and past[0][1].shape != update.shape):
            past.clear()
        now = self.trajectory.now
        errors = None
        if past:
            errors = torch.stack([self._at(float(ratio), past, update, now) for ratio in self.ratios], dim=1)
        past.insert(0, (now, update.float()))
        del past[2 * OLDEST + 2 :]
        return errors

    def _at(self, ratio: float, past: list[tuple[Tensor, Tensor]], update: Tensor, now: Tensor) -> Tensor:
        """Error of one ratio (B,): tokens of every age, each as often as it occurs where all take turns."""
        if ratio == 1:  # never refreshed: as old as the region is long, and taken for OLDEST times OLDEST
            measured = min(OLDEST, len(past))
            return self._error(measured, 1, past, update, now) * (OLDEST**2 / measured) ** 2
        period = 1 / (1 - ratio)
        total = torch.zeros(len(update), dtype=torch.float64, device=update.device)
        for age in range(1, math.ceil(period)):
            share = min(1 / period, max(1 - age / period, 0.0))
            measured = min(age, OLDEST, len(past))
            error = self._error(measured, min(round(period), OLDEST + 1), past, update, now)
            total += share * error * (age / measured) ** 2
        return total

    def _error(self, age: int, spacing: int, past: list[tuple[Tensor, Tensor]], update: Tensor, now: Tensor) -> Tensor:
        """Mean square error (B,) of what updates ``age``, ``age + spacing``, ... steps old foretell."""
        degree = self.config.extrapolation
        used = [past[place] for place in range(age - 1, len(past), spacing)][: degree + 1]
        times = torch.stack([time for time, _ in used]).unsqueeze(-1)
        foretold = foretell([known.double() for _, known in used], times.double(), now.double())
        return _squares(foretold - update).mean(dim=1)


def _squares(x: Tensor) -> Tensor:
    """(B, N, D) -> mean squares (B, N)."""
    return x.square().mean(-1)
