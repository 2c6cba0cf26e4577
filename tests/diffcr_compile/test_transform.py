"""``transform`` and ``restore`` in place."""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, original, routed, same_bits, same_snapshot, snapshot, tiny_inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import diffcr_compile
from diffcr_compile import DiffCRConfig
from diffcr_compile.transform import PASSES

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=3, heads=1, head_dim=6)
INPUTS = tiny_inputs(SHAPE)


def kept_share(model: nn.Module) -> torch.Tensor:
    diffcr_compile.set_ratios(model, 0.5)
    return model(**INPUTS)


def test_it_returns_the_same_object() -> None:
    model = original(SHAPE)
    assert diffcr_compile.transform(model, example_inputs=INPUTS) is model
    assert type(model) is TinyDiT


@pytest.mark.parametrize(
    "given",
    [INPUTS, ((INPUTS["x"], INPUTS["timestep"]), {}), ([INPUTS["x"]], {"timestep": INPUTS["timestep"]})],
    ids=["dict", "args", "both"],
)
def test_inputs_may_be_given_in_any_form(given: Any) -> None:
    model = diffcr_compile.transform(original(SHAPE), example_inputs=given)
    assert same_bits(kept_share(model), kept_share(routed(SHAPE)))


def test_one_sample_is_enough() -> None:
    """A batch of one would bake its size into the graphs."""
    model = diffcr_compile.transform(original(SHAPE), example_inputs=tiny_inputs(SHAPE, batch=1))
    assert same_bits(kept_share(model), kept_share(routed(SHAPE)))


def test_filter_fn_chooses_among_the_blocks() -> None:
    asked: list[str] = []

    def odd(module: nn.Module, fqn: str) -> bool:
        asked.append(fqn)
        return fqn != "blocks.1"

    model = diffcr_compile.transform(original(SHAPE), example_inputs=INPUTS, filter_fn=odd)
    assert tuple(diffcr_compile.ratios(model).shape) == (4, 2)
    assert {"blocks.0", "blocks.1", "blocks.2"} <= set(asked)
    assert "blocks.1 (Block): left out by filter_fn" in str(diffcr_compile.explain(model))
    assert not hasattr(model.blocks[1], "diffcr_router")


def test_the_config_is_followed() -> None:
    config = DiffCRConfig(num_regions=7, gate="sigmoid", timestep_range=(0.0, 500.0))
    model = diffcr_compile.transform(original(SHAPE), config, example_inputs=INPUTS)
    assert tuple(diffcr_compile.ratios(model).shape) == (7, 3)
    text = str(diffcr_compile.explain(model))
    assert "gate_sigmoid" in text
    assert "0..500" in text
    assert same_bits(model(**INPUTS), original(SHAPE)(**INPUTS))
    assert not same_bits(kept_share(model), kept_share(routed(SHAPE)))


def test_a_compiled_wrapper_is_unwrapped() -> None:
    model = original(SHAPE)
    wrapper = torch.compile(model, backend="eager")
    assert diffcr_compile.transform(wrapper, example_inputs=INPUTS) is model  # type: ignore[arg-type]
    assert diffcr_compile.restore(wrapper) is model  # type: ignore[arg-type]


def test_flags_and_hooks_stay() -> None:
    model = original(SHAPE).train()
    model.embed.weight.requires_grad_(False)
    seen: list[str] = []
    model.register_forward_hook(lambda *args: seen.append("root"))
    model.blocks[0].register_forward_pre_hook(lambda *args: seen.append("block"))
    before = snapshot(model)
    diffcr_compile.transform(model, example_inputs=INPUTS)
    assert model.training
    assert not model.embed.weight.requires_grad
    seen.clear()
    model(**INPUTS)
    assert seen == ["block", "root"]
    diffcr_compile.restore(model)
    assert same_snapshot(snapshot(model), before)


