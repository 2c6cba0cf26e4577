"""Which input holds the tokens, and what follows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffcr_compile.passes.analysis import Refused
from diffcr_compile.passes.attention import find_attention
from diffcr_compile.passes.block import BlockAnalysis
from diffcr_compile.passes.export import export_block
from diffcr_compile.passes.tokens import find_stream, plan_leaves
from hand import B, D, Hand, N, T, analyse, block_of, draw
from torch import Tensor

PASSES = (export_block, find_attention, find_stream, plan_leaves)


def plan(forward: Callable[..., Any], **arguments: Any) -> BlockAnalysis:
    return analyse(block_of(forward), arguments, PASSES)


def with_sides(self: Hand, x: Tensor, temb: Tensor, rope: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    q, k, v = self.heads(x + temb.unsqueeze(1) * scale)
    q, k = q * rope, k * rope
    return x + self.join(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias))


def test_sizes_that_export_proves_equal_follow_the_tokens() -> None:
    block = plan(with_sides, x=draw(), temb=draw(B, D), rope=draw(N, D // 2), bias=draw(B, 1, N, N), scale=0.5)
    assert [leaf.name for leaf in block.leaves] == ["x", "temb", "rope", "bias", "scale"]
    assert [leaf.dims for leaf in block.leaves] == [("B", "N", "8"), ("B", "8"), ("N", "4"), ("B", "1", "N", "N"), ()]
    assert [[axis.axis for axis in leaf.token_axes] for leaf in block.leaves] == [[1], [], [0], [2, 3], []]
    assert [leaf.batch_axis for leaf in block.leaves] == [0, 0, None, 0, None]
    assert [leaf.is_tensor for leaf in block.leaves] == [True, True, True, True, False]
    assert (block.stream, block.outputs[0].source, block.outputs[0].routed) == (0, 0, True)


def joint_text_first(self: Hand, x: Tensor, text: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = self.heads(torch.cat([text, x], dim=1))
    attended = self.join(torch.nn.functional.scaled_dot_product_attention(q * rope, k * rope, v))
    return text + attended[:, : text.shape[1]], x + attended[:, text.shape[1] :]


def joint_text_last(self: Hand, x: Tensor, text: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = self.heads(torch.cat([x, text], dim=1))
    attended = self.join(torch.nn.functional.scaled_dot_product_attention(q * rope, k * rope, v))
    return text + attended[:, x.shape[1] :], x + attended[:, : x.shape[1]]


@pytest.mark.parametrize(("forward", "side"), [(joint_text_first, "before"), (joint_text_last, "after")])
def test_the_concatenation_tells_the_side(forward: Callable[..., Any], side: str) -> None:
    block = plan(forward, x=draw(), text=draw(B, T, D, seed=1), rope=draw(N + T, D // 2))
    _, text, rope = block.leaves
    (axis,) = rope.token_axes
    assert {"before": axis.before, "after": axis.after} == {"before": (), "after": (), side: ((1, 1),)}
    assert axis.joint
    assert not text.token_axes
    assert (block.outputs[0].routed, block.outputs[0].source) == (False, 1)
    assert (block.outputs[1].routed, block.outputs[1].source) == (True, 0)


def test_the_longer_stream_is_routed() -> None:
    block = plan(joint_text_first, x=draw(B, T, D), text=draw(B, N, D, seed=1), rope=draw(N + T, D // 2))
    assert block.leaves[block.stream].name == "text"


def sequence_first(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x.transpose(0, 1)).transpose(0, 1)


def test_the_sequence_may_come_first() -> None:
    block = plan(sequence_first, x=draw(N, B, D))
    assert block.leaves[0].dims == ("N", "B", "8")
    assert (block.leaves[0].token_axes[0].axis, block.leaves[0].batch_axis) == (0, 1)


def no_residual(self: Hand, x: Tensor) -> Tensor:
    return self.attend(x)


def without_batch(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x.unsqueeze(0)).squeeze(0)


def halved(self: Hand, x: Tensor, table: Tensor) -> Tensor:
    return x + self.attend(x + table.repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    ("forward", "arguments", "reason"),
    [
        (no_residual, {"x": draw()}, "no output is an input plus something"),
        (without_batch, {"x": draw(N, D)}, "no batch axis"),
        (halved, {"x": draw(B, 8, D), "table": draw(4, D)}, "no axis of an input"),
    ],
)
def test_what_can_not_follow_is_refused(forward: Callable[..., Any], arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        plan(forward, **arguments)
