"""The measured cost model: shapes, straight lines, and what it puts back. No time is compared with another."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Shape, TinyDiT, looping, original, routed, same_bits, same_snapshot, snapshot, tiny_inputs

import diffcr_compile
from diffcr_compile import DiffCRConfig, latency
from diffcr_compile import routed as runtime
from diffcr_compile.cost import CostModel, measure_costs
from diffcr_compile.latency import BlockTime, measure_latency
from diffcr_compile.ratios import capacity
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=3, heads=2, head_dim=6)
INPUTS = tiny_inputs(SHAPE, num_tokens=20)


@pytest.fixture
def model() -> TinyDiT:
    return routed(SHAPE)


def measured(model: TinyDiT, rounds: int = 1) -> CostModel:
    return measure_latency(model, INPUTS, measure_costs(model, INPUTS), rounds=rounds)


def test_every_block_has_a_time_at_every_bin_that_never_rises(model: TinyDiT) -> None:
    costs = measured(model)
    assert (costs.unit, len(costs.blocks)) == ("latency", 3)
    for block in costs.blocks:
        assert isinstance(block, BlockTime)
        assert (block.num_tokens, len(block.times_ms)) == (20, 11)
        assert all(time > 0 for time in block.times_ms)
        assert list(block.times_ms) == sorted(block.times_ms, reverse=True)
        assert block.dense == block.times_ms[0]
    assert costs.dense >= sum(block.dense for block in costs.blocks)
    assert costs.fixed >= 0


def test_blocks_of_one_family_and_shape_are_measured_once(model: TinyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    measurements: list[int] = []

    def medians(functions: list[Any], rounds: int) -> list[float]:
        measurements.append(len(functions))
        assert rounds == 4
        return [float(len(functions) - place) for place in range(len(functions))]

    monkeypatch.setattr(latency, "_medians", medians)
    costs = measured(model, rounds=4)
    assert measurements == [11, 1]
    assert len({block.times_ms for block in costs.blocks}) == 1  # type: ignore[attr-defined]
    assert costs.dense == 33.0  # the sum of the blocks, which took longer than the whole


def test_blocks_that_a_number_alone_tells_apart_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffcr_compile.transform(looping(SHAPE, 4, 1, 4), example_inputs=INPUTS)
    measurements: list[int] = []

    def medians(functions: list[Any], rounds: int) -> list[float]:
        measurements.append(len(functions))
        return [float(len(measurements))] * len(functions)

    monkeypatch.setattr(latency, "_medians", medians)
    assert [block.dense for block in measured(model).blocks] == [1.0, 2.0, 1.0]
    assert measurements == [11, 11, 1]


def test_what_is_timed_keeps_what_the_ratio_says(model: TinyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, ...]] = []

    def medians(functions: list[Any], rounds: int) -> list[float]:
        for function in functions:
            with diffcr_compile.trace(model) as seen:
                function()
            kept.append(tuple(calls[0].shape[1] for calls in seen.kept.values() if calls))
        return [1.0] * len(functions)

    monkeypatch.setattr(latency, "_medians", medians)
    measured(model)
    assert kept == [*((capacity(20, 100 * place),) for place in range(11)), (20, 20, 20)]


def test_noise_does_not_make_a_time_rise(model: TinyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = [5.0, 6.0, 4.0, 4.5, 3.0, 3.0, 2.0, 7.0, 1.0, 1.5, 0.5]
    monkeypatch.setattr(latency, "_medians", lambda functions, rounds: noisy[: len(functions)])
    costs = measured(model)
    assert costs.blocks[0].times_ms == (5.0, 5.0, 4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 0.5)  # type: ignore[attr-defined]


def test_nothing_is_left_behind(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, 0.3)
    before, table, expected = snapshot(model), diffcr_compile.ratios(model), model(**INPUTS)
    measured(model)
    assert same_snapshot(snapshot(model), before)
    assert torch.equal(diffcr_compile.ratios(model), table)
    assert same_bits(model(**INPUTS), expected)
    current = routing_of(model).current
    assert (current.pinned, current.row) == (False, None)


@given(
    drops=st.lists(st.floats(0, 10), min_size=11, max_size=11),
    ratios=st.lists(st.integers(0, 1000), min_size=2, max_size=2),
)
def test_between_bins_times_lie_on_straight_lines(drops: list[float], ratios: list[int]) -> None:
    times = tuple(float(sum(drops[place:])) for place in range(11))
    block = BlockTime(20, times)
    assert [block.at(100 * place) for place in range(11)] == list(times)
    low, high = sorted(ratios)
    assert block.at(low) >= block.at(high) - 1e-9 * max(times[0], 1)  # rounding of a sum of eleven
    place, rest = divmod(low, 100)
    expected = times[place] if rest == 0 else times[place] * (1 - rest / 100) + times[place + 1] * rest / 100
    assert block.at(low) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_a_lowered_model_is_measured_compiled_and_stays_lowered(
    model: TinyDiT, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is run here, so nothing is compiled."""
    model = diffcr_compile.lower(model, scope=scope)  # type: ignore[arg-type]
    state, seen = routing_of(model), []
    lowered, compiled = state.lowered, [block.compiled for block in state.blocks]

    def medians(functions: list[Any], rounds: int) -> list[float]:
        seen.append(all(block.compiled is not None for block in state.blocks))
        return [1.0] * len(functions)

    monkeypatch.setattr(latency, "_medians", medians)
    monkeypatch.setattr(
        latency, "_record_calls", lambda model, state, inputs: {block.fqn: [] for block in state.blocks}
    )
    costs = measure_costs(routed(SHAPE), INPUTS)
    measure_latency(model, INPUTS, costs, rounds=1)
    assert seen == [True, True]
    assert state.lowered is lowered
    assert lowered.scope == scope
    assert [block.compiled is None for block in state.blocks] == [one is None for one in compiled]


def test_it_is_measured_in_eval_mode_and_draws_nothing(model: TinyDiT) -> None:
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    seen: list[bool] = []
    handle = model.blocks[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    noise = model.head.register_forward_hook(lambda module, args, output: output + torch.rand(()))
    torch.manual_seed(3)
    measured(model)
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(3))
    assert seen
    assert not any(seen)
    assert [module.training for module in model.modules()] == modes
    handle.remove()
    noise.remove()


def test_with_reuse_a_step_in_the_midst_of_a_sampling_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = diffcr_compile.transform(original(SHAPE), DiffCRConfig(skip="reuse"), example_inputs=INPUTS)
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        counted = getattr(runtime, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return counted(*args, **kwargs)

        monkeypatch.setattr(runtime, name, function)

    costs = measure_costs(model, INPUTS)
    for name in ("remember_all", "context_key"):
        count(name)
    found = measure_latency(model, INPUTS, costs, rounds=2)
    # ratio zero is timed once that does not count and in two rounds, by torch's timer after two calls each
    assert calls == {"remember_all": 9, "context_key": 1}
    assert len({block.times_ms for block in found.blocks}) == 1  # type: ignore[attr-defined]
    state = routing_of(model)
    assert state.current.trajectory is None
