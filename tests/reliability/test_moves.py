"""What users do to a model after it is routed: copies, dtypes, devices, modes, state dicts, functional calls, parametrizations.

A moved routed model is compared with the same move on the plain model, routed afterwards from the artefact of the first: nothing
of the routed model that was moved is in the second. Where there is no such second, the laws of the design are checked.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, original, routed_fqns, same_bits, tiny_inputs, watch_blocks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

import diffcr_compile
from diffcr_compile import DiffCRConfig
from reliability.support import NIGHTLY, randomise_routers, routed_like, sample, transformed

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

SHAPE = Shape("rotary", depth=2, heads=2, head_dim=4)
TABLE = [[0.0, 0.0], [0.2, 0.3], [0.5, 0.4], [0.8, 0.9]]
EQUAL_ROWS = [[0.4, 0.6]] * 4
STEPS = (990.0, 700.0, 450.0, 200.0, 10.0)

OPTIONS: dict[str, dict[str, Any]] = {
    "identity": {},
    "reuse, turn": {"skip": "reuse"},
    "reuse, score": {"skip": "reuse", "selection": "score", "context": "kept"},
    "reuse, stale context": {"skip": "reuse", "context": "stale"},
}
if NIGHTLY:
    OPTIONS |= {
        "identity, full context": {"context": "all"},
        "reuse, turn, kept context": {"skip": "reuse", "context": "kept"},
        "reuse, score, full context": {"skip": "reuse", "selection": "score"},
        "reuse, both": {"skip": "reuse", "selection": "score and turn"},
    }
REUSE = {name: options for name, options in OPTIONS.items() if "skip" in options}
every = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
with_reuse = pytest.mark.parametrize("options", REUSE.values(), ids=REUSE.keys())


def reads_all_tokens(options: dict[str, Any]) -> bool:
    return DiffCRConfig(**options).context != "kept"


def model_of(options: dict[str, Any], table: Any = TABLE) -> TinyDiT:
    model = randomise_routers(transformed(SHAPE, **options))
    diffcr_compile.set_ratios(model, table)
    return model


def other_weights(seed: int = 1) -> dict[str, Tensor]:
    """Another checkpoint of the plain model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in original(SHAPE).state_dict().items()
    }


def plain_with(weights: dict[str, Tensor]) -> TinyDiT:
    plain = original(SHAPE)
    plain.load_state_dict(weights, strict=True)
    return plain


def skips_something(model: TinyDiT, outputs: list[Tensor], **options: Any) -> bool:
    """Whether the outputs of a trajectory are others than the dense model's."""
    with diffcr_compile.trace(model) as seen:
        sample(model, SHAPE, STEPS, **options)
    num_tokens = outputs[0].shape[1]
    return any(kept.shape[1] < num_tokens for calls in seen.kept.values() for kept in calls)


# Dtypes.


DTYPES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "double": (lambda model: model.double(), torch.float64),
    "to": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "to and back": (lambda model: model.to(torch.float64).to(torch.float32), torch.float32),
}


WITH_FULL_CONTEXT = ("bfloat16",)
"""Casts that are tried with full context too in CI: each has its graph written anew twice, in seconds."""


@pytest.mark.parametrize(
    ("options", "move"),
    [
        pytest.param(options, move, id=f"{name}, {move}")
        for name, options in OPTIONS.items()
        for move in DTYPES
        if NIGHTLY or move in WITH_FULL_CONTEXT or not reads_all_tokens(options)
    ],
)
def test_a_cast_model_is_the_cast_plain_model_routed(options: dict[str, Any], move: str, tmp_path: Path) -> None:
    cast, dtype = DTYPES[move]
    model = model_of(options)
    sample(model, SHAPE, STEPS[:2])  # a trajectory under way, whose memory is of the old dtype
    reference = routed_like(model, cast(original(SHAPE)), tmp_path / "routing")
    assert cast(model) is model
    outputs = sample(model, SHAPE, STEPS, dtype=dtype)
    assert {output.dtype for output in outputs} == {dtype}
    assert all(bool(output.isfinite().all()) for output in outputs)
    assert same_bits(outputs, sample(reference, SHAPE, STEPS, dtype=dtype))
    assert skips_something(model, outputs, dtype=dtype)


