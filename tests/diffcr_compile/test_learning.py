"""Learning as a mode, and the budget loss."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from models import Shape, TinyDiT, original, relative_error, routed, same_bits, tiny_inputs

import diffcr_compile
from diffcr_compile.learning import dense

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
INPUTS = tiny_inputs(SHAPE)


@pytest.fixture
def model() -> TinyDiT:
    return routed(SHAPE)


def test_learnables_are_the_same_tensors_each_time(model: TinyDiT) -> None:
    with diffcr_compile.learning(model) as first:
        pass
    with diffcr_compile.learning(model) as second:
        pass
    assert first.ratios is second.ratios
    assert first.ratios.requires_grad
    assert first.ratios.is_leaf
    assert (first.ratios.dtype, tuple(first.ratios.shape)) == (torch.float32, (4, 2))
    assert [tuple(router.shape) for router in first.routers] == [(6,), (6,)]
    assert first.routers[0] is model.blocks[0].diffcr_router.weight


@pytest.mark.parametrize("way", ["add", "assign"])
def test_an_optimiser_may_write_past_autograd(model: TinyDiT, way: str) -> None:
    """By ``.data``, as some do: no version of the tensor tells."""
    expected = model(**INPUTS)
    with diffcr_compile.learning(model) as learnable:
        if way == "add":
            learnable.ratios.data.add_(0.52)
        else:
            learnable.ratios.data = torch.full_like(learnable.ratios, 0.52)
    assert bool((diffcr_compile.ratios(model) == 0.5).all())
    assert not torch.equal(model(**INPUTS), expected)
    with diffcr_compile.learning(model) as learnable:
        learnable.ratios.data.sub_(1.0)
        model(**INPUTS)
        assert bool((learnable.ratios == 0).all()), "clamped"


@pytest.mark.parametrize("estimator", ["three-bin", ["two-bin"], None])
def test_another_estimator_is_named(model: TinyDiT, estimator: object) -> None:
    said = f"estimator must be one of 'two-bin', 'single-pass', found {estimator!r}"
    with pytest.raises(ValueError, match=re.escape(said)), diffcr_compile.learning(model, estimator=estimator):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("budget", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr)
def test_a_budget_may_be_a_number_of_torch_or_numpy(model: TinyDiT, budget: Any) -> None:
    assert float(diffcr_compile.budget_loss(model, budget)) == float(diffcr_compile.budget_loss(model, 0.5))


def test_ratios_leave_zero(model: TinyDiT) -> None:
    """The slope at zero is that of the first bin, for every block of the region."""
    with diffcr_compile.learning(model) as learnable:
        model(**INPUTS).square().sum().backward()
    assert learnable.ratios.grad is not None
    assert bool((learnable.ratios.grad[2] != 0).all())
    assert not learnable.ratios.grad[[0, 1, 3]].any()


def test_the_mode_ends_after_an_error(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, 0.25)
    expected = model(**INPUTS)
    with pytest.raises(ZeroDivisionError), diffcr_compile.learning(model):
        raise ZeroDivisionError
    assert same_bits(model(**INPUTS), expected)


def test_between_bins_the_values_are_mixed(model: TinyDiT) -> None:
    """One block: 0.25 lies halfway between the bins 0.2 and 0.3."""
    shape = Shape("plain", depth=1, heads=1, head_dim=6)
    model = routed(shape, torch.float64)
    inputs = tiny_inputs(shape, dtype=torch.float64, num_tokens=17)
    outputs = {}
    with torch.no_grad():
        for ratio in (0.2, 0.3):
            diffcr_compile.set_ratios(model, ratio)
            outputs[ratio] = model(**inputs)
        diffcr_compile.set_ratios(model, 0.25)
        with diffcr_compile.learning(model):
            mixed = model(**inputs)
    assert not same_bits(outputs[0.2], outputs[0.3])
    # the weight is a float32: 0.25 is exact, its place between the bins to 1e-6
    assert relative_error(mixed, (outputs[0.2] + outputs[0.3]) / 2) < 1e-5


def test_a_trainer_of_ones_own_meets_a_budget(model: TinyDiT) -> None:
    with diffcr_compile.learning(model) as learnable:
        optimizer = torch.optim.SGD([learnable.ratios], lr=2.0)
        losses = []
        for _ in range(60):
            loss = diffcr_compile.budget_loss(model, 0.6)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0] == pytest.approx(0.16, abs=1e-6)  # (1 - 0.6)^2 at ratio zero
    assert losses[-1] < 1e-4
    model(**INPUTS)
    assert diffcr_compile.cost(model).share == pytest.approx(0.6, abs=0.05)  # bins are 0.1 apart


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_at_a_bin_the_budget_loss_is_that_of_the_cost(model: TinyDiT, ratio: float) -> None:
    diffcr_compile.set_ratios(model, ratio)
    expected = (diffcr_compile.cost(model).share - 0.5) ** 2
    loss = diffcr_compile.budget_loss(model, 0.5)
    assert (loss.dtype, loss.ndim, loss.device.type) == (torch.float32, 0, "cpu")
    assert loss.item() == pytest.approx(expected, abs=1e-6)  # float32


def test_the_budget_loss_falls_towards_compression_above_the_budget(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, 0.3)
    diffcr_compile.budget_loss(model, 0.2).backward()
    with diffcr_compile.learning(model) as learnable:
        pass
    assert learnable.ratios.grad is not None
    assert bool((learnable.ratios.grad < 0).all())


def test_dense_is_the_original_whatever_the_table_says(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, 0.8)
    with dense(model):
        assert same_bits(model(**INPUTS), original(SHAPE)(**INPUTS))
    assert not same_bits(model(**INPUTS), original(SHAPE)(**INPUTS))


def test_learning_under_inference_mode_is_refused_and_the_budget_loss_is_not(model: TinyDiT) -> None:
    with torch.inference_mode():
        with pytest.raises(diffcr_compile.UnsupportedError, match=r"inference_mode\(\) is on: enter learning outside"):
            diffcr_compile.learning(model).__enter__()
        assert float(diffcr_compile.budget_loss(model, 0.5)) == pytest.approx(0.25)
    with diffcr_compile.learning(model):
        model(**INPUTS).square().sum().backward()


def test_a_step_to_no_number_is_said_and_set_ratios_puts_a_table_back(model: TinyDiT) -> None:
    with diffcr_compile.learning(model) as learnable:
        model(**INPUTS).square().sum().backward()
        learnable.ratios.grad = torch.full_like(learnable.ratios, torch.nan)
        torch.optim.SGD([learnable.ratios], lr=0.1).step()
        with pytest.raises(diffcr_compile.CalibrationError, match=r"ratios are NaN: an optimiser .* set_ratios"):
            model(**INPUTS)
    with pytest.raises(diffcr_compile.CalibrationError, match="ratios are NaN"):
        model(**INPUTS)
    with pytest.raises(ValueError, match="ratios must lie in"):
        diffcr_compile.set_ratios(model, 1.5)
    diffcr_compile.set_ratios(model, 0.5)
    assert bool((learnable.ratios == 0.5).all())
    assert model(**INPUTS).isfinite().all()
