"""LoRA during calibration: what is put on, what is learned, and that nothing but products is left."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffcr_compile.calibration.adapters import low_rank
from models import Shape, TinyDiT, original, routed, same_bits, same_snapshot, sinusoids, snapshot, tiny_inputs
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CalibrationConfig, UnsupportedError
from diffcr_compile.routed import routing_of

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=2, head_dim=6)
STEPS = torch.tensor([20.0, 400.0, 950.0])
RANK = 2
CONFIG = CalibrationConfig(steps=6, trainable="lora", lora_rank=RANK, learning_rate=1e-2)


def batches(dtype: torch.dtype) -> list[dict[str, Any]]:
    return [tiny_inputs(SHAPE, num_tokens=20, dtype=dtype, seed=seed, timestep=STEPS.roll(seed)) for seed in range(3)]


@pytest.fixture
def model() -> TinyDiT:
    return routed(SHAPE, torch.float64)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the routed blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }


def attributes(model: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def test_only_products_of_the_rank_are_added_and_only_to_linears(model: TinyDiT) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG)
    after = model.state_dict()
    adapted = {f"{name}.weight" for name in linears(model)}
    assert len(adapted) == 10
    for name in adapted:
        values = torch.linalg.svdvals(after[name] - before[name])
        assert float(values[0]) > 1e-4
        # float64: a sum and a difference with a weight of size one leave 1e-16 each
        assert float(values[RANK]) < 1e-13
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if name not in adapted)


def test_keys_modules_flags_and_the_generator_are_as_before(model: TinyDiT) -> None:
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    keys, found = list(model.state_dict()), attributes(model)
    model.embed.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == parameters
    assert list(model.state_dict()) == keys
    assert attributes(model) == found
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_peft_configuration_of_the_users_is_kept(model: TinyDiT) -> None:
    """diffusers' models have the attribute once an adapter was on them."""
    mark = {"old": object()}
    model.peft_config = mark  # type: ignore[assignment]
    with low_rank(model, routing_of(model), RANK, 0):
        assert "diffcr" in model.peft_config
    assert model.peft_config is mark
    assert list(mark) == ["old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_error_nothing_is_left(model: TinyDiT, error: type[BaseException]) -> None:
    before, modules = snapshot(model), [id(module) for module in model.modules()]
    calls = []

    def loss(one: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        calls.append(len(list(one.parameters())))
        if len(calls) == 4:
            raise error
        return one(**batch).square().mean()

    plain = len(list(model.parameters()))
    with pytest.raises(error):
        diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG, loss=loss)
    assert calls == [plain + 20] * 4
    assert same_snapshot(snapshot(model), before)
    assert [id(module) for module in model.modules()] == modules


def test_nan_leaves_the_weights(model: TinyDiT) -> None:
    before = snapshot(model)
    spoilt = batches(torch.float64)
    spoilt[1]["x"][0, 0, 0] = torch.nan
    with pytest.raises(diffcr_compile.CalibrationError, match="Table, routers and weights are as before"):
        diffcr_compile.calibrate(model, spoilt, budget=0.6, config=replace(CONFIG, warm_start=False))
    assert same_snapshot(snapshot(model), before)
    assert not diffcr_compile.ratios(model).any()


def test_a_layer_that_peft_refuses_leaves_no_adapters(model: TinyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    adapt, calls = LoraModel._create_and_replace, 0

    def refuse(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("not this layer")
        return adapt(*args, **kwargs)

    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "_create_and_replace", refuse)
        with pytest.raises(ValueError, match="not this layer"):
            diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG)
    assert same_snapshot(snapshot(model), before)
    assert diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG).share <= 0.6


def test_inside_only_adapters_require_gradients(model: TinyDiT) -> None:
    expected = model(**batches(torch.float64)[0])
    with low_rank(model, routing_of(model), RANK, 0):
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(learning) == 20
        assert all(".lora_A.diffcr." in name or ".lora_B.diffcr." in name for name in learning)
        assert same_bits(model(**batches(torch.float64)[0]), expected)  # the second factor starts at zero
    assert same_bits(model(**batches(torch.float64)[0]), expected)


