"""What the report says of routers and tables: each kind of collapse is named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffcr_compile.calibration.examine import NUM_BINS, examine_losses, examine_routers, examine_table
from models import Shape, TinyDiT, routed, same_snapshot, snapshot, tiny_inputs
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CalibrationConfig, CalibrationReport
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
STEPS = torch.tensor([20.0, 400.0, 950.0])
BATCHES = [tiny_inputs(SHAPE, num_tokens=40, seed=seed, timestep=STEPS.roll(seed)) for seed in range(3)]
SETTLED = CalibrationConfig(steps=1, trainable="routers", warm_start=False, ramp=0.0, settle=1.0)
"""One step at the table that was set, by which routers move too little to recover."""

VARIED = [[0.3, 0.5], [0.4, 0.6], [0.5, 0.3], [0.6, 0.4]]


def report_of(
    table: Any = VARIED, *, change: Callable[[TinyDiT], None] = lambda model: None, batches: Any = BATCHES
) -> CalibrationReport:
    model = routed(SHAPE)
    diffcr_compile.set_ratios(model, table)
    change(model)
    return diffcr_compile.calibrate(model, batches, budget=0.9, config=SETTLED)


def weight_of(model: TinyDiT, block: int) -> Tensor:
    return model.blocks[block].diffcr_router.weight  # type: ignore[union-attr,return-value]


@torch.no_grad()
def collapse(model: TinyDiT) -> None:
    weight_of(model, 1).zero_()


class Positions(nn.Module):
    """In place of the tokens' embedding: the same tokens in every sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, width, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[: x.shape[1]].expand(len(x), -1, -1)


def look_at_positions_alone(model: TinyDiT) -> None:
    model.embed = Positions(6)  # type: ignore[assignment]


def test_nothing_is_said_of_what_is_healthy() -> None:
    report = report_of()
    assert report.diagnostics == ()
    assert "note:" not in str(report)


def test_after_learning_nothing_is_said() -> None:
    report = diffcr_compile.calibrate(
        routed(SHAPE), BATCHES, budget=0.6, config=CalibrationConfig(steps=20, trainable="routers")
    )
    assert report.diagnostics == ()


def test_a_collapsed_router_is_named() -> None:
    model = routed(SHAPE)
    collapse(model)
    config = CalibrationConfig(preset="training-free", warm_start=False)
    report = diffcr_compile.calibrate(model, BATCHES, budget=0.65, config=config)
    assert report.diagnostics == ("blocks.1: the router gives every token of a sample the same score",)
    assert str(report).endswith("note: blocks.1: the router gives every token of a sample the same score")


def test_a_router_that_sees_positions_alone_is_named() -> None:
    report = report_of(change=look_at_positions_alone)
    assert report.diagnostics[0] == (
        "blocks.0: the router ranks the same positions first in every sample, whatever it sees"
    )


def test_one_sample_tells_nothing_of_positions() -> None:
    batch = tiny_inputs(SHAPE, batch=1, num_tokens=40, timestep=400.0)
    assert report_of(change=look_at_positions_alone, batches=[batch]).diagnostics == ()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_routers_that_choose_nothing_are_not_looked_at(ratio: float) -> None:
    table = [[0.5, ratio]] * 3 + [[0.4, ratio]]
    assert report_of(table, change=collapse).diagnostics == ()


def test_a_flat_table_is_named() -> None:
    (remark,) = report_of(0.4).diagnostics
    assert remark == "the table is flat: every ratio is 0.4, nothing was learned about layers or timesteps"


def test_equal_rows_are_named() -> None:
    (remark,) = report_of([[0.4, 0.5]] * 4).diagnostics
    assert remark == "every timestep region has the same row: nothing was learned about timesteps"


