"""The laws of routing, with ``skip="reuse"``: over drawn trajectories, tables, dtypes and sizes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    BATCH,
    BlockCall,
    Shape,
    TinyDiT,
    kept_arguments,
    original,
    relative_error,
    run_routed,
    same_bits,
    tensors_of,
    tiny_inputs,
)
from torch import Tensor

import diffcr_compile
from diffcr_compile import DiffCRConfig
from diffcr_compile.ratios import capacity

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=2, heads=2, head_dim=6, masked=True)
ROTARY = Shape("rotary", depth=1, heads=2, head_dim=8)
JOINT = Shape("joint", depth=2, heads=1, head_dim=8)
CASES = tuple(
    (shape, {"skip": "reuse", "num_regions": 4, "context": context, "selection": selection, "extrapolation": degree})
    for shape, context, selection, degree in (
        (PLAIN, "all", "turn", 0),
        (PLAIN, "stale", "score", 1),
        (PLAIN, "kept", "score and turn", 0),
        (ROTARY, "all", "score and turn", 2),
        (ROTARY, "kept", "turn", 0),
        (JOINT, "all", "score", 0),
        (JOINT, "kept", "turn", 1),
        (JOINT, "stale", "score and turn", 0),
    )
)
"""Structures and options: a transform costs a second or more."""

DRAWN = st.sampled_from(range(len(CASES)))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
TRAJECTORIES = st.lists(st.integers(0, 999), min_size=3, max_size=5, unique=True).map(lambda steps: sorted(steps)[::-1])
NUM_TOKENS = st.integers(6, 17)
SEEDS = st.integers(0, 2**16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float64: 1e-12}


@functools.cache
def _transformed(case: int) -> TinyDiT:
    shape, options = CASES[case]
    return diffcr_compile.transform(original(shape), DiffCRConfig(**options), example_inputs=tiny_inputs(shape))


def prepared(case: int, dtype: torch.dtype, table: Any) -> TinyDiT:
    """A copy; its routers know nothing, and so each sample keeps tokens of its own where they are asked."""
    model = copy.deepcopy(_transformed(case)).to(dtype)
    diffcr_compile.set_ratios(model, table)
    return model


def tables(columns: int) -> st.SearchStrategy[list[list[float]]]:
    ratio = st.integers(0, 10).map(lambda tenths: tenths / 10)
    return st.lists(st.lists(ratio, min_size=columns, max_size=columns), min_size=4, max_size=4)


def inputs_along(shape: Shape, steps: list[int], **options: Any) -> Iterator[dict[str, Any]]:
    """The model's inputs; the tokens change a little from step to step."""
    for step in steps:
        given = tiny_inputs(shape, timestep=float(step), **options)
        yield {**given, "x": given["x"] * (1 + step / 1000)}


def follow(model: TinyDiT, given: list[dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**inputs) for inputs in given]


@given(case=DRAWN, dtype=DTYPES, steps=TRAJECTORIES, num_tokens=NUM_TOKENS, seed=SEEDS)
def test_zero_ratio_and_the_first_step_are_the_original(
    case: int, dtype: torch.dtype, steps: list[int], num_tokens: int, seed: int
) -> None:
    shape = CASES[case][0]
    given = list(inputs_along(shape, steps, num_tokens=num_tokens, seed=seed, dtype=dtype))
    expected = follow(original(shape, dtype), given)
    for found, known in zip(follow(prepared(case, dtype, 0), given), expected, strict=True):
        assert same_bits(found, known)
    model = prepared(case, dtype, 0.5)
    assert same_bits(follow(model, given)[0], expected[0])
    diffcr_compile.restore(model)
    assert all(same_bits(*pair) for pair in zip(follow(model, given), expected, strict=True))


