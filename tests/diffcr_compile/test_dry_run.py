"""Running a model without a trace."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from models import Shape, original, same_bits, same_snapshot, snapshot, tiny_inputs
from torch import nn

from diffcr_compile import CaptureError
from diffcr_compile.arguments import map_leaves
from diffcr_compile.dry_run import describe_inputs, dry_run, shadow

SHAPE = Shape("rotary", depth=1, heads=1, head_dim=6)


def test_a_shadow_shares_tensors_and_nothing_else() -> None:
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
