"""From learned ratios to a table of bins under an exact budget."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from ..cost import UNITS, CostModel
from ..errors import BudgetError
from ..ratios import BIN, SCALE

_UNITS = 20_000
"""Resolution of the optimisation: savings are counted in this many units, rounded down, so that a budget is never exceeded."""

Rows = list[list[int]]


def snap_table(masters: Tensor, costs: CostModel, budget: float, tolerance: float) -> Rows:
    """The table of bins, in thousandths, nearest to ``masters`` whose share of the dense FLOPs meets the budget.

    A multiple-choice knapsack, solved exactly by dynamic programming: one bin for each (region, block), the summed squared
    distance from the masters least, the FLOPs at most ``budget`` and at least ``budget (1 - tolerance)`` of the dense ones.
    Where the bins are too coarse for that, single ratios leave their bin to use what is left.

    masters: (num_regions, num_blocks) in [0, 1]. Raises BudgetError below what remains at ratio one everywhere.
    """
    learned = masters.detach().double().numpy()
    bins = np.arange(0, SCALE + 1, BIN)
    return _choose((learned[:, :, None] - bins / SCALE) ** 2, costs, budget, tolerance)


def choose_table(suffering: Tensor, costs: CostModel, budget: float, tolerance: float) -> Rows:
    """The table of bins whose summed ``suffering`` (num_regions, num_blocks, bins) is least within the budget; as
    :func:`snap_table`, with another measure of what a bin costs."""
    return _choose(suffering.double().numpy(), costs, budget, tolerance)


def choose_bins(suffering: Tensor, costs: CostModel, budget: float, weights: Tensor) -> Rows:
    """The same for rows that serve (num_rows,) shares of the forwards, their sum at most one: others are dense. What is left of the
    budget is for :func:`use_up`; where it can't be met every ratio is one."""
    shares = weights.double().numpy()
    return _choose_bins(suffering.double().numpy() * shares[:, None, None], costs, budget, shares)


def _choose(penalties: np.ndarray, costs: CostModel, budget: float, tolerance: float) -> Rows:
    rows = _choose_bins(penalties, costs, budget, np.full(len(penalties), 1 / len(penalties)))
    return use_up(rows, costs.share, budget, tolerance)


def _choose_bins(penalties: np.ndarray, costs: CostModel, budget: float, weights: np.ndarray) -> Rows:
    check_reachable(costs, budget)
    num_rows, num_blocks, num_bins = penalties.shape
    saved = [
        [(block.dense - block.at(ratio * BIN)) / costs.dense for ratio in range(num_bins)] for block in costs.blocks
    ]
    savings = (weights[:, None, None] * np.array(saved)[None]).reshape(-1, num_bins)
    penalties = np.where(savings < 0, np.inf, penalties.reshape(-1, num_bins))  # small ratios may cost more than none
    choices = _least_penalty(penalties, np.maximum(savings, 0), at_least=1 - budget)
    return (choices.reshape(num_rows, num_blocks) * BIN).tolist()


def rounded_up(share: float) -> float:
    """To four places, as errors name a share that can be asked for."""
    return min(math.ceil(share * 1e4) / 1e4, 1.0)


def check_reachable(costs: CostModel, budget: float) -> None:
    """Raises BudgetError, naming the minimum, where no table reaches the budget."""
    if budget < costs.minimum_share:
        least = rounded_up(costs.minimum_share)
        raise BudgetError(
            f"budget {budget:g} can't be reached: with every token skipped in every routed block, {least:.4f} of the "
            f"dense {UNITS[costs.unit]} remain (the parts that are not routed). Ask for at least {least:.4f}, or "
            "let more families be routed (filter_fn, min_flops_share)."
        )


def _least_penalty(penalties: np.ndarray, saved: np.ndarray, *, at_least: float) -> np.ndarray:
    """Index of the choice of each item, the summed penalty least with the summed savings ``at_least`` that much.

    Savings beyond it count as it: the state is capped there. penalties, saved: (items, choices).
    """
    if at_least <= 0:
        return penalties.argmin(axis=1)
    unit = at_least / _UNITS
    units = np.minimum(np.floor(saved / unit * (1 + 1e-12)), _UNITS).astype(np.int64)
    best = np.full(_UNITS + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((len(penalties), _UNITS + 1), dtype=np.int8)
    came_from = np.zeros((len(penalties), _UNITS + 1), dtype=np.int32)
    places = np.arange(_UNITS + 1)
    for item, (cost_row, unit_row) in enumerate(zip(penalties, units, strict=True)):
        following = np.full(_UNITS + 1, np.inf)
        for choice, (penalty, gain) in enumerate(zip(cost_row, unit_row, strict=True)):
            total = best + penalty
            inside = _UNITS - gain
            candidates = np.full(_UNITS + 1, np.inf)
            candidates[gain:] = total[: inside + 1]
            sources = np.maximum(places - gain, 0)
            if gain:
                last = inside + int(np.argmin(total[inside:]))
                candidates[_UNITS], sources[_UNITS] = total[last], last
            better = candidates < following
            following = np.where(better, candidates, following)
            taken[item, better] = choice
            came_from[item, better] = sources[better]
        best = following
    if not np.isfinite(best[_UNITS]):
        return np.full(len(penalties), penalties.shape[1] - 1)
    choices = np.zeros(len(penalties), dtype=np.int64)
    place = _UNITS
    for item in range(len(penalties) - 1, -1, -1):
        choices[item] = taken[item, place]
        place = came_from[item, place]
    return choices


def use_up(rows: Rows, share: Callable[[Rows], float], budget: float, tolerance: float) -> Rows:
    """Lower single ratios, from the last row on, each as far as the budget allows, until ``share`` is within the tolerance."""
    for row in range(len(rows) - 1, -1, -1):
        for block in range(len(rows[row])):
            if rows[row][block] == 0:
                continue
            if share(rows) >= budget * (1 - tolerance):
                return rows
            low, high = 0, rows[row][block]
            while low < high:
                middle = (low + high) // 2
                rows[row][block] = middle
                low, high = (low, middle) if share(rows) <= budget else (middle + 1, high)
            rows[row][block] = low
    return rows