def test_transform_after_restore_gives_the_same() -> None:
    model = routed(SHAPE)
    expected = kept_share(model)
    again = diffcr_compile.transform(diffcr_compile.restore(model), example_inputs=INPUTS)
    assert same_bits(kept_share(again), expected)


def test_a_deferred_model_is_searched_once_at_its_first_forward() -> None:
    model = diffcr_compile.transform(original(SHAPE))
    assert same_bits(model(**INPUTS), original(SHAPE)(**INPUTS))
    routers = [id(block.diffcr_router) for block in model.blocks]
    model(**INPUTS)
    assert routers == [id(block.diffcr_router) for block in model.blocks]


CONFIG = DiffCRConfig(num_regions=2)


def owing() -> TinyDiT:
    return diffcr_compile.transform(original(SHAPE), CONFIG, filter_fn=lambda module, fqn: fqn != "blocks.1")


def assert_owed(model: TinyDiT) -> None:
    """The next forward does what was asked for."""
    assert same_bits(model(**INPUTS), original(SHAPE)(**INPUTS))
    assert tuple(diffcr_compile.ratios(model).shape) == (2, 2)
    diffcr_compile.restore(model)
    assert same_snapshot(snapshot(model), snapshot(original(SHAPE)))


@pytest.mark.parametrize(
    "act",
    [
        lambda model: model(INPUTS["x"]),
        lambda model: diffcr_compile.cost(model, {"x": INPUTS["x"]}),
        lambda model: diffcr_compile.calibrate(model, [{"x": INPUTS["x"]}], budget=0.8),
    ],
    ids=["forward", "cost", "calibrate"],
)
def test_a_first_call_that_the_model_refuses_leaves_the_search_owed(act: Any) -> None:
    model = owing()
    with pytest.raises(diffcr_compile.CaptureError, match="TinyDiT"):
        act(model)
    with pytest.raises(diffcr_compile.CaptureError, match="have not been looked for yet"):
        diffcr_compile.explain(model)
    assert_owed(model)


