"""The graph rewritten for full context: what it is made of, and when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffcr_compile.passes.block import BlockAnalysis
from diffcr_compile.passes.blocks import BLOCK_PASSES
from diffcr_compile.passes.context import prove_context
from hand import D, Hand, N, T, analyse, block_of, draw
from torch import Tensor

from diffcr_compile import DiffCRConfig


def finish(block: Any, **arguments: Any) -> BlockAnalysis:
    """Analysed for full context."""
    passes = [step for step in BLOCK_PASSES if step is not prove_context]

    def ask_for_all(state: BlockAnalysis) -> BlockAnalysis:
        from dataclasses import replace

        return replace(state, config=DiffCRConfig(context="all"))

    return analyse(block, arguments, [*passes, ask_for_all, prove_context])


def plain(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x)


def written_out(self: Hand, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    return x + self.join((q @ k.transpose(-1, -2) / D**0.5).softmax(-1) @ v)


def linear(self: Hand, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    return x + self.join(q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v))


def joint(self: Hand, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    out = self.attend(torch.cat([text, x], dim=1))
    return x + out[:, text.shape[1] :], text + out[:, : text.shape[1]]


def masked(self: Hand, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    return x + self.join(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]))


def in_place(self: Hand, x: Tensor) -> Tensor:
    y = self.attend(x)
    y += x
    return y


MASK = torch.rand(2, N, N, generator=torch.Generator().manual_seed(1)) < 0.8
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (plain, {"x": draw()}),
    "softmax written out": (written_out, {"x": draw()}),
    "linear attention": (linear, {"x": draw()}),
    "joint": (joint, {"x": draw(), "text": draw(2, T, D)}),
    "masked": (masked, {"x": draw(), "mask": MASK | torch.eye(N, dtype=torch.bool)}),
    "in place": (in_place, {"x": draw()}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_form_is_rewritten_and_proved(name: str) -> None:
    """The proof is at batch 3 with other tokens for each sample, to a relative error far below its limit."""
    forward, arguments = CASES[name]
    block = finish(block_of(forward), **arguments)
    assert block.plan is not None
    assert (block.plan.context, block.plan.context_note) == ("all", "")
    assert block.plan.error < 1e-5


def test_only_what_keys_and_values_need_is_computed_for_all() -> None:
    """Plain attention: one projection on all tokens, queries taken from it, the output projection on the kept ones."""
    block = finish(block_of(plain), x=draw())
    assert block.context_graph is not None
    names = [getattr(node.target, "__name__", str(node.target)) for node in block.context_graph.graph.graph.nodes]
    assert sum("linear" in name for name in names) == 2
    assert names.count("take_tokens") == 1
    assert block.context_graph.attributes == ("qkv.weight", "qkv.bias", "out.weight", "out.bias")


def test_kept_context_asks_for_nothing() -> None:
    block = analyse(block_of(plain), {"x": draw()}, BLOCK_PASSES)
    assert block.context_graph is None
    assert block.plan is not None
    assert block.plan.context == "kept"


def einsum(self: Hand, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
    return x + self.join(torch.einsum("bhnm,bhmd->bhnd", weights, v))


def test_what_does_not_allow_it_says_why_and_keeps_kept_context() -> None:
    """Products written as einsum are not told apart into queries and keys."""
    block = finish(block_of(einsum), x=draw())
    assert block.plan is not None
    assert block.plan.context == "kept"
    assert block.plan.context_note.startswith("keys and values from kept tokens only: ")
    assert block.context_graph is None
