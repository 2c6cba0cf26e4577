"""What enters between blocks or beside the tokens: rows 10 (residuals, image prompts) and 11 (rotary tables, several streams)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from coverage import TOLERANCE, Row, compare_with_loop
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from models import reference_flops, routed_fqns, tensors_of, watch_blocks
from torch import Tensor, nn
from zoo import ZOO

import diffcr_compile
from compatibility.matrix import (
    BATCH,
    LARGE,
    TINY,
    assert_bits,
    assert_routes,
    inputs,
    kept,
    plain,
    refused,
    routed,
    row,
    run,
    table,
)
from diffcr_compile.routed import STATE

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

Record = Callable[[str, object], None]
WIDTHS = {"sd3": 32, "flux": 64}
RESIDUALS = {
    "sd3": {"block_controlnet_hidden_states": 3},
    "flux": {"controlnet_block_samples": 2, "controlnet_single_block_samples": 2},
}
"""Argument -> number of tensors (B, N, D), one for each block."""
_NO_RESIDUALS = dict.fromkeys(("dit", "pixart", "wan"), "its forward takes no residuals")


def assert_equals_loop(model: nn.Module, given: dict[str, Any]) -> None:
    """Every routed block equals the plain block on each sample's kept tokens alone; skipped tokens keep their bits."""
    found = Row("")
    assert compare_with_loop(model, given, found) < TOLERANCE
    assert not found.failures


def _residuals(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, TINY[name].tokens, WIDTHS[name])
    return {
        key: [torch.randn(shape, generator=generator) for _ in range(count)] for key, count in RESIDUALS[name].items()
    }


@row(10, "ControlNet residuals between blocks, unknown at transform", without=_NO_RESIDUALS)
def test_controlnet_residuals(name: str) -> None:
    """Every token, skipped or kept, has its residual added, and the next block's router sees the sum."""
    model, residuals = routed(name), _residuals(name)
    given = {**inputs(name), **residuals}
    with torch.no_grad(), watch_blocks(model, routed_fqns(model)) as calls:
        model(**given)
    images = [tensors_of(call.output)[-1] for call in calls]
    added = [tensor for tensors in residuals.values() for tensor in tensors]
    for output, residual, following in zip(images, added, calls[1:], strict=False):
        assert_bits(following.kwargs["hidden_states"], output + residual)
    assert_equals_loop(model, given)
    assert not torch.equal(kept(model, given)[calls[1].fqn], kept(model, inputs(name))[calls[1].fqn])
    assert_routes(name, model)
    assert reference_flops(lambda: model(**given)) == reference_flops(lambda: model(**inputs(name)))


@row(10, "ControlNet residuals, samples in several timestep regions", without=_NO_RESIDUALS)
def test_controlnet_residuals_by_region(name: str, record_property: Record) -> None:
    """The batch must be split, and whether an input that was not there at transform has a batch axis is unknown."""
    model = routed(name)
    diffcr_compile.set_ratios(model, table(model))
    given = {**inputs(name), **_residuals(name)}
    given["timestep"] = torch.tensor([0.9, 0.1, 0.6]) * (1 if name == "flux" else 1000)
    message = refused(record_property, run, model, given)
    assert "samples of one region at a time" in message


_NO_PROMPTS = dict.fromkeys(("dit", "pixart", "wan"), "no IP-Adapter for it in diffusers")


def _with_image_prompt(name: str, model: nn.Module) -> dict[str, Any]:
    """Put the IP-Adapter on the blocks of two streams; the call with three image tokens for each sample."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randn(BATCH, 3, 18, generator=generator)
    given: dict[str, Any] = {"ip_hidden_states": [prompt]}
    if name == "sd3":
        given = {"ip_hidden_states": prompt, "temb": torch.randn(BATCH, 22, generator=generator)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for block in model.transformer_blocks:
            block.attn.set_processor(_image_processor(name, model.config.attention_head_dim).eval())
    return {**inputs(name), "joint_attention_kwargs": given}


def _image_processor(name: str, head_dim: int) -> nn.Module:
    if name == "sd3":
        return SD3IPAdapterJointAttnProcessor2_0(WIDTHS[name], 18, head_dim, timesteps_emb_dim=22)
    return FluxIPAdapterAttnProcessor(WIDTHS[name], 18, num_tokens=(3,))


@row(10, "IP-Adapter before transform", without=_NO_PROMPTS, slow=LARGE)
def test_image_prompt_before(name: str) -> None:
    model = plain(name)
    given = _with_image_prompt(name, model)
    dense = run(model, given)
    diffcr_compile.transform(model, example_inputs=given)
    assert_bits(run(model, given), dense)
    diffcr_compile.set_ratios(model, 0.5)
    assert len(routed_fqns(model)) == len(routed_fqns(routed(name)))
    assert_equals_loop(model, given)
    cost = diffcr_compile.cost(model, given)
    assert reference_flops(lambda: model(**given)) == cost.routed_flops[0] < cost.dense_flops


@row(10, "IP-Adapter after transform", without=_NO_PROMPTS, slow=LARGE)
def test_image_prompt_after(name: str) -> None:
    """A new kind of call: analysed when it is first made, and then routed as if it had been there from the start."""
    model = routed(name)
    given = _with_image_prompt(name, model)
    other = plain(name)
    diffcr_compile.transform(other, example_inputs=_with_image_prompt(name, other))
    diffcr_compile.set_ratios(other, 0.5)
    assert_bits(run(model, given), run(other, given))
    assert {len(block.programs) for block in model.__dict__[STATE].blocks} == {2}


STREAMS = {
    "qwen-image": ("QwenImageTransformer2DModel", {}, "a complex rotary table"),
    "z-image": ("ZImageTransformer2DModel", {}, "lists of samples, a complex rotary table"),
    "ernie": ("ErnieImageTransformer2DModel", {}, "sequence first"),
    "ltx-2": ("LTX2VideoTransformer3DModel", {}, "video and audio streams"),
    "hunyuan-dit": ("HunyuanDiT2DModel", {"num_layers": 4}, "long skips"),
    "nucleus": ("NucleusMoEImageTransformer2DModel", {"num_layers": 4}, "mixture of experts"),
}


@row(
    11,
    "other structures: each block equals its samples run alone",
    models=tuple(STREAMS),
    slow=("hunyuan-dit", "ltx-2"),
)
def test_other_structures(name: str) -> None:
    kind, smaller, _ = STREAMS[name]
    build, given = ZOO[kind].build, ZOO[kind].inputs(BATCH)
    assert isinstance(build, functools.partial)
    torch.manual_seed(0)
    model = build.func(kind, {**build.args[1], **smaller})
    with torch.no_grad():
        dense: list[Tensor] = tensors_of(model(**given))
    diffcr_compile.transform(model, example_inputs=given)
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(tensors_of(model(**given)), dense, strict=True))
    diffcr_compile.set_ratios(model, 0.5)
    assert len(routed_fqns(model)) >= 3
    assert_equals_loop(model, given)
    cost = diffcr_compile.cost(model, given)
    assert reference_flops(lambda: model(**given)) == cost.routed_flops[0] < cost.dense_flops
