"""Move the ratios: along the learned gradient, and exactly on the budget's schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost import CostModel

_MOMENTUM = 0.9
_BISECTIONS = 40


class BudgetedRatios:
    """Projected gradient descent on the masters of the table.

    A step goes against the (smoothed, normalised) gradient of the loss, and then along the FLOPs that each ratio saves as
    far as the scheduled share asks: what hurts least per FLOP saved is compressed first, and the budget needs no weight.
    The paper adds a weighted squared distance from the target to the loss instead, with a weight adjusted on the way; a
    projection meets the schedule at every step and has nothing to adjust.
    """

    def __init__(self, masters: Tensor, costs: CostModel, learning_rate: float) -> None:
        self.masters, self.costs, self.learning_rate = masters, costs, learning_rate
        self.gradient = torch.zeros_like(masters, requires_grad=False)
        dense = torch.tensor([float(block.dense) for block in costs.blocks], dtype=torch.float32, device="cpu")
        self.savings = (dense / dense.max()).expand_as(masters)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step to the expected ``share`` of the dense FLOPs, from ``masters.grad`` (zero in regions not visited)."""
        if self.masters.grad is not None:
            visited = self.masters.grad.abs().sum(dim=1, keepdim=True) > 0
            smoothed = _MOMENTUM * self.gradient + (1 - _MOMENTUM) * self.masters.grad
            self.gradient = torch.where(visited, smoothed, self.gradient)
            self.masters.grad = None
        scale = self.gradient.square().mean().sqrt().clamp(min=1e-20)
        move = -self.learning_rate * (self.gradient / scale).clamp(-1, 1)
        low, high = -2.0, 2.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if float(self.costs.expected_share(self._moved(move, middle))) > share:
                low = middle
            else:
                high = middle
        self.masters.copy_(self._moved(move, high))

    def _moved(self, move: Tensor, multiplier: float) -> Tensor:
        return (self.masters.detach() + move + multiplier * self.savings).clamp(0, 1)
