"""``skip="reuse"`` with context from every token: the laws, over trajectories of tiny models whose samples keep other tokens."""

from __future__ import annotations

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import (
    CHANNELS,
    Block,
    Shape,
    TinyDiT,
    original,
    relative_error,
    routed_fqns,
    same_bits,
    same_snapshot,
    sinusoids,
    snapshot,
    tensors_of,
    tiny_inputs,
    watch_blocks,
)
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import DiffCRConfig, UnsupportedError
from diffcr_compile import routed as runtime
from diffcr_compile.lower import Lowered
from diffcr_compile.primitives import take_tokens
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=2, heads=2, head_dim=6, masked=True)
SHAPES = (PLAIN, Shape("rotary", depth=2, heads=2, head_dim=8), Shape("joint", depth=2, heads=1, head_dim=8))
STEPS = (990.0, 700.0, 450.0, 200.0, 10.0)
TOLERANCE = 1e-5
every_token = pytest.mark.parametrize("context", ["all", "stale"])


class Beside(torch.nn.Module):
    """An adapter around a layer, with none of its attributes."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * x


class Widening(Block):
    """Its change is scaled by float32 numbers, which under autocast widens a bfloat16 stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.scale = nn.Parameter(torch.full((shape.width,), 0.5))

    def forward(self, x: Tensor, cond: Tensor, rope: Any = None, mask: Tensor | None = None) -> Tensor:
        return x + self.scale * (super().forward(x, cond, rope, mask) - x)


@functools.cache
def _transformed(shape: Shape, options: tuple[tuple[str, Any], ...]) -> TinyDiT:
    return diffcr_compile.transform(original(shape), DiffCRConfig(**dict(options)), example_inputs=tiny_inputs(shape))


def transformed(shape: Shape = PLAIN, **options: Any) -> TinyDiT:
    """A copy of a model transformed once with these options."""
    return copy.deepcopy(_transformed(shape, tuple(sorted(options.items()))))


def sample(model: TinyDiT, shape: Shape = PLAIN, steps: tuple[float, ...] = STEPS, **options: Any) -> list[Tensor]:
    """Outputs along a trajectory; the tokens change a little from step to step."""
    outputs = []
    with torch.no_grad():
        for step in steps:
            inputs = tiny_inputs(shape, timestep=step, **options)
            inputs["x"] = inputs["x"] * (1 + step / 1000)
            outputs.append(model(**inputs))
    return outputs


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_with_full_context_a_kept_token_equals_the_dense_block(shape: Shape) -> None:
    model = transformed(shape, context="all")
    assert all(family.context == "all" for family in diffcr_compile.explain(model).plan.families)
    diffcr_compile.set_ratios(model, 0.5)
    plain = original(shape)
    with torch.no_grad(), watch_blocks(model, routed_fqns(model)) as calls, diffcr_compile.trace(model) as seen:
        model(**tiny_inputs(shape))
    for call in calls:
        kept = seen.kept[call.fqn][0]
        assert len({tuple(row) for row in kept.tolist()}) > 1
        with torch.no_grad():
            expected = tensors_of(plain.get_submodule(call.fqn)(*call.args, **call.kwargs))
        found = tensors_of(call.output)
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            if index == 0:
                places = kept.unsqueeze(-1).expand(-1, -1, one.shape[-1])
                skipped = torch.ones(one.shape[:2], dtype=torch.bool).scatter(1, kept, False)
                assert torch.equal(one[skipped], call.args[0][skipped])
                one, other = one.gather(1, places), other.gather(1, places)
            assert relative_error(one, other) < TOLERANCE


@pytest.mark.parametrize("context", ["kept", "all", "stale"])
def test_the_first_step_is_dense_and_zero_is_the_original(context: str) -> None:
    model, plain = transformed(skip="reuse", context=context), original(PLAIN)
    assert all(same_bits(a, b) for a, b in zip(sample(model), sample(plain), strict=True))
    diffcr_compile.set_ratios(model, 0.5)
    outputs, expected = sample(model), sample(plain)
    assert same_bits(outputs[0], expected[0])
    assert not same_bits(outputs[1], expected[1])


def test_a_new_trajectory_begins_anew() -> None:
    model = transformed(skip="reuse", context="all", selection="turn")
    diffcr_compile.set_ratios(model, 0.6)
    first, second = sample(model), sample(model)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_reset_begins_anew_at_once() -> None:
    model = transformed(skip="reuse")
    diffcr_compile.set_ratios(model, 0.6)
    sample(model, steps=(900.0,))
    diffcr_compile.reset(model)
    assert same_bits(sample(model, steps=(700.0,))[0], sample(original(PLAIN), steps=(700.0,))[0])