def test_the_seed_decides_the_start(model: TinyDiT) -> None:
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(starts))
        with low_rank(model, routing_of(model), RANK, seed):
            starts.append([one.detach().clone() for name, one in model.named_parameters() if "lora_A" in name])
    assert same_bits(starts[0], starts[1])
    assert not any(torch.equal(left, right) for left, right in zip(starts[0], starts[2], strict=True))


def test_a_rank_above_a_layers_width_is_the_layers(model: TinyDiT) -> None:
    config = CalibrationConfig(steps=2, trainable="lora", lora_rank=40)
    report = diffcr_compile.calibrate(model, batches(torch.float64), budget=0.8, config=config)
    assert 0.792 <= report.share <= 0.8


def adapted(model: TinyDiT) -> TinyDiT:
    """The model with a user's own adapter on the queries, keys and values; peft freezes the rest."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=3, target_modules=["qkv"], init_lora_weights=False), model, "mine")
    return model


def test_a_model_with_adapters_is_refused(model: TinyDiT) -> None:
    before = snapshot(adapted(model))
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.stream\.qkv has an adapter already"):
        diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG)
    assert same_snapshot(snapshot(model), before)


@pytest.mark.parametrize("estimator", ["two-bin", "single-pass"])
def test_all_trains_a_users_own_adapter_alone(model: TinyDiT, estimator: str) -> None:
    before = {name: tensor.clone() for name, tensor in adapted(model).state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = CalibrationConfig(steps=6, learning_rate=1e-2, estimator=estimator)  # type: ignore[arg-type]
    report = diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=config)
    after = model.state_dict()
    assert list(after) == list(before)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 4
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert 0.594 <= report.share <= 0.6


def test_blocks_without_linears_are_refused(model: TinyDiT) -> None:
    state: Any = SimpleNamespace(blocks=[])
    with pytest.raises(UnsupportedError, match="no routed block has a linear layer"), low_rank(model, state, 2, 0):
        pass


def test_without_peft_it_says_what_to_install(model: TinyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UnsupportedError, match=r"imported \(import of peft halted.*pip install 'diffcr-compile\[peft\]'"
    ):
        diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG)


def test_an_interrupted_merge_leaves_the_model_as_it_was(model: TinyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    merge, calls = Linear.merge, [0]

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        merge(self, *args, **kwargs)

    before = snapshot(model)
    with monkeypatch.context() as patched:
        patched.setattr(Linear, "merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG)
    assert calls[0] == 3
    assert same_snapshot(snapshot(model), before)
    assert (routing_of(model).trained, routing_of(model).report) == (False, None)
    assert 0.59 < diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG).share <= 0.6


def test_quantised_weights_are_refused_before_anything_is_learned() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = original(Shape("plain", depth=2, heads=2, head_dim=8))
    quantize_(model, Int8WeightOnlyConfig())
    given = [tiny_inputs(Shape("plain", depth=2, heads=2, head_dim=8), timestep=STEPS)]
    diffcr_compile.transform(model, example_inputs=given[0])
    before = attributes(model)
    with pytest.raises(UnsupportedError, match=r"the weight of blocks\.0\.\S+ is quantised"):
        diffcr_compile.calibrate(model, given, budget=0.6, config=CONFIG)
    assert attributes(model) == before


def test_layers_of_other_blocks_whose_names_end_alike_are_left_alone() -> None:
    """What is not routed is not adapted: ``refiner.blocks.0`` beside ``blocks.0``."""

    class Refined(TinyDiT):
        def __init__(self, shape: Shape) -> None:
            super().__init__(shape)
            self.refiner = nn.Module()
            self.refiner.blocks = copy.deepcopy(self.blocks)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
            cond = self.time(sinusoids(timestep, self.shape.width).to(x.dtype))
            refined = self.refiner.blocks[0](self.embed(x), cond, None, None)
            return super().forward(x, timestep) + 0.1 * self.head(refined)

    torch.manual_seed(0)
    model = Refined(SHAPE).double().eval()
    diffcr_compile.transform(
        model, example_inputs=batches(torch.float64)[0], filter_fn=lambda _, name: not name.startswith("refiner")
    )
    assert [block.fqn for block in routing_of(model).blocks] == [f"blocks.{place}" for place in range(SHAPE.depth)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diffcr_compile.calibrate(model, batches(torch.float64), budget=0.6, config=CONFIG)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("blocks.") for name in changed)
    assert not any(name.startswith("refiner") for name in changed)
