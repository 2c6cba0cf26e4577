"""The search: what is tried first, what is one family, and why the rest stays dense."""

from __future__ import annotations

from typing import Any

import torch
from diffcr_compile.passes.analysis import ModelAnalysis, run_passes
from diffcr_compile.passes.blocks import find_blocks
from diffcr_compile.passes.capture import capture_calls
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
    assert [site.fqn for site in analysis.sites] == ["blocks.0", "blocks.2"]
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


def test_looking_changes_nothing() -> None:
    from models import same_snapshot, snapshot

    model = original(SHAPE)
    before = snapshot(model)
    search(model, tiny_inputs(SHAPE))
    assert same_snapshot(snapshot(model), before)