@pytest.mark.parametrize("selection", ["turn", "score and turn"])
def test_every_token_is_refreshed_within_a_bounded_number_of_steps(selection: str) -> None:
    model = transformed(skip="reuse", selection=selection)
    diffcr_compile.set_ratios(model, 0.75)
    with diffcr_compile.trace(model) as seen:
        sample(model, steps=tuple(float(step) for step in range(990, 100, -50)))
    for calls in seen.kept.values():
        num_tokens, k = calls[0].shape[1], calls[1].shape[1]
        period = -(-num_tokens // k) + (selection != "turn")
        for start in range(1, len(calls) - period):
            for row in range(calls[0].shape[0]):
                together = torch.cat([call[row] for call in calls[start : start + period]])
                assert len(together.unique()) == num_tokens


def test_skipped_tokens_take_the_last_update_to_the_bit() -> None:
    model = transformed(skip="reuse", extrapolation=0)
    diffcr_compile.set_ratios(model, 0.5)
    updates: dict[str, Tensor] = {}
    for step in STEPS:
        inputs = tiny_inputs(PLAIN, timestep=step)
        with torch.no_grad(), watch_blocks(model, routed_fqns(model)) as calls, diffcr_compile.trace(model) as seen:
            model(**inputs)
        for call in calls:
            (output,), x, kept = tensors_of(call.output), call.args[0], seen.kept[call.fqn][0]
            skipped = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, kept, False)
            if call.fqn in updates:
                assert torch.equal(output[skipped], (x + updates[call.fqn])[skipped])
            fresh = output - x
            fresh[skipped] = updates.get(call.fqn, fresh)[skipped]
            updates[call.fqn] = fresh


@every_token
def test_samples_are_independent(context: str) -> None:
    """Law 5: a permuted batch gives the permuted result, all along a trajectory."""
    model = transformed(skip="reuse", context=context, selection="score and turn")
    diffcr_compile.set_ratios(model, 0.5)
    order = torch.tensor([2, 0, 1])
    permuted = []
    straight = sample(model)
    diffcr_compile.reset(model)
    for step in STEPS:
        inputs = tiny_inputs(PLAIN, timestep=step)
        inputs["x"] = inputs["x"] * (1 + step / 1000)
        with torch.no_grad():
            permuted.append(model(**{name: value[order] for name, value in inputs.items()}))
    assert all(relative_error(b, a[order]) < TOLERANCE for a, b in zip(straight, permuted, strict=True))


@every_token
def test_guidance_in_two_calls_equals_guidance_in_a_batch(context: str) -> None:
    model = transformed(skip="reuse", context=context, selection="turn")
    diffcr_compile.set_ratios(model, 0.5)
    together = sample(model)
    diffcr_compile.reset(model)
    apart = []
    for step in STEPS:
        inputs = tiny_inputs(PLAIN, timestep=step)
        inputs["x"] = inputs["x"] * (1 + step / 1000)
        with torch.no_grad():
            parts = [model(**{name: value[i : i + 1] for name, value in inputs.items()}) for i in range(3)]
        apart.append(torch.cat(parts))
    assert all(relative_error(b, a) < TOLERANCE for a, b in zip(together, apart, strict=True))


@every_token
def test_threads_do_not_share_a_trajectory(context: str) -> None:
    model = transformed(skip="reuse", context=context, selection="turn")
    diffcr_compile.set_ratios(model, 0.5)
    expected = {seed: sample(model, seed=seed)[-1] for seed in (1, 2)}
    found: dict[int, Tensor] = {}

    def run(seed: int) -> None:
        found[seed] = sample(model, seed=seed)[-1]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(found[seed], expected[seed]) for seed in expected)


@pytest.mark.parametrize("scope", ["regional", "full"])
@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, id=shape.kind, marks=[pytest.mark.nightly] * (shape.kind == "rotary")) for shape in SHAPES],
)
@every_token
def test_lowered_equals_eager(scope: str, shape: Shape, context: str) -> None:
    torch._dynamo.reset()
    model = transformed(shape, skip="reuse", context=context, selection="turn", num_regions=4)
    diffcr_compile.set_ratios(model, [[0.2, 0.5], [0.5, 0.5], [0.5, 0.0], [0.2, 0.0]])
    eager = copy.deepcopy(model)
    diffcr_compile.lower(model, scope=scope, backend="aot_eager")  # type: ignore[arg-type]
    for _ in range(2):
        pairs = list(zip(sample(model, shape), sample(eager, shape), strict=True))
        assert all(relative_error(a, b) < TOLERANCE for a, b in pairs)


@every_token
def test_what_a_graph_of_the_model_writes_into_stays_in_place(context: str) -> None:
    """And is marked so: torch records no CUDA graph that changes an input of another kind."""
    torch._dynamo.reset()
    eager = sample(transformed_to_half(context))
    model = diffcr_compile.lower(transformed_to_half(context), scope="full", backend="aot_eager")
    places = []
    for _ in range(2):
        assert all(relative_error(a, b) < TOLERANCE for a, b in zip(sample(model), eager, strict=True))
        memories = routing_of(model).current.trajectory.memories.values()
        written = [t for memory in memories for t in (*memory.updates, memory.times, memory.age, *memory.context)]
        places.append([tensor.data_ptr() for tensor in written])
    assert places[0] == places[1]
    assert {tensor._dynamo_static_input_type for tensor in written} == {"unguarded"}  # type: ignore[attr-defined]


