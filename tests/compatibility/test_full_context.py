"""The matrix for ``skip="reuse"`` with keys and values from all tokens: what changes a block's modules has its graph written anew,
or is refused; what stands around its calls is let be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch
from models import reference_flops, relative_error
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import diffcr_compile
from compatibility.matrix import (
    SKIPPED,
    TINY,
    assert_bits,
    at_timestep,
    follow,
    inputs,
    plain,
    refused,
    reusing,
    row,
    run,
)

ALLOWED = 1.5
"""Times the error that quantisation makes of the dense model's outputs."""

SAVED = 0.9
"""Of the dense FLOPs of a trajectory: its first step is dense, and in the others keys and values come from all tokens."""

EXTRAPOLATED = 5**0.5
"""Times the rounding of one update: what a line through two, twice the last less the one before, has at the next step."""

MERGED = 1e-4
"""Of the largest value, float32: an adapter beside its layer, and merged into it."""


def _half(name: str, model: nn.Module) -> None:
    """Skipping goes on: a further step has half of the tokens computed in some block."""
    with diffcr_compile.trace(model) as seen:
        run(model, at_timestep(name, inputs(name), 0.2))
    tokens = TINY[name].tokens
    assert any(calls and calls[-1].shape[1] == tokens - tokens // 2 for calls in seen.kept.values())


def _differ(first: list[Any], second: list[Any]) -> float:
    return max(relative_error(one, other) for one, other in zip(first, second, strict=True))


@row(12, "LoRA after transform: load, merge", slow=tuple(TINY))
def test_lora(name: str) -> None:
    model, bare = reusing(name), follow(reusing(name), name)
    torch.manual_seed(0)
    adapters = LoraConfig(r=3, target_modules=list(TINY[name].targets), init_lora_weights=False)
    inject_adapter_in_model(adapters, model)
    model.eval()
    beside = follow(model, name)
    assert _differ(beside, bare) > 1e-3
    _half(name, model)
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "merge"):
            module.merge()
    diffcr_compile.reset(model)
    assert _differ(follow(model, name), beside) < MERGED
    _half(name, model)


def _quantised(name: str, config: Any) -> None:
    """As far from the plain one as the dense model is, by each step's error; tokens take turns alike."""
    model, dense = reusing(name), plain(name)
    quantize_(model, config)
    quantize_(dense, config)
    allowed = ALLOWED * _differ(follow(dense, name), follow(plain(name), name))
    assert 0 < _differ(follow(model, name), follow(reusing(name), name)) < allowed
    _half(name, model)


@row(12, "int8 weights after transform", slow=tuple(TINY))
def test_int8(name: str) -> None:
    _quantised(name, Int8WeightOnlyConfig())


@row(12, "int8 weights and activations after transform", slow=tuple(TINY), variant=True)
def test_int8_dynamic(name: str) -> None:
    _quantised(name, Int8DynamicActivationInt8WeightConfig())


@row(12, "float8 weights after transform", slow=tuple(TINY), variant=True)
def test_float8(name: str) -> None:
    _quantised(name, Float8WeightOnlyConfig())


@row(12, "bfloat16 after transform", slow=tuple(TINY))
def test_bfloat16(name: str) -> None:
    model, dense = reusing(name).bfloat16(), plain(name).bfloat16()
    allowed = EXTRAPOLATED * _differ(follow(dense, name, torch.bfloat16), follow(plain(name), name))
    assert 0 < _differ(follow(model, name, torch.bfloat16), follow(reusing(name), name)) < allowed
    dense_flops = reference_flops(lambda: follow(dense, name, torch.bfloat16))
    assert reference_flops(lambda: follow(model, name, torch.bfloat16)) < SAVED * dense_flops


@row(12, "autocast around the first forward and a sampling, none around the next", slow=tuple(TINY))
def test_autocast(name: str, tmp_path: Path) -> None:
    """Its graphs hold no casts: as those of a model that was transformed without."""

    def sampled(model: nn.Module, cast: bool) -> list[torch.Tensor]:
        diffcr_compile.reset(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return follow(model, name)

    model = reusing(name)
    expected = {cast: sampled(model, cast) for cast in (False, True)}
    diffcr_compile.save(model, tmp_path / "routing")
    loaded = diffcr_compile.load(plain(name), tmp_path / "routing")
    deferred = diffcr_compile.transform(plain(name), diffcr_compile.DiffCRConfig(skip="reuse"))
    with torch.autocast("cpu", torch.bfloat16):
        run(deferred, inputs(name))
    diffcr_compile.set_ratios(deferred, 0.5)
    for other in (loaded, deferred):
        for cast in (True, False):
            for found, known in zip(sampled(other, cast), expected[cast], strict=True):
                assert_bits(found, known)
        _half(name, other)


@row(12, "accelerate's hooks on blocks, after transform")
def test_hooks_on_blocks(name: str) -> None:
    model = reusing(name)
    expected = follow(model, name)
    diffcr_compile.reset(model)
    hook = accelerate.hooks.AlignDevicesHook(execution_device=torch.device("cpu"), io_same_device=True)
    for block in model.get_submodule(TINY[name].first.rstrip(".")):
        accelerate.hooks.add_hook_to_module(block, hook)
    for found, known in zip(follow(model, name), expected, strict=True):
        assert_bits(found, known)
    _half(name, model)


@row(12, "layerwise casting to float8 storage, after transform")
def test_layerwise_casting(name: str, record_property: Any) -> None:
    model = reusing(name)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert "context='kept'" in refused(record_property, follow, model, name)


@row(12, "lower, whole and by block, over a loop of four steps: as eagerly", slow=tuple(TINY))
def test_lowered(name: str) -> None:
    """Their graphs, run by ATen: Inductor's code is tried with the default options above."""
    expected = follow(reusing(name), name)
    for scope in ("regional", "full"):
        torch._dynamo.reset()
        model = diffcr_compile.lower(reusing(name), scope=scope, backend="aot_eager")  # type: ignore[arg-type]
        found = follow(model, name)
        assert _differ(found, expected) < 1e-5
        assert relative_error(found[-1], follow(plain(name), name)[-1]) > SKIPPED
