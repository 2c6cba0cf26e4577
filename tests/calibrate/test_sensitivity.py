"""What each ratio would cost, measured on dense forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffcr_compile.calibration.sensitivity import measure_suffering
from models import Shape, original, sinusoids, tiny_inputs, written_in_place
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile.routed import STATE, ModelRouting

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=2, heads=1, head_dim=6)
STEPS = tuple(float(step) for step in range(975, 0, -50))


def measure(
    skip: str,
    steps: tuple[float, ...] = STEPS,
    change: float = 1.0,
    build: Callable[[Shape], nn.Module] = original,
    **options: object,
) -> Tensor:
    """Suffering (regions, blocks, bins) along a trajectory whose tokens grow by ``change`` times the timestep's share."""
    model = build(PLAIN)
    config = diffcr_compile.DiffCRConfig(skip=skip, num_regions=2, **options)  # type: ignore[arg-type]
    diffcr_compile.transform(model, config, example_inputs=tiny_inputs(PLAIN))
    state: ModelRouting = model.__dict__[STATE]
    batches = []
    for step in steps:
        inputs = tiny_inputs(PLAIN, timestep=step)
        inputs["x"] = inputs["x"] * (1 + change * step / 1000)
        batches.append(inputs)
    return measure_suffering(model, state, batches)


@pytest.mark.parametrize("skip", ["identity", "reuse"])
def test_nothing_skipped_costs_nothing_and_more_costs_more(skip: str) -> None:
    suffering = measure(skip)
    assert suffering.shape == (2, PLAIN.depth, 11)
    assert bool((suffering[..., 0] == 0).all())
    assert bool((suffering[..., 1:] > 0).all())
    assert bool((suffering[..., 8] > suffering[..., 1]).all())
    if skip == "identity":
        assert bool((suffering.diff(dim=-1) >= 0).all())


@pytest.mark.parametrize("skip", ["identity", "reuse"])
def test_blocks_that_write_into_their_tokens_suffer_as_others_do(skip: str) -> None:
    assert torch.equal(measure(skip, build=written_in_place), measure(skip))


def test_what_does_not_change_costs_reuse_nothing() -> None:
    """The same timestep but for a hair, the same tokens: the last update is the present one."""
    still = measure("reuse", steps=tuple(500.0 - 1e-3 * i for i in range(6)), change=0.0)
    moving = measure("reuse")
    assert float(still[..., :10].max()) < 1e-3 * float(moving[..., :10].max())


def test_identity_leaves_out_the_lowest_scores_first() -> None:
    """With keys and values from all tokens a ratio costs the updates of those that score least."""
    suffering = measure("identity", steps=(400.0,), context="all")[0]
    model, inputs = original(PLAIN), tiny_inputs(PLAIN, timestep=400.0)
    config = diffcr_compile.DiffCRConfig(context="all", num_regions=2)
    routed = diffcr_compile.transform(copy.deepcopy(model), config, example_inputs=inputs)
    cond, x = model.time(sinusoids(inputs["timestep"], PLAIN.width)), model.embed(inputs["x"] * 1.4)
    for place, block in enumerate(model.blocks):
        result = block(x, cond, None, None)
        update, scores = result - x, x @ routed.blocks[place].diffcr_router.weight
        lowest = scores.argsort(dim=1)[:, : x.shape[1] // 2]
        left_out = update.square().mean(-1).gather(1, lowest).sum(dim=1) / x.shape[1]
        scale = x.square().mean() + result.square().mean()
        assert float(suffering[place, 5]) == pytest.approx(float((left_out / scale).mean()), rel=1e-3)
        x = result


def test_bypass_is_measured_as_it_runs() -> None:
    """Kept tokens miss the keys of skipped ones: half of the tokens cost more than their updates, which are all that counts where
    keys and values come from all."""
    run, omitted = measure("identity"), measure("identity", context="all")
    assert torch.allclose(run[..., [0, 10]], omitted[..., [0, 10]])
    assert bool((run[..., 5] > omitted[..., 5]).all())


def test_a_region_without_steps_takes_the_mean_of_the_others() -> None:
    suffering = measure("reuse", steps=tuple(float(step) for step in range(980, 520, -40)))
    assert torch.equal(suffering[0], suffering[1])


def test_of_many_tokens_some_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    every = measure("reuse")
    monkeypatch.setattr("diffcr_compile.calibration.sensitivity.MEASURED_TOKENS", 4)
    some = measure("reuse")
    assert not torch.equal(some, every)
    assert float(((some - every).abs() / every.clamp(min=1e-12))[..., 1:].mean()) < 0.5


@pytest.mark.parametrize("skip", ["identity", "reuse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_said(skip: str, value: float) -> None:
    config = diffcr_compile.DiffCRConfig(skip=skip)  # type: ignore[arg-type]
    model = diffcr_compile.transform(original(PLAIN), config, example_inputs=tiny_inputs(PLAIN))
    batches = [tiny_inputs(PLAIN, timestep=step) for step in (900.0, 600.0, 300.0)]
    batches[1]["x"][0, 0, 0] = value
    free = diffcr_compile.CalibrationConfig(preset="training-free")
    with pytest.raises(diffcr_compile.CalibrationError, match="dense outputs of batch 1 are not finite"):
        diffcr_compile.calibrate(model, batches, budget=0.7, config=free)
    assert not diffcr_compile.ratios(model).any()