@given(case=DRAWN, steps=TRAJECTORIES, num_tokens=NUM_TOKENS, seed=SEEDS, data=st.data())
def test_as_many_tokens_are_kept_as_the_table_says(
    case: int, steps: list[int], num_tokens: int, seed: int, data: st.DataObject
) -> None:
    shape = CASES[case][0]
    table = data.draw(tables(shape.depth))
    model = prepared(case, torch.float32, table)
    for place, inputs in enumerate(inputs_along(shape, steps, num_tokens=num_tokens, seed=seed)):
        row = table[min(int(steps[place] / 1000 * 4), 3)]
        for call, ratio in zip(run_routed(model, inputs), row, strict=True):
            first = place == 0 and any(any(each) for each in table)
            expected = num_tokens if first or ratio == 0 else capacity(num_tokens, round(1000 * ratio))
            if expected == 0 and shape.kind == "joint":
                expected = call.kept.shape[1]  # the text may be without a value to fall back on
                assert expected <= 1
            assert call.kept.shape == (BATCH, expected)


@given(case=DRAWN, dtype=DTYPES, steps=TRAJECTORIES, num_tokens=NUM_TOKENS, seed=SEEDS, data=st.data())
def test_a_kept_token_has_the_blocks_result_and_a_skipped_one_its_last_update(
    case: int, dtype: torch.dtype, steps: list[int], num_tokens: int, seed: int, data: st.DataObject
) -> None:
    """Laws 2 and 3: with all tokens' context the dense block's result at that token, with the kept ones' that of the sample's kept
    tokens alone; skipped, without extrapolation, what came in plus the last update, bit for bit."""
    shape, options = CASES[case]
    model, plain = prepared(case, dtype, data.draw(tables(shape.depth))), original(shape, dtype)
    last: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    for inputs in inputs_along(shape, steps, num_tokens=num_tokens, seed=seed, dtype=dtype):
        for call in run_routed(model, inputs):
            before, after = call.args[0], tensors_of(call.output)[0]
            kept = torch.zeros(BATCH, num_tokens, dtype=torch.bool).scatter_(1, call.kept, True)
            if options["extrapolation"] == 0 and call.fqn in last:
                expected = (before + last[call.fqn])[~kept]
                assert same_bits(after[~kept], expected)
            last[call.fqn] = torch.where(kept.unsqueeze(-1), after - before, last.get(call.fqn, after - before))
            if shape.kind == "joint":  # as long as the block runs its text is its own, then that takes its last update
                before, after = call.args[1], tensors_of(call.output)[1]
                if not call.kept.shape[1] and options["extrapolation"] == 0:
                    assert same_bits(after, before + text[call.fqn])
                else:
                    text[call.fqn] = after - before
            for found, known in expected_results(shape, options["context"], plain, call, kept):
                assert relative_error(found, known) < TOLERANCE[dtype]


def expected_results(
    shape: Shape, context: str, plain: TinyDiT, call: BlockCall, kept: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a kept token's result and what it should be; none with stale context, or where nothing is kept."""
    if context == "stale" or not call.kept.shape[1]:
        return
    block, after = plain.get_submodule(call.fqn), tensors_of(call.output)[0]
    with torch.no_grad():
        if context == "all" or bool(kept.all()):
            yield after[kept], tensors_of(block(*call.args))[0][kept]
            return
        for sample in range(BATCH):
            alone = tensors_of(block(*kept_arguments(shape, call, sample)))[0]
            yield after[sample : sample + 1, call.kept[sample]], alone


@given(
    case=DRAWN,
    steps=TRAJECTORIES,
    num_tokens=NUM_TOKENS,
    seed=SEEDS,
    order=st.permutations(range(BATCH)),
    data=st.data(),
)
def test_samples_are_independent(
    case: int, steps: list[int], num_tokens: int, seed: int, order: list[int], data: st.DataObject
) -> None:
    """Permuting the batch permutes the result, and a sample alone has the result that it has among others."""
    shape = CASES[case][0]
    table = data.draw(tables(shape.depth))
    given = list(inputs_along(shape, steps, num_tokens=num_tokens, seed=seed))
    expected = follow(prepared(case, torch.float32, table), given)
    for samples in (order, order[:1]):
        picked = [
            {name: value[samples] if batched(value) else value for name, value in inputs.items()} for inputs in given
        ]
        found = follow(prepared(case, torch.float32, table), picked)
        for one, known in zip(found, expected, strict=True):
            assert relative_error(one, known[samples]) < 5e-5


def batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == BATCH
