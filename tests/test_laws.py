"""The laws of routing over generated models: batch 3, samples that keep different tokens.

Models are transformed once per structure and copied; sizes of the inputs, dtypes, ratios and masks are drawn. The nightly
profile (``HYPOTHESIS_PROFILE=nightly``) draws structures too.
"""

from __future__ import annotations

import functools
import math
import os
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from models import (
    BATCH,
    BlockCall,
    Shape,
    TinyDiT,
    kept_arguments,
    original,
    reference_flops,
    relative_error,
    routed,
    routed_fqns,
    run_routed,
    same_bits,
    same_snapshot,
    snapshot,
    tensors_of,
    tiny_inputs,
    watch_blocks,
)
from torch import Tensor

import diffcr_compile
from diffcr_compile.ratios import capacity

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

POOL = (
    Shape("plain", depth=1, heads=1, head_dim=6),
    Shape("plain", depth=3, heads=2, head_dim=6),
    Shape("plain", depth=2, heads=3, head_dim=4, masked=True),
    Shape("rotary", depth=2, heads=2, head_dim=8),
    Shape("rotary", depth=1, heads=3, head_dim=4, masked=True),
    Shape("joint", depth=2, heads=1, head_dim=8),
    Shape("joint", depth=1, heads=2, head_dim=4, masked=True),
)
"""Structures of the ``ci`` profile: a transform costs a second or more."""

FREE = st.builds(
    Shape,
    kind=st.sampled_from(["plain", "rotary", "joint"]),
    depth=st.integers(1, 4),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([2, 4, 6, 8, 10]),
    masked=st.booleans(),
)
SHAPES = FREE if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else st.sampled_from(POOL)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SEEDS = st.integers(0, 2**16)
NUM_TOKENS = st.integers(6, 17)
NUM_TEXT = st.integers(1, 9)
RATIOS = st.integers(0, 1000)
BETWEEN = st.integers(200, 800)
"""Thousandths at which at least one of six tokens skips and one is kept."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float64: 1e-12}
"""Of the largest value. Another batch size or the kernel under vmap adds up in another order: some hundred roundings of the
dtype (6e-8, 4e-3, 5e-4, 1e-16) in a block."""


def table_of(
    data: st.DataObject, model: TinyDiT, ratios: st.SearchStrategy[int], *, same_rows: bool = False
) -> list[list[int]]:
    """A drawn table in thousandths."""
    rows, columns = diffcr_compile.ratios(model).shape
    row = st.lists(ratios, min_size=columns, max_size=columns)
    if same_rows:
        return [data.draw(row)] * rows
    return data.draw(st.lists(row, min_size=rows, max_size=rows))


def set_thousandths(model: TinyDiT, table: list[list[int]]) -> None:
    diffcr_compile.set_ratios(model, torch.tensor(table, dtype=torch.float64) / 1000)


def keep_different_tokens(calls: list[BlockCall]) -> bool:
    return all(len({tuple(row) for row in call.kept.tolist()}) > 1 for call in calls)


def stream_of(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Routed tokens before and after a block of a ``TinyDiT``."""
    return call.args[0], tensors_of(call.output)[0]


# Law 1: zero ratio is the original, bit for bit.


@given(shape=SHAPES, dtype=DTYPES, num_tokens=NUM_TOKENS, train=st.booleans(), seed=SEEDS)
def test_zero_ratio_is_the_original(shape: Shape, dtype: torch.dtype, num_tokens: int, train: bool, seed: int) -> None:
    plain, model = original(shape, dtype).train(train), routed(shape, dtype).train(train)
    inputs = tiny_inputs(shape, num_tokens=num_tokens, dtype=dtype, seed=seed)
    outputs = []
    for one in (plain, model):
        torch.manual_seed(seed)  # dropout, in train mode
        outputs.append(one(**inputs))
    assert same_bits(outputs[1], outputs[0])
    with torch.no_grad():
        torch.manual_seed(seed)
        assert same_bits(model(**inputs), outputs[0])
    for output in outputs:
        output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if "diffcr_router" not in name}
    assert list(gradients) == [name for name, _ in plain.named_parameters()]
    assert all(
        torch.equal(gradients[name], parameter.grad)
        for name, parameter in plain.named_parameters()
        if parameter.grad is not None
    )


