"""Running a model without a trace."""

from __future__ import annotations

import functools
import threading
import types
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, original, same_bits, same_snapshot, snapshot, tiny_inputs
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CaptureError
from diffcr_compile.arguments import map_leaves
from diffcr_compile.dry_run import describe_inputs, dry_run, shadow

SHAPE = Shape("rotary", depth=1, heads=1, head_dim=6)


def test_a_shadow_shares_parameters_and_nothing_else() -> None:
    model = original(SHAPE).train()
    copy = shadow(model)
    assert [id(parameter) for parameter in copy.parameters()] == [id(parameter) for parameter in model.parameters()]
    assert not copy.training
    assert model.training
    copy.blocks[0].cache = 1
    assert not hasattr(model.blocks[0], "cache")


def test_what_can_not_be_copied_is_named() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(CaptureError, match=r"Linear holds something that can't be copied .*lock.* before transform"):
        shadow(model)


def wrap_forward(module: nn.Module) -> None:
    """As offload does: a wrapper of the forward set on the instance, and beside it state that can't be copied; of other files than
    the module's class."""
    elsewhere: dict[str, Any] = {"__name__": "elsewhere", "lock": threading.Lock()}
    exec("class State:\n    def __init__(self): self.lock = lock", elsewhere)
    exec("def call(forward, *args, **kwargs):\n    raise AssertionError('called in a shadow')", elsewhere)
    forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(elsewhere["call"], forward), forward)
    module.state = elsewhere["State"]()


def test_a_shadow_is_without_the_wrappers_of_others() -> None:
    model, inputs = diffcr_compile.transform(original(SHAPE), example_inputs=tiny_inputs(SHAPE)), tiny_inputs(SHAPE)
    expected, plain = model(**inputs), original(SHAPE)(**inputs)
    wrap_forward(model)
    wrap_forward(model.blocks[0])
    wrap_forward(model.blocks[0].stream.qkv)
    wrapper, copy = model.blocks[0].forward, shadow(model)
    assert torch.equal(copy(**inputs), expected)
    assert copy.blocks[0].state is None
    assert model.blocks[0].forward is wrapper
    assert copy.blocks[0].forward.__self__ is copy.blocks[0]
    with pytest.warns(UserWarning, match="untrained"):
        diffcr_compile.set_ratios(copy, 0.5)
    assert not torch.equal(copy(**inputs), plain), "the routed forward is the one that was wrapped"


def test_a_shadow_keeps_a_forward_that_wraps_nothing() -> None:
    model = original(SHAPE)
    model.blocks[0].forward = types.MethodType(lambda self, x, *args, **kwargs: x + self.marker, model.blocks[0])
    model.blocks[0].marker = 1
    copy = shadow(model)
    copy.blocks[0].marker = 2
    assert torch.equal(copy.blocks[0](torch.zeros(2)), torch.full((2,), 2.0))


def test_what_a_model_keeps_for_itself_stays_where_its_own_file_wraps_the_forward() -> None:
    model = original(SHAPE)
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))
    type_of = type("Own", (), {"__module__": type(model).__module__})
    model.own = type_of()
    assert isinstance(shadow(model).own, type_of)


@pytest.mark.parametrize("everywhere", [False, True])
def test_fake_tensors_are_all_on_one_device(everywhere: bool) -> None:
    model, inputs = original(SHAPE), tiny_inputs(SHAPE)
    expected = [parameter.shape for parameter in model.parameters()]
    (model if everywhere else model.blocks[0].stream).to("meta")
    copy = shadow(model)
    with dry_run(copy, fake=True) as convert:
        output = copy(**map_leaves(convert, inputs))
        assert {tensor.device.type for tensor in (output, *copy.parameters())} == {"cpu"}
    assert [parameter.shape for parameter in copy.parameters()] == expected
    assert all(parameter.is_meta for parameter in model.blocks[0].stream.parameters())


@pytest.mark.parametrize("fake", [True, False])
def test_a_dry_run_leaves_the_generators_alone(fake: bool) -> None:
    model, inputs = original(SHAPE).train(), tiny_inputs(SHAPE)
    before, rng = snapshot(model), torch.get_rng_state()
    with dry_run(model, fake=fake) as convert:
        output = model(**map_leaves(convert, inputs))
    assert output.shape == inputs["x"].shape
    assert isinstance(output, torch._subclasses.FakeTensor) is fake
    assert torch.equal(torch.get_rng_state(), rng)
    assert same_snapshot(snapshot(model), before)


def test_a_description_keeps_the_values_of_integers() -> None:
    inputs: dict[str, Any] = {
        "x": torch.ones(2, 3),
        "ids": torch.tensor([1, 2]),
        "n": [3, None],
        "mask": torch.ones(2) > 0,
    }
    described = describe_inputs(inputs)
    assert described["x"].is_meta
    assert described["x"].shape == (2, 3)
    assert same_bits((described["ids"], described["mask"]), (inputs["ids"], inputs["mask"]))
    assert described["n"] == [3, None]


class Counting(TinyDiT):
    """Counts its forwards, in a buffer."""

    def forward(self, x: Tensor, timestep: Tensor, rope: Any = None) -> Tensor:
        self.seen.add_(1)
        return super().forward(x, timestep, rope=rope)


@pytest.mark.parametrize("reads", [False, True], ids=["fake", "real"])
def test_what_a_forward_writes_into_buffers_is_not_left_there(reads: bool) -> None:
    model = original(SHAPE)
    model.__class__ = Counting
    model.register_buffer("seen", torch.zeros(4))
    if reads:
        model.register_forward_pre_hook(
            lambda module, args, kwargs: kwargs["x"].sum().item() and None, with_kwargs=True
        )
    diffcr_compile.transform(model, example_inputs=tiny_inputs(SHAPE))
    diffcr_compile.cost(model, tiny_inputs(SHAPE))
    assert model.seen.tolist() == [0.0] * 4
    model(**tiny_inputs(SHAPE))
    assert model.seen.tolist() == [1.0] * 4
