"""Start each router from what its block does: ridge regression on the size of every token's update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import bind_arguments, iterate_leaves
from ..learning import dense
from ..routed import BlockRouting, ModelRouting, router_weight
from ..sharding import like
from .processes import sum_over_processes

RIDGE = 1e-2
"""Regularisation, as a share of the mean squared feature."""


@torch.no_grad()
def fit_routers(model: nn.Module, state: ModelRouting, batches: Iterable[dict[str, Any]]) -> None:
    """Set every router to the vector that best predicts ``log ||block(x) - x||`` of a token from the token, on ``batches``.

    Scores then have unit spread over the tokens seen. Tokens that a block hardly changes are the first to skip it.
    """
    sums = {block.fqn: _Moments(router_weight(model.get_submodule(block.fqn))) for block in state.blocks}
    handles = [
        model.get_submodule(block.fqn).register_forward_hook(_observer(block, sums[block.fqn]), with_kwargs=True)
        for block in state.blocks
    ]
    try:
        with dense(model):
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    for block in state.blocks:
        sums[block.fqn].solve()


class _Moments:
    """Sums over tokens of x x^T, x y, x, y: what a regression needs, whatever the number of tokens."""

    def __init__(self, weight: Tensor) -> None:
        width = weight.numel()
        self.weight = weight
        self.xx = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
        self.xy, self.x = (torch.zeros(width, dtype=torch.float64, device=weight.device) for _ in range(2))
        self.y, self.count = 0.0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (tokens, D); y: (tokens,)."""
        x, y = x.double(), y.double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.x += x.sum(0)
        self.y += float(y.sum())
        self.count += len(x)

    def solve(self) -> None:
        """Set the vector, from the tokens of all processes."""
        totals = torch.tensor([self.y, float(self.count)], dtype=torch.float64)
        sum_over_processes([self.xx, self.xy, self.x, totals])
        self.y, self.count = float(totals[0]), int(totals[1])
        if self.count == 0:
            return
        mean = self.x / self.count
        covariance = self.xx / self.count - torch.outer(mean, mean)
        target = self.xy / self.count - mean * (self.y / self.count)
        ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
        vector = torch.linalg.solve(
            covariance + ridge * torch.eye(len(mean), dtype=mean.dtype, device=mean.device), target
        )
        spread = (vector @ covariance @ vector).clamp(min=0).sqrt()
        if float(spread) > 0:
            self.weight.copy_(like(vector / spread, self.weight))


def _observer(block: BlockRouting, moments: _Moments) -> Callable[..., None]:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = bind_arguments(block.positional, args, kwargs)
        plan = block.program(bound).plan
        tokens = [leaf for _, leaf in iterate_leaves(bound) if leaf is not None][plan.stream]
        outputs = [leaf for _, leaf in iterate_leaves(output) if isinstance(leaf, Tensor)]
        result = outputs[plan.routed_output].double()
        update = result if plan.is_branch else result - tokens.double()
        size = update.square().mean(-1).clamp(min=1e-12).log() / 2
        moments.add(tokens.reshape(-1, tokens.shape[-1]), size.reshape(-1))

    return observe