@pytest.mark.parametrize("name", ["check_untouched", "outline_blocks", "run_passes", "route_blocks", "describe_inputs"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_search_that_is_interrupted_leaves_the_search_owed(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> Any:
        raise error

    model = owing()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["diffcr_compile.transform"], name, interrupt)
        with pytest.raises(error):
            model(**INPUTS)
    assert_owed(model)


@pytest.mark.parametrize("name", ["outline_blocks", "describe_inputs"])
def test_a_search_at_transform_that_is_interrupted_leaves_the_model_plain(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = original(SHAPE)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["diffcr_compile.transform"], name, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            diffcr_compile.transform(model, example_inputs=INPUTS)
    assert same_snapshot(snapshot(model), snapshot(original(SHAPE)))
    assert same_bits(kept_share(diffcr_compile.transform(model, example_inputs=INPUTS)), kept_share(routed(SHAPE)))


def test_a_first_forward_with_a_wrapped_block_leaves_the_model_plain() -> None:
    """A refusal for good: the message says to transform first, which then works."""
    model = diffcr_compile.transform(original(SHAPE))
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda *args, **kwargs: own(*args, **kwargs)  # type: ignore[method-assign]
    with pytest.raises(diffcr_compile.UnsupportedError, match="call transform first"):
        model(**INPUTS)
    with pytest.raises(diffcr_compile.NotTransformedError):
        diffcr_compile.set_ratios(model, 0.5)
    del model.blocks[0].forward
    assert same_snapshot(snapshot(model), snapshot(original(SHAPE)))
    assert same_bits(kept_share(diffcr_compile.transform(model, example_inputs=INPUTS)), kept_share(routed(SHAPE)))


def test_restore_from_deferred() -> None:
    model = diffcr_compile.transform(original(SHAPE))
    diffcr_compile.restore(model)
    assert same_snapshot(snapshot(model), snapshot(original(SHAPE)))


def test_calibrate_settles_a_deferred_model() -> None:
    model = diffcr_compile.transform(original(SHAPE))
    diffcr_compile.calibrate(model, [INPUTS], budget=0.8, config=diffcr_compile.CalibrationConfig(steps=2))
    assert diffcr_compile.cost(model).share <= 0.8


def test_the_passes_are_logged_in_order(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="diffcr_compile"):
        diffcr_compile.transform(original(SHAPE), example_inputs=INPUTS)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("pass ")]
    for number, step in enumerate(PASSES, start=1):
        assert any(line.startswith(f"pass {number}/{len(PASSES)} {step.__name__}: ") for line in lines)


def test_a_model_on_the_meta_device_is_analysed() -> None:
    """The search under fake tensors needs no values."""
    inputs = {name: value.to("meta") for name, value in INPUTS.items()}
    model = diffcr_compile.transform(original(SHAPE).to("meta"), example_inputs=inputs)
    assert tuple(diffcr_compile.ratios(model).shape) == (4, 3)
    assert model.blocks[0].diffcr_router.weight.is_meta


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_that_leaves_the_meta_device_is_the_one_that_never_was_there(assign: bool) -> None:
    """It is given its weights by a dense checkpoint, which knows of no routers."""
    inputs = {name: value.to("meta") for name, value in INPUTS.items()}
    model = diffcr_compile.transform(original(SHAPE).to("meta"), example_inputs=inputs)
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(original(SHAPE).state_dict(), assign=assign)
    assert same_bits(kept_share(model), kept_share(routed(SHAPE)))


@pytest.mark.parametrize("context", ["kept", "all"])
def test_under_autocast_the_same_is_found_as_without(context: Any) -> None:
    shape = Shape("rotary", depth=2, heads=2, head_dim=4)
    config, inputs = DiffCRConfig(context=context), tiny_inputs(shape)
    plans = []
    for enabled in (False, True):
        model = diffcr_compile.transform(original(shape), config)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            expected = original(shape)(**inputs)
            assert same_bits(model(**inputs), expected)
        plans.append(diffcr_compile.explain(model).plan)
    assert plans[0] == plans[1]
    assert [family.lift for family in plans[0].families] == ["vmap"]


def test_in_inference_mode_the_same_is_found_as_outside() -> None:
    plans = []
    for mode in (torch.no_grad, torch.inference_mode):
        model = diffcr_compile.transform(original(SHAPE))
        with mode():
            model(**INPUTS)
        plans.append(diffcr_compile.explain(model).plan)
    assert plans[0] == plans[1]
    assert diffcr_compile.ratios(model).shape == (4, 3)


def test_a_count_of_flops_around_the_first_forward_sees_the_forward_alone() -> None:
    counts = []
    for model in (original(SHAPE), diffcr_compile.transform(original(SHAPE))):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**INPUTS)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_a_timestep_without_an_axis() -> None:
    class Scalar(TinyDiT):
        def forward(self, x: Any, timestep: Any) -> Any:
            return super().forward(x, timestep.reshape(-1))

    model = original(SHAPE)
    model.__class__ = Scalar
    inputs = {**INPUTS, "timestep": torch.tensor(500.0)}
    expected = model(**inputs)
    diffcr_compile.transform(model, example_inputs=inputs)
    assert same_bits(model(**inputs), expected)
    assert diffcr_compile.ratios(model).shape == (4, 3)


@pytest.mark.parametrize("mode", [diffcr_compile.learning, diffcr_compile.trace])
def test_a_copy_made_in_a_mode_is_not_in_it(mode: Any) -> None:
    model = routed(SHAPE)
    diffcr_compile.set_ratios(model, 0.5)
    with mode(model) as seen:
        duplicate = copy.deepcopy(model)
    assert same_bits(duplicate(**INPUTS), model(**INPUTS))
    assert not any(getattr(seen, "kept", {}).values())
