"""Self-distillation from the model at ratio zero."""

from __future__ import annotations

import pytest
import torch
from diffcr_compile.calibration.objective import dense_outputs, distillation_loss, output_tensors
from models import Shape, original, routed, same_bits, tiny_inputs

import diffcr_compile

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)


@pytest.mark.filterwarnings("ignore:the routers are untrained")
def test_the_teacher_is_the_original() -> None:
    model, inputs = routed(SHAPE), tiny_inputs(SHAPE)
    diffcr_compile.set_ratios(model, 0.7)
    (target,) = dense_outputs(model, inputs)
    assert same_bits(target, original(SHAPE)(**inputs))
    assert not target.requires_grad


def test_the_loss_is_a_share_of_the_targets_mean_square() -> None:
    target = torch.tensor([[3.0, 4.0]])
    assert distillation_loss([target], [target]).item() == 0
    assert distillation_loss([torch.zeros(1, 2)], [target]).item() == 1
    assert distillation_loss([target / 2], [target]).item() == pytest.approx(0.25)
    assert distillation_loss([100 * target / 2], [100 * target]).item() == pytest.approx(0.25)


def test_outputs_are_averaged_in_float32() -> None:
    half = [torch.ones(2, 2, dtype=torch.float16), torch.zeros(3)]
    loss = distillation_loss(half, [torch.ones(2, 2, dtype=torch.float16), torch.ones(3)])
    assert (loss.dtype, loss.ndim, loss.item()) == (torch.float32, 0, 0.5)


def test_targets_of_zero_are_no_division_by_zero() -> None:
    assert torch.isfinite(distillation_loss([torch.ones(2)], [torch.zeros(2)]))


def test_floating_tensors_are_found_whatever_holds_them() -> None:
    from collections import OrderedDict

    x, ids = torch.ones(2), torch.arange(3)
    assert same_bits(output_tensors((x, [ids, {"y": x}])), [x, x])
    assert same_bits(output_tensors(OrderedDict(sample=x, ids=ids)), [x])
    assert same_bits(output_tensors(x), [x])
