"""The routed forward on the instance: class, signature, copies, pickles, threads, and what others bind after it."""

from __future__ import annotations

import copy
import io
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffcr_compile.passes.program import write_program
from models import (
    Shape,
    TinyDiT,
    original,
    relative_error,
    routed,
    routed_fqns,
    run_routed,
    same_bits,
    sinusoids,
    tiny_inputs,
    watch_blocks,
)
from torch import Tensor

import diffcr_compile
from diffcr_compile import DiffCRConfig
from diffcr_compile.region import pin_region
from diffcr_compile.routed import ROUTER, STATE

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("joint", depth=2, heads=1, head_dim=6)
INPUTS = tiny_inputs(SHAPE)


@pytest.fixture
def model() -> TinyDiT:
    model = routed(SHAPE)
    diffcr_compile.set_ratios(model, 0.4)
    return model


def run(model: TinyDiT, inputs: dict[str, Any] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or INPUTS))


def test_a_block_keeps_its_class_and_signature(model: TinyDiT) -> None:
    import inspect

    plain = original(SHAPE)
    for mine, theirs in zip(model.blocks, plain.blocks, strict=True):
        assert type(mine) is type(theirs)
        assert inspect.signature(mine.forward) == inspect.signature(theirs.forward)
        assert set(vars(mine)) - set(vars(theirs)) == {STATE, "forward"}
        assert set(mine._modules) - set(theirs._modules) == {ROUTER}


def test_a_blocks_own_hooks_run_once_around_it() -> None:
    """They are no part of its graph, in which kept tokens come out as from the dense block."""
    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model, inputs = original(shape), tiny_inputs(shape)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
        block.register_forward_hook(lambda module, args, output: output * 3)
    dense = copy.deepcopy(model)
    diffcr_compile.transform(model, DiffCRConfig(context="all"), example_inputs=inputs)
    assert routed_fqns(model) == ["blocks.0", "blocks.1"]
    diffcr_compile.set_ratios(model, 0.5)
    found = run_routed(model, inputs)[0]
    with torch.no_grad(), watch_blocks(dense, ["blocks.0"]) as expected:
        dense(**inputs)
    kept = found.kept.unsqueeze(-1).expand(-1, -1, shape.width)
    assert relative_error(found.output.gather(1, kept), expected[0].output.gather(1, kept)) < 1e-5


def test_what_is_added_lies_inside_blocks(model: TinyDiT) -> None:
    plain = original(SHAPE)
    added = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert added == {"blocks.0.diffcr_router.weight", "blocks.1.diffcr_router.weight"}
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]


def test_a_copy_is_independent(model: TinyDiT) -> None:
    before, other = run(model), copy.deepcopy(model)
    assert same_bits(run(other), before)
    diffcr_compile.set_ratios(other, 0.9)
    assert same_bits(run(model), before)
    assert not same_bits(run(other), before)
    assert all(block.forward.__self__ is block for block in other.blocks)
    assert str(diffcr_compile.explain(model)) != str(diffcr_compile.explain(other))


def test_a_copy_has_the_table_as_it_is() -> None:
    """Set by hand after learning, or moved by an optimiser and not yet read."""
    model = routed(SHAPE)
    with diffcr_compile.learning(model) as learned:
        pass
    diffcr_compile.set_ratios(model, 0.25)
    assert torch.equal(diffcr_compile.ratios(copy.deepcopy(model)), diffcr_compile.ratios(model))
    with diffcr_compile.learning(model) as learned, torch.no_grad():
        learned.ratios.fill_(0.7)
    duplicate = copy.deepcopy(model)
    assert torch.equal(diffcr_compile.ratios(duplicate), torch.full_like(diffcr_compile.ratios(model), 0.7))
    assert torch.equal(diffcr_compile.ratios(model), diffcr_compile.ratios(duplicate))


@pytest.mark.parametrize("scope", [None, "regional", "full"])
def test_after_a_forward_that_failed_none_is_under_way(model: TinyDiT, scope: Any) -> None:
    torch._dynamo.reset()
    diffcr_compile.set_ratios(model, [[0.0] * 2, [0.2] * 2, [0.5] * 2, [0.8] * 2])
    if scope is not None:
        diffcr_compile.lower(model, scope=scope, backend="eager")
    run(model, tiny_inputs(SHAPE, timestep=900.0))
    with pytest.raises(Exception):  # noqa: B017 - whatever the model makes of it
        model(**{**tiny_inputs(SHAPE, timestep=900.0), "text": None})
    current = model.__dict__[STATE].current
    assert (current.inside, current.split, current.call) == (False, None, None)
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"Write model\(\.\.\.\)"):
        model.forward(**tiny_inputs(SHAPE, timestep=10.0))


def test_a_pickle_of_the_whole_model_is_refused_aloud(model: TinyDiT) -> None:
    """It would come back dense: a bound forward is pickled by its name alone."""
    with pytest.raises(diffcr_compile.UnsupportedError, match="save"):
        torch.save(model, io.BytesIO())


