"""Projected descent on the masters: against the gradient, exactly on the budget's schedule."""

from __future__ import annotations

import statistics

import pytest
import torch
from diffcr_compile.calibration.ratios import BudgetedRatios
from hand import hand_costs
from hypothesis import example, given
from hypothesis import strategies as st


@example(share=0.984375, seed=444)  # the smallest block's masters have far to go
@given(share=st.floats(0.05, 0.999), seed=st.integers(0, 999))
def test_every_step_is_on_the_schedule(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masters = torch.rand(4, 3, generator=generator).requires_grad_()
    masters.grad = torch.randn(4, 3, generator=generator)
    costs = hand_costs(3)
    BudgetedRatios(masters, costs, 0.02).step(share)
    # float32 masters
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


def noisy(signal: torch.Tensor, noise: float, steps: int, *, one_region: bool, seed: int = 0) -> torch.Tensor:
    """The smoothed gradient after as many noisy ones, of all regions or of one a step."""
    generator = torch.Generator().manual_seed(seed)
    masters = torch.full_like(signal, 0.5).requires_grad_()
    ratios = BudgetedRatios(masters, hand_costs(signal.shape[1]), 0.02)
    for step in range(steps):
        gradient = signal + noise * torch.randn(signal.shape, generator=generator)
        if one_region:
            gradient[torch.arange(len(signal)) != step % len(signal)] = 0
        masters.grad = gradient
        ratios.step(0.5)
    return ratios.gradient()


@pytest.mark.parametrize("one_region", [False, True])
def test_what_regions_have_of_their_own_counts_as_far_as_it_is_no_noise(one_region: bool) -> None:
    signal = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
    own = signal - signal.mean(dim=0)
    known = noisy(signal, 0.01, 400, one_region=one_region)
    assert torch.allclose(known - known.mean(dim=0), own, atol=0.15)
    visits = 5 if one_region else 20
    lost = [noisy(signal, 30.0, 20, one_region=one_region, seed=seed) for seed in range(20)]
    left = statistics.mean(float((each - each.mean(dim=0)).square().mean().sqrt()) for each in lost)
    assert left < 0.4 * 30 / visits**0.5  # of what averaging over the visits leaves
    alike = noisy(torch.full((4, 3), 2.0), 0.01, 400, one_region=one_region)
    assert float((alike - 2).abs().max()) < 0.05


def test_one_region_follows_its_own_gradient() -> None:
    """One ratio a layer: all is shared."""
    signal = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.allclose(noisy(signal, 0.0, 200, one_region=False), signal, rtol=1e-3)


def test_without_shrinking_each_region_follows_its_own_gradient() -> None:
    """However noisy: what the mean of the regions would hide."""
    signal = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.5, 0.5]])
    masters = torch.full_like(signal, 0.5).requires_grad_()
    ratios = BudgetedRatios(masters, hand_costs(2), 0.02, shrink=False)
    for step in range(12):
        gradient = torch.zeros_like(signal)
        gradient[step % 3] = signal[step % 3]  # one region a step
        masters.grad = gradient
        ratios.step(0.5)
    assert torch.allclose(ratios.gradient(), signal, rtol=1e-5)


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