@every
def test_a_cast_model_at_ratio_zero_is_the_cast_original(options: dict[str, Any]) -> None:
    model = model_of(options, 0.0).bfloat16()
    plain = original(SHAPE).bfloat16()
    assert same_bits(*(sample(one, SHAPE, STEPS, dtype=torch.bfloat16) for one in (model, plain)))


# Copies.


@every
def test_a_copy_computes_the_same_and_is_independent(options: dict[str, Any]) -> None:
    model = model_of(options)
    duplicate = copy.deepcopy(model)
    expected = sample(model, SHAPE, STEPS)
    assert same_bits(sample(duplicate, SHAPE, STEPS), expected)
    diffcr_compile.set_ratios(duplicate, 0.9)
    randomise_routers(duplicate, seed=5)
    with torch.no_grad():
        duplicate.blocks[0].stream.qkv.weight.mul_(2)
    assert not same_bits(sample(duplicate, SHAPE, STEPS), expected)
    assert same_bits(sample(model, SHAPE, STEPS), expected)
    diffcr_compile.restore(duplicate)
    assert same_bits(sample(model, SHAPE, STEPS), expected)


@with_reuse
def test_a_copy_made_within_a_trajectory_begins_one_of_its_own(options: dict[str, Any]) -> None:
    model = model_of(options)
    whole = sample(model, SHAPE, STEPS)
    sample(model, SHAPE, STEPS[:2])
    duplicate = copy.deepcopy(model)
    assert same_bits(sample(duplicate, SHAPE, STEPS[2:3]), sample(original(SHAPE), SHAPE, STEPS[2:3]))
    assert same_bits(sample(model, SHAPE, STEPS[2:]), whole[2:])


# Devices without numbers.


IDENTITY = {name: options for name, options in OPTIONS.items() if name not in REUSE}


@pytest.mark.parametrize("options", IDENTITY.values(), ids=IDENTITY.keys())
def test_on_the_meta_device_shapes_are_the_plain_models(options: dict[str, Any]) -> None:
    model = model_of(options, EQUAL_ROWS).to("meta")
    inputs = torch.utils._pytree.tree_map(lambda tensor: tensor.to("meta"), tiny_inputs(SHAPE, num_tokens=13))
    output = model(**inputs)
    assert output.is_meta
    assert output.shape == original(SHAPE)(**tiny_inputs(SHAPE, num_tokens=13)).shape
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("options", IDENTITY.values(), ids=IDENTITY.keys())
def test_under_fake_tensors_shapes_are_the_plain_models(options: dict[str, Any]) -> None:
    model = model_of(options, EQUAL_ROWS)
    expected = sample(model, SHAPE, STEPS)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = torch.utils._pytree.tree_map(mode.from_tensor, tiny_inputs(SHAPE, num_tokens=13))
        output = model(**inputs)
    assert output.shape == (3, 13, 5)
    assert same_bits(sample(model, SHAPE, STEPS), expected)


@every
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_rows_that_differ_ask_for_a_timestep_with_a_value(options: dict[str, Any], kind: str) -> None:
    model = model_of(options)
    expected = sample(model, SHAPE, STEPS)
    other = copy.deepcopy(model).to("meta") if kind == "meta" else model
    with FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else contextlib.nullcontext() as mode:
        place = mode.from_tensor if mode else lambda tensor: tensor.to("meta")
        with pytest.raises(diffcr_compile.UnsupportedError, match=f"a {kind} tensor has none"):
            other(**torch.utils._pytree.tree_map(place, tiny_inputs(SHAPE, num_tokens=13)))
    assert same_bits(sample(model, SHAPE, STEPS), expected)


# Modes.