@pytest.mark.parametrize(
    ("table", "budget", "said"),
    [
        (torch.full((4, 2), 0.3), 0.7, "flat"),
        (torch.full((4, 2), 0.0), 1.0, ""),
        (torch.full((1, 1), 0.3), 0.7, ""),
        (torch.full((1, 2), 0.3), 0.7, "flat"),
        (torch.tensor([[0.3, 0.4]]), 0.7, ""),
        (torch.tensor([[0.3, 0.4], [0.3, 0.4]]), 0.7, "same row"),
        (torch.tensor([[0.3], [0.4]]), 0.7, ""),
    ],
)
def test_tables(table: Tensor, budget: float, said: str) -> None:
    remarks = examine_table(table, budget)
    assert len(remarks) == bool(said)
    assert said in "".join(remarks)


def test_histograms_count_every_token_of_every_router() -> None:
    model = routed(SHAPE)
    histograms, _ = examine_routers(model, routing_of(model), BATCHES)
    assert len(histograms) == 2
    for index, (low, high, counts) in enumerate(histograms):
        assert len(counts) == NUM_BINS
        assert sum(counts) == 3 * 3 * 40
        with torch.no_grad():
            seen: list[Tensor] = []
            handle = model.blocks[index].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            for batch in BATCHES:
                model(**batch)
            handle.remove()
            scores = torch.cat(seen) @ weight_of(model, index)
        assert low == pytest.approx(float(scores.min()), abs=1e-5)  # float32, another order
        assert high == pytest.approx(float(scores.max()), abs=1e-5)
        expected = torch.histogram(scores.flatten(), bins=NUM_BINS, range=(low, high)).hist
        # a score on the border of two bins may fall to either
        assert float((torch.tensor(counts) - expected).abs().sum()) <= 4


def test_looking_changes_nothing() -> None:
    model = routed(SHAPE)
    diffcr_compile.set_ratios(model, VARIED)
    before = snapshot(model)
    examine_routers(model, routing_of(model), BATCHES)
    assert same_snapshot(snapshot(model), before)
    assert not routing_of(model).dense


def test_without_routers_nothing_is_shown() -> None:
    """Tokens in turn: no router takes part."""
    config = diffcr_compile.DiffCRConfig(skip="reuse")
    from models import original

    model = diffcr_compile.transform(original(SHAPE), config, example_inputs=tiny_inputs(SHAPE))
    trajectory = [
        tiny_inputs(SHAPE, num_tokens=40, timestep=step, seed=1) for step in (900.0, 700.0, 500.0, 300.0, 100.0)
    ]
    report = diffcr_compile.calibrate(model, trajectory, budget=0.7)
    assert report.scores == ()
    assert not any("router" in remark for remark in report.diagnostics)


@pytest.mark.parametrize(
    ("losses", "remarks"),
    [
        ([0.5, 2.0] * 5 + [0.6] * 90, 0),
        ([0.1] * 50 + [2.0] * 50, 1),
        ([0.1] * 99 + [50.0], 0),  # one batch
        ([0.0] * 10 + [1.0] * 90, 0),  # a distance from the dense model
        ([-1.0] * 10 + [5.0] * 10, 0),
        ([], 0),
    ],
)
def test_a_loss_that_grew_is_remarked(losses: list[float], remarks: int) -> None:
    assert len(examine_losses(losses)) == remarks


def test_a_loss_of_ones_own_that_diverged_is_said_in_the_report() -> None:
    calls, model = 0, routed(SHAPE)

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        nonlocal calls
        calls += 1
        return model(**batch).square().mean() + float(calls)

    config = CalibrationConfig(steps=25, trainable="routers")
    report = diffcr_compile.calibrate(model, BATCHES, budget=0.8, loss=loss, config=config)
    assert not any(
        "learning may have diverged" in remark for remark in report.diagnostics
    )  # 20.5 is not above 10 times 5.5
    calls, config = 0, CalibrationConfig(steps=80, trainable="routers")
    report = diffcr_compile.calibrate(model, BATCHES, budget=0.8, loss=loss, config=config)
    assert sum("learning may have diverged" in remark for remark in report.diagnostics) == 1
    assert "learning may have diverged" in str(report)
