"""Tables that are tried without training."""

from __future__ import annotations

import math

import pytest
import torch
from diffcr_compile.calibration import trials
from diffcr_compile.calibration.objective import dense_outputs
from diffcr_compile.calibration.rehearsal import find_predecessors
from diffcr_compile.calibration.snap import Rows
from diffcr_compile.calibration.trials import (
    Trial,
    Visited,
    propose_tables,
    share_of_table,
    swap_steps,
    try_table,
    visited_regions,
)
from hand import hand_costs
from hypothesis import given
from hypothesis import strategies as st
from models import Shape, TinyDiT, original, tiny_inputs
from torch import Tensor

import diffcr_compile
from diffcr_compile.cost import measure_costs
from diffcr_compile.routed import STATE, ModelRouting

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=3, heads=1, head_dim=6)
STEPS = tuple(float(step) for step in range(980, 0, -70))
TOLERANCE = 0.01
WHOLE = {"whole steps", "whole steps, later ones"}
NAMES = {
    "block by block",
    "uniform",
    "uniform, one block dense",
    *WHOLE,
    *(f"{name}, blocks of one given back" for name in WHOLE),
}


def suffering(num_regions: int, num_blocks: int = 3) -> Tensor:
    """Rising with the ratio; block 1 suffers most."""
    by_block = torch.tensor([1.0, 5.0, 2.0])[:num_blocks]
    return (torch.linspace(0, 1, 11).square() * by_block.unsqueeze(-1)).double().expand(num_regions, num_blocks, 11)


def once(regions: list[int]) -> Visited:
    """One trajectory, with one step in each of the regions."""
    return Visited({region: int(place > 0) for place, region in enumerate(regions)}, 1)


def trajectory(steps: tuple[float, ...] = STEPS, change: float = 1.0) -> list[dict[str, Tensor]]:
    batches = []
    for step in steps:
        inputs = tiny_inputs(PLAIN, timestep=step)
        inputs["x"] = inputs["x"] * (1 + change * step / 1000)
        batches.append(inputs)
    return batches


def reusing(**options: object) -> tuple[TinyDiT, ModelRouting]:
    model = original(PLAIN)
    config = diffcr_compile.DiffCRConfig(skip="reuse", **options)  # type: ignore[arg-type]
    diffcr_compile.transform(model, config, example_inputs=tiny_inputs(PLAIN))
    return model, model.__dict__[STATE]


