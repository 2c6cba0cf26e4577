"""Real denoisers, tiny: diffusers' DiT, PixArt, SD3, FLUX and Wan, and the original DiT on timm's layers; at batch three."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import (
    BATCH,
    BlockCall,
    facebook_dit,
    facebook_inputs,
    reference_flops,
    relative_error,
    routed_fqns,
    run_routed,
    same_bits,
    same_snapshot,
    snapshot,
    tensors_of,
)
from torch import Tensor, nn
from zoo import ZOO

import diffcr_compile

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

TOLERANCE = 1e-5
"""Of the largest value: a sample alone, without vmap, is added up in another order than in the batch (float32)."""


@dataclass(frozen=True)
class Denoiser:
    """A model with what is known of it. ``follows``: parameter of the block -> axis that follows the tokens; ``after``: the
    parameter whose tokens (axis 1) stand before them on a joint axis; ``mentions``: what ``explain`` must say."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    num_blocks: int
    lift: str
    follows: dict[str, int]
    mentions: tuple[str, ...]
    after: str = ""


def _zoo(name: str, num_blocks: int, lift: str, follows: dict[str, int], *mentions: str, after: str = "") -> Denoiser:
    return Denoiser(ZOO[name].build, ZOO[name].inputs, num_blocks, lift, follows, mentions, after)


DENOISERS = {
    "dit": _zoo("DiTTransformer2DModel", 3, "direct", {"hidden_states": 1}, "BasicTransformerBlock x 3", "0..1000"),
    "pixart": _zoo("PixArtTransformer2DModel", 3, "direct", {"hidden_states": 1}, "BasicTransformerBlock x 3"),
    "sd3": _zoo(
        "SD3Transformer2DModel",
        7,
        "direct",
        {"hidden_states": 1},
        "JointTransformerBlock x 3",
        "JointTransformerBlock x 1: transformer_blocks.6",
        "output 0[B, t0, 32]: joined to encoder_hidden_states",
    ),
    "flux": _zoo(
        "FluxTransformer2DModel",
        6,
        "vmap",
        {"hidden_states": 1, "image_rotary_emb": 0},
        "FluxTransformerBlock x 3",
        "FluxSingleTransformerBlock x 3",
        "image_rotary_emb_0[N+t0, 16]: follows the tokens",
        "0..1;",
        after="encoder_hidden_states",
    ),
    "wan": _zoo(
        "WanTransformer3DModel",
        3,
        "inserted axis",
        {"hidden_states": 1, "rotary_emb": 1},
        "WanTransformerBlock x 3",
        "rotary_emb_0[1, N, 1, t1]: follows the tokens",
    ),
    "facebook": Denoiser(
        facebook_dit, facebook_inputs, 3, "direct", {"x": 1}, ("FacebookBlock x 3", "timestep input 't'")
    ),
}