def transformed_to_half(context: str) -> TinyDiT:
    model = transformed(skip="reuse", context=context)
    diffcr_compile.set_ratios(model, 0.5)
    return model


@pytest.mark.parametrize("scope", [None, "regional", "full"])
@pytest.mark.parametrize("degree", [0, 1])
def test_text_beside_a_block_that_is_skipped_whole_takes_its_last_update(degree: int, scope: str | None) -> None:
    """Extrapolated like the tokens': two dense steps, and one in which no block runs."""
    torch._dynamo.reset()
    shape = SHAPES[2]
    model = transformed(shape, skip="reuse", num_regions=4, extrapolation=degree)
    diffcr_compile.set_ratios(model, [[1.0] * 2, [1.0] * 2, [0.0] * 2, [0.0] * 2])
    expected = sample(model, shape)
    diffcr_compile.reset(model)
    updates: list[dict[str, Tensor]] = []
    with torch.no_grad(), watch_blocks(model, routed_fqns(model)) as calls:
        sample(model, shape, STEPS[:3])
    for call in calls:
        if call.fqn == calls[0].fqn:
            updates.append({})
        updates[-1][call.fqn] = tensors_of(call.output)[1] - call.args[1]
    ahead = degree * (STEPS[2] - STEPS[1]) / (STEPS[1] - STEPS[0])
    for first, second, third in ([step[fqn] for step in updates] for fqn in updates[0]):
        assert not torch.allclose(first, second, rtol=1e-2)
        assert relative_error(third, second + ahead * (second - first)) < TOLERANCE
    if scope is not None:
        diffcr_compile.lower(model, scope=scope, backend="aot_eager")  # type: ignore[arg-type]
        diffcr_compile.reset(model)
        assert all(relative_error(a, b) < TOLERANCE for a, b in zip(sample(model, shape), expected, strict=True))


@pytest.mark.parametrize("scope", ["regional", "full"])
def test_a_lowered_model_forgets_what_it_no_longer_skips(scope: str) -> None:
    """Back at ratio zero, with another batch size: nothing of the memory is met again."""
    torch._dynamo.reset()
    model = transformed(skip="reuse")
    diffcr_compile.lower(model, scope=scope, backend="aot_eager")  # type: ignore[arg-type]
    diffcr_compile.set_ratios(model, 0.5)
    sample(model)
    diffcr_compile.set_ratios(model, 0)
    expected = sample(original(PLAIN), batch=2)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(sample(model, batch=2), expected, strict=True))


