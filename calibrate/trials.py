"""Without training, with reuse: tables worth trying, and the trial of each on a recorded trajectory.

What every block would suffer by itself (``sensitivity.py``) leaves out that errors of successive blocks cancel where they are of
one step, and add up where tokens are fresh in one block and stale in the next. So whole tables are run on what was recorded: where
the sampler can be told from it (``sampler.py``) each on a sampling of its own, and how far its samples end from the dense ones
decides; else on the recorded inputs, and what the outputs differ by decides. Which steps can be spared depends on the picture's way
from noise, and no proposal knows it: rows of the best table are swapped between neighbouring steps as long as that brings samples
nearer.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import UNITS, CostModel
from ..errors import BudgetError, CalibrationError
from ..ratios import SCALE
from ..region import regions_of_call
from ..routed import ModelRouting
from ..table import write_table
from .objective import output_tensors
from .processes import of_all_processes
from .sampler import Sampler
from .snap import Rows, choose_bins, rounded_up, use_up

CARRIED = 0.8
"""Where the sampler is unknown, what is left in the next step of an error: those of successive steps that point one way add
up."""

NUM_DENSE = 2
"""Steps at the beginning of a trajectory that whole-step tables leave dense: a straight line needs two updates."""

FARTHEST = 2
"""Steps between two that swap their rows."""

MOST_GROUPS = 10
"""Rows that a table chosen block by block may have after the dense one: each is a graph to compile."""


@dataclass(frozen=True)
class Trial:
    """A table that was tried, by a polynomial of a degree through updates; swapped: after its steps were."""

    name: str
    degree: float
    rows: Rows
    error: float
    swapped: bool = False

    def __str__(self) -> str:
        followed = ("", ", extrapolated", ", extrapolated by parabolas")[int(self.degree)]
        return self.name + followed + (", steps swapped" if self.swapped else "")


@dataclass(frozen=True)
class Visited:
    """Where the recorded forwards lie. counts: by timestep region, in order of their first visit, how many go on from others.
    begins: how many begin a trajectory, or a slot of one, and are dense whatever the table."""

    counts: Mapping[int, int]
    begins: int

    @property
    def regions(self) -> list[int]:
        return list(self.counts)

    @property
    def dense_rows(self) -> int:
        """1 where the first region holds nothing but the beginnings of trajectories, and others are there to save in; else 0."""
        return int(len(self.counts) > 1 and self.counts[self.regions[0]] == 0)

    @property
    def total(self) -> int:
        """Forwards."""
        return self.begins + sum(self.counts.values())


def visited_regions(
    model: nn.Module, state: ModelRouting, batches: Iterable[dict[str, Any]], before: Sequence[Sequence[int]]
) -> Visited:
    """Where the batches lie, of all processes; ``before``: the places of those that each goes on from.

    Raises CalibrationError where the samples of one batch lie in several regions: with reuse they take their steps together.
    """
    counts: Counter[int] = Counter()
    for place, batch in enumerate(batches):
        regions = set(regions_of_call(model, state, batch))
        if len(regions) > 1:
            raise CalibrationError(
                f"the samples of batch {place} lie in timestep regions {sorted(regions)}. With skip='reuse' expected the "
                "denoiser's inputs while it samples, all of a batch at one timestep, as diffcr_compile.record collects them."
            )
        counts.update(dict.fromkeys(regions, int(bool(before[place]))))
    merged: Counter[int] = Counter()
    begins = 0
    for each, first in of_all_processes((counts, sum(not places for places in before))):
        merged.update(each)
        begins += first
    return Visited(merged, begins)


def share_of_table(rows: Rows, visited: Visited, costs: CostModel) -> float:
    """Of the dense cost, the mean over the timestep regions or over the forwards that were recorded, whichever is more: steps stand
    for more regions here and fewer there, and those that begin a trajectory are dense."""
    spent = sum(count * costs.row_cost(rows[region]) for region, count in visited.counts.items())
    return max(costs.share(rows), (visited.begins + spent / costs.dense) / visited.total)


def propose_tables(
    suffering: Tensor, visited: Visited, costs: CostModel, budget: float, tolerance: float
) -> dict[str, Rows]:
    """Tables within the budget, by name, each once. In all of them the first step visited is dense, as it is in any trajectory,
    unless other steps lie in its region.

    suffering: (num_regions, num_blocks, bins). Regions that no step visited have the row of one beside them that one did. Tables
    that can't reach the budget are left out. Raises BudgetError, naming the minimum, where none can.
    """
    num_regions, num_blocks, _ = suffering.shape
    regions = visited.regions
    nearest = _neighbours(regions, num_regions)
    counts = torch.tensor(list(visited.counts.values()), dtype=torch.float64, device="cpu")
    weights = torch.bincount(nearest, minlength=len(regions)).double() / num_regions
    weights = torch.minimum(weights, counts / visited.total)  # by neither measure are savings less

    def expand(rows: Rows) -> Rows:
        return [list(rows[int(place)]) for place in nearest]

    def share(rows: Rows) -> float:
        return share_of_table(expand(rows), visited, costs)

    first = visited.dense_rows
    others = len(regions) - first
    dense, skipped = [0] * num_blocks, [SCALE] * num_blocks
    worst = int(suffering[regions].mean(dim=(0, 2)).argmax())
    spared = [0 if block == worst else SCALE for block in range(num_blocks)]
    all_dense, all_skipped = [dense] * len(regions), [dense] * first + [skipped] * others
    minimum = share(all_skipped)
    if budget < minimum:
        least = rounded_up(minimum)
        raise BudgetError(
            f"budget {budget:g} can't be reached: {visited.begins} of the {visited.total} steps recorded begin a trajectory and "
            f"are dense, so that with every token skipped in the others {least:.4f} of the dense {UNITS[costs.unit]} remain. Ask "
            f"for at least {least:.4f}, or record samplings of more steps."
        )
    needed = (1 - budget) / max(1 - costs.minimum_share, 1e-9)
    evenly = torch.ones(len(regions), dtype=torch.float64, device="cpu")
    late = 0.5 + torch.linspace(0, 1, len(regions), dtype=torch.float64, device="cpu")
    whole = {
        f"whole steps{when}{how}": _whole_steps(weights, needed, density, all_skipped, part)
        for when, density in (("", evenly), (", later ones", late))
        for how, part in (("", 0.5), (", blocks of one given back", 0.0))
    }
    proposed = {
        "block by block": (_by_blocks(suffering, regions, weights, costs, budget, first), [all_skipped]),
        "uniform": (all_dense, [all_skipped]),
        "uniform, one block dense": (all_dense, [[dense] * first + [spared] * others]),
        **whole,
    }
    tables: dict[str, Rows] = {}
    for name, (rows, limits) in proposed.items():
        table = _within(rows, limits, share, budget)
        if share(table) <= budget:
            table = expand(use_up(table, share, budget, tolerance))
            if table not in tables.values():
                tables[name] = table
    return tables


def _within(rows: Rows, limits: Iterable[Rows], share: Callable[[Rows], float], budget: float) -> Rows:
    """A copy of ``rows``, raised towards one limit after the other by as little as meets the budget, or by all of them."""
    rows = [list(row) for row in rows]
    for limit in limits:
        if share(rows) <= budget:
            break
        low, high = 0, SCALE
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if share(_raised(rows, limit, middle)) <= budget else (middle + 1, high)
        rows = _raised(rows, limit, low)
    return rows


def _raised(rows: Rows, limit: Rows, ratio: int) -> Rows:
    """Every ratio at least ``ratio`` thousandths of its limit."""
    return [
        [max(given, most * ratio // SCALE) for given, most in zip(row, limits, strict=True)]
        for row, limits in zip(rows, limit, strict=True)
    ]


def _neighbours(regions: Sequence[int], num_regions: int) -> Tensor:
    """For each region the place in ``regions`` of the nearest region there, above, below or either way: as gives the steps the most
    equal parts of the range, whatever end of its interval a sampler takes for a step."""
    distance = torch.arange(num_regions, device="cpu").unsqueeze(1) - torch.tensor(regions, device="cpu")
    far = num_regions * 2
    ways = (
        distance.abs(),
        torch.where(distance >= 0, distance, far - distance),
        torch.where(distance <= 0, -distance, far + distance),
    )
    places = [way.argmin(dim=1) for way in ways]
    return min(
        places, key=lambda place: float(torch.bincount(place, minlength=len(regions)).double().var(correction=0))
    )


def _whole_steps(
    weights: Tensor, needed: float, density: Tensor, all_skipped: Rows, part: float
) -> tuple[Rows, list[Rows]]:
    """A table that skips some of the steps visited whole, spread evenly by ``density``, each as late as it is due, since errors of
    early steps decide what a picture becomes: as many as ``needed`` of the weight asks for, and one more where more than ``part``
    of it is lacking. And limits to raise it to for what it lacks then: one step more each, from the last on."""
    density = density.clone()
    density[:NUM_DENSE] = 0
    density *= needed / max(float((density * weights).sum()), 1e-12)
    dense = [0] * len(all_skipped[0])
    skips, owed = [], 0.0
    for weight, rate in zip(weights.tolist(), density.tolist(), strict=True):
        owed += rate * weight
        skips.append(rate > 0 and owed >= weight * (1 - 1e-9))
        owed -= weight * skips[-1]
    others = [place for place in range(len(skips) - 1, NUM_DENSE - 1, -1) if not skips[place]]
    while others and owed > max(part * float(weights[others[0]]), 1e-9):
        owed -= float(weights[others[0]])
        skips[others.pop(0)] = True
    limits = [[row if at == place else dense for at, row in enumerate(all_skipped)] for place in others]
    return [row if skip else dense for row, skip in zip(all_skipped, skips, strict=True)], [*limits, all_skipped]


def _by_blocks(
    suffering: Tensor, regions: Sequence[int], weights: Tensor, costs: CostModel, budget: float, first: int
) -> Rows:
    """The table of the regions, in a few groups of equal rows, that suffers least; those before ``first`` are dense."""
    others = torch.arange(first, len(regions), device="cpu")
    groups = [group.tolist() for group in others.tensor_split(min(MOST_GROUPS, len(others)))]
    means = torch.stack([suffering[[regions[place] for place in group]].mean(dim=0) for group in groups])
    shares = torch.stack([weights[group].sum() for group in groups])
    chosen = choose_bins(means, costs, budget, shares)
    dense = [[0] * suffering.shape[1]] * (len(regions) - len(others))
    return dense + [row for group, row in zip(groups, chosen, strict=True) for _ in group]


def swap_steps(
    trial: Trial,
    visited: Visited,
    error: Callable[[Rows, float], float],
    fits: Callable[[Rows], bool],
    calls: int,
    seed: int,
) -> tuple[Trial, int]:
    """A trial of lower error, by swapping the rows of steps that lie near each other, in random order; and the calls left.

    visited: of which the first keeps its row. error: of a table and a degree. fits: whether a table is
    within the budget (steps that stand for several regions weigh more). calls: how often ``error`` may be called; it ends before
    where no swap helps. Single blocks' ratios are left where they are: there are many more of them to try, and few pictures to try
    them on.
    """
    rows, least = trial.rows, trial.error
    regions = visited.regions
    nearest = _neighbours(regions, len(rows)).tolist()
    generator = random.Random(seed)
    seen = {_key(rows)}

    def swapped(first: int, second: int) -> Rows:
        moved = {first: second, second: first}
        return [list(rows[regions[moved.get(place, place)]]) for place in nearest]

    def neighbours() -> list[Rows]:
        steps = range(1, len(regions))
        pairs = [(i, j) for i in steps for j in steps if 0 < j - i <= FARTHEST]
        generator.shuffle(pairs)
        return [swapped(*pair) for pair in pairs]

    candidates = neighbours()
    while candidates and calls:
        candidate = candidates.pop()
        if _key(candidate) in seen or not fits(candidate):
            continue
        seen.add(_key(candidate))
        calls -= 1
        found = error(candidate, trial.degree)
        if found < least:
            rows, least = candidate, found
            candidates = neighbours()
    return replace(trial, rows=rows, error=least, swapped=trial.swapped or least < trial.error), calls


def _key(rows: Rows) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, rows))


@torch.no_grad()
def try_table(
    model: nn.Module,
    state: ModelRouting,
    rows: Rows,
    degree: float,
    batches: Iterable[dict[str, Any]],
    targets: Iterable[list[Tensor]],
    sampler: Sampler | None = None,
) -> float:
    """Mean squared error of a table, as a share of the dense result's square, on recorded steps in order; infinite where it is no
    number.

    Of the samples where the sampler is known. Else of the outputs on the recorded inputs: errors of successive steps are added up,
    ``CARRIED`` each time.
    """
    write_table(state, rows)
    state.degree, state.current.trajectory = degree, None
    measure = functools.partial(_error_of_outputs, state=state) if sampler is None else sampler.error
    try:
        error = measure(model, batches=batches, targets=targets)
    finally:
        state.current.trajectory = None
    return error if math.isfinite(error) else math.inf


def _error_of_outputs(
    model: nn.Module, batches: Iterable[dict[str, Any]], targets: Iterable[list[Tensor]], *, state: ModelRouting
) -> float:
    carried: dict[int, list[Tensor]] = {}
    total, scale = 0.0, 0.0
    for batch, target in zip(batches, targets, strict=True):
        outputs = output_tensors(model(**batch))
        errors = [
            output.float() - dense.to(output.device).float() for output, dense in zip(outputs, target, strict=True)
        ]
        trajectory = state.current.trajectory
        slot, first = (0, True) if trajectory is None else (trajectory.slot, trajectory.first)
        before = carried.get(slot)
        if before is not None and not first and [e.shape for e in before] == [e.shape for e in errors]:
            errors = [error + CARRIED * past for error, past in zip(errors, before, strict=True)]
        carried[slot] = errors
        total += sum(float(error.square().mean()) for error in errors)
        scale += sum(float(dense.float().square().mean()) for dense in target)
    return total / max(scale, 1e-12)
