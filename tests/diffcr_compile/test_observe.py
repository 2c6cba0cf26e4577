"""``record`` and ``trace``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, original, routed, same_bits, same_snapshot, snapshot, tiny_inputs

import diffcr_compile
from diffcr_compile.observe import watch_calls
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
MIXED = tiny_inputs(SHAPE, timestep=torch.tensor([10.0, 900.0, 400.0]))


@pytest.fixture
def model() -> TinyDiT:
    model = routed(SHAPE)
    diffcr_compile.set_ratios(model, [[0.0, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 1.0]])
    return model


def test_record_on_a_plain_model() -> None:
    model, inputs = original(SHAPE), tiny_inputs(SHAPE)
    before = snapshot(model)
    with diffcr_compile.record(model) as batches:
        model(inputs["x"], timestep=inputs["timestep"])
        inputs["x"].zero_()
        model(inputs["x"], inputs["timestep"])
    assert same_snapshot(snapshot(model), before)
    assert [list(batch) for batch in batches] == [["x", "timestep"]] * 2
    assert same_bits(batches[0], tiny_inputs(SHAPE))
    assert same_bits(batches[1], inputs)


class Fragile(TinyDiT):
    """Writes into its inputs, calls itself, and fails, as asked."""

    fails = 0
    calls_itself = False

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        if self.calls_itself:
            self.calls_itself = False
            with contextlib.suppress(ZeroDivisionError):
                self(2 * x, timestep)
        elif self.fails:
            self.fails -= 1
            raise ZeroDivisionError
        return super().forward(x, timestep)


def call(model: Fragile, value: float) -> None:
    with contextlib.suppress(ZeroDivisionError):
        model(torch.full((1, 3, 5), float(value)), torch.tensor([5.0]))


def values_of(batches: Sequence[dict[str, Any]]) -> list[float]:
    return [float(batch["x"][0, 0, 0]) for batch in batches]


def test_record_leaves_out_calls_that_fail() -> None:
    model = Fragile(SHAPE)
    before = snapshot(model)
    with diffcr_compile.record(model) as batches, diffcr_compile.record(model) as others:
        call(model, 1)
        model.fails = 2
        for value in (2, 3, 4):
            call(model, value)
        with pytest.raises(TypeError):
            model(nothing=1)
        model.calls_itself, model.fails = True, 1
        call(model, 5)  # the inner call fails, and not the outer one
        model.calls_itself = True
        call(model, 6)
    assert values_of(batches) == values_of(others) == [1, 4, 5, 14, 6]
    del model.calls_itself, model.fails
    assert same_snapshot(snapshot(model), before)


def test_calls_that_fail_take_no_place_of_others() -> None:
    model = Fragile(SHAPE)
    with diffcr_compile.record(model, limit=2) as batches:
        call(model, 1)
        call(model, 2)
        model.fails = 20
        for value in range(3, 23):
            call(model, value)
    assert values_of(batches) == [1, 2]


def test_record_keeps_a_split_batch_whole(model: TinyDiT) -> None:
    """One call of the user's is one batch, also where its samples lie in several regions."""
    with diffcr_compile.record(model) as batches:
        model(**MIXED)
    assert len(batches) == 1
    assert same_bits(batches[0], MIXED)


def test_recorded_batches_run(model: TinyDiT) -> None:
    with diffcr_compile.record(model) as batches:
        expected = model(**tiny_inputs(SHAPE))
    assert same_bits(model(**batches[0]), expected)
    assert not batches[0]["x"].requires_grad


def test_trace_tells_every_call(model: TinyDiT) -> None:
    with diffcr_compile.trace(model) as seen:
        for step in (10.0, 900.0):
            model(**tiny_inputs(SHAPE, timestep=step))
    shapes = {fqn: [tuple(kept.shape) for kept in calls] for fqn, calls in seen.kept.items()}
    assert shapes == {"blocks.0": [(3, 11), (3, 4)], "blocks.1": [(3, 9), (3, 0)]}
    assert all(kept.dtype == torch.int64 for calls in seen.kept.values() for kept in calls)
    assert seen.kept["blocks.0"][0].tolist() == [list(range(11))] * 3
    assert all(row == sorted(set(row)) for kept in seen.kept["blocks.1"] for row in kept.tolist())


def test_tracing_changes_no_output(model: TinyDiT) -> None:
    expected = model(**MIXED)
    with diffcr_compile.trace(model) as seen:
        assert same_bits(model(**MIXED), expected)
    assert same_bits(model(**MIXED), expected)
    assert len(seen.kept["blocks.0"]) == 3


def test_traces_nest_and_end_after_an_error(model: TinyDiT) -> None:
    with diffcr_compile.trace(model) as outer:
        inner = _run_and_fail(model)
        model(**tiny_inputs(SHAPE))
    assert len(inner.kept["blocks.0"]) == 1
    assert len(outer.kept["blocks.0"]) == 2
    assert torch.equal(inner.kept["blocks.0"][0], outer.kept["blocks.0"][0])


def _run_and_fail(model: TinyDiT) -> diffcr_compile.Trace:
    try:
        with diffcr_compile.trace(model) as seen:
            model(**tiny_inputs(SHAPE))
            raise ZeroDivisionError
    except ZeroDivisionError:
        return seen


def test_calls_are_watched_before_and_after_and_no_longer_after_an_error(model: TinyDiT) -> None:
    state, hooks = routing_of(model), snapshot(model)
    seen: list[Any] = []
    watched = watch_calls(
        model,
        state,
        before=lambda block, args, kwargs: seen.append(("before", block.fqn, args[0])),
        after=lambda block, args, kwargs, output: seen.append(("after", block.fqn, output)),
    )
    with contextlib.suppress(ZeroDivisionError), watched:
        output = model(**tiny_inputs(SHAPE))
        raise ZeroDivisionError
    expected = [(when, block.fqn) for block in state.blocks for when in ("before", "after")]
    assert [(when, fqn) for when, fqn, _ in seen] == expected
    assert same_bits(seen[1][2], seen[2][2]), "a block takes what the one before it returns"
    assert same_bits(model.head(seen[-1][2]), output)
    assert same_snapshot(snapshot(model), hooks)
    model(**tiny_inputs(SHAPE))
    assert len(seen) == len(expected)
