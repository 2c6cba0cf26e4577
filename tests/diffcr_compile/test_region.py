"""Timestep regions: from the value, once per forward; a batch in several regions is split and put together."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Shape, TinyDiT, original, relative_error, routed, same_bits, tiny_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import diffcr_compile
from diffcr_compile import DiffCRConfig
from diffcr_compile.plan import TimestepPlan
from diffcr_compile.region import pin_region, region_of
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
TABLE = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]]
PLAN = TimestepPlan("t", 0.0, 1000.0)


@pytest.fixture
def model() -> TinyDiT:
    model = routed(SHAPE)
    diffcr_compile.set_ratios(model, TABLE)
    return model


def inputs(*timesteps: float) -> dict[str, Any]:
    return tiny_inputs(SHAPE, batch=len(timesteps), timestep=torch.tensor(timesteps))


@given(value=st.floats(0, 1000, width=32), num_regions=st.integers(1, 9))
def test_regions_are_of_equal_width(value: float, num_regions: int) -> None:
    (region,) = region_of(value, PLAN, num_regions)
    assert (
        region == min(int(value * num_regions / 1000 + 1e-12), num_regions - 1) or value * num_regions / 1000 % 1 < 1e-9
    )
    assert 0 <= region < num_regions


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor(10.0), [0]),
        (torch.tensor([10, 999]), [0, 3]),
        (torch.tensor([[10, 400], [0, 20]]), [1, 0]),
        (torch.tensor([1000.0, 0.0]), [3, 0]),
        (torch.tensor([1000.9, -0.9]), [3, 0]),
        (500, [2]),
        (249.999, [0]),
        (torch.zeros(0), [0]),
        (torch.zeros(0, 5), [0]),
    ],
    ids=[
        *("scalar", "per sample", "per token: the largest", "ends", "rounding past the ends", "int", "just below"),
        *("no samples", "no samples, per token"),
    ],
)
def test_region_of(values: Any, expected: list[int]) -> None:
    assert region_of(values, PLAN, 4) == expected


@pytest.mark.parametrize("options", [{}, {"router": "timestep"}, {"skip": "reuse", "num_regions": 4}], ids=str)
def test_an_empty_batch_has_an_empty_result(options: dict[str, Any]) -> None:
    """As in the dense model, eagerly and lowered, whatever the table."""
    model = diffcr_compile.transform(original(SHAPE), DiffCRConfig(**options), example_inputs=tiny_inputs(SHAPE))
    diffcr_compile.set_ratios(model, TABLE)
    empty = {name: leaf[:0] for name, leaf in tiny_inputs(SHAPE).items()}
    expected = original(SHAPE)(**empty)
    assert same_bits(model(**empty), expected)
    for scope in ("regional", "full"):
        assert same_bits(diffcr_compile.lower(model, scope=scope, backend="eager")(**empty), expected)


@pytest.mark.parametrize("value", [1002.0, -2.0, float("nan")])
def test_a_timestep_outside_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match=r"'t' is .*, outside 0..1000"):
        region_of(torch.tensor([5.0, value]), PLAN, 4)


@pytest.mark.parametrize("region", range(4))
def test_the_timestep_picks_the_row(model: TinyDiT, region: int) -> None:
    call = inputs(*[250.0 * region + 10] * 3)
    with torch.no_grad():
        found = model(**call)
        diffcr_compile.set_ratios(model, [TABLE[region]] * 4)
        assert same_bits(found, model(**call))


def test_a_split_batch_is_each_sample_alone(model: TinyDiT) -> None:
    call = inputs(900.0, 10.0, 950.0, 300.0)
    with torch.no_grad():
        whole = model(**call)
        for sample in range(4):
            alone = model(**{name: value[sample : sample + 1] for name, value in call.items()})
            assert relative_error(whole[sample : sample + 1], alone) < 1e-5  # float32, another batch size


def test_a_forward_that_fails_leaves_no_half_split_batch(model: TinyDiT) -> None:
    """The next forward is not given the samples that were left over."""
    good, expected = inputs(10.0, 20.0), routed(SHAPE)
    diffcr_compile.set_ratios(expected, TABLE)
    bad = inputs(10.0, 900.0)
    bad["x"] = bad["x"][..., :2]
    with pytest.raises(RuntimeError):
        model(**bad)
    with torch.no_grad():
        assert same_bits(model(**good), expected(**good))


def test_hooks_of_the_user_see_the_whole_batch() -> None:
    """A forward hook that was there before ``transform`` is called once per call, with the whole output, as on the dense model."""
    from models import original

    seen: list[int] = []
    model = original(SHAPE)
    model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    diffcr_compile.transform(model, example_inputs=tiny_inputs(SHAPE))
    diffcr_compile.set_ratios(model, TABLE)
    seen.clear()
    model(**inputs(10.0, 900.0, 20.0))
    assert seen == [3]


def double(module: TinyDiT, args: Any) -> Any:
    return (args[0] * 2, *args[1:])


def double_one(module: TinyDiT, args: Any) -> Any:
    """Of a call with one positional argument: its hook may return it bare."""
    return args[0] * 2


def double_keyword(module: TinyDiT, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "x": kwargs["x"] * 2}


@pytest.mark.parametrize(
    ("hook", "num_positional"),
    [(double, 2), (double, 1), (double_one, 1), (double_keyword, 0)],
    ids=["all by position", "one by position", "its one argument bare", "by keyword"],
)
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_a_pre_hook_reaches_every_sample_of_a_split_batch(
    model: TinyDiT, hook: Any, num_positional: int, first: bool
) -> None:
    """Whatever it is registered for, and in the form in which the call was written."""
    given = inputs(10.0, 900.0, 20.0, 600.0)
    doubled, values = {**given, "x": given["x"] * 2}, tuple(given.values())
    with torch.no_grad():
        expected = model(**doubled)
        model.register_forward_pre_hook(hook, with_kwargs=hook is double_keyword, prepend=first)
        found = model(*values[:num_positional], **dict(list(given.items())[num_positional:]))
    assert same_bits(found, expected)


def test_a_pre_hook_that_only_looks_changes_nothing(model: TinyDiT) -> None:
    given, seen = inputs(10.0, 900.0, 20.0), []
    with torch.no_grad():
        expected = model(**given)
        model.register_forward_pre_hook(lambda module, args: None)
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(kwargs["x"])), with_kwargs=True)
        assert same_bits(model(**given), expected)
    assert seen == [2, 1]


def test_equal_rows_read_no_timestep(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, 0.5)
    assert torch.isfinite(model(**inputs(99999.0, -5.0))).all()


def test_a_pinned_region_wins(model: TinyDiT) -> None:
    with torch.no_grad():
        expected = model(**inputs(990.0, 990.0))
        with pin_region(routing_of(model), 3):
            found = model(inputs(990.0, 990.0)["x"], torch.tensor([990.0, 990.0]))
        assert same_bits(found, expected)
        with pin_region(routing_of(model), 0):
            assert not same_bits(model(**inputs(990.0, 990.0)), expected)


def test_copies_have_regions_of_their_own(model: TinyDiT) -> None:
    other = copy.deepcopy(model)
    diffcr_compile.restore(other)
    with torch.no_grad():
        assert not same_bits(model(**inputs(900.0, 10.0)), other(**inputs(900.0, 10.0)))
    diffcr_compile.restore(model)
    assert same_bits(model(**inputs(900.0, 10.0)), other(**inputs(900.0, 10.0)))


# Gradient checkpointing: blocks run again in backward, when other forwards have long been under way.

Checkpoint = Callable[..., Tensor]
CHECKPOINTS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
}


def around_blocks(model: TinyDiT, run: Checkpoint) -> TinyDiT:
    """A copy whose blocks are called through ``run``, as diffusers' models do."""
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.forward = functools.partial(run, block.forward)  # type: ignore[method-assign]
    return other