def test_a_forward_that_another_tool_wraps_stays_routed_and_passes_through_after_restore(model: TinyDiT) -> None:
    calls = []
    inner = model.blocks[0].forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    expected = run(model)
    model.blocks[0].forward = wrapped
    assert same_bits(run(model), expected)
    diffcr_compile.restore(model)
    assert model.blocks[0].forward is wrapped
    assert same_bits(run(model), run(original(SHAPE)))
    assert len(calls) == 2


def test_threads_have_regions_of_their_own(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, [[0.0] * 2, [0.2] * 2, [0.5] * 2, [0.8] * 2])
    inputs = [tiny_inputs(SHAPE, timestep=step) for step in (10.0, 300.0, 600.0, 900.0)]
    expected = [run(model, one) for one in inputs]
    failures: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            failures.extend([index] * (not same_bits(run(model, inputs[index]), expected[index])))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_block_rests_where_it_skips_nothing_and_nobody_asks(model: TinyDiT) -> None:
    state = model.__dict__[STATE]
    table = torch.zeros(state.num_regions, len(state.blocks))
    table[:, -1] = 0.5
    diffcr_compile.set_ratios(model, table)
    assert [block.rests for block in state.blocks] == [True] * (len(state.blocks) - 1) + [False]
    diffcr_compile.set_ratios(model, 0)
    assert all(block.rests for block in state.blocks)
    with diffcr_compile.trace(model) as seen:
        assert not any(block.rests for block in state.blocks)
        model(**INPUTS)
    assert all(len(calls) == 1 for calls in seen.kept.values())
    with diffcr_compile.learning(model):
        assert not any(block.rests for block in state.blocks)
    with pin_region(state, 0, (500,) * len(state.blocks)):
        assert not any(block.rests for block in state.blocks)
    assert all(block.rests for block in state.blocks)


def test_checkpointing_around_a_block_recomputes_the_same_tokens(model: TinyDiT) -> None:
    from torch.utils.checkpoint import checkpoint

    block, inputs = model.blocks[0], tiny_inputs(SHAPE)
    x = torch.randn(3, 11, SHAPE.width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cond = torch.randn(3, SHAPE.width, generator=torch.Generator().manual_seed(1))
    gradients = []
    for run_block in (block, lambda *args: checkpoint(block, *args, use_reentrant=False)):
        x.grad = None
        run_block(x, inputs["text"], cond, inputs["rope"])[0].square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad.clone())
    assert same_bits(gradients[1], gradients[0])


def test_other_sizes_than_those_it_was_analysed_with(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, 0.5)
    inputs = tiny_inputs(SHAPE, batch=2, num_tokens=29, num_text=3)
    assert run(model, inputs).shape == inputs["x"].shape


@pytest.mark.parametrize("lift", ["vmap", "loop"])
def test_what_is_broadcast_over_the_samples_is_given_to_each(lift: Any) -> None:
    """One timestep for the whole batch, where there was one for each sample when the model was analysed."""
    shape = Shape("joint", depth=2, heads=1, head_dim=6)
    model = routed(shape)
    for block in model.blocks:
        (program,) = block.__dict__[STATE].programs.values()
        plan = replace(program.plan, lift=lift)
        block.__dict__[STATE].programs = {plan.signature: write_program(plan, DiffCRConfig())}
    diffcr_compile.set_ratios(model, 0.4)
    steps = torch.full((3,), 500.0)
    expected = run(model, {**INPUTS, "timestep": steps})
    found = run(model, {**INPUTS, "timestep": steps[:1]})
    assert relative_error(found, expected) < 1e-6  # a product of one row may round in another way than that of three
    assert not same_bits(expected, run(model, {**INPUTS, "timestep": steps / 2}))


def test_a_table_that_does_not_follow_the_tokens_is_refused(model: TinyDiT) -> None:
    rope = tuple(table[:-1] for table in INPUTS["rope"])
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"blocks.0: input 'rope_0' .* should hold 15 tokens"):
        run(model, {**INPUTS, "rope": rope})


def test_autocast_is_followed(model: TinyDiT) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model)
        diffcr_compile.set_ratios(model, 0.0)
        assert same_bits(run(model), run(original(SHAPE)))
    assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_callers_may_write_into_what_a_block_returns(ratio: float, lowered: bool) -> None:
    """As into a block's own output: what it was given stays."""

    class Adding(TinyDiT):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            cond = self.time(sinusoids(timestep, self.shape.width).to(x.dtype))
            kept = []
            for block in self.blocks:
                kept.append(x)
                x = block(x, cond, None, None)
                x += 1
            return x + sum(kept)

    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model = original(shape)
    model.__class__ = Adding
    latents = torch.randn(3, 11, shape.width, generator=torch.Generator().manual_seed(0))
    given = {"x": latents.clone(), "timestep": torch.full((3,), 500.0)}
    diffcr_compile.transform(model, example_inputs=given)
    diffcr_compile.set_ratios(model, ratio)
    if lowered:
        torch._dynamo.reset()
        diffcr_compile.lower(model, scope="regional", backend="eager")
    with torch.no_grad():
        output = model(**given)
    assert torch.equal(given["x"], latents)
    if ratio == 1.0:
        assert torch.allclose(output, latents + 2 + latents + (latents + 1), atol=1e-5)
