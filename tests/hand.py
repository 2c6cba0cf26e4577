"""Blocks of a few lines, and how to analyse one up to a pass. Axes: B batch, N tokens, T other tokens, D width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffcr_compile.passes.analysis import Call, TensorInfo
from diffcr_compile.passes.block import BlockAnalysis
from torch import Tensor, nn

from diffcr_compile import DiffCRConfig
from diffcr_compile.arguments import map_leaves

B, N, T, D = 2, 7, 3, 8


class Hand(nn.Module):
    """A block with two heads whose forward is given from outside."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys, values (B, 2, N, D / 2)."""
        return tuple(part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))

    def attend(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        return self.join(nn.functional.scaled_dot_product_attention(*self.heads(x)))

    def join(self, x: Tensor) -> Tensor:
        """(B, 2, N, D / 2) -> (B, N, D)."""
        return self.out(x.transpose(1, 2).flatten(2))


def block_of(forward: Callable[..., Any]) -> nn.Module:
    """An instance of a class with this forward."""
    return type(forward.__name__, (Hand,), {"forward": forward})().eval()


def analyse(block: nn.Module, arguments: dict[str, Any], passes: Sequence[Callable[..., Any]]) -> BlockAnalysis:
    """``passes`` run on a call of ``block``."""
    with torch.no_grad():
        output = block(**arguments)

    def describe(_: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return TensorInfo(tuple(leaf.shape), leaf.dtype, None if leaf.dtype.is_floating_point else leaf)

    call = Call("block", map_leaves(describe, arguments), map_leaves(describe, output), 0)
    state = BlockAnalysis(block, "block", call, DiffCRConfig())
    for step in passes:
        state = step(state)
    return state


def draw(*sizes: int, seed: int = 0) -> Tensor:
    """Standard normal values, by default (B, N, D)."""
    return torch.randn(*(sizes or (B, N, D)), generator=torch.Generator().manual_seed(seed))


def hand_costs(num_blocks: int, *, num_tokens: int = 1000, fixed: int = 0) -> Any:
    """A cost model of blocks whose FLOPs are proportional to the tokens kept; block ``i`` weighs ``i + 1``."""
    from diffcr_compile.cost import BlockCost, CostModel

    blocks = tuple(
        BlockCost(num_tokens, (index + 1) * 1_000_000, 0, (0.0, (index + 1) * 1_000_000 / num_tokens, 0.0))
        for index in range(num_blocks)
    )
    return CostModel(fixed + sum(block.dense for block in blocks), blocks)