def loss(model: TinyDiT, timestep: float) -> Tensor:
    return model(**inputs(*[timestep] * 3)).square().sum()


def gradients(model: TinyDiT) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    assert len(found) > 3
    return found


@pytest.fixture(params=CHECKPOINTS)
def checkpointed(model: TinyDiT, request: pytest.FixtureRequest) -> TinyDiT:
    return around_blocks(model, CHECKPOINTS[request.param])


def test_forwards_that_are_never_differentiated_hinder_no_backward(model: TinyDiT, checkpointed: TinyDiT) -> None:
    for one in (model, checkpointed):
        kept = [loss(one, timestep) for timestep in (10.0, 900.0)]
        loss(one, 300.0).backward()
        assert len(kept) == 2
    assert same_bits(gradients(checkpointed), gradients(model))


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_between_a_forward_and_its_backward_changes_no_gradient(
    model: TinyDiT, checkpointed: TinyDiT, grad: bool
) -> None:
    for one in (model, checkpointed):
        value = loss(one, 300.0)
        with torch.set_grad_enabled(grad):
            loss(one, 900.0)
        value.backward()
    assert same_bits(gradients(checkpointed), gradients(model))


def test_backwards_in_any_order(model: TinyDiT, checkpointed: TinyDiT) -> None:
    found = []
    for one in (model, checkpointed):
        values = [loss(one, timestep) for timestep in (10.0, 900.0, 300.0)]
        found.append([])
        for place in (1, 0, 2):
            values[place].backward()
            found[-1].append(gradients(one))
    assert same_bits(found[1], found[0])
    assert routing_of(checkpointed).reached == {}