@functools.cache
def _plain(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DENOISERS[name].build()


@functools.cache
def _routed(name: str) -> nn.Module:
    model = copy.deepcopy(_plain(name))
    return diffcr_compile.transform(model, example_inputs=DENOISERS[name].inputs(BATCH))


@pytest.fixture(params=list(DENOISERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def plain(name: str) -> nn.Module:
    return _plain(name)


@pytest.fixture
def model(name: str) -> nn.Module:
    """A copy of the transformed model."""
    return copy.deepcopy(_routed(name))


@pytest.fixture
def inputs(name: str) -> dict[str, Any]:
    return DENOISERS[name].inputs(BATCH)


def test_zero_ratio_is_the_original(plain: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> None:
    assert same_bits(model(**inputs), plain(**inputs))
    assert type(model) is type(plain)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.load_state_dict(plain.state_dict(), strict=True).missing_keys == []
    assert getattr(model, "dtype", None) == getattr(plain, "dtype", None)
    assert getattr(model, "config", None) == getattr(plain, "config", None)


def test_every_block_is_found(name: str) -> None:
    explanation = diffcr_compile.explain(_routed(name))
    assert tuple(explanation.table.shape) == (4, DENOISERS[name].num_blocks)
    assert {family.plan.lift for family in explanation.families} == {DENOISERS[name].lift}
    assert sum(len(family.blocks) for family in explanation.families) == DENOISERS[name].num_blocks
    assert 0.9 < explanation.routable_share < 1


def test_explain_says_what_follows_the_tokens(name: str) -> None:
    text = str(diffcr_compile.explain(_routed(name)))
    for mention in (*DENOISERS[name].mentions, "put_tokens(", "untrained", DENOISERS[name].lift):
        assert mention in text


def test_each_block_equals_each_sample_run_alone(
    name: str, plain: nn.Module, model: nn.Module, inputs: dict[str, Any]
) -> None:
    diffcr_compile.set_ratios(model, 0.5)
    calls = run_routed(model, inputs)
    assert len(calls) == DENOISERS[name].num_blocks
    for call in calls:
        assert len({tuple(row) for row in call.kept.tolist()}) > 1
        *text_found, tokens_found = tensors_of(call.output)
        for sample in range(BATCH):
            *text, tokens = _run_alone(DENOISERS[name], plain.get_submodule(call.fqn), call, sample)
            assert relative_error(tokens_found[sample : sample + 1, call.kept[sample]], tokens) < TOLERANCE
            assert len(text_found) == len(text)
            assert all(
                relative_error(found[sample : sample + 1], one) < TOLERANCE
                for found, one in zip(text_found, text, strict=True)
            )


def _run_alone(denoiser: Denoiser, block: nn.Module, call: BlockCall, sample: int) -> list[Tensor]:
    """The original block on one sample's kept tokens; every argument sliced by hand."""
    bound = inspect.signature(type(block).forward).bind(block, *call.args, **call.kwargs).arguments
    bound.pop("self")
    kept = call.kept[sample].tolist()
    before = bound[denoiser.after].shape[1] if denoiser.after else 0

    def one(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(name, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if value.shape[0] == BATCH:
            value = value[sample : sample + 1]
        if name in denoiser.follows:
            joint = name == "image_rotary_emb"
            positions = [*range(before), *(before + token for token in kept)] if joint else kept
            value = value.index_select(denoiser.follows[name], torch.tensor(positions))
        return value

    with torch.no_grad():
        return tensors_of(block(**{name: one(name, value) for name, value in bound.items()}))


def test_skipped_tokens_keep_their_bits(model: nn.Module, inputs: dict[str, Any]) -> None:
    diffcr_compile.set_ratios(model, 0.5)
    for call in run_routed(model, inputs):
        before = call.args[0] if call.args else call.kwargs["hidden_states"]
        after = tensors_of(call.output)[-1]
        skipped = torch.ones(before.shape[:2], dtype=torch.bool).scatter(1, call.kept, False)
        assert int(skipped.sum()) == BATCH * (before.shape[1] // 2)
        assert torch.equal(before[skipped], after[skipped])


def test_flops_fall_and_agree_with_torchs_counter(plain: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> None:
    dense = reference_flops(lambda: plain(**inputs))
    assert diffcr_compile.cost(model, inputs) == diffcr_compile.cost(model)
    found = [dense]
    for ratio in (0.25, 0.5, 0.75, 1.0):
        diffcr_compile.set_ratios(model, ratio)
        cost = diffcr_compile.cost(model)
        assert cost.dense_flops == dense
        assert set(cost.routed_flops) == {reference_flops(lambda: model(**inputs))}
        found.append(cost.routed_flops[0])
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


def test_backward_reaches_every_router(model: nn.Module, inputs: dict[str, Any]) -> None:
    diffcr_compile.set_ratios(model, 0.5)
    tensors_of(model(**inputs))[0].square().sum().backward()
    for fqn in routed_fqns(model):
        gradient = model.get_submodule(fqn).diffcr_router.weight.grad
        assert gradient is not None
        assert bool(gradient.any())
        assert bool(gradient.isfinite().all())


def test_mixed_timesteps_equal_each_sample_alone(name: str, model: nn.Module) -> None:
    rows, columns = diffcr_compile.ratios(model).shape
    generator = torch.Generator().manual_seed(0)
    diffcr_compile.set_ratios(model, torch.rand(rows, columns, generator=generator))
    argument = model.__dict__["_diffcr"].plan.timestep
    inputs = DENOISERS[name].inputs(BATCH)
    steps = torch.tensor([0.9, 0.1, 0.6]) * argument.high
    inputs[argument.argument] = steps.to(inputs[argument.argument].dtype)
    with torch.no_grad():
        (whole,) = tensors_of(model(**inputs))
        for sample in range(BATCH):
            one = {
                key: value[sample : sample + 1] if isinstance(value, Tensor) and len(value) == BATCH else value
                for key, value in inputs.items()
            }
            (alone,) = tensors_of(model(**one))
            assert relative_error(whole[sample : sample + 1], alone) < TOLERANCE


def test_restore_is_exact(plain: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> None:
    diffcr_compile.set_ratios(model, 0.5)
    model(**inputs)
    diffcr_compile.restore(model)
    assert same_snapshot(snapshot(model), snapshot(plain))
    assert same_bits(model(**inputs), plain(**inputs))


def test_deferred_equals_example_inputs(name: str, plain: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> None:
    deferred = diffcr_compile.transform(copy.deepcopy(plain))
    with torch.no_grad():
        assert same_bits(deferred(**inputs), plain(**inputs))
        assert str(diffcr_compile.explain(deferred)) == str(diffcr_compile.explain(_routed(name)))
        for one in (deferred, model):
            diffcr_compile.set_ratios(one, 0.5)
        assert same_bits(deferred(**inputs), model(**inputs))
