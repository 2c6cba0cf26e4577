"""Start each router from what its block does: ridge regression on the size of every token's update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import iterate_leaves
from ..learning import dense
from ..observe import watch_calls
from ..routed import BlockRouting, ModelRouting, router_weight
from ..sharding import like, whole
from .batches import as_routers_see
from .objective import Finite
from .processes import sum_over_processes

RIDGE = 1e-2
"""Regularisation, as a share of the mean squared feature."""


@torch.no_grad()
def fit_routers(
    model: nn.Module,
    state: ModelRouting,
    batches: Iterable[dict[str, Any]],
    name: Callable[[], str] = lambda: "a batch",
) -> None:
    """Set every router to the vector that best predicts ``log ||block(x) - x||`` of a token from the token, on ``batches``.

    Scores then have unit spread over the tokens seen. Tokens that a block hardly changes are the first to skip it. A router that
    sees the timestep is fitted region by region; a region without tokens takes the vector of all. name: of the batch read last.
    Raises CalibrationError where the dense outputs of one are not finite.
    """
    sums = {block.fqn: _Moments(router_weight(model.get_submodule(block.fqn))) for block in state.blocks}

    def observe(block: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        program, values = block.read_call(args, kwargs)
        plan, tokens = program.plan, values[program.plan.stream]
        outputs = [leaf for _, leaf in iterate_leaves(output) if isinstance(leaf, Tensor)]
        result = outputs[plan.routed_output].double()
        update = result if plan.is_branch else result - tokens.double()
        size = update.square().mean(-1).clamp(min=1e-12).log() / 2
        row = state.region() if state.config.router == "timestep" else 0
        sums[block.fqn].add(tokens.reshape(-1, tokens.shape[-1]), size.reshape(-1), row)

    outputs = Finite(name)
    with dense(model), watch_calls(model, state, after=observe):
        for batch in as_routers_see(model, state, batches):
            outputs.look_at(model(**batch))
    outputs.check()
    for block in state.blocks:
        sums[block.fqn].solve()


class _Moments:
    """Sums over tokens of x x^T, x y, x, y and 1, for each vector of a router: what a regression needs of any number of tokens."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        rows, width = weight.shape if weight.ndim == 2 else (1, weight.numel())
        self.xx, self.xy, self.x, self.y, self.count = (
            torch.zeros(rows, *sizes, dtype=torch.float64, device=weight.device)
            for sizes in ((width, width), (width,), (width,), (), ())
        )

    def add(self, x: Tensor, y: Tensor, row: int) -> None:
        """x: (tokens, D); y: (tokens,); row: of the router, which scores these tokens."""
        x, y = x.double(), y.double()
        if self.xx.device != x.device:  # offload moved the block for its forward
            moments = (self.xx, self.xy, self.x, self.y, self.count)
            self.xx, self.xy, self.x, self.y, self.count = (each.to(x.device) for each in moments)
        self.xx[row] += x.T @ x
        self.xy[row] += x.T @ y
        self.x[row] += x.sum(0)
        self.y[row] += y.sum()
        self.count[row] += len(x)

    def solve(self) -> None:
        """Set the vectors, from the tokens of all processes."""
        sums = [self.xx, self.xy, self.x, self.y, self.count]
        sum_over_processes(sums)
        weight = whole(self.weight).clone()
        for row, vector in enumerate(weight.view(-1, weight.shape[-1])):
            fitted = _ridge(*(each[row] if self.count[row] else each.sum(0) for each in sums))
            if fitted is not None:
                vector.copy_(fitted)
        self.weight.copy_(like(weight, self.weight))


def _ridge(xx: Tensor, xy: Tensor, x: Tensor, y: Tensor, count: Tensor) -> Tensor | None:
    """The regression's vector (D,), scaled to unit spread; None where there are no tokens, or nothing to tell them apart."""
    if not count:
        return None
    mean = x / count
    covariance = xx / count - torch.outer(mean, mean)
    target = xy / count - mean * (y / count)
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    vector = torch.linalg.solve(covariance + ridge * torch.eye(len(mean), dtype=mean.dtype, device=mean.device), target)
    spread = (vector @ covariance @ vector).clamp(min=0).sqrt()
    return vector / spread if float(spread) > 0 else None