def test_backwards_that_fail_leave_little_and_hinder_no_other(model: TinyDiT, checkpointed: TinyDiT) -> None:
    for _ in range(100):
        with pytest.raises(diffcr_compile.UnsupportedError):
            (loss(checkpointed, 10.0) + loss(checkpointed, 900.0)).backward()
    assert len(routing_of(checkpointed).reached) < 100
    for one in (model, checkpointed):
        one.zero_grad()
        loss(one, 300.0).backward()
    assert same_bits(gradients(checkpointed), gradients(model))


def test_one_backward_of_two_regions_is_refused(checkpointed: TinyDiT) -> None:
    with pytest.raises(
        diffcr_compile.UnsupportedError, match=r"blocks.1 is recomputed in backward .* regions \[0, 3\]"
    ):
        (loss(checkpointed, 10.0) + loss(checkpointed, 900.0)).backward()
    (loss(checkpointed, 900.0) + loss(checkpointed, 990.0)).backward()


def test_a_backward_of_one_batch_in_two_regions_is_refused(checkpointed: TinyDiT) -> None:
    """Until the batch is taken apart."""
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"recomputed in backward .* regions \[0, 3\]"):
        checkpointed(**inputs(10.0, 900.0, 20.0)).square().sum().backward()
    for timesteps in ((10.0, 20.0), (900.0,)):
        checkpointed(**inputs(*timesteps)).square().sum().backward()


def test_a_backward_that_does_not_come_from_the_outputs_is_refused(checkpointed: TinyDiT) -> None:
    seen: list[Tensor] = []
    checkpointed.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    loss(checkpointed, 300.0)
    with pytest.raises(
        diffcr_compile.UnsupportedError, match=r"from the model's outputs, or turn gradient checkpointing"
    ):
        seen[0].square().sum().backward()


def test_where_all_rows_are_equal_no_region_is_asked_for(checkpointed: TinyDiT) -> None:
    diffcr_compile.set_ratios(checkpointed, 0.5)
    (loss(checkpointed, 10.0) + loss(checkpointed, 900.0)).backward()
    assert len(gradients(checkpointed)) > 3


def as_kind(kind: type[TinyDiT], table: Any = TABLE, **given: Any) -> TinyDiT:
    """A routed model of a class made from ``TinyDiT``."""
    plain = original(SHAPE)
    plain.__class__ = kind
    diffcr_compile.transform(plain, example_inputs=given or inputs(10.0, 400.0, 990.0))
    diffcr_compile.set_ratios(plain, table)
    return plain


