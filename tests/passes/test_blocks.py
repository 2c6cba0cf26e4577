"""The search: what is tried first, what is one family, and why the rest stays dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffcr_compile.passes import blocks
from diffcr_compile.passes.analysis import ModelAnalysis, run_passes
from diffcr_compile.passes.block import BlockAnalysis
from diffcr_compile.passes.blocks import find_blocks
from diffcr_compile.passes.capture import capture_calls
from diffcr_compile.passes.export import export_block
from models import Block, Shape, original, sinusoids, tiny_inputs
from torch import Tensor, nn

from diffcr_compile import DiffCRConfig

SHAPE = Shape("plain", depth=3, heads=1, head_dim=6)


def search(model: nn.Module, inputs: dict[str, Any], filter_fn: Any = lambda module, fqn: True) -> ModelAnalysis:
    return run_passes((capture_calls, find_blocks), ModelAnalysis(model, DiffCRConfig(), inputs, filter_fn))


def test_repeated_blocks_are_one_family() -> None:
    analysis = search(original(SHAPE), tiny_inputs(SHAPE))
    assert [(site.fqn, site.family) for site in analysis.sites] == [(f"blocks.{n}", 0) for n in range(3)]
    assert [family.kind for family in analysis.families] == ["Block"]
    assert analysis.refusals == ()


class Nested(nn.Module):
    """Blocks in a stack in a trunk, run in another order than they are listed; one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict({"late": nn.ModuleList(Block(SHAPE) for _ in range(2)), "early": Block(SHAPE)})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        cond = sinusoids(t, SHAPE.width)
        for block in (self.trunk["early"], *self.trunk["late"], self.trunk["early"]):
            x = block(x, cond)
        return x


def test_columns_are_in_order_of_first_execution() -> None:
    analysis = search(Nested().eval(), {"x": torch.randn(3, 7, 6), "t": torch.ones(3)})
    assert [site.fqn for site in analysis.sites] == ["trunk.early", "trunk.late.0", "trunk.late.1"]


class Positional(Block):
    """Adds positions made from the length: can't be routed."""

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + torch.arange(x.shape[1]).view(1, -1, 1), cond)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(SHAPE), Positional(SHAPE), Block(SHAPE), Positional(SHAPE)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        cond = sinusoids(t, SHAPE.width)
        for block in self.blocks:
            x = block(x, cond)
        return x


def test_one_reason_for_all_that_share_it() -> None:
    analysis = search(Mixed().eval(), {"x": torch.randn(3, 7, 6), "t": torch.ones(3)})
    routed = [site.fqn for site in analysis.sites if not analysis.families[site.family].is_branch]
    assert routed == ["blocks.0", "blocks.2"]
    (refusal,) = (refusal for refusal in analysis.refusals if refusal.kind == "Positional")
    assert refusal.fqns == ("blocks.1", "blocks.3")
    assert str(refusal).startswith("blocks.1 and 1 more (Positional): ")
    assert "positions made from the length" in refusal.reason


def test_filter_fn_is_asked_before_anything_is_exported() -> None:
    analysis = search(original(SHAPE), tiny_inputs(SHAPE), lambda module, fqn: fqn == "blocks.1")
    assert [site.fqn for site in analysis.sites] == ["blocks.1"]
    left_out = {
        fqn for refusal in analysis.refusals if refusal.reason == "left out by filter_fn" for fqn in refusal.fqns
    }
    assert {"blocks.0", "blocks.2"} <= left_out


class Cache:
    """Filled by a block, as keys and values are."""


class Causal(nn.Module):
    """Can't be routed whole, nor can its attention; ``how`` the feed-forward joins."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.attention = _CausalAttention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attention(x, cache)
        return x + self.mlp(x) if self.how == "added" else self.mlp(x)


class _CausalAttention(nn.Module):
    """Where it has a cache to fill, it reads values, and torch.export can't take it or what calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        if cache is not None and float(x.sum()) != float("inf"):
            cache.values = x
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, dim=-1))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class CausalStack(nn.Module):
    def __init__(self, how: str = "added", *, cache: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Causal(how) for _ in range(2))
        self.cache = Cache() if cache else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.cache)
        return x


FEED_FORWARDS = ["blocks.0.mlp", "blocks.1.mlp"]


def found(model: nn.Module, **inputs: Any) -> list[str]:
    return [site.fqn for site in search(model.eval(), inputs or {"x": torch.randn(3, 7, 8)}).sites]


@pytest.mark.parametrize("cache", [False, True])
def test_feed_forwards_of_what_is_refused_are_routed(cache: bool) -> None:
    """Seen in the block's graph, or in that around its attention where the attention can't be traced."""
    analysis = search(CausalStack(cache=cache).eval(), {"x": torch.randn(3, 7, 8)})
    assert [site.fqn for site in analysis.sites] == FEED_FORWARDS
    (family,) = analysis.families
    assert (family.is_branch, family.token_axis, family.batch_axis) == (True, 1, 0)
    assert {refusal.kind for refusal in analysis.refusals} == {"Causal", "_CausalAttention"}


@pytest.mark.parametrize("cache", [False, True])
def test_a_feed_forward_that_is_not_added_is_not(cache: bool) -> None:
    assert found(CausalStack("replaces", cache=cache)) == []


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = CausalStack()

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x.transpose(0, 1)).transpose(0, 1)


def test_one_more_sample_tells_samples_from_tokens() -> None:
    """To a causal attention that takes the first axis for the batch, the tokens of another axis are samples."""
    analysis = search(SequenceFirst().eval(), {"x": torch.randn(3, 7, 8)})
    (family,) = analysis.families
    assert (family.token_axis, family.batch_axis) == (0, 1)


class FixedBatch(CausalStack):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(3, 7, 8))


def test_without_it_nothing_tells_them_apart() -> None:
    assert found(FixedBatch()) == []


class Listed(CausalStack):
    def forward(self, x: list[Tensor]) -> Tensor:
        return super().forward(torch.stack([sample.flatten(1).T for sample in x]))


def test_samples_may_come_as_a_list() -> None:
    assert found(Listed(), x=[torch.randn(8, 7, 1) for _ in range(3)]) == FEED_FORWARDS


def test_feed_forwards_of_what_filter_fn_left_out_are_left_out() -> None:
    analysis = search(
        CausalStack().eval(), {"x": torch.randn(3, 7, 8)}, lambda module, fqn: fqn not in ("blocks.0", "blocks.1")
    )
    assert analysis.sites == ()


def test_nothing_is_exported_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block for all, its attention, and the feed-forward; the block's graph serves for both as its branches."""
    exported: list[str] = []

    def note(block: BlockAnalysis) -> BlockAnalysis:
        exported.append(block.fqn)
        return export_block(block)

    monkeypatch.setattr(blocks, "export_block", note)
    assert found(CausalStack()) == FEED_FORWARDS
    assert exported == ["blocks.0", "blocks.0.attention", "blocks.0.mlp"]


def test_looking_changes_nothing() -> None:
    from models import same_snapshot, snapshot

    model = original(SHAPE)
    before = snapshot(model)
    search(model, tiny_inputs(SHAPE))
    assert same_snapshot(snapshot(model), before)