@every
def test_train_and_eval_come_back_to_the_same_bits(options: dict[str, Any]) -> None:
    model = model_of(options)
    expected = sample(model, SHAPE, STEPS)
    assert model.train() is model
    assert all(module.training for module in model.modules())
    torch.manual_seed(0)
    trained = sample(model, SHAPE, STEPS)
    assert not same_bits(trained, expected)  # dropout
    assert same_bits(sample(model.eval(), SHAPE, STEPS), expected)


@every
def test_in_train_mode_ratio_zero_is_the_original(options: dict[str, Any]) -> None:
    outputs = []
    for model in (model_of(options, 0.0), original(SHAPE)):
        torch.manual_seed(3)
        outputs.append(sample(model.train(), SHAPE, STEPS))
    assert same_bits(*outputs)


@pytest.mark.parametrize("options", IDENTITY.values(), ids=IDENTITY.keys())
def test_in_train_mode_skipped_tokens_keep_their_bits(options: dict[str, Any]) -> None:
    model = model_of(options, EQUAL_ROWS).train()
    with diffcr_compile.trace(model) as seen, watch_blocks(model, routed_fqns(model)) as calls:
        model(**tiny_inputs(SHAPE))
    assert len(calls) == SHAPE.depth
    for call in calls:
        (kept,) = seen.kept[call.fqn]
        skipped = torch.ones(call.output.shape[:2], dtype=torch.bool).scatter(1, kept, False)
        assert 0 < int(skipped.sum()) < skipped.numel()
        assert torch.equal(call.output[skipped], call.args[0][skipped])


@every
def test_frozen_weights_change_no_value_and_want_no_gradient(options: dict[str, Any]) -> None:
    model = model_of(options)
    expected = [output.detach() for output in run_with_grad(model)]
    assert model.requires_grad_(False) is model
    outputs = run_with_grad(model)
    assert not any(output.requires_grad for output in outputs)
    assert same_bits(outputs, expected)
    assert same_bits(sample(model, SHAPE, STEPS), expected)


def run_with_grad(model: TinyDiT) -> list[Tensor]:
    """As :func:`sample`, in the grad mode of the caller."""
    outputs = []
    for step in STEPS:
        inputs = tiny_inputs(SHAPE, timestep=step)
        outputs.append(model(**{**inputs, "x": inputs["x"] * (1 + step / 1000)}))
    return outputs


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(options: dict[str, Any], mode: Any) -> None:
    model = model_of(options)
    expected = [output.detach() for output in run_with_grad(model)]
    with mode():
        assert same_bits(run_with_grad(model), expected)


@every
def test_a_trajectory_begun_in_inference_mode_goes_on_outside(options: dict[str, Any]) -> None:
    model = model_of(options)
    whole = sample(model_of(options), SHAPE, STEPS)
    with torch.inference_mode():
        begun = sample(model, SHAPE, STEPS[:2])
    assert same_bits([*begun, *sample(model, SHAPE, STEPS[2:])], whole)


@every
def test_after_inference_mode_a_new_trajectory_may_want_gradients(options: dict[str, Any]) -> None:
    model = model_of(options)
    expected = [output.detach() for output in run_with_grad(model_of(options))]
    with torch.inference_mode():
        sample(model, SHAPE, STEPS)
    outputs = run_with_grad(model)
    assert same_bits([output.detach() for output in outputs], expected)
    outputs[-1].square().sum().backward()
    gradient = model.blocks[0].stream.qkv.weight.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())


@every
def test_inputs_made_in_inference_mode_are_taken(options: dict[str, Any]) -> None:
    model = model_of(options)
    expected = sample(model, SHAPE, STEPS)
    with torch.inference_mode():
        steps = [tiny_inputs(SHAPE, timestep=step) for step in STEPS]
        for step, inputs in zip(STEPS, steps, strict=True):
            inputs["x"] = inputs["x"] * (1 + step / 1000)
    with torch.no_grad():
        outputs = [model(**inputs) for inputs in steps]
    assert same_bits(outputs, expected)


# Weights.


