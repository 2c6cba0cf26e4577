"""Look at what was learned: the routers' scores, and whether anything collapsed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..learning import dense
from ..observe import watch_calls
from ..primitives import score_tokens, select_tokens
from ..routed import BlockRouting, ModelRouting, router_vector
from ..sharding import whole
from .batches import Batch, as_routers_see
from .report import Histograms

NUM_BINS = 24
NOISY, GROWN = 10, 10.0
"""Losses of single steps whose median counts, and how many times it may grow without a remark."""

_EQUAL = 1e-4
"""Scores of one sample that differ by less than this share of their size are one score."""


@torch.no_grad()
def examine_routers(
    model: nn.Module, state: ModelRouting, batches: Iterable[Batch]
) -> tuple[Histograms, tuple[str, ...]]:
    """Histograms of every router's scores on dense forwards, and what is wrong with them, by block."""
    scores: dict[str, list[Tensor]] = {block.fqn: [] for block in state.blocks}

    def observe(block: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        program, values = block.read_call(args, kwargs)
        plan, tokens = program.plan, values[program.plan.stream]
        weight = whole(router_vector(model.get_submodule(block.fqn))).to(tokens.device)
        scores[block.fqn].append(score_tokens(tokens, weight, plan.token_axis, plan.batch_axis).cpu())

    with dense(model), watch_calls(model, state, before=observe):
        for batch in as_routers_see(model, state, batches):
            model(**batch)
    found = [remark for block in state.blocks for remark in _remarks(block, scores[block.fqn])]
    return tuple(_histogram(scores[block.fqn]) for block in state.blocks), tuple(found)


def examine_table(table: Tensor, budget: float) -> tuple[str, ...]:
    """What is suspicious about a learned table (num_regions, num_blocks)."""
    if budget == 1 or table.numel() == 1:
        return ()
    if float(table.min()) == float(table.max()):
        return (
            f"the table is flat: every ratio is {float(table.min()):g}, nothing was learned about layers or timesteps",
        )
    if len(table) > 1 and bool((table == table[0]).all()):
        return ("every timestep region has the same row: nothing was learned about timesteps",)
    return ()


def examine_losses(losses: Sequence[float]) -> tuple[str, ...]:
    """What is suspicious about those of a loss of one's own, whose scale nobody else knows."""
    first, last = (statistics.median(part) if part else 0.0 for part in (losses[:NOISY], losses[-NOISY:]))
    if first > 0 and last > GROWN * first:
        return (
            f"the loss ended at {last:.3g}, above {GROWN:g} times that of the first steps ({first:.3g}): where it is no distance "
            "from the dense model, learning may have diverged; lower the learning rates",
        )
    return ()


def _histogram(scores: list[Tensor]) -> tuple[float, float, tuple[int, ...]]:
    values = torch.cat([score.flatten() for score in scores])
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, bins=NUM_BINS, min=low, max=high)
    return low, high, tuple(int(count) for count in counts)


def _remarks(block: BlockRouting, scores: list[Tensor]) -> list[str]:
    """A router that decides nothing, or decides without looking."""
    if not any(0 < ratio < 1000 for ratio in block.ratios):
        return []
    spread = torch.cat([score.std(dim=1) / score.abs().mean(dim=1).clamp(min=1e-12) for score in scores])
    if float(spread.max()) < _EQUAL:
        return [f"{block.fqn}: the router gives every token of a sample the same score"]
    halves = [select_tokens(score, max(score.shape[1] // 2, 1)) for score in scores]
    rows = [row for half in halves for row in half]
    if len(rows) > 1 and all(row.shape == rows[0].shape and torch.equal(row, rows[0]) for row in rows):
        return [f"{block.fqn}: the router ranks the same positions first in every sample, whatever it sees"]
    return []
