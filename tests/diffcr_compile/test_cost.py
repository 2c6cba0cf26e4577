"""What tables cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    Shape,
    TinyDiT,
    looping,
    original,
    reference_flops,
    routed,
    same_snapshot,
    sinusoids,
    snapshot,
    tiny_inputs,
)

import diffcr_compile
from diffcr_compile.cost import BlockCost, CostModel, cost_model

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)


@pytest.fixture(scope="module")
def model() -> TinyDiT:
    return routed(SHAPE)


def test_measuring_changes_nothing(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, 0.5)
    before = snapshot(model)
    diffcr_compile.cost(model, tiny_inputs(SHAPE))
    assert same_snapshot(snapshot(model), before)


@pytest.mark.parametrize("loops", [(4, 1), (1, 4)])
def test_blocks_that_a_number_alone_tells_apart_cost_what_each_does(loops: tuple[int, int]) -> None:
    inputs = tiny_inputs(SHAPE, num_tokens=40)
    model = diffcr_compile.transform(looping(SHAPE, *loops), example_inputs=inputs)
    dense = reference_flops(lambda: model(**inputs))
    for row in ([0.5, 0.0], [0.0, 0.5], [0.3, 0.8]):
        diffcr_compile.set_ratios(model, [row] * 4)
        counted = reference_flops(lambda: model(**inputs))
        assert diffcr_compile.cost(model, inputs).share == pytest.approx(counted / dense, rel=1e-9)
    assert cost_model(model).fixed > 0


def test_other_inputs_cost_otherwise(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, 0.5)
    small = diffcr_compile.cost(model)
    inputs = tiny_inputs(SHAPE, batch=2, num_tokens=40)
    large = diffcr_compile.cost(model, inputs)
    assert large.dense_flops == reference_flops(lambda: original(SHAPE)(**inputs))
    assert large.routed_flops[0] == reference_flops(lambda: model(**inputs))
    assert diffcr_compile.cost(model) == small


@pytest.mark.parametrize(
    "ask",
    [diffcr_compile.cost, lambda model, inputs: diffcr_compile.calibrate(model, [inputs], budget=0.7)],
    ids=["cost", "calibrate"],
)
def test_inputs_without_samples_are_refused(model: TinyDiT, ask: Callable[[TinyDiT, Any], Any]) -> None:
    empty = {name: value[:0] for name, value in tiny_inputs(SHAPE).items()}
    with pytest.raises(diffcr_compile.CaptureError, match=r"TinyDiT computes nothing .* expected at least one"):
        ask(model, empty)


@pytest.mark.parametrize("settled", [True, False], ids=["settled", "deferred"])
def test_inputs_may_be_given_by_position(settled: bool) -> None:
    inputs = tiny_inputs(SHAPE)
    model = routed(SHAPE) if settled else diffcr_compile.transform(original(SHAPE))
    expected = diffcr_compile.cost(routed(SHAPE), inputs)
    assert diffcr_compile.cost(model, ((inputs["x"],), {"timestep": inputs["timestep"]})) == expected
    assert diffcr_compile.cost(model, ((), inputs)) == expected


LARGE = tiny_inputs(SHAPE, batch=2, num_tokens=40)


def test_without_inputs_it_is_as_transformed_whatever_was_measured_since() -> None:
    model = routed(SHAPE)
    expected = reference_flops(lambda: original(SHAPE)(**tiny_inputs(SHAPE)))
    share = float(diffcr_compile.budget_loss(routed(SHAPE), 0.5))
    assert diffcr_compile.cost(model, LARGE).dense_flops > 2 * expected
    assert diffcr_compile.cost(model).dense_flops == expected
    config = diffcr_compile.CalibrationConfig(preset="training-free")
    diffcr_compile.calibrate(model, [LARGE], budget=0.9, config=config)
    diffcr_compile.set_ratios(model, 0.0)
    assert diffcr_compile.cost(model).dense_flops == expected
    assert float(diffcr_compile.budget_loss(model, 0.5)) == share


@pytest.fixture
def loaded(tmp_path: Path) -> TinyDiT:
    diffcr_compile.save(routed(SHAPE), tmp_path / "routing")
    return diffcr_compile.load(original(SHAPE), tmp_path / "routing")


@pytest.mark.parametrize("act", [diffcr_compile.cost, lambda model: diffcr_compile.budget_loss(model, 0.5)])
def test_a_loaded_model_has_no_inputs_until_it_is_measured(loaded: TinyDiT, act: Any) -> None:
    with pytest.raises(
        diffcr_compile.CaptureError, match=r"TinyDiT was loaded.* Call diffcr_compile.cost\(model, example"
    ):
        act(loaded)
    first = diffcr_compile.cost(loaded, LARGE)
    diffcr_compile.cost(loaded, tiny_inputs(SHAPE))
    assert diffcr_compile.cost(loaded) == first
    assert act(loaded) is not None


def test_a_loaded_model_takes_the_inputs_it_is_calibrated_with(loaded: TinyDiT) -> None:
    config = diffcr_compile.CalibrationConfig(preset="training-free")
    diffcr_compile.calibrate(loaded, [LARGE], budget=0.9, config=config)
    assert diffcr_compile.cost(loaded) == diffcr_compile.cost(loaded, LARGE)


def test_the_expected_share_is_the_share_at_bins_and_linear_between(model: TinyDiT) -> None:
    costs = cost_model(model)
    at = {ratio: costs.share([[ratio] * 2] * 4) for ratio in (300, 400)}
    for ratio, expected in ((0.3, at[300]), (0.4, at[400]), (0.35, (at[300] + at[400]) / 2)):
        # float32 masters and result
        assert float(costs.expected_share(torch.full((4, 2), ratio))) == pytest.approx(expected, abs=1e-6)


def test_a_cost_model_adds_up() -> None:
    block = BlockCost(num_tokens=10, dense=1000, skipped=0, curve=(5.0, 80.0, 2.0))
    costs = CostModel(dense=2500, blocks=(block, block))
    assert costs.fixed == 500
    assert block.at(0) == 1000
    assert block.at(50) == 1000, "no token skips"
    assert block.at(1000) == 0
    assert block.at(500) == 5 + 400 + 50
    assert costs.row_cost([0, 500]) == 500 + 1000 + 455
    assert costs.share([[0, 0], [1000, 1000]]) == (2500 + 500) / 2 / 2500
    assert costs.minimum_share == 0.2


def test_a_routed_block_that_is_not_called_is_named() -> None:
    class Leaving(TinyDiT):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor, short: bool = False) -> torch.Tensor:
            x, cond = self.embed(x), self.time(sinusoids(timestep, self.shape.width))
            for block in self.blocks[:1] if short else self.blocks:
                x = block(x, cond)
            return self.head(x)

    inputs = tiny_inputs(SHAPE)
    model = diffcr_compile.transform(Leaving(SHAPE).eval(), example_inputs=inputs)
    for look in (
        lambda batch: diffcr_compile.cost(model, batch),
        lambda batch: diffcr_compile.calibrate(model, [batch], budget=0.9),
    ):
        with pytest.raises(diffcr_compile.CaptureError, match=r"^blocks\.1: routed, but not called on these inputs"):
            look({**inputs, "short": True})