@pytest.mark.parametrize("scope", ["regional", "full"])
@pytest.mark.parametrize(
    ("skip", "context"),
    [("identity", "all"), pytest.param("reuse", "all", marks=pytest.mark.nightly), ("reuse", "stale")],
)
def test_a_wrapped_layer_is_not_passed_by_when_lowered(scope: str, skip: str, context: str) -> None:
    """An adapter with the layer's own attributes, put on after the graphs were made."""
    torch._dynamo.reset()

    class Adapted(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.5 * x

    model = transformed(skip=skip, context=context)
    diffcr_compile.set_ratios(model, 0.5)
    eager = copy.deepcopy(model)
    diffcr_compile.lower(model, scope=scope, backend="aot_eager")  # type: ignore[arg-type]
    for each in (model, eager):
        sample(each)
        for block in each.blocks:
            block.stream.out.__class__ = Adapted  # type: ignore[union-attr]
    pairs = zip(sample(model), sample(eager), strict=True)
    assert all(relative_error(a, b) < TOLERANCE for a, b in pairs)


def test_cost_reports_the_memory() -> None:
    model = transformed(skip="reuse", extrapolation=1)
    inputs = tiny_inputs(PLAIN)
    assert diffcr_compile.cost(model, inputs).memory_bytes == 0
    diffcr_compile.set_ratios(model, 0.5)
    batch, num_tokens = inputs["x"].shape[:2]
    per_block = 2 * batch * num_tokens * PLAIN.width * 4 + 2 * batch * num_tokens * 4 + batch * num_tokens * 4
    assert diffcr_compile.cost(model, inputs).memory_bytes == len(routed_fqns(model)) * per_block


def test_full_context_costs_more_than_kept_and_less_than_dense() -> None:
    """Stale keys and values cost what kept tokens' do, but for attention over all of them, and memory."""
    costs = {}
    for context in ("kept", "stale", "all"):
        model = transformed(skip="reuse", context=context)
        diffcr_compile.set_ratios(model, 0.5)
        costs[context] = diffcr_compile.cost(model, tiny_inputs(PLAIN))
    assert costs["kept"].share < costs["stale"].share < costs["all"].share < 1
    batch, num_tokens = tiny_inputs(PLAIN)["x"].shape[:2]
    held = 2 * batch * num_tokens * PLAIN.width * 4 * len(routed_fqns(model))
    assert costs["stale"].memory_bytes == costs["all"].memory_bytes + held


@pytest.mark.parametrize("context", ["kept", "all", "stale"])
def test_reuse_needs_a_timestep(context: str) -> None:
    """A model without one has no trajectory in which anything could be remembered."""
    plain = original(PLAIN)

    class Still(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.model(x=x, timestep=torch.zeros(len(x)), mask=mask)

    inputs = {name: value for name, value in tiny_inputs(PLAIN).items() if name != "timestep"}
    model, config = Still(), DiffCRConfig(skip="reuse", context=context)  # type: ignore[arg-type]
    before = snapshot(model)
    with pytest.raises(
        diffcr_compile.UnsupportedError, match=r"skip='reuse' needs to know.*no input.*use skip='identity'"
    ):
        diffcr_compile.transform(model, config, example_inputs=inputs)
    assert same_snapshot(snapshot(model), before)


def test_stale_context_in_a_dense_step_is_the_block_to_the_bit() -> None:
    """Steps in the middle of a trajectory whose row is zero: keys and values are remembered, and the result is the dense one's."""
    model = transformed(skip="reuse", context="stale", num_regions=4)
    diffcr_compile.set_ratios(model, [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    pairs = list(zip(sample(model), sample(original(PLAIN)), strict=True))
    assert all(same_bits(a, b) for a, b in pairs[:3])
    assert not same_bits(*pairs[-1])


@every_token
def test_a_replaced_submodule_is_not_passed_by(context: str) -> None:
    """An adapter put on a layer after ``transform`` is in the result: the graph is rewritten."""
    model = transformed(skip="reuse", context=context)
    diffcr_compile.set_ratios(model, 0.5)
    before = sample(model, steps=(700.0, 500.0))[1]

    for block in model.blocks:
        block.stream.out = Beside(block.stream.out)  # type: ignore[union-attr]
    after = sample(model, steps=(700.0, 500.0))[1]
    assert relative_error(after, before) > 1e-3


@pytest.mark.parametrize("scope", [None, "regional", "full"])
@every_token
def test_an_adapter_put_on_between_two_steps_is_not_passed_by(context: str, scope: str | None) -> None:
    """Nor taken for the layer it stands for where it has no weight by that name."""
    torch._dynamo.reset()

    def last_step(adapted: bool, scope: str | None) -> Tensor:
        model = transformed(skip="reuse", context=context)
        if scope is not None:
            diffcr_compile.lower(model, scope=scope, backend="aot_eager")  # type: ignore[arg-type]
        diffcr_compile.set_ratios(model, 0.5)
        with torch.no_grad():
            for timestep in (700.0, 500.0, 300.0):
                if adapted and timestep == 300.0:
                    for block in model.blocks:
                        block.stream.out = Beside(block.stream.out)  # type: ignore[union-attr]
                output = model(**tiny_inputs(PLAIN, timestep=timestep))
        return output

    changed = last_step(True, None)
    assert relative_error(changed, last_step(False, None)) > 1e-3
    assert scope is None or relative_error(last_step(True, scope), changed) < TOLERANCE


@every_token
def test_dtype_and_artefact(tmp_path: Any, context: str) -> None:
    """``half`` after ``transform``, and ``load`` without inputs, both write the graph anew."""
    model = transformed(skip="reuse", context=context, selection="turn")
    diffcr_compile.set_ratios(model, 0.5)
    expected = sample(model)
    diffcr_compile.save(model, tmp_path / "routing")
    loaded = diffcr_compile.load(original(PLAIN), tmp_path / "routing")
    assert all(same_bits(a, b) for a, b in zip(sample(loaded), expected, strict=True))
    half = sample(model.to(torch.bfloat16), dtype=torch.bfloat16)
    assert all(output.dtype == torch.bfloat16 for output in half)
    assert relative_error(half[-1].float(), expected[-1]) < 0.1


@every_token
def test_calibrate_without_training_prefers_the_steps_and_blocks_that_suffer_least(context: str) -> None:
    model = transformed(skip="reuse", context=context, selection="turn")
    with diffcr_compile.record(model) as batches:
        sample(model, steps=tuple(float(step) for step in range(990, 0, -60)))
    report = diffcr_compile.calibrate(model, batches, budget=0.7)
    # by timestep regions; by the 17 steps, for which they stand unevenly, it is within 1 %
    assert 0.7 * 0.96 <= report.share <= 0.7
    assert not report.history
    uniform = transformed(skip="reuse", context=context, selection="turn")
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        diffcr_compile.set_ratios(uniform, middle)
        low, high = (middle, high) if diffcr_compile.cost(uniform, tiny_inputs(PLAIN)).share > 0.7 else (low, middle)
    diffcr_compile.set_ratios(uniform, high)
    dense = sample(original(PLAIN))
    errors = [sum(relative_error(a, b) for a, b in zip(sample(each), dense, strict=True)) for each in (model, uniform)]
    assert errors[0] < errors[1]


def test_learning_needs_a_trajectory() -> None:
    model = transformed(skip="reuse")
    config = diffcr_compile.CalibrationConfig(steps=2)
    with pytest.raises(diffcr_compile.CalibrationError, match="order of sampling"):
        diffcr_compile.calibrate(model, [tiny_inputs(PLAIN)], budget=0.9, config=config)


def test_batches_out_of_order_are_refused() -> None:
    model = transformed(skip="reuse")
    with pytest.raises(diffcr_compile.CalibrationError, match="order of sampling"):
        diffcr_compile.calibrate(model, [tiny_inputs(PLAIN)], budget=0.9)


def test_plain_compile_is_refused_by_name() -> None:
    torch._dynamo.reset()
    model = transformed(skip="reuse")
    diffcr_compile.set_ratios(model, 0.5)
    with pytest.raises(Exception, match=r"diffcr_compile\.lower"):
        torch.compile(model, backend="eager", fullgraph=True)(**tiny_inputs(PLAIN))


def test_a_block_called_twice_in_a_forward_is_refused_by_name() -> None:
    class Twice(TinyDiT):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            cond = self.time(sinusoids(timestep, self.shape.width))
            x = self.embed(x)
            for _ in range(2):
                x = self.blocks[0](x, cond, None, None)
            return self.head(x)

    shape = Shape("plain", depth=1, heads=1, head_dim=6)
    inputs = {name: tiny_inputs(shape)[name] for name in ("x", "timestep")}
    model = diffcr_compile.transform(Twice(shape).eval(), DiffCRConfig(skip="reuse"), example_inputs=inputs)
    diffcr_compile.set_ratios(model, 0.5)
    with pytest.raises(diffcr_compile.UnsupportedError, match="more than once"):
        model(**inputs)


@pytest.mark.parametrize("row", [(0.5, 0.5, 0.5), (0.0, 1.0, 0.5), (1.0, 0.5, 0.0)], ids=str)
@pytest.mark.parametrize("skip", ["identity", "reuse"])
def test_a_stream_that_blocks_widen_under_autocast_is_widened_where_they_route(
    skip: str, row: tuple[float, ...]
) -> None:
    """And what is remembered in one dtype serves a stream in another: no block is dense for that."""
    shape = Shape("plain", depth=3, heads=2, head_dim=6)
    torch.manual_seed(0)
    plain = TinyDiT(shape).eval()
    plain.blocks = nn.ModuleList(Widening(shape) for _ in range(shape.depth)).eval()
    inputs = {name: tiny_inputs(shape)[name] for name in ("x", "timestep")}
    found: list[torch.dtype] = []
    for block in plain.blocks:
        block.register_forward_hook(lambda block, args, output: found.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain(**inputs)
        assert found == [torch.float32] * 3
        model = diffcr_compile.transform(plain, DiffCRConfig(skip=skip), example_inputs=inputs)
        num_regions = len(diffcr_compile.ratios(model))
        diffcr_compile.set_ratios(model, torch.tensor([row] * num_regions))
        num_tokens = inputs["x"].shape[1]
        for place, timestep in enumerate(STEPS):
            found.clear()
            with diffcr_compile.trace(model) as seen:
                model(inputs["x"], torch.full_like(inputs["timestep"], timestep))
            counts = [kept[0].shape[1] for kept in seen.kept.values()]
            dense = skip == "reuse" and place == 0
            assert counts == [num_tokens if dense else num_tokens - int(ratio * num_tokens) for ratio in row]
            assert [dtype for dtype, ratio in zip(found, row, strict=True) if dense or ratio < 1] == (
                [torch.float32] * sum(dense or ratio < 1 for ratio in row)
            )


class Narrowing(Block):
    """Casts a float32 stream to its weights' dtype."""

    def forward(self, x: Tensor, cond: Tensor, rope: Any = None, mask: Tensor | None = None) -> Tensor:
        dtype = self.stream.out.weight.dtype
        return super().forward(x.to(dtype), cond.to(dtype), rope, mask)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"gate": "sigmoid"}, {"skip": "reuse"}], ids=str)
def test_a_stream_that_blocks_narrow_is_narrowed_where_they_route(options: dict[str, Any]) -> None:
    shape = Shape("plain", depth=2, heads=2, head_dim=6)
    plain = TinyDiT(shape).eval()
    plain.blocks = nn.ModuleList(Narrowing(shape) for _ in range(shape.depth)).eval().to(torch.bfloat16)
    plain.head.to(torch.bfloat16)
    inputs = {name: tiny_inputs(shape)[name] for name in ("x", "timestep")}
    model = diffcr_compile.transform(plain, DiffCRConfig(**options), example_inputs=inputs)
    diffcr_compile.set_ratios(model, 0.5)
    for timestep in STEPS[:3]:
        output = model(inputs["x"], torch.full_like(inputs["timestep"], timestep))
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_are_remembered_in_the_dtype_asked_for(dtype: str) -> None:
    """A skipped token takes its last update to the bit, rounded to that dtype; ``cost`` counts its bytes."""
    model = transformed(skip="reuse", context="kept", extrapolation=0, memory_dtype=dtype)
    whole = transformed(skip="reuse", context="kept", extrapolation=0)
    for one in (model, whole):
        diffcr_compile.set_ratios(one, 1.0)
    num_tokens = tiny_inputs(PLAIN)["x"].shape[1]
    small, large = (diffcr_compile.cost(one).memory_bytes for one in (model, whole))
    width = PLAIN.heads * PLAIN.head_dim
    assert large - small == PLAIN.depth * 3 * num_tokens * width * 2
    updates: dict[str, list[Tensor]] = {}
    for fqn in routed_fqns(model):
        model.get_submodule(fqn).register_forward_hook(
            lambda _, args, output, fqn=fqn: updates.setdefault(fqn, []).append(output - args[0])
        )
    sample(model, steps=STEPS[:2])
    for first, second in updates.values():
        rounded = first.to(getattr(torch, dtype)).float()
        assert relative_error(second, rounded) < TOLERANCE < relative_error(second, first)


class Scaled(torch.nn.Module):
    """A block whose arithmetic holds the number of its layer, an attribute, an argument and dropout."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.gain, self.dropout = number, 1.0, 0.0
        self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    def forward(self, x: Tensor, strength: float) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        update = self.out(attended) * self.gain * strength / (self.number + 1)
        return x + torch.nn.functional.dropout(update, self.dropout, self.training)


class ScaledDiT(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Scaled(number) for number in range(3))

    def forward(self, x: Tensor, strength: float = 1.0) -> Tensor:
        for block in self.blocks:
            x = block(x, strength)
        return x


def scaled_model(*, training: bool = False) -> tuple[ScaledDiT, Tensor]:
    torch.manual_seed(0)
    model, x = ScaledDiT().train(training), torch.randn(3, 11, 8)
    diffcr_compile.transform(model, DiffCRConfig(context="all"), example_inputs={"x": x, "strength": 1.0})
    diffcr_compile.set_ratios(model, 0.5)
    return model, x


def error_of_kept_tokens(model: ScaledDiT, x: Tensor, **options: Any) -> float:
    """The largest difference of a kept token from the dense block's, over the blocks."""
    worst = 0.0
    model(x, **options)  # graphs are written here: an export would run the watchers
    with torch.no_grad(), watch_blocks(model, routed_fqns(model)) as calls, diffcr_compile.trace(model) as seen:
        model(x, **options)
    for call in calls:
        block = model.get_submodule(call.fqn)
        with torch.no_grad():
            expected = type(block).forward(block, *call.args, **call.kwargs)  # type: ignore[arg-type]
        places = seen.kept[call.fqn][0].unsqueeze(-1).expand(-1, -1, 8)
        worst = max(worst, relative_error(call.output.gather(1, places), expected.gather(1, places)))
    return worst


def test_a_rewritten_graph_holds_the_number_of_its_own_layer() -> None:
    assert error_of_kept_tokens(*scaled_model()) < TOLERANCE


def test_an_attribute_that_changes_is_not_passed_by() -> None:
    model, x = scaled_model()
    model(x)
    for block in model.blocks:
        block.gain = 3.0  # type: ignore[assignment]
    assert error_of_kept_tokens(model, x) < TOLERANCE


def test_a_number_in_the_call_that_changes_is_not_passed_by() -> None:
    model, x = scaled_model()
    for strength in (1.0, 2.0, 1.0):
        assert error_of_kept_tokens(model, x, strength=strength) < TOLERANCE


@pytest.mark.parametrize("scope", ["regional", "full"])
def test_nor_is_it_when_lowered(scope: str) -> None:
    torch._dynamo.reset()
    (model, x), (eager, _) = scaled_model(), scaled_model()
    diffcr_compile.lower(model, scope=scope, backend="aot_eager")  # type: ignore[arg-type]
    with torch.no_grad():
        for strength in (2.0, 1.0, 1.0, 2.0):
            assert relative_error(model(x, strength=strength), eager(x, strength=strength)) < TOLERANCE


@pytest.mark.parametrize("scope", [None, "regional", "full"])
def test_nor_is_it_where_another_thread_gives_another_number_meanwhile(
    scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    (model, x), (eager, _) = scaled_model(), scaled_model()
    if scope is not None:
        diffcr_compile.lower(model, scope=scope, backend="aot_eager")
    place, name = (runtime, "forward_at") if scope is None else (Lowered, "_graph")
    go_on, others = getattr(place, name), []

    def interrupt(*call: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                others.append(pool.submit(run, model, 2.0).result())
        return go_on(*call)

    def run(model: ScaledDiT, strength: float) -> Tensor:
        with torch.no_grad():
            return model(x, strength=strength)

    expected = {strength: run(eager, strength) for strength in (1.0, 2.0, 3.0)}
    for strength in (2.0, 1.0):
        run(model, strength)
    monkeypatch.setattr(place, name, interrupt)
    for strength in (1.0, 3.0):
        assert relative_error(run(model, strength), expected[strength]) < TOLERANCE
    assert others
    assert all(relative_error(other, expected[2.0]) < TOLERANCE for other in others)


def test_nor_is_it_in_a_graph_of_ones_own() -> None:
    torch._dynamo.reset()
    (model, x), (eager, _) = scaled_model(), scaled_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert relative_error(compiled(x, strength=1.0), eager(x, strength=1.0)) < TOLERANCE
        with pytest.raises(torch._dynamo.exc.Unsupported, match="CaptureError"):
            compiled(x, strength=2.0)
        model(x, strength=2.0)
        for strength in (2.0, 1.0):
            assert relative_error(compiled(x, strength=strength), eager(x, strength=strength)) < TOLERANCE


def test_dropout_is_not_lost_in_training() -> None:
    model, x = scaled_model(training=True)
    for block in model.blocks:
        block.dropout = 0.5  # type: ignore[assignment]
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def at(step: float, **options: Any) -> dict[str, Any]:
    return tiny_inputs(PLAIN, timestep=step, **options)


SCOPES = pytest.mark.parametrize("scope", [None, "regional", "full"])


def lowered(model: TinyDiT, scope: Any) -> TinyDiT:
    return model if scope is None else diffcr_compile.lower(model, scope=scope, backend="eager")


@SCOPES
@torch.no_grad()
def test_a_block_that_skips_from_now_on_takes_nothing_of_another_picture(scope: Any) -> None:
    """Its memory is of the trajectory before: in this one it skipped nothing so far."""
    torch._dynamo.reset()
    model = transformed(skip="reuse", num_regions=1)
    diffcr_compile.set_ratios(model, 0.5)
    fresh = copy.deepcopy(model)
    lowered(model, scope)
    sample(model, seed=5)
    found = []
    for each in (model, fresh):
        diffcr_compile.set_ratios(each, [[0.5, 0.0]])
        for step in (900.0, 600.0):
            each(**at(step))
        diffcr_compile.set_ratios(each, 0.5)
        found.append([each(**at(step)) for step in (300.0, 200.0)])
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@SCOPES
@torch.no_grad()
def test_a_first_step_that_fails_and_is_called_again_begins_anew(scope: Any, error: type[BaseException]) -> None:
    """After its first block, which remembers it then, and before its second."""

    def fail(*_: Any) -> None:
        raise error

    torch._dynamo.reset()
    model, fresh = transformed(skip="reuse"), transformed(skip="reuse")
    for each in (model, fresh):
        diffcr_compile.set_ratios(each, 0.5)
    lowered(model, scope)
    sample(model, seed=5)
    hook = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error), torch.compiler.set_stance("force_eager"):
        model(**at(990.0))
    hook.remove()
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(sample(model), sample(fresh), strict=True))


@torch.no_grad()
def test_a_trace_at_another_size_between_lowered_forwards_is_not_met_again() -> None:
    torch._dynamo.reset()
    model = transformed(skip="reuse")
    diffcr_compile.set_ratios(model, 0.5)
    fresh = copy.deepcopy(model)
    lowered(model, "full")
    sample(model)
    with diffcr_compile.trace(model):
        sample(model, num_tokens=14)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(sample(model), sample(fresh), strict=True))


@torch.no_grad()
def test_a_lowered_model_in_another_dtype_remembers_in_that() -> None:
    torch._dynamo.reset()
    model = transformed(skip="reuse", context="kept")
    diffcr_compile.set_ratios(model, 0.5)
    fresh = copy.deepcopy(model.to(torch.bfloat16).float())
    lowered(model.to(torch.bfloat16), "full")
    sample(model, dtype=torch.bfloat16)
    model.float()
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(sample(model), sample(fresh), strict=True))