@given(shape=SHAPES, num_tokens=NUM_TOKENS, data=st.data())
def test_a_ratio_that_skips_no_token_is_the_original(shape: Shape, num_tokens: int, data: st.DataObject) -> None:
    model = routed(shape)
    set_thousandths(model, table_of(data, model, st.integers(0, (1000 - 1) // num_tokens)))
    inputs = tiny_inputs(shape, num_tokens=num_tokens)
    assert same_bits(model(**inputs), original(shape)(**inputs))


@given(shape=SHAPES, dtype=DTYPES, seed=SEEDS)
def test_learning_starts_with_the_originals_values(shape: Shape, dtype: torch.dtype, seed: int) -> None:
    model, inputs = routed(shape, dtype), tiny_inputs(shape, dtype=dtype, seed=seed)
    with diffcr_compile.learning(model):
        output = model(**inputs)
    assert same_bits(output, original(shape, dtype)(**inputs))


@pytest.mark.parametrize("shape", [POOL[1], POOL[5]], ids=["plain", "joint"])
def test_zero_ratio_is_the_original_after_calibration(shape: Shape) -> None:
    model = routed(shape)
    batches = [tiny_inputs(shape, seed=seed, timestep=torch.tensor([20.0, 400.0, 950.0])) for seed in range(2)]
    config = diffcr_compile.CalibrationConfig(steps=6, trainable="routers")
    diffcr_compile.calibrate(model, batches, budget=0.7, config=config)
    assert not same_bits(model(**batches[0]), original(shape)(**batches[0]))
    diffcr_compile.set_ratios(model, 0.0)
    assert same_bits(model(**batches[0]), original(shape)(**batches[0]))


# Law 2: a skipped token leaves the block with the bits it came in with.


@given(shape=SHAPES, dtype=DTYPES, num_tokens=NUM_TOKENS, grad=st.booleans(), seed=SEEDS, data=st.data())
def test_skipped_tokens_keep_their_bits(
    shape: Shape, dtype: torch.dtype, num_tokens: int, grad: bool, seed: int, data: st.DataObject
) -> None:
    model = routed(shape, dtype)
    table = table_of(data, model, st.integers(200, 1000))
    set_thousandths(model, table)
    inputs = tiny_inputs(shape, num_tokens=num_tokens, dtype=dtype, seed=seed)
    with torch.set_grad_enabled(grad), diffcr_compile.trace(model) as seen:  # noqa: SIM117
        with watch_blocks(model, routed_fqns(model)) as calls:
            model(**inputs)
    assert len(calls) == shape.depth
    for call in calls:
        before, after = stream_of(call)
        (kept,) = seen.kept[call.fqn]
        skipped = torch.ones(before.shape[:2], dtype=torch.bool).scatter(1, kept, False)
        assert int(skipped.sum()) > 0
        assert torch.equal(before[skipped], after[skipped])


# Law 3: kept tokens equal the original block run on each sample's kept tokens alone.


@given(shape=SHAPES, dtype=DTYPES, num_tokens=NUM_TOKENS, num_text=NUM_TEXT, seed=SEEDS, data=st.data())
def test_kept_tokens_equal_each_sample_run_alone(
    shape: Shape, dtype: torch.dtype, num_tokens: int, num_text: int, seed: int, data: st.DataObject
) -> None:
    plain, model = original(shape, dtype), routed(shape, dtype)
    set_thousandths(model, table_of(data, model, BETWEEN))
    calls = run_routed(model, tiny_inputs(shape, num_tokens=num_tokens, num_text=num_text, dtype=dtype, seed=seed))
    assume(keep_different_tokens(calls))
    assert len(calls) == shape.depth
    for call in calls:
        block, after = plain.get_submodule(call.fqn), tensors_of(call.output)
        for sample in range(BATCH):
            with torch.no_grad():
                expected = tensors_of(block(*kept_arguments(shape, call, sample)))
            found = [
                after[0][sample : sample + 1, call.kept[sample]],
                *(text[sample : sample + 1] for text in after[1:]),
            ]
            assert len(found) == len(expected)
            assert max(map(relative_error, found, expected)) < TOLERANCE[dtype]


@given(
    shape=SHAPES.filter(lambda shape: shape.kind == "plain"),
    dtype=DTYPES,
    num_tokens=NUM_TOKENS,
    seed=SEEDS,
    data=st.data(),
)
def test_a_direct_call_has_the_bits_of_the_original_block(
    shape: Shape, dtype: torch.dtype, num_tokens: int, seed: int, data: st.DataObject
) -> None:
    plain, model = original(shape, dtype), routed(shape, dtype)
    set_thousandths(model, table_of(data, model, BETWEEN))
    for call in run_routed(model, tiny_inputs(shape, num_tokens=num_tokens, dtype=dtype, seed=seed)):
        x, cond, _, mask = zip(*(kept_arguments(shape, call, sample) for sample in range(BATCH)), strict=True)
        masks = torch.cat(mask) if shape.masked else None
        with torch.no_grad():
            expected = plain.get_submodule(call.fqn)(torch.cat(x), torch.cat(cond), None, masks)
        found = torch.stack([call.output[sample, call.kept[sample]] for sample in range(BATCH)])
        assert same_bits(found, expected)


@given(shape=SHAPES, num_tokens=NUM_TOKENS, seed=SEEDS, data=st.data())
def test_the_tokens_of_highest_score_are_kept(shape: Shape, num_tokens: int, seed: int, data: st.DataObject) -> None:
    model = routed(shape)
    set_thousandths(model, table_of(data, model, BETWEEN))
    for call in run_routed(model, tiny_inputs(shape, num_tokens=num_tokens, seed=seed)):
        router = model.get_submodule(call.fqn).diffcr_router.weight.double()
        scores = (stream_of(call)[0].double() @ router).tolist()
        for sample, kept in enumerate(call.kept.tolist()):
            best = sorted(range(num_tokens), key=lambda token: -scores[sample][token])[: len(kept)]
            assert kept == sorted(best)


# Law 4: ratios are integers in thousandths.


@given(num_tokens=st.integers(1, 100_000), ratio=RATIOS)
@example(num_tokens=10, ratio=700)  # a ceiling of floats keeps 4
def test_capacity_is_exact(num_tokens: int, ratio: int) -> None:
    k = capacity(num_tokens, ratio)
    assert type(k) is int
    assert k == math.ceil(num_tokens * (1 - Fraction(ratio, 1000)))


@given(shape=SHAPES, num_tokens=NUM_TOKENS, timestep=st.integers(0, 1000), data=st.data())
def test_every_block_keeps_what_the_table_says(
    shape: Shape, num_tokens: int, timestep: int, data: st.DataObject
) -> None:
    model = routed(shape)
    table = table_of(data, model, RATIOS)
    set_thousandths(model, table)
    assert torch.equal(diffcr_compile.ratios(model), torch.tensor(table) / 1000)
    calls = run_routed(model, tiny_inputs(shape, num_tokens=num_tokens, timestep=timestep))
    row = table[min(timestep * len(table) // 1000, len(table) - 1)]
    expected = [math.ceil(num_tokens * (1 - Fraction(ratio, 1000))) for ratio in row]
    assert [call.kept.shape for call in calls] == [(BATCH, k) for k in expected]


@given(shape=SHAPES, dtype=DTYPES, seed=SEEDS)
def test_ratio_one_skips_the_block(shape: Shape, dtype: torch.dtype, seed: int) -> None:
    model = routed(shape, dtype)
    diffcr_compile.set_ratios(model, 1.0)
    calls = run_routed(model, tiny_inputs(shape, dtype=dtype, seed=seed))
    streams = 2 if shape.kind == "joint" else 1
    assert all(same_bits(call.output, call.args[:streams]) for call in calls)


# Law 5: samples are independent, mixed timesteps included.


@given(shape=SHAPES, num_tokens=NUM_TOKENS, order=st.permutations(range(BATCH)), seed=SEEDS, data=st.data())
def test_permuting_the_batch_permutes_the_result(
    shape: Shape, num_tokens: int, order: list[int], seed: int, data: st.DataObject
) -> None:
    model = routed(shape, torch.float64)
    set_thousandths(model, table_of(data, model, RATIOS))
    timestep = torch.tensor(data.draw(st.lists(st.floats(0, 1000, width=32), min_size=BATCH, max_size=BATCH)))
    inputs = tiny_inputs(shape, num_tokens=num_tokens, dtype=torch.float64, timestep=timestep, seed=seed)
    permuted = {name: value if name == "rope" else value[order] for name, value in inputs.items()}
    with torch.no_grad():
        assert relative_error(model(**permuted), model(**inputs)[order]) < TOLERANCE[torch.float64]


@given(shape=SHAPES, num_tokens=NUM_TOKENS, seed=SEEDS, data=st.data())
def test_splitting_the_batch_splits_the_result(shape: Shape, num_tokens: int, seed: int, data: st.DataObject) -> None:
    model = routed(shape, torch.float64)
    set_thousandths(model, table_of(data, model, RATIOS))
    timestep = torch.tensor(data.draw(st.lists(st.floats(0, 1000, width=32), min_size=BATCH, max_size=BATCH)))
    inputs = tiny_inputs(shape, num_tokens=num_tokens, dtype=torch.float64, timestep=timestep, seed=seed)
    with torch.no_grad():
        whole = model(**inputs)
        for sample in range(BATCH):
            one = {name: value if name == "rope" else value[sample : sample + 1] for name, value in inputs.items()}
            assert relative_error(whole[sample : sample + 1], model(**one)) < TOLERANCE[torch.float64]


# Law 6: permuting tokens with their side inputs permutes the result.


@given(shape=SHAPES, num_tokens=NUM_TOKENS, num_text=NUM_TEXT, seed=SEEDS, data=st.data())
def test_permuting_the_tokens_permutes_the_result(
    shape: Shape, num_tokens: int, num_text: int, seed: int, data: st.DataObject
) -> None:
    model = routed(shape, torch.float64)
    set_thousandths(model, table_of(data, model, RATIOS))
    inputs = tiny_inputs(shape, num_tokens=num_tokens, num_text=num_text, dtype=torch.float64, seed=seed)
    order = data.draw(st.permutations(range(num_tokens)))
    before = num_text if shape.kind == "joint" else 0
    joint = [*range(before), *(before + token for token in order)]
    permuted = {**inputs, "x": inputs["x"][:, order]}
    permuted |= {"rope": tuple(table[joint] for table in inputs["rope"])} if "rope" in inputs else {}
    permuted |= {"mask": inputs["mask"][:, joint][:, :, joint]} if "mask" in inputs else {}
    with torch.no_grad():
        assert relative_error(model(**permuted), model(**inputs)[:, order]) < TOLERANCE[torch.float64]


# Law 7: the two-bin estimator.


def set_column(model: TinyDiT, table: list[list[int]], column: int, ratio: int) -> None:
    set_thousandths(model, [[ratio if index == column else value for index, value in enumerate(row)] for row in table])


@given(shape=SHAPES, num_tokens=NUM_TOKENS, timestep=st.integers(0, 1000), seed=SEEDS, data=st.data())
def test_the_gradient_of_a_ratio_is_the_two_bin_difference(
    shape: Shape, num_tokens: int, timestep: int, seed: int, data: st.DataObject
) -> None:
    model = routed(shape, torch.float64)
    table = table_of(data, model, st.one_of(RATIOS, st.integers(0, 10).map(lambda bin: 100 * bin)))
    set_thousandths(model, table)
    inputs = tiny_inputs(shape, num_tokens=num_tokens, dtype=torch.float64, timestep=timestep, seed=seed)
    region = min(timestep * len(table) // 1000, len(table) - 1)
    with diffcr_compile.learning(model) as learnable:
        with watch_blocks(model, routed_fqns(model)) as calls:
            output = model(**inputs)
        for call in calls:
            for tensor in tensors_of(call.output):
                tensor.retain_grad()
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))).sum().backward()
    gradient = learnable.ratios.grad
    assert gradient is not None
    assert not gradient[[row for row in range(len(table)) if row != region]].any()
    for column, call in enumerate(calls):
        low = min(table[region][column] // 100, 9) * 100  # at a bin the side of more compression; at one the last width
        outputs = []
        for ratio in (low, low + 100):
            set_column(model, [table[region]] * len(table), column, ratio)
            with torch.no_grad():
                outputs.append(tensors_of(model.get_submodule(call.fqn)(*call.args, **call.kwargs)))
        expected = sum(
            float((tensor.grad * (upper - lower)).sum().detach())
            for tensor, lower, upper in zip(tensors_of(call.output), *outputs, strict=True)
            if tensor.grad is not None  # the last block's text goes nowhere
        )
        # float32 masters: the estimate is rounded to 6e-8 of its largest term
        assert float(gradient[region, column]) == pytest.approx(expected / 0.1, rel=1e-4, abs=1e-4)


@given(shape=SHAPES, seed=SEEDS, data=st.data())
def test_a_batch_in_several_regions_learns_like_its_samples(shape: Shape, seed: int, data: st.DataObject) -> None:
    model = routed(shape, torch.float64)
    set_thousandths(model, table_of(data, model, st.integers(0, 900)))
    inputs = tiny_inputs(shape, dtype=torch.float64, timestep=torch.tensor([990.0, 10.0, 600.0]), seed=seed)
    with diffcr_compile.learning(model) as learnable:
        model(**inputs).square().sum().backward()
        together, learnable.ratios.grad = learnable.ratios.grad, None
        for sample in range(BATCH):
            one = {name: value if name == "rope" else value[sample : sample + 1] for name, value in inputs.items()}
            model(**one).square().sum().backward()
    assert together is not None
    assert learnable.ratios.grad is not None
    assert relative_error(together, learnable.ratios.grad) < 1e-5  # float32 gradients


# Law 8: restore gives back keys, forward and bits.


@given(shape=SHAPES, dtype=DTYPES, learn=st.booleans(), seed=SEEDS, data=st.data())
def test_restore_gives_the_original_back(
    shape: Shape, dtype: torch.dtype, learn: bool, seed: int, data: st.DataObject
) -> None:
    plain, model = original(shape, dtype), routed(shape, dtype)
    inputs = tiny_inputs(shape, dtype=dtype, seed=seed)
    set_thousandths(model, table_of(data, model, RATIOS))
    mode: Any = diffcr_compile.learning if learn else diffcr_compile.trace
    with mode(model):
        model(**inputs)
    assert diffcr_compile.restore(model) is model
    assert same_snapshot(snapshot(model), snapshot(plain))
    assert same_bits(model(**inputs), plain(**inputs))


# Law 9: FLOPs never rise with the ratio, and cost agrees with torch's counter.


@functools.cache
def measured(shape: Shape) -> TinyDiT:
    """A model whose costs are known, so that ``cost`` only reads the table."""
    model = routed(shape)
    diffcr_compile.cost(model)
    return model


@given(shape=SHAPES, data=st.data())
def test_flops_never_rise_with_the_ratio(shape: Shape, data: st.DataObject) -> None:
    model = measured(shape)
    lower = table_of(data, model, RATIOS)
    higher = [[data.draw(st.integers(ratio, 1000)) for ratio in row] for row in lower]
    costs = []
    for table in (lower, higher):
        set_thousandths(model, table)
        costs.append(diffcr_compile.cost(model))
    assert all(more >= less for more, less in zip(costs[0].routed_flops, costs[1].routed_flops, strict=True))
    assert max(costs[0].routed_flops) <= costs[0].dense_flops
    assert costs[0].share >= costs[1].share


@given(shape=SHAPES, data=st.data())
def test_cost_agrees_with_the_flop_counter(shape: Shape, data: st.DataObject) -> None:
    model, plain = measured(shape), original(shape)
    set_thousandths(model, table_of(data, model, RATIOS))
    cost = diffcr_compile.cost(model)
    assert cost.dense_flops == reference_flops(lambda: plain(**tiny_inputs(shape)))
    for region, flops in enumerate(cost.routed_flops):
        inputs = tiny_inputs(shape, timestep=1000 * (region + 0.5) / len(cost.routed_flops))
        assert flops == reference_flops(lambda inputs=inputs: model(**inputs))
    assert cost.share == pytest.approx(sum(cost.routed_flops) / len(cost.routed_flops) / cost.dense_flops)
