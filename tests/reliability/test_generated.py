"""The laws of the design over models wider than those of ``test_laws.py``: depth, heads, streams, gates, numbers of regions,
batches of one to four at mixed timesteps, a table of its own for every region, three dtypes.

A transform costs seconds, so structures come from a pool drawn once, and everything else by hypothesis; the nightly profile has
a larger pool and more examples.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import (
    Shape,
    TinyDiT,
    kept_arguments,
    original,
    reference_flops,
    relative_error,
    routed_fqns,
    run_routed,
    same_bits,
    same_snapshot,
    snapshot,
    tensors_of,
    tiny_inputs,
    watch_blocks,
)

import diffcr_compile
from diffcr_compile.ratios import capacity
from reliability.support import cases, randomise_routers, transformed

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 6e-2, torch.float64: 1e-11}
"""Of the largest value: some hundred roundings of the dtype in a block, where another batch size adds up in another order."""


SCORED = 1e-6
"""The same where the sigmoid gate, of a score in float32 whatever the dtype, is a factor of the result."""


def _draw_structure(generator: random.Random) -> tuple[Shape, tuple[tuple[str, Any], ...]]:
    """A model and the options it is transformed with."""
    shape = Shape(
        kind=generator.choice(["plain", "rotary", "joint"]),
        depth=generator.randint(1, cases(4, 6)),
        heads=generator.randint(1, 6),
        head_dim=generator.choice([2, 4, 6, 8, 10, 16]),
        masked=generator.random() < 0.4,
    )
    options = {"num_regions": generator.randint(1, 7), "gate": generator.choice(["exact", "exact", "sigmoid"])}
    return shape, tuple(sorted(options.items()))


def _draw_pool(size: int) -> list[tuple[Shape, tuple[tuple[str, Any], ...]]]:
    """Different structures; the first three have a stream of each kind."""
    generator, pool = random.Random(20), []
    while len(pool) < size:
        one = _draw_structure(generator)
        kinds = {shape.kind for shape, _ in pool}
        if one not in pool and (len(pool) >= 3 or one[0].kind not in kinds):
            pool.append(one)
    return pool


POOL = _draw_pool(cases(3, 40))


@dataclass(frozen=True)
class Case:
    """A routed model and a batch for it. table: (num_regions, depth) in thousandths."""

    shape: Shape
    options: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    timesteps: tuple[float, ...]
    num_tokens: int
    num_text: int
    table: tuple[tuple[int, ...], ...]
    seed: int

    @property
    def batch(self) -> int:
        return len(self.timesteps)

    @property
    def exact(self) -> bool:
        """Whether the gate leaves a kept token as it is."""
        return dict(self.options)["gate"] == "exact"

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype] if self.exact else max(TOLERANCE[self.dtype], SCORED)

    def plain(self) -> TinyDiT:
        return original(self.shape, self.dtype)

    def routed(self) -> TinyDiT:
        model = randomise_routers(transformed(self.shape, self.dtype, **dict(self.options)), self.seed)
        diffcr_compile.set_ratios(model, torch.tensor(self.table, dtype=torch.float64) / 1000)
        return model

    def inputs(self) -> dict[str, Any]:
        return tiny_inputs(
            self.shape,
            batch=self.batch,
            num_tokens=self.num_tokens,
            num_text=self.num_text,
            dtype=self.dtype,
            timestep=torch.tensor(self.timesteps),
            seed=self.seed,
        )

    def row(self, sample: int) -> tuple[int, ...]:
        """Ratios of a sample, by the region its timestep lies in."""
        regions = len(self.table)
        return self.table[min(int(self.timesteps[sample] / 1000 * regions), regions - 1)]


def pick(inputs: dict[str, Any], samples: list[int]) -> dict[str, Any]:
    """Some samples of a batch; the rotary table belongs to all."""
    return {name: value if name == "rope" else value[samples] for name, value in inputs.items()}


@st.composite
def draw_cases(draw: st.DrawFn, ratios: st.SearchStrategy[int], dtypes: tuple[torch.dtype, ...]) -> Case:
    shape, options = draw(st.sampled_from(POOL))
    row = st.tuples(*[ratios] * shape.depth)
    timestep = st.one_of(st.floats(0, 1000, width=32), st.sampled_from([0.0, 250.0, 500.0, 999.0, 1000.0]))
    return Case(
        shape,
        options,
        draw(st.sampled_from(dtypes)),
        tuple(draw(st.lists(timestep, min_size=1, max_size=4))),
        draw(st.integers(5, 24)),
        draw(st.integers(1, 7)),
        tuple(draw(row) for _ in range(dict(options)["num_regions"])),
        draw(st.integers(0, 2**16)),
    )


ALL = (torch.float32, torch.float64, torch.bfloat16)
ANY_RATIO = st.integers(0, 1000)
BETWEEN = st.integers(200, 800)
"""Thousandths at which at least one of five tokens skips and one is kept."""

examples = settings(
    suppress_health_check=[HealthCheck.too_slow], max_examples=cases(6, settings.get_profile("nightly").max_examples)
)


@examples
@given(case=draw_cases(st.integers(0, 1000 // 25), ALL), train=st.booleans())
def test_where_no_token_skips_the_batch_is_the_original(case: Case, train: bool) -> None:
    """Law 1, at ratios of which one token would be more than asked for; at mixed timesteps as each region's samples together."""
    model, plain, inputs = case.routed().train(train), case.plain().train(train), case.inputs()
    groups: dict[int, list[int]] = {}
    for sample in range(case.batch):
        regions = len(case.table) if len(set(case.table)) > 1 else 1
        groups.setdefault(min(int(case.timesteps[sample] / 1000 * regions), regions - 1), []).append(sample)
    torch.manual_seed(case.seed)  # dropout
    found = model(**inputs)
    torch.manual_seed(case.seed)
    for samples in groups.values():
        assert same_bits(found[samples], plain(**pick(inputs, samples)))