def one_by_one(model: TinyDiT, given: dict[str, Any]) -> Tensor:
    return torch.cat([model(given["x"][i : i + 1], given["timestep"][i : i + 1]) for i in range(len(given["x"]))])


@pytest.mark.parametrize(("samples", "timesteps"), [(4, 2), (3, 4), (2, 3)])
def test_another_number_of_timesteps_than_of_samples_is_refused(model: TinyDiT, samples: int, timesteps: int) -> None:
    x = inputs(*[500.0] * samples)["x"]
    with pytest.raises(
        diffcr_compile.UnsupportedError,
        match=rf"input 'x' of TinyDiT .* {samples} samples, but there are {timesteps} timesteps",
    ):
        model(x, torch.linspace(10, 990, timesteps))


def test_what_is_broadcast_over_the_samples_is_given_to_every_group() -> None:
    shape = Shape("plain", depth=2, heads=1, head_dim=6, masked=True)
    given = tiny_inputs(shape, timestep=torch.tensor([100.0, 900.0, 500.0]))
    model = diffcr_compile.transform(original(shape), example_inputs=given)
    diffcr_compile.set_ratios(model, TABLE)
    mask = given.pop("mask")[:1]
    assert relative_error(model(**given, mask=mask), model(**given, mask=mask.expand(3, -1, -1))) < 1e-6


@pytest.mark.parametrize("table", [TABLE, 0.5], ids=["by region", "uniform"])
def test_one_picture_at_several_timesteps(model: TinyDiT, table: Any) -> None:
    diffcr_compile.set_ratios(model, table)
    x, timesteps = inputs(500.0)["x"], torch.tensor([100.0, 900.0, 500.0])
    found = model(x, timesteps)
    assert relative_error(found, model(x.expand(3, -1, -1), timesteps)) < 1e-6


@dataclasses.dataclass
class Output:
    sample: Tensor
    scale: float = 1.0