@pytest.mark.parametrize("num_regions", [1, 4])
@SCOPES
@torch.no_grad()
def test_the_models_forward_without_the_model_is_refused(scope: Any, num_regions: int) -> None:
    torch._dynamo.reset()
    model = transformed(skip="reuse", num_regions=num_regions)
    diffcr_compile.set_ratios(model, 0.5)
    lowered(model, scope)
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"Write model\(\.\.\.\)"):
        model.forward(**at(500.0))
    sample(model)
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"Write model\(\.\.\.\)"):
        model.forward(**at(500.0))


@torch.no_grad()
def test_blocks_compiled_by_themselves_do_not_forget() -> None:
    """They run uncompiled, or say so; what they remember is not passed by."""
    torch._dynamo.reset()
    model = transformed(skip="reuse")
    diffcr_compile.set_ratios(model, 0.5)
    eager = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend="eager")
    try:
        found = sample(model)
    except Exception as error:
        assert "diffcr_compile.lower" in str(error)  # noqa: PT017 - which of the two depends on the version of torch
    else:
        assert all(relative_error(a, b) < TOLERANCE for a, b in zip(found, sample(eager), strict=True))
    torch._dynamo.reset()
    whole = copy.deepcopy(eager)
    for block in whole.blocks:
        block.compile(backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"diffcr_compile\.lower"):
        sample(whole)