@given(
    budget=st.floats(0.4, 0.95),
    num_steps=st.integers(4, 25),
    offset=st.integers(0, 1),
    num_regions=st.sampled_from([25, 50]),
)
def test_every_table_meets_the_budget(budget: float, num_steps: int, offset: int, num_regions: int) -> None:
    """First step dense; every region that no step visited has the row of one beside it that one did."""
    costs = hand_costs(3, fixed=1_000_000)
    visited = list(dict.fromkeys((num_steps - 1 - i) * num_regions // num_steps + offset for i in range(num_steps)))
    visited = [min(region, num_regions - 1) for region in visited]
    visited = list(dict.fromkeys(visited))
    tables = propose_tables(suffering(num_regions), once(visited), costs, budget, TOLERANCE)
    assert "block by block" in tables
    assert set(tables) <= NAMES
    assert len({str(rows) for rows in tables.values()}) == len(tables)
    for rows in tables.values():
        assert costs.share(rows) <= budget + 1e-12
        assert costs.share([rows[region] for region in visited]) <= budget + 1e-12
        assert len(rows) == num_regions
        assert all(type(ratio) is int and 0 <= ratio <= 1000 for row in rows for ratio in row)
        assert rows[visited[0]] == [0, 0, 0]
        for region, row in enumerate(rows):
            above = next((rows[other] for other in sorted(visited) if other >= region), None)
            below = next((rows[other] for other in sorted(visited, reverse=True) if other <= region), None)
            assert row in (above, below)


def test_most_of_the_budget_is_used() -> None:
    costs = hand_costs(3, fixed=1_000_000)
    visited = once(list(range(48, -1, -2)))
    for rows in propose_tables(suffering(50), visited, costs, 0.6, TOLERANCE).values():
        assert share_of_table(rows, visited, costs) >= 0.6 * (1 - TOLERANCE)


def test_whole_steps_are_dense_or_skipped_and_the_first_two_are_dense() -> None:
    costs = hand_costs(3, fixed=1_000_000)
    visited = list(range(48, -1, -2))
    rows = propose_tables(suffering(50), once(visited), costs, 0.6, TOLERANCE)["whole steps"]
    kinds = [set(rows[region]) for region in visited]
    assert kinds[:2] == [{0}, {0}]
    assert sum(kind == {1000} for kind in kinds) >= 8
    assert sum(kind not in ({0}, {1000}) for kind in kinds) <= 1
    assert all({0} in kinds[place : place + 3] for place in range(len(kinds) - 2))


def test_what_whole_steps_lack_is_taken_from_one_step_more() -> None:
    """Half of 50 steps would do but for what is computed beside the blocks: no further step is given up for that."""
    costs = hand_costs(3, fixed=30_000)
    rows = propose_tables(suffering(50), once(list(range(49, -1, -1))), costs, 0.5, TOLERANCE)["whole steps"]
    assert sum(row == [1000] * 3 for row in rows) == 25
    (part,) = [row for row in rows if row not in ([0] * 3, [1000] * 3)]
    assert 0 < max(part) < 200
    assert 0.5 * (1 - TOLERANCE) <= costs.share(rows) <= 0.5


def test_one_block_that_suffers_most_is_spared() -> None:
    rows = propose_tables(suffering(10), once([9, 6, 3, 0]), hand_costs(3), 0.7, TOLERANCE)["uniform, one block dense"]
    assert all(row[1] == 0 for row in rows)
    assert any(row[0] > 0 for row in rows)


def test_regions_are_listed_as_they_are_visited() -> None:
    model, state = reusing(num_regions=10)
    batches = trajectory((950.0, 910.0, 450.0, 50.0, 990.0, 930.0))
    before = find_predecessors(model, state, batches)
    visited = visited_regions(model, state, batches, before)
    assert visited == Visited({9: 2, 4: 1, 0: 1}, 2)
    assert visited.regions == [9, 4, 0]
    assert visited.total == 6


def test_samples_at_different_timesteps_are_refused() -> None:
    model, _ = reusing()
    batches = trajectory()
    batches[3]["timestep"] = batches[3]["timestep"] * torch.tensor([1.0, 0.5, 0.1])
    with pytest.raises(diffcr_compile.CalibrationError, match=r"samples of batch 3 lie in timestep regions \[.*record"):
        diffcr_compile.calibrate(model, batches, budget=0.6)


def errors_of(rows: Rows, degree: float = 1.0, steps: tuple[float, ...] = STEPS) -> float:
    model, state = reusing(num_regions=10)
    batches = trajectory(steps)
    targets = [dense_outputs(model, batch) for batch in batches]
    return try_table(model, state, rows, degree, batches, targets)


def test_the_dense_table_has_no_error_and_more_skipping_has_more() -> None:
    found = [errors_of([[ratio] * 3] * 10) for ratio in (0, 300, 1000)]
    assert found[0] == 0 < found[1] < found[2]


def test_a_straight_line_is_better_extrapolated() -> None:
    """In small steps the tokens change in proportion to the timestep, and so nearly do the updates."""
    rows, steps = [[500] * 3] * 10, tuple(900 - i / 20 for i in range(10))
    assert errors_of(rows, 1.0, steps) < 0.5 * errors_of(rows, 0.0, steps)


def test_the_best_of_what_was_tried_is_taken() -> None:
    model, state = reusing()
    report = diffcr_compile.calibrate(model, trajectory(), budget=0.6)
    straight = {name.removesuffix(", extrapolated") for name in report.trials if name.endswith(", extrapolated")}
    assert straight == set(report.trials) - {f"{name}, extrapolated" for name in straight}
    assert {"block by block", "uniform", "whole steps"} <= straight <= NAMES
    best = min(report.trials, key=lambda name: report.trials[name])
    assert state.degree == float(best.endswith("extrapolated"))
    batches = trajectory()
    rows = [[round(float(ratio) * 1000) for ratio in row] for row in report.table]
    targets = [dense_outputs(model, batch) for batch in batches]
    assert try_table(model, state, rows, state.degree, batches, targets) == pytest.approx(report.trials[best], rel=1e-5)
    visited = visited_regions(model, state, batches, find_predecessors(model, state, batches))
    share = share_of_table(rows, visited, measure_costs(model, batches[0]))
    assert 0.6 * (1 - TOLERANCE) <= share <= 0.6
    assert report.share <= 0.6
    assert f"tried: {best}: error" in str(report)
    assert type(report).from_dict(report.to_dict()).trials == report.trials


VISITED = [9, 7, 5, 3, 1]


def stepwise(skipped: str) -> Rows:
    """A table of ten regions and two blocks; steps in order of their visit, x where one is skipped whole."""
    row = {"x": [1000, 1000], ".": [0, 0]}
    return [list(row[skipped[4 - region // 2]]) for region in range(10)]


def misplaced(rows: Rows) -> float:
    """How far the skipped steps are from the last ones."""
    return float(sum((4 - place) ** 2 for place, region in enumerate(VISITED) if rows[region] == [1000, 1000]))


def swapped_steps(calls: int, **options: object) -> tuple[Rows, float, list[Rows]]:
    seen: list[Rows] = []

    def error(rows: Rows, degree: float) -> float:
        assert degree == 1
        seen.append(rows)
        return misplaced(rows)

    start = stepwise(".xx..")
    given = {"fits": lambda rows: True, "seed": 0, **options}
    trial = Trial("whole steps", 1.0, start, misplaced(start))
    found, left = swap_steps(trial, once(VISITED), error, calls=calls, **given)  # type: ignore[arg-type]
    assert left == calls - len(seen)
    assert str(found) == "whole steps, extrapolated" + ", steps swapped" * (found.rows != start)
    return found.rows, found.error, seen


def test_rows_are_swapped_for_the_better_until_none_helps() -> None:
    rows, least, seen = swapped_steps(1000)
    assert rows == stepwise("...xx")
    assert least == misplaced(rows)
    assert len(seen) < 20
    assert len({str(each) for each in seen}) == len(seen)
    assert all(each[9] == [0, 0] and sum(map(sum, each)) == sum(map(sum, rows)) for each in seen)


def test_no_more_tables_are_tried_than_asked_for_and_the_seed_decides_which() -> None:
    assert swapped_steps(0) == (stepwise(".xx.."), misplaced(stepwise(".xx..")), [])
    assert len(swapped_steps(3)[2]) == 3
    assert swapped_steps(3, seed=1) == swapped_steps(3, seed=1)
    assert any(swapped_steps(3, seed=seed)[2] != swapped_steps(3)[2] for seed in range(1, 5))


def test_a_table_above_the_budget_is_not_tried() -> None:
    rows, _, seen = swapped_steps(1000, fits=lambda rows: rows[1] == [0, 0])
    assert rows == stepwise("..xx.")
    assert all(each[1] == [0, 0] for each in seen)


def test_a_failed_calibration_leaves_the_extrapolation_as_it_was() -> None:
    model, state = reusing()
    state.degree = 0.5
    batches = trajectory()
    del batches[5]["timestep"]
    with pytest.raises(diffcr_compile.DiffCRError):
        diffcr_compile.calibrate(model, batches, budget=0.6)
    assert state.degree == 0.5
    assert not diffcr_compile.ratios(model).any()


def test_the_extrapolation_is_saved(tmp_path: object) -> None:
    model, state = reusing()
    diffcr_compile.set_ratios(model, 0.5)
    state.degree = 0.0
    diffcr_compile.save(model, f"{tmp_path}/routing")
    other = diffcr_compile.load(original(PLAIN), f"{tmp_path}/routing")
    assert other.__dict__[STATE].degree == 0.0
    with torch.no_grad():
        for batch in trajectory():
            assert torch.equal(model(**batch), other(**batch))


def test_whole_steps_that_would_need_one_of_the_first_two_take_part_of_it() -> None:
    visited, costs = [9, 6, 3, 0], hand_costs(3)
    rows = propose_tables(suffering(10), once(visited), costs, 0.4, TOLERANCE)["whole steps"]
    assert [rows[region] for region in (9, 3, 0)] == [[0] * 3, [1000] * 3, [1000] * 3]
    assert all(0 < ratio < 1000 for ratio in rows[6])
    assert share_of_table(rows, once(visited), costs) <= 0.4


def test_where_a_step_more_than_needed_is_skipped_its_blocks_are_given_back() -> None:
    """What four steps lack is nearer to one of them than to two: one and a part of another, or two but for some blocks."""
    visited = [9, 6, 3, 0]
    tables = propose_tables(suffering(10), once(visited), hand_costs(3), 0.7, TOLERANCE)
    nearest, more = (
        [tables[name][region] for region in visited]
        for name in ("whole steps", "whole steps, blocks of one given back")
    )
    assert nearest == [[0] * 3, [0] * 3, [334] * 3, [1000] * 3]
    assert more == [[0] * 3, [0] * 3, [1000] * 3, [0, 0, 400]]


def test_a_budget_below_the_first_step_is_refused_by_name() -> None:
    visited, costs = once([9, 6, 3, 0]), hand_costs(3)
    least = share_of_table([[1000] * 3] * 8 + [[0] * 3] * 2, visited, costs)
    named = math.ceil(least * 1e4) / 1e4
    expected = rf"1 of the 4 steps recorded begin .* in the others {named:.4f} .*more steps"
    with pytest.raises(diffcr_compile.BudgetError, match=expected):
        propose_tables(suffering(10), visited, costs, least - 0.01, TOLERANCE)
    assert propose_tables(suffering(10), visited, costs, named, TOLERANCE)


@given(
    budget=st.floats(0.3, 0.95),
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    begins=st.integers(1, 3),
    num_regions=st.sampled_from([6, 10]),
)
def test_the_budget_holds_by_the_recorded_steps_however_they_lie(
    budget: float, counts: list[int], begins: int, num_regions: int
) -> None:
    """Several trajectories, whose first steps are dense; regions with many steps or none but first ones."""
    costs = hand_costs(3)
    visited = Visited({num_regions - 1 - place: count for place, count in enumerate(counts)}, begins)
    try:
        tables = propose_tables(suffering(num_regions), visited, costs, budget, TOLERANCE)
    except diffcr_compile.BudgetError:
        return
    assert "block by block" in tables
    for rows in tables.values():
        steps = [rows[region] for region, count in visited.counts.items() for _ in range(count)]
        assert costs.share([*steps, *[[0] * 3] * begins]) <= budget + 1e-12
        assert costs.share(rows) <= budget + 1e-12
        assert not visited.dense_rows or rows[num_regions - 1] == [0] * 3


@pytest.mark.parametrize("starts", [(980.0,), (980.0, 500.0), (980.0, 600.0, 300.0)])
@pytest.mark.parametrize("options", [{}, {"num_regions": 1}])
def test_what_is_computed_on_the_recorded_steps_is_the_budget(
    starts: tuple[float, ...], options: dict[str, int]
) -> None:
    """Counted token by token: pictures begun at several strengths, one region for all."""
    model, _ = reusing(**options)
    batches = [batch for start in starts for batch in trajectory(tuple(step for step in STEPS if step <= start))]
    config = diffcr_compile.CalibrationConfig(preset="training-free", budget_kind="tokens")
    diffcr_compile.calibrate(model, batches, budget=0.6, config=config)
    with torch.no_grad(), diffcr_compile.trace(model) as seen:
        for batch in batches:
            model(**batch)
    kept = [tokens.shape[1] / batches[0]["x"].shape[1] for calls in seen.kept.values() for tokens in calls]
    assert 0.6 * (1 - 0.1) <= sum(kept) / len(kept) <= 0.6 + 1e-9  # the mean over the regions is nearer


def test_a_table_whose_outputs_are_not_finite_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **named: object) -> float:
        return math.nan

    model, _ = reusing()
    monkeypatch.setattr(trials, "_error_of_outputs", broken)
    with pytest.raises(diffcr_compile.CalibrationError, match=r"none of the \d+ tables .* outputs finite"):
        diffcr_compile.calibrate(model, trajectory(), budget=0.6)


def test_swaps_stay_within_the_tolerance() -> None:
    """Steps that stand for several regions weigh more: seven of them, unevenly spread."""
    model, state = reusing()
    batches = trajectory((980.0, 960.0, 940.0, 700.0, 400.0, 380.0, 20.0))
    config = diffcr_compile.CalibrationConfig(preset="training-free", budget_kind="tokens")
    diffcr_compile.calibrate(model, batches, budget=0.6, config=config)
    visited = visited_regions(model, state, batches, find_predecessors(model, state, batches))
    share = share_of_table(state.rows, visited, measure_costs(model, batches[0]).in_tokens())
    assert 0.6 * (1 - config.tolerance) <= share <= 0.6
