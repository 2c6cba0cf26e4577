"""What changes a model's linear layers: rows 4 (LoRA by peft) and 5 (quantisation by torchao), before and after transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import reference_flops, relative_error, routed_fqns, tensors_of, watch_blocks
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quant_api,
    quantize_,
)

import diffcr_compile
from compatibility.matrix import (
    ROUNDING,
    SKIPPED,
    TINY,
    assert_bits,
    assert_close,
    assert_keeps,
    assert_routes,
    assert_skips,
    at_timestep,
    inputs,
    kept,
    plain,
    routed,
    row,
    run,
    transform_first,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:the routers are untrained", "ignore:There is a performance drop", "ignore:.*adapter"
)

RANK, SCALE = 3, 2
MERGED = 1e-4
"""Of the largest value: ``W x + s B A x`` is added up in another order than ``(W + s B A) x`` (float32), which changes a score that
is near another's by no more than that either."""


# Row 4


def _config(name: str) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=list(TINY[name].targets))


def _weights(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Adapter weights as a file would hold them: ``fqn.lora_A.weight``, found on the plain model."""
    model = inject_adapter_in_model(_config(name), plain(name))
    generator = torch.Generator().manual_seed(seed)
    return {
        key: 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in get_peft_model_state_dict(model).items()
    }


def _adapters(model: nn.Module) -> dict[str, LoraLayer]:
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, LoraLayer)}


def _inject(model: nn.Module, name: str, weights: dict[str, Tensor]) -> nn.Module:
    inject_adapter_in_model(_config(name), model)
    assert set(_adapters(model)) == {key.removesuffix(".lora_A.weight") for key in weights if "lora_A" in key}
    _set(model, weights)
    return model.eval()


def _set(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for fqn, layer in _adapters(model).items():
            layer.lora_A["default"].weight.copy_(weights[f"{fqn}.lora_A.weight"])
            layer.lora_B["default"].weight.copy_(weights[f"{fqn}.lora_B.weight"])


def _merged(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A model without adapters whose own weights were changed by hand."""
    state = model.state_dict()
    with torch.no_grad():
        for key, first in weights.items():
            if "lora_A" in key:
                second = weights[key.replace("lora_A", "lora_B")]
                state[key.replace("lora_A.weight", "weight")] += SCALE * second @ first
    return model


@row(4, "LoRA after transform: load, fuse, unload")
def test_lora_after(name: str) -> None:
    weights, given = _weights(name), inputs(name)
    expected, bare = run(_merged(routed(name), weights), given), run(routed(name), given)
    model = routed(name)
    keys = list(model.state_dict())
    _inject(model, name, weights)
    assert_routes(name, model, cost=diffcr_compile.cost(model, given))
    assert_close(run(model, given), expected, MERGED)
    assert not torch.allclose(expected, bare, rtol=1e-3)
    for layer in _adapters(model).values():
        layer.merge()
    assert_close(run(model, given), expected, MERGED)
    assert_routes(name, model)
    for layer in _adapters(model).values():
        layer.unmerge()
    for fqn, layer in _adapters(model).items():
        model.set_submodule(fqn, layer.base_layer)
    assert list(model.state_dict()) == keys
    assert_close(run(model, given), bare)
    assert_routes(name, model)


@row(4, "LoRA before transform: fuse, unfuse, restored with it", slow=tuple(TINY))
def test_lora_before(name: str) -> None:
    weights, given = _weights(name), inputs(name)
    expected = run(_merged(routed(name, first=True), weights), given)
    dense = run(_inject(plain(name), name, weights), given)
    model = transform_first(_inject(plain(name), name, weights), name)
    assert_routes(name, model, first=True, cost=diffcr_compile.cost(model, given))
    assert_close(run(model, given), expected, MERGED)
    for layer in _adapters(model).values():
        layer.merge()
    assert_close(run(model, given), expected, MERGED)
    assert_routes(name, model, first=True)
    for layer in _adapters(model).values():
        layer.unmerge()
    assert_close(run(model, given), expected, MERGED)
    diffcr_compile.restore(model)
    assert_close(run(model, given), dense, MERGED)


@row(4, "LoRA after lower: load, fuse", slow=tuple(TINY))
def test_lora_after_lower(name: str) -> None:
    torch._dynamo.reset()
    weights, given = _weights(name), inputs(name)
    expected, bare = run(_merged(routed(name), weights), given), run(routed(name), given)
    model = diffcr_compile.lower(routed(name), backend="aot_eager")
    assert_close(run(model, given), bare)
    _inject(model, name, weights)
    assert_close(run(model, given), expected, MERGED)
    assert relative_error(expected, bare) > SKIPPED
    assert_skips(name, run(model, given), given)
    for layer in _adapters(model).values():
        layer.merge()
    assert_close(run(model, given), expected, MERGED)
    assert_keeps(name, model)


@row(4, "all-linear leaves the router alone")
def test_all_linear(name: str) -> None:
    linear = {fqn for fqn, module in plain(name).named_modules() if isinstance(module, nn.Linear)}
    model, given = routed(name), inputs(name)
    expected = run(model, given)
    wrapped = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    assert set(_adapters(model)) <= linear
    assert len(_adapters(model)) >= len(linear) - 1
    assert not any("router" in fqn for fqn in _adapters(model))
    assert_bits(run(wrapped.eval(), given), expected)  # a fresh adapter adds zero
    assert {model.get_submodule(fqn).diffcr_router.weight.requires_grad for fqn in routed_fqns(model)} == {False}


_NO_LOADER = dict.fromkeys(("dit", "pixart"), "diffusers' class has no LoRA loader of its own")


@row(4, "diffusers' load, fuse, unfuse and unload after transform", without=_NO_LOADER)
def test_diffusers_lora(name: str) -> None:
    weights, given = _weights(name), inputs(name)
    expected, bare = run(_merged(routed(name), weights), given), run(routed(name), given)
    model = routed(name)
    named = {f"transformer.{key}": value for key, value in weights.items()}
    alphas = {
        key.replace("lora_A.weight", "alpha"): torch.tensor(float(RANK * SCALE)) for key in named if "lora_A" in key
    }
    model.load_lora_adapter(named, network_alphas=alphas, prefix="transformer")
    assert set(_adapters(model)) == {key.removesuffix(".lora_A.weight") for key in weights if "lora_A" in key}
    assert_close(run(model, given), expected, MERGED)
    assert_keeps(name, model)
    model.fuse_lora()
    assert_close(run(model, given), expected, MERGED)
    assert_routes(name, model)
    model.unfuse_lora()
    assert_close(run(model, given), expected, MERGED)
    model.unload_lora()
    assert not _adapters(model)
    assert_close(run(model, given), bare)
    assert_routes(name, model)


@row(4, "hot-swap of a compiled routed model, without recompilation", slow=tuple(TINY))
def test_hot_swap(name: str) -> None:
    torch._dynamo.reset()
    first, second, given = _weights(name), _weights(name, 1), inputs(name)
    model = _inject(routed(name), name, first)
    prepare_model_for_compiled_hotswap(model, config=_config(name), target_rank=RANK)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_close(run(compiled, given), run(_merged(routed(name), first), given), MERGED)
    assert counter.frame_count == 1
    assert_skips(name, run(compiled, given), given)
    swapped = {key.replace(".weight", ".default.weight"): value for key, value in second.items()}
    hotswap_adapter_from_state_dict(model, swapped, "default", _config(name))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(run(compiled, given), run(_merged(routed(name), second), given), MERGED)
    assert_keeps(name, model)


@row(
    4,
    "LoRA of one's own, trained by calibrate: saved, loaded elsewhere with the routing, fused, unfused, hot-swapped",
    without=_NO_LOADER,
    slow=tuple(TINY),
)
def test_trained_lora(name: str, tmp_path: Path) -> None:
    model, given = routed(name, 0.0), inputs(name)
    weights = {key: value for key, value in model.state_dict().items() if "router" not in key}
    model.add_adapter(_config(name))
    config = diffcr_compile.CalibrationConfig(steps=4, learning_rate=3e-2, warm_start=False)
    report = diffcr_compile.calibrate(model, [given, inputs(name)], budget=0.8, config=config)
    assert report.share <= 0.8
    trained = [bool(layer.lora_B["default"].weight.any()) for layer in _adapters(model).values()]
    assert sum(trained) > len(trained) // 2  # the last block's text is no output's business
    after = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    expected = run(model.eval(), given)
    model.save_lora_adapter(tmp_path / "adapter")
    diffcr_compile.save(model, tmp_path / "routing")
    other = plain(name)
    diffcr_compile.load(other, tmp_path / "routing")
    assert not torch.allclose(run(other, given), expected, rtol=1e-3)
    file = {
        "prefix": None,
        "adapter_name": "ours",
        "weight_name": "pytorch_lora_weights.safetensors",
        "use_safetensors": True,
    }
    other.load_lora_adapter(tmp_path / "adapter", **file)
    assert_close(run(other, given), expected, MERGED)
    other.fuse_lora()
    assert_close(run(other, given), expected, MERGED)
    other.unfuse_lora()
    assert_close(run(other, given), expected, MERGED)
    with safe_open(tmp_path / "adapter" / file["weight_name"], framework="pt") as saved:
        first = {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118
        second = {key: 2 * value for key, value in first.items()}
        (tmp_path / "second").mkdir()
        save_file(second, tmp_path / "second" / file["weight_name"], metadata=saved.metadata())
    other.load_lora_adapter(tmp_path / "second", **file, hotswap=True)
    other_merged = plain(name)
    diffcr_compile.load(other_merged, tmp_path / "routing")
    assert_close(run(other, given), run(_merged(other_merged, second), given), MERGED)
    assert relative_error(run(other, given), expected) > MERGED
    assert diffcr_compile.cost(other, given).share == report.share
    other.unload_lora()
    assert torch.equal(diffcr_compile.ratios(other), report.table)
    cost, last = diffcr_compile.cost(other, given), at_timestep(name, given, 0.95)
    assert reference_flops(lambda: other(**last)) == cost.routed_flops[-1]


# Row 5


INT8 = Int8WeightOnlyConfig()
INT8_DYNAMIC = Int8DynamicActivationInt8WeightConfig()
FLOAT8 = Float8WeightOnlyConfig()
FLOAT8_DYNAMIC = Float8DynamicActivationFloat8WeightConfig()
FLOAT8_BOTH = "float8 weights and activations (on the CPU, past torchao's check for a GPU)"
ALLOWED = 1.5
"""Times the quantised dense model's error against the dense model: half of the tokens have an error of their own, which is
about that."""


@pytest.fixture
def float8_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao asks for a GPU before it quantises activations to float8, and its code computes on a CPU too."""
    if not torch.cuda.is_available():
        with pytest.raises(AssertionError, match="Float8 dynamic quantization requires CUDA compute capability"):
            quantize_(nn.Linear(16, 16), FLOAT8_DYNAMIC)
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)


def _takes(linear: nn.Linear, config: Any) -> bool:
    """Whether torchao quantises a layer: where it multiplies in float8, sizes must be multiples of 16, and it leaves others."""
    return config is not FLOAT8_DYNAMIC or all(size % 16 == 0 for size in linear.weight.shape)


def _is_quantised(model: nn.Module, config: Any) -> bool:
    taken = [module for module in model.modules() if isinstance(module, nn.Linear) and _takes(module, config)]
    return bool(taken) and all(type(module.weight.data) is not Tensor for module in taken)


def _quantised(model: nn.Module, config: Any) -> nn.Module:
    quantize_(model, config)
    assert _is_quantised(model, config)
    return model


def _check_after(name: str, config: Any) -> None:
    """The whole model; both keep the same tokens."""
    given = inputs(name)
    model, reference = _quantised(routed(name), config), routed(name)
    allowed = ALLOWED * relative_error(run(_quantised(plain(name), config), given), run(plain(name), given))
    for fqn, indices in kept(reference, given).items():
        assert torch.equal(kept(model, given)[fqn], indices)
    assert_keeps(name, model)
    assert all(type(model.get_submodule(fqn).diffcr_router.weight) is nn.Parameter for fqn in routed_fqns(model))
    assert 0 < relative_error(run(model, given), run(reference, given)) < allowed


@row(5, "int8 weights after transform")
def test_int8_after(name: str) -> None:
    _check_after(name, INT8)


@row(5, "int8 weights and activations after transform")
def test_int8_dynamic_after(name: str) -> None:
    _check_after(name, INT8_DYNAMIC)


def _check_blocks_after(name: str, config: Any, allowed: float = ALLOWED) -> None:
    """Block by block on the same inputs, since an error of this size changes which of two near scores is larger further on."""
    model, reference = _quantised(routed(name), config), routed(name)
    quantised, dense = _quantised(plain(name), config), plain(name)
    assert_keeps(name, model)
    with torch.no_grad(), watch_blocks(reference, routed_fqns(reference)) as calls:
        reference(**inputs(name))
    for call in calls:
        blocks = [one.get_submodule(call.fqn) for one in (model, quantised, dense)]
        with torch.no_grad():
            found, changed, plainly = (tensors_of(block(*call.args, **call.kwargs)) for block in blocks)
        for one, other, before, after in zip(found, tensors_of(call.output), plainly, changed, strict=True):
            assert 0 < relative_error(one, other) < allowed * relative_error(after, before)


@row(5, "float8 weights after transform")
def test_float8_after(name: str) -> None:
    _check_blocks_after(name, FLOAT8)


@pytest.mark.usefixtures("float8_anywhere")
@row(5, f"{FLOAT8_BOTH} after transform")
def test_float8_dynamic_after(name: str) -> None:
    """Keys and values have errors of their own, and attention takes the mean of half as many."""
    _check_blocks_after(name, FLOAT8_DYNAMIC, allowed=2**0.5 * ALLOWED)


def _check_before(name: str, config: Any) -> None:
    """The other order gives the same bits: its error is that of the lines above."""
    given = inputs(name)
    model, after = transform_first(_quantised(plain(name), config), name), _quantised(routed(name, first=True), config)
    assert_keeps(name, model, first=True)
    assert_bits(run(model, given), run(after, given))
    diffcr_compile.restore(model)
    assert_bits(run(model, given), run(_quantised(plain(name), config), given))


@row(5, "int8 weights before transform", slow=tuple(TINY))
def test_int8_before(name: str) -> None:
    _check_before(name, INT8)


@row(5, "int8 weights and activations before transform", slow=tuple(TINY), variant=True)
def test_int8_dynamic_before(name: str) -> None:
    _check_before(name, INT8_DYNAMIC)


@row(5, "float8 weights before transform", slow=tuple(TINY))
def test_float8_before(name: str) -> None:
    _check_before(name, FLOAT8)


@pytest.mark.usefixtures("float8_anywhere")
@row(5, f"{FLOAT8_BOTH} before transform", slow=tuple(TINY), variant=True)
def test_float8_dynamic_before(name: str) -> None:
    _check_before(name, FLOAT8_DYNAMIC)


def _saved_and_loaded(name: str, config: Any, folder: Path) -> None:
    """Routing by ``save``, weights by ``torch.save``; into a plain model, the routing before the weights and after them."""
    given = inputs(name)
    model = _quantised(routed(name), config)
    expected = run(model, given)
    diffcr_compile.save(model, folder / "routing")
    torch.save(diffcr_compile.restore(model).state_dict(), folder / "weights.pt")
    weights = torch.load(folder / "weights.pt", weights_only=True)
    first, second = plain(name), plain(name)
    diffcr_compile.load(first, folder / "routing")
    first.load_state_dict(weights, assign=True, strict=False)
    second.load_state_dict(weights, assign=True)
    diffcr_compile.load(second, folder / "routing")
    for loaded in (first, second):
        assert _is_quantised(loaded, config)
        assert_bits(run(loaded, given), expected)
        assert_keeps(name, loaded)


@row(5, "int8 weights: state dict and routing saved and loaded")
def test_int8_saved(name: str, tmp_path: Path) -> None:
    _saved_and_loaded(name, INT8, tmp_path)


@row(5, "int8 weights and activations: state dict and routing saved and loaded")
def test_int8_dynamic_saved(name: str, tmp_path: Path) -> None:
    _saved_and_loaded(name, INT8_DYNAMIC, tmp_path)


@row(5, "float8 weights: state dict and routing saved and loaded")
def test_float8_saved(name: str, tmp_path: Path) -> None:
    _saved_and_loaded(name, FLOAT8, tmp_path)


@pytest.mark.usefixtures("float8_anywhere")
@row(5, f"{FLOAT8_BOTH}: state dict and routing saved and loaded")
def test_float8_dynamic_saved(name: str, tmp_path: Path) -> None:
    _saved_and_loaded(name, FLOAT8_DYNAMIC, tmp_path)


def _lowered(name: str, config: Any, drift: float = ROUNDING) -> None:
    """Off the eager quantised routed model by less than ``drift``."""
    torch._dynamo.reset()
    model, given = _quantised(routed(name), config), inputs(name)
    expected = run(model, given)
    found = run(diffcr_compile.lower(model), given)
    assert relative_error(found, expected) < drift
    assert relative_error(found, run(routed(name), given)) > 10 * ROUNDING
    assert_skips(name, found, given)
    assert_keeps(name, model)


def _lowered_before(name: str, config: Any) -> None:
    torch._dynamo.reset()
    model, given = transform_first(_quantised(plain(name), config), name), inputs(name)
    expected = run(model, given)
    found = run(diffcr_compile.lower(model), given)
    assert_close(found, expected)
    assert_skips(name, found, given)
    assert_keeps(name, model, first=True)


@row(5, "int8 weights, lowered", slow=tuple(TINY))
def test_int8_lowered(name: str) -> None:
    _lowered(name, INT8)


@row(5, "int8 weights before transform, lowered", slow=tuple(TINY), variant=True)
def test_int8_before_lowered(name: str) -> None:
    _lowered_before(name, INT8)


@row(5, "int8 weights after lower", slow=tuple(TINY))
def test_int8_after_lower(name: str) -> None:
    torch._dynamo.reset()
    given, expected = inputs(name), run(_quantised(routed(name), INT8), inputs(name))
    model = diffcr_compile.lower(routed(name), backend="aot_eager")
    run(model, given)
    assert_close(run(_quantised(model, INT8), given), expected)
    assert_keeps(name, model)


@row(5, "int8 weights and activations, lowered", slow=tuple(TINY), variant=True)
def test_int8_dynamic_lowered(name: str) -> None:
    """An activation that another order of sums puts on the other side of a step is off by a whole step, in the compiled dense
    model too: that drifts as far."""
    dense, given = _quantised(plain(name), INT8_DYNAMIC), inputs(name)
    expected = run(dense, given)
    torch._dynamo.reset()
    _lowered(name, INT8_DYNAMIC, drift=ALLOWED * relative_error(run(torch.compile(dense), given), expected))


@row(5, "float8 weights, lowered", slow=tuple(TINY), variant=True)
def test_float8_lowered(name: str) -> None:
    _lowered(name, FLOAT8)


@pytest.mark.usefixtures("float8_anywhere")
@row(5, f"{FLOAT8_BOTH}, lowered", slow=tuple(TINY), variant=True)
def test_float8_dynamic_lowered(name: str) -> None:
    _lowered(name, FLOAT8_DYNAMIC)
