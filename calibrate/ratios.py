"""Move the ratios: along the learned gradient, and exactly on the budget's schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost import CostModel

_MOMENTUM = 0.9
"""Of the gradient that the timestep regions share."""

_OWN_MOMENTUM = 0.98
"""Of what a region's gradient has beyond that, over its own visits."""

_BISECTIONS = 50


class BudgetedRatios:
    """Projected gradient descent on the masters of the table.

    A step goes against the (smoothed, normalised) gradient of the loss, and then along the FLOPs that each ratio saves as
    far as the scheduled share asks: what hurts least per FLOP saved is compressed first, and the budget needs no weight.
    The paper adds a weighted squared distance from the target to the loss instead, with a weight adjusted on the way; a
    projection meets the schedule at every step and has nothing to adjust.

    Few steps see each region, and a region's gradient is mostly noise then: followed alone it scatters what is skipped over blocks
    that differ from region to region, to which the weights do not adapt in time. So regions share a gradient, and each keeps of
    what its own has beyond it the part that is no noise by its variance (James and Stein 1961). What such tables
    are worth beside one ratio a layer: examples/benchmarks/quality.md, quality_longer.md. Without ``shrink`` each region follows
    its own gradient alone, as in the paper.
    """

    def __init__(self, masters: Tensor, costs: CostModel, learning_rate: float, *, shrink: bool = True) -> None:
        self.masters, self.costs, self.learning_rate, self.shrink = masters, costs, learning_rate, shrink
        num_regions, num_blocks = masters.shape
        self.state: dict[str, Tensor] = {
            "masters": masters,
            "shared": torch.zeros(num_blocks, dtype=torch.float32, device="cpu"),
            "own": torch.zeros(num_regions, num_blocks, dtype=torch.float32, device="cpu"),
            "own_square": torch.zeros(num_regions, num_blocks, dtype=torch.float32, device="cpu"),
            "visits": torch.zeros(num_regions, 1, dtype=torch.float32, device="cpu"),
        }
        dense = torch.tensor([float(block.dense) for block in costs.blocks], dtype=torch.float32, device="cpu")
        self.savings = (dense / dense.max()).expand_as(masters)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step to the expected ``share`` of the dense FLOPs, from ``masters.grad`` (zero in regions not visited)."""
        if self.masters.grad is not None:
            self._note(self.masters.grad)
            self.masters.grad = None
        gradient = self.gradient()
        scale = gradient.square().mean().sqrt().clamp(min=1e-20)
        move = -self.learning_rate * (gradient / scale).clamp(-1, 1)
        high = (1 + self.learning_rate) / float(self.savings[self.savings > 0].min())  # any master to either end
        low = -high
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if float(self.costs.expected_share(self._moved(move, middle))) > share:
                low = middle
            else:
                high = middle
        self.masters.copy_(self._moved(move, high))

    def _note(self, gradient: Tensor) -> None:
        visited = gradient.abs().sum(dim=1, keepdim=True) > 0
        if not bool(visited.any()):
            return
        state = self.state
        if self.shrink:
            state["shared"].lerp_(gradient.sum(dim=0) / visited.sum(), 1 - _MOMENTUM)
        beyond = gradient - state["shared"]
        for name, value in (("own", beyond), ("own_square", beyond.square())):
            state[name].copy_(torch.where(visited, state[name].lerp(value, 1 - self._own_momentum), state[name]))
        state["visits"] += visited

    def gradient(self) -> Tensor:
        """The smoothed gradient (num_regions, num_blocks): what regions share, and of what each has of its own the part that
        the variance of its visits does not explain; without ``shrink`` each region's own."""
        state = self.state
        decay = self._own_momentum ** state["visits"]
        begun = (1 - decay).clamp(min=1e-9)
        own, square = state["own"] / begun, state["own_square"] / begun
        if not self.shrink:
            return own
        visits = (1 + _OWN_MOMENTUM) / (1 - _OWN_MOMENTUM) * (1 - decay) / (1 + decay)  # as many, evenly weighted
        noise = ((square - own.square()).clamp(min=0) / (visits - 1).clamp(min=1)).mean()
        own = own - own.mean(dim=0)
        told = float((1 - noise / own.square().mean().clamp(min=1e-30)).clamp(0, 1))
        return state["shared"] + (told if float(state["visits"].min()) > 1 else 0.0) * own

    @property
    def _own_momentum(self) -> float:
        return _OWN_MOMENTUM if self.shrink else _MOMENTUM

    def _moved(self, move: Tensor, multiplier: float) -> Tensor:
        return (self.masters.detach() + move + multiplier * self.savings).clamp(0, 1)