@pytest.mark.parametrize("other_thread", [False, True])
def test_recomputation_in_backward_is_refused(other_thread: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = transformed(skip="reuse")
    diffcr_compile.set_ratios(model, 0.5)
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner, **kw: checkpoint(inner, *args, use_reentrant=False, **kw)
    model(**at(900.0))
    loss = model(**at(600.0)).square().mean()
    with ThreadPoolExecutor(1) as pool:
        backward = (lambda: pool.submit(loss.backward).result()) if other_thread else loss.backward
        with pytest.raises(diffcr_compile.UnsupportedError, match="Turn gradient checkpointing off"):
            backward()


ONE = Shape("plain", depth=2, heads=2, head_dim=6)


class Frames(nn.Module):
    """Blocks whose batch is samples times frames, as in video models that attend frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = original(ONE)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x (B, F, N, C), timestep (B,) -> (B, F, N, C)."""
        frames = x.shape[1]
        return self.inner(x.flatten(0, 1), timestep.repeat_interleave(frames)).unflatten(0, (-1, frames))


def test_blocks_of_another_batch_than_the_models() -> None:
    def given(timestep: Any, samples: int = 2) -> dict[str, Tensor]:
        x = torch.randn(samples, 4, 11, CHANNELS, generator=torch.Generator().manual_seed(1))
        return {"x": x, "timestep": torch.as_tensor(timestep).expand(samples)}

    model = diffcr_compile.transform(Frames(), DiffCRConfig(skip="reuse"), example_inputs=given(500.0))
    diffcr_compile.set_ratios(model, 0.5)
    with torch.no_grad():
        together = [model(**given(timestep)) for timestep in (900.0, 600.0, 300.0)]
        diffcr_compile.reset(model)
        alone = [model(**{name: value[:1] for name, value in given(t).items()}) for t in (900.0, 600.0, 300.0)]
        for both, one in zip(together, alone, strict=True):
            assert relative_error(both[:1], one) < 1e-5
        diffcr_compile.reset(model)
        with pytest.raises(UnsupportedError, match="8 samples, and the model's 2 have different timesteps"):
            model(**given([901.0, 902.0]))


class Adapted(nn.Module):
    """A linear layer with something beside it, by a scale that is no tensor."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Linear(base.in_features, base.out_features)
        self.scaling = {"default": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x) * self.scaling["default"]


def test_a_scale_that_changes_between_two_steps_is_followed() -> None:
    """What ``set_adapters`` does from a callback of a pipeline, or for one of two calls of guidance."""
    torch.manual_seed(0)
    model = original(ONE)
    for block in model.blocks:
        block.stream.out = Adapted(block.stream.out)
    model = diffcr_compile.transform(model, DiffCRConfig(skip="reuse"), example_inputs=tiny_inputs(ONE))
    assert {family.context for family in diffcr_compile.explain(model).plan.families} == {"all"}
    diffcr_compile.set_ratios(model, 0.5)

    def worst(timestep: float, scale: float, seed: int = 0) -> float:
        """Error of kept tokens against the dense block as it now is."""
        for block in model.blocks:
            block.stream.out.scaling["default"] = scale
        found = []
        with torch.no_grad():
            with watch_blocks(model, routed_fqns(model)) as calls, diffcr_compile.trace(model) as seen:
                model(**tiny_inputs(ONE, timestep=timestep, seed=seed))
            for call in calls:
                block, kept = model.get_submodule(call.fqn), seen.kept[call.fqn][0]
                dense = type(block).forward(block, *call.args, **call.kwargs)
                found.append(relative_error(*(take_tokens(x, kept, 1, 0) for x in (call.output, dense))))
        return max(found)

    for timestep, scale in ((990.0, 1.0), (700.0, 1.0), (450.0, 0.0), (200.0, 0.5)):
        assert worst(timestep, scale) < 1e-5
    for timestep in (990.0, 700.0, 450.0):  # with it in the first of two calls, without in the second
        assert worst(timestep, 1.0, seed=1) < 1e-5
        assert worst(timestep, 0.0, seed=2) < 1e-5


def test_what_never_is_the_same_twice_is_refused_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MOST_STATES", 3)
    torch.manual_seed(0)
    model = original(ONE)
    model.blocks[0].stream.out = Adapted(model.blocks[0].stream.out)
    model = diffcr_compile.transform(model, DiffCRConfig(skip="reuse"), example_inputs=tiny_inputs(ONE))
    diffcr_compile.set_ratios(model, 0.5)
    with torch.no_grad():
        for step, timestep in enumerate((990.0, 700.0, 450.0)):
            model.blocks[0].stream.out.scaling["default"] = 1.0 + step
            model(**tiny_inputs(ONE, timestep=timestep))
        model.blocks[0].stream.out.scaling["default"] = 9.0
        with pytest.raises(UnsupportedError, match=r"blocks\.0 runs by a graph .* 3 have been met.*\(default\)"):
            model(**tiny_inputs(ONE, timestep=200.0))