@examples
@given(case=draw_cases(BETWEEN, ALL))
def test_skipped_tokens_keep_their_bits_and_kept_ones_are_the_blocks_own(case: Case) -> None:
    """Laws 2, 3 and 4: every block call, every sample, whatever regions the batch lies in."""
    model, plain = case.routed(), case.plain()
    calls = run_routed(model, case.inputs())
    per_block = {fqn: [call for call in calls if call.fqn == fqn] for fqn in routed_fqns(model)}
    assert [sum(len(call.kept) for call in listed) for listed in per_block.values()] == [case.batch] * case.shape.depth
    counts = sorted(
        tuple(listed[i].kept.shape[1] for listed in per_block.values()) for i in range(len(calls) // len(per_block))
    )
    rows = sorted(
        {tuple(capacity(case.num_tokens, ratio) for ratio in case.row(sample)) for sample in range(case.batch)}
    )
    assert sorted(set(counts)) == rows
    for call in calls:
        before, after = call.args[0], tensors_of(call.output)
        skipped = torch.ones(before.shape[:2], dtype=torch.bool).scatter(1, call.kept, False)
        assert int(skipped.sum()) > 0
        assert torch.equal(before[skipped], after[0][skipped])
        router = model.get_submodule(call.fqn).diffcr_router.weight
        for sample in range(len(call.kept)):
            with torch.no_grad():
                expected = tensors_of(plain.get_submodule(call.fqn)(*kept_arguments(case.shape, call, sample)))
            kept = call.kept[sample]
            start = before[sample : sample + 1, kept]
            scores = (start.double() @ router.double()).unsqueeze(-1)
            gate = torch.ones_like(scores) if case.exact else scores.sigmoid()
            expected[0] = start + gate * (expected[0].double() - start)
            found = [after[0][sample : sample + 1, kept], *(text[sample : sample + 1] for text in after[1:])]
            assert max(map(relative_error, found, expected)) < case.tolerance


@examples
@given(case=draw_cases(ANY_RATIO, (torch.float64,)), data=st.data())
def test_samples_are_independent(case: Case, data: st.DataObject) -> None:
    """Law 5: any selection of the batch, in any order, computes the same as the whole."""
    model, inputs = case.routed(), case.inputs()
    order = data.draw(st.permutations(range(case.batch)))[: data.draw(st.integers(1, case.batch))]
    with torch.no_grad():
        assert relative_error(model(**pick(inputs, order)), model(**inputs)[order]) < case.tolerance


@examples
@given(case=draw_cases(ANY_RATIO, (torch.float64,)), data=st.data())
def test_permuting_the_tokens_permutes_the_result(case: Case, data: st.DataObject) -> None:
    """Law 6, at mixed timesteps."""
    model, inputs = case.routed(), case.inputs()
    order = data.draw(st.permutations(range(case.num_tokens)))
    before = case.num_text if case.shape.kind == "joint" else 0
    joint = [*range(before), *(before + token for token in order)]
    permuted = {**inputs, "x": inputs["x"][:, order]}
    permuted |= {"rope": tuple(table[joint] for table in inputs["rope"])} if "rope" in inputs else {}
    permuted |= {"mask": inputs["mask"][:, joint][:, :, joint]} if "mask" in inputs else {}
    with torch.no_grad():
        assert relative_error(model(**permuted), model(**inputs)[:, order]) < case.tolerance


@examples
@given(case=draw_cases(ANY_RATIO, ALL))
def test_flops_are_those_counted_and_never_rise_with_the_ratio(case: Case) -> None:
    """Law 9: every region's row, at this batch and these lengths."""
    model, inputs = case.routed(), case.inputs()
    cost = diffcr_compile.cost(model, inputs)
    plain = case.plain()
    assert cost.dense_flops == reference_flops(lambda: plain(**inputs))
    for region, flops in enumerate(cost.routed_flops):
        one = {**inputs, "timestep": torch.full((case.batch,), 1000 * (region + 0.5) / len(case.table))}
        assert flops == reference_flops(lambda one=one: model(**one))
    higher = [[min(1000, ratio + 37) for ratio in row] for row in case.table]
    diffcr_compile.set_ratios(model, torch.tensor(higher, dtype=torch.float64) / 1000)
    assert all(
        more <= less
        for more, less in zip(diffcr_compile.cost(model, inputs).routed_flops, cost.routed_flops, strict=True)
    )


@examples
@given(case=draw_cases(ANY_RATIO, ALL))
def test_the_same_input_has_the_same_bits_run_to_run(case: Case) -> None:
    model, inputs = case.routed(), case.inputs()
    with torch.no_grad():
        first = model(**inputs)
        assert same_bits(model(**inputs), first)
        assert same_bits(case.routed()(**case.inputs()), first)
        with diffcr_compile.trace(model), watch_blocks(model, routed_fqns(model)):
            assert same_bits(model(**inputs), first)


@examples
@given(case=draw_cases(ANY_RATIO, ALL))
def test_a_routing_survives_its_artefact_and_leaves_no_trace(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Law 8."""
    model, plain, inputs = case.routed(), case.plain(), case.inputs()
    folder = tmp_path_factory.mktemp("generated") / "routing"
    diffcr_compile.save(model, folder)
    other = diffcr_compile.load(case.plain(), folder)
    with torch.no_grad():
        assert same_bits(other(**inputs), model(**inputs))
        assert torch.equal(diffcr_compile.ratios(other), diffcr_compile.ratios(model))
        for one in (model, other):
            diffcr_compile.restore(one)
            assert same_snapshot(snapshot(one), snapshot(plain))
            assert same_bits(one(**inputs), plain(**inputs))
