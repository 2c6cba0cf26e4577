"""Snapping: the nearest table of bins under an exact budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffcr_compile.calibration.snap import check_reachable, snap_table
from hand import hand_costs
from hypothesis import given
from hypothesis import strategies as st

from diffcr_compile import BudgetError

TOLERANCE = 0.01
TABLES = st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=4)


@given(table=TABLES, budget=st.floats(0.2, 1.0))
def test_the_budget_is_met_and_never_exceeded(table: list[list[float]], budget: float) -> None:
    costs = hand_costs(3, fixed=1_000_000)
    rows = snap_table(torch.tensor(table), costs, budget, TOLERANCE)
    assert budget * (1 - TOLERANCE) <= costs.share(rows) <= budget
    assert all(type(ratio) is int and 0 <= ratio <= 1000 for row in rows for ratio in row)
    assert (len(rows), {len(row) for row in rows}) == (len(table), {3})


@given(table=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), bins=st.integers(1, 29))
def test_it_is_the_nearest_of_all_tables(table: list[float], bins: int) -> None:
    """Against every table of bins that saves enough; only where the bins alone come within the tolerance."""
    costs = hand_costs(3)
    budget = 1 - bins / 60 + 1e-4
    rows = snap_table(torch.tensor([table]), costs, budget, tolerance=1.0)

    def distance(row: tuple[int, ...]) -> float:
        return sum((ratio / 1000 - learned) ** 2 for ratio, learned in zip(row, table, strict=True))

    every = itertools.product(range(0, 1001, 100), repeat=3)
    best = min(distance(row) for row in every if costs.share([list(row)]) <= budget)
    assert distance(tuple(rows[0])) == pytest.approx(best, abs=1e-9)


def test_bins_that_fit_stay() -> None:
    table = [[0.1, 0.4, 0.9], [0.3, 0.0, 1.0]]
    costs = hand_costs(3)
    rows = [[round(ratio * 1000) for ratio in row] for row in table]
    # savings are counted in 20 000 units and rounded down: a little more than these rows cost
    assert snap_table(torch.tensor(table), costs, costs.share(rows) + 1e-3, TOLERANCE) == rows


def test_a_budget_of_one_skips_nothing_that_was_not_learned() -> None:
    assert snap_table(torch.zeros(2, 3), hand_costs(3), 1.0, TOLERANCE) == [[0, 0, 0]] * 2


def test_the_minimum_itself_is_reachable() -> None:
    costs = hand_costs(3, fixed=1_000_000)
    assert snap_table(torch.zeros(2, 3), costs, costs.minimum_share, TOLERANCE) == [[1000] * 3] * 2


def test_below_the_minimum_the_error_names_it() -> None:
    costs = hand_costs(1, fixed=1_000_000)
    check_reachable(costs, 0.5)
    with pytest.raises(BudgetError, match=r"budget 0.4 can't be reached.*Ask for at least 0.5000"):
        check_reachable(costs, 0.4)
