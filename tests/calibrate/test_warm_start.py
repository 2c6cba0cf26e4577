"""The routers' start: ridge regression on what a block does to each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffcr_compile.calibration.warm_start import RIDGE, fit_routers
from models import Shape, original, routed, run_routed, same_bits, tiny_inputs, written_in_place
from torch import Tensor

import diffcr_compile
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")


def batches(shape: Shape) -> list[dict[str, Any]]:
    return [tiny_inputs(shape, seed=seed, num_tokens=9 + seed, timestep=100.0 * seed) for seed in range(3)]


def features(shape: Shape, block: int) -> tuple[Tensor, Tensor]:
    """Tokens (rows) that reach a block of the original, and the log size of its update of each: float64."""
    model, seen = original(shape), []

    def keep(module: Any, args: tuple[Any, ...], output: Any) -> None:
        after = output if isinstance(output, Tensor) else output[0]
        seen.append((args[0].flatten(0, 1), (after - args[0]).double().square().mean(-1).sqrt().log().flatten()))

    model.blocks[block].register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches(shape):
            model(**batch)
    return torch.cat([x for x, _ in seen]).double(), torch.cat([y for _, y in seen])


@pytest.mark.parametrize("kind", ["plain", "joint"])
def test_it_is_the_ridge_regression(kind: str) -> None:
    shape = Shape(kind, depth=2, heads=1, head_dim=6)  # type: ignore[arg-type]
    model = routed(shape)
    fit_routers(model, routing_of(model), batches(shape))
    for index, block in enumerate(model.blocks):
        x, y = features(shape, index)
        x, y = x - x.mean(0), y - y.mean()
        covariance = x.T @ x / len(x)
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype)
        vector = torch.linalg.solve(covariance + ridge, x.T @ y / len(x))
        expected = vector / (x @ vector).square().mean().sqrt()
        # the block's updates are computed in float32
        assert torch.allclose(block.diffcr_router.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_blocks_that_write_into_their_tokens_are_seen_as_others_are() -> None:
    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model, other = routed(shape), diffcr_compile.transform(written_in_place(shape), example_inputs=tiny_inputs(shape))
    assert all(family.in_place for family in routing_of(other).plan.families)
    for one in (model, other):
        fit_routers(one, routing_of(one), batches(shape))
    for block, expected in zip(other.blocks, model.blocks, strict=True):
        assert torch.equal(block.diffcr_router.weight, expected.diffcr_router.weight)


def test_nothing_else_changes() -> None:
    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model = routed(shape)
    diffcr_compile.set_ratios(model, 0.5)
    hooks = [len(block._forward_hooks) for block in model.blocks]
    fit_routers(model, routing_of(model), batches(shape))
    assert [len(block._forward_hooks) for block in model.blocks] == hooks
    assert torch.equal(diffcr_compile.ratios(model), torch.full((4, 2), 0.5))
    diffcr_compile.set_ratios(model, 0.0)
    assert same_bits(model(**tiny_inputs(shape)), original(shape)(**tiny_inputs(shape)))


def test_tokens_that_change_little_skip_first() -> None:
    """On the tokens it was fitted to, what is skipped changes less on average than what is kept."""
    shape = Shape("plain", depth=1, heads=1, head_dim=6)
    model, plain = routed(shape), original(shape)
    fit_routers(model, routing_of(model), batches(shape))
    diffcr_compile.set_ratios(model, 0.5)
    kept_changes, skipped_changes = [], []
    for batch in batches(shape):
        (call,) = run_routed(model, batch)
        with torch.no_grad():
            change = (plain.blocks[0](*call.args) - call.args[0]).square().mean(-1).log()
        mask = torch.zeros_like(change, dtype=torch.bool).scatter(1, call.kept, True)
        kept_changes.append(change[mask])
        skipped_changes.append(change[~mask])
    assert torch.cat(kept_changes).mean() > torch.cat(skipped_changes).mean()