class AsDataclass(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        return Output(super().forward(x, timestep))


class AsNamespace(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        return types.SimpleNamespace(sample=super().forward(x, timestep))


def test_outputs_in_a_dataclass_are_put_together(model: TinyDiT) -> None:
    given = inputs(100.0, 900.0, 100.0)
    found = as_kind(AsDataclass)(**given)
    assert isinstance(found, Output)
    assert same_bits(found.sample, model(**given))


def test_learning_from_outputs_in_a_dataclass() -> None:
    model, config = as_kind(AsDataclass, 0.0), diffcr_compile.CalibrationConfig(steps=2)
    assert diffcr_compile.calibrate(model, [inputs(100.0, 900.0)], budget=0.8, config=config).share <= 0.8


def test_outputs_that_can_not_be_put_together_are_refused() -> None:
    with pytest.raises(
        diffcr_compile.UnsupportedError, match=r"AsNamespace returns a SimpleNamespace.* one region at a time"
    ):
        as_kind(AsNamespace)(**inputs(100.0, 900.0))


class Turning(TinyDiT):
    """``turned``: tokens in front of the samples; ``twice``: one tensor more."""

    def forward(self, x: Tensor, timestep: Tensor, turned: bool = False, twice: bool = False) -> Any:  # type: ignore[override]
        output = super().forward(x, timestep)
        output = output.transpose(0, 1) if turned else output
        return (output, output) if twice else output


@pytest.mark.parametrize("flag", ["turned", "twice"])
def test_other_outputs_than_those_that_were_seen_are_not_put_together(flag: str) -> None:
    model, call = as_kind(Turning), inputs(100.0, 900.0)
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"others than when it was transformed.*one region at"):
        model(**call, **{flag: True})
    model(**inputs(100.0), **{flag: True})
    assert torch.equal(model(**call), one_by_one(model, call))


def test_a_graph_of_ones_own_serves_regions_that_differ() -> None:
    """Of the whole model, in any order of calls and in another thread: batches in one region, and in several."""
    model = routed(SHAPE)
    diffcr_compile.set_ratios(model, TABLE)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    wrong: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                for steps in ((900.0, 100.0, 400.0), (100.0,) * 3, (900.0, 100.0, 100.0), (900.0, 100.0, 400.0)):
                    found, expected = compiled(**inputs(*steps)), eager(**inputs(*steps))
                    if found.shape != expected.shape or relative_error(found, expected) > 1e-5:
                        wrong.append(steps)
        except Exception as error:
            wrong.append(error)

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert wrong == []


class Guided(TinyDiT):
    def guided(self, x: Tensor, timestep: Tensor) -> Tensor:
        one, other = self.forward(torch.cat([x, x]), torch.cat([timestep, timestep])).chunk(2)
        return one + 2 * (one - other)


def test_a_forward_around_the_hooks_is_refused_where_the_timestep_matters() -> None:
    model = as_kind(Guided)
    for _ in range(2):
        with pytest.raises(diffcr_compile.UnsupportedError, match=r"blocks\.0 .*self\(\.\.\.\) for self\.forward"):
            model.guided(**inputs(900.0))
        model(**inputs(900.0))
    diffcr_compile.set_ratios(model, 0.5)
    assert bool(model.guided(**inputs(900.0)).isfinite().all())
    with diffcr_compile.learning(model), pytest.raises(diffcr_compile.UnsupportedError, match="not looked up"):
        model.guided(**inputs(900.0))


def test_a_forward_around_the_hooks_is_refused_with_reuse() -> None:
    model = diffcr_compile.transform(original(SHAPE), DiffCRConfig(skip="reuse"), example_inputs=inputs(500.0, 400.0))
    diffcr_compile.set_ratios(model, 0.5)
    with pytest.raises(diffcr_compile.UnsupportedError, match="not looked up"):
        model.forward(**inputs(900.0))


def in_thousandths(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "timestep": kwargs["timestep"] * 1000}


@pytest.mark.parametrize("deferred", [False, True])
def test_hooks_of_the_root_that_change_its_call_are_part_of_the_model(model: TinyDiT, deferred: bool) -> None:
    given = inputs(100.0, 900.0, 500.0)
    scaled = {**given, "timestep": given["timestep"] / 1000}
    other = original(SHAPE)
    other.register_forward_pre_hook(in_thousandths, with_kwargs=True)
    expected = other(**scaled)
    diffcr_compile.transform(other, example_inputs=None if deferred else scaled)
    assert same_bits(other(**scaled), expected)
    diffcr_compile.set_ratios(other, TABLE)
    assert diffcr_compile.explain(other).plan.timestep == TimestepPlan("timestep", 0.0, 1.0)
    assert same_bits(other(**scaled), model(**given))


def test_an_empty_batch_of_any_form_has_an_empty_result() -> None:
    for kind in ("plain", "rotary", "joint"):
        shape = Shape(kind, depth=2, heads=1, head_dim=6)  # type: ignore[arg-type]
        model = routed(shape)
        for ratio in (0.0, 0.5, 1.0):
            diffcr_compile.set_ratios(model, ratio)
            assert model(**tiny_inputs(shape, batch=0)).shape == (0, 11, 5)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("skip", ["identity", "reuse"])
def test_a_model_whose_forward_was_ended_can_be_freed(skip: Any, error: type[BaseException]) -> None:
    model = diffcr_compile.transform(original(SHAPE), DiffCRConfig(skip=skip), example_inputs=tiny_inputs(SHAPE))
    diffcr_compile.set_ratios(model, 0.5)

    def end(*_: Any) -> None:
        raise error

    handle = model.blocks[1].register_forward_pre_hook(end)
    with pytest.raises(error), torch.no_grad():
        model(**tiny_inputs(SHAPE))
    handle.remove()
    freed = weakref.ref(model)
    del model
    for _ in range(3):
        gc.collect()
    assert freed() is None
