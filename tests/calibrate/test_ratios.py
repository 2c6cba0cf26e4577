"""Projected descent on the masters: against the gradient, exactly on the budget's schedule."""

from __future__ import annotations

import pytest
import torch
from diffcr_compile.calibration.ratios import BudgetedRatios
from hand import hand_costs
from hypothesis import given
from hypothesis import strategies as st


@given(share=st.floats(0.05, 0.999), seed=st.integers(0, 999))
def test_every_step_is_on_the_schedule(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masters = torch.rand(4, 3, generator=generator).requires_grad_()
    masters.grad = torch.randn(4, 3, generator=generator)
    costs = hand_costs(3)
    BudgetedRatios(masters, costs, 0.02).step(share)
    # bisection to 4 / 2^40 and float32 masters
    assert float(costs.expected_share(masters.detach())) == pytest.approx(share, abs=1e-5)
    assert masters.grad is None
    assert bool(((masters >= 0) & (masters <= 1)).all())


def test_what_hurts_least_is_compressed_first() -> None:
    masters = torch.full((1, 2), 0.5, requires_grad=True)
    costs = hand_costs(2)
    ratios = BudgetedRatios(masters, costs, 0.02)
    for _ in range(5):
        masters.grad = torch.tensor([[10.0, 0.1]])  # skipping in the first block raises the loss
        ratios.step(0.5)
    assert float(masters.detach()[0, 0]) < 0.5 < float(masters.detach()[0, 1])


def test_regions_not_visited_keep_their_direction() -> None:
    masters = torch.full((2, 2), 0.5, requires_grad=True)
    ratios = BudgetedRatios(masters, hand_costs(2), 0.02)
    masters.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ratios.step(0.5)
    before = ratios.gradient.clone()
    masters.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    ratios.step(0.5)
    assert torch.equal(ratios.gradient[1], before[1])
    assert not torch.equal(ratios.gradient[0], before[0])


def test_a_step_without_gradients_only_follows_the_budget() -> None:
    masters = torch.zeros(2, 2, requires_grad=True)
    BudgetedRatios(masters, hand_costs(2), 0.02).step(0.8)
    assert float(masters.detach().min()) > 0
    # what a block saves is what its ratio moves by: the second weighs twice the first
    assert torch.allclose(masters.detach()[:, 1], 2 * masters.detach()[:, 0], rtol=1e-4)


def test_the_step_stays_within_its_rate() -> None:
    masters = torch.full((1, 2), 0.5, requires_grad=True)
    masters.grad = torch.tensor([[1000.0, -1000.0]])
    costs = hand_costs(2)
    BudgetedRatios(masters, costs, 0.02).step(float(costs.expected_share(masters.detach())))
    assert float((masters.detach() - 0.5).abs().max()) <= 2 * 0.02 + 1e-4  # its own move, and the budget's answer to it