@every
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_another_checkpoint_is_that_of_the_plain_model(options: dict[str, Any], assign: bool, tmp_path: Path) -> None:
    model, weights = model_of(options), other_weights()
    sample(model, SHAPE, STEPS)
    assert list(model.state_dict()) == list(weights)
    before = [block.diffcr_router.weight.detach().clone() for block in model.blocks]
    model.load_state_dict(weights, strict=True, assign=assign)
    assert same_bits([block.diffcr_router.weight.detach() for block in model.blocks], before)
    reference = routed_like(model, plain_with(weights), tmp_path / "routing")
    assert same_bits(sample(model, SHAPE, STEPS), sample(reference, SHAPE, STEPS))
    assert same_bits(list(model.state_dict().values()), list(weights.values()))


@every
def test_a_functional_call_takes_the_weights_it_is_given(options: dict[str, Any], tmp_path: Path) -> None:
    model, weights = model_of(options), other_weights()
    expected = sample(model, SHAPE, STEPS)
    reference = routed_like(model, plain_with(weights), tmp_path / "routing")

    def call(**inputs: Any) -> Tensor:
        return torch.func.functional_call(model, weights, (), inputs)

    assert same_bits(sample(call, SHAPE, STEPS), sample(reference, SHAPE, STEPS))
    assert same_bits(sample(model, SHAPE, STEPS), expected)


@pytest.mark.parametrize("options", IDENTITY.values(), ids=IDENTITY.keys())
def test_a_functional_call_has_the_gradients_of_backward(options: dict[str, Any]) -> None:
    model, inputs = model_of(options), tiny_inputs(SHAPE, timestep=700.0)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = torch.func.grad(lambda given: torch.func.functional_call(model, given, (), inputs).square().sum())(
        parameters
    )
    model(**inputs).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) > 10
    # the same sums in another order: some hundred roundings of float32
    for name, gradient in found.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


class Twice(nn.Module):
    """A parametrization whose result is exact."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@every
def test_a_parametrized_layer_is_not_passed_by(options: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(options)
    expected = sample(model, SHAPE, STEPS)
    name = "blocks.0.stream.qkv"
    doubled = {key: 2 * value if key == f"{name}.weight" else value for key, value in model.state_dict().items()}
    reference = routed_like(model, plain_with(doubled), tmp_path / "routing")
    parametrize.register_parametrization(model.get_submodule(name), "weight", Twice())
    assert same_bits(sample(model, SHAPE, STEPS), sample(reference, SHAPE, STEPS))
    parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=False)
    assert same_bits(sample(model, SHAPE, STEPS), expected)


@every
def test_weights_in_shared_memory_are_those_of_every_process(options: dict[str, Any]) -> None:
    model = model_of(options)
    expected = sample(model, SHAPE, STEPS)
    assert model.share_memory() is model
    assert all(parameter.is_shared() for parameter in model.parameters())
    assert same_bits(sample(model, SHAPE, STEPS), expected)
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            model.blocks[0].stream.qkv.weight.mul_(2)
            model.blocks[0].diffcr_router.weight.neg_()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    unshared = model_of(options)
    with torch.no_grad():
        unshared.blocks[0].stream.qkv.weight.mul_(2)
        unshared.blocks[0].diffcr_router.weight.neg_()
    found = sample(model, SHAPE, STEPS)
    assert same_bits(found, sample(unshared, SHAPE, STEPS))
    assert not same_bits(found, expected)


# Moves together, and back to the original.


@every
def test_after_all_moves_restore_gives_the_moved_original(options: dict[str, Any]) -> None:
    model, plain = model_of(options), original(SHAPE)
    weights = other_weights()
    for one in (model, plain):
        one.load_state_dict(weights, strict=True, assign=True)
        one.double().requires_grad_(False).train().eval()
    duplicate = copy.deepcopy(model)
    sample(duplicate, SHAPE, STEPS, dtype=torch.float64)
    diffcr_compile.restore(duplicate)
    assert list(duplicate.state_dict()) == list(plain.state_dict())
    assert same_bits(*(sample(one, SHAPE, STEPS, dtype=torch.float64) for one in (duplicate, plain)))
