"""Attention in its forms, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffcr_compile.passes.analysis import Refused
from diffcr_compile.passes.attention import find_attention
from diffcr_compile.passes.blocks import BLOCK_PASSES
from diffcr_compile.passes.export import export_block
from hand import B, D, Hand, N, T, analyse, block_of, draw
from torch import Tensor


def sdpa(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x)


def written_out(self: Hand, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    return x + self.join((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v)


def with_einsum(self: Hand, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    return x + self.join(torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1), v))


def linear(self: Hand, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    return x + self.join(q.relu() @ (k.relu().transpose(-1, -2) @ v))


@pytest.mark.parametrize(
    ("forward", "form"), [(sdpa, "sdpa"), (written_out, "softmax"), (with_einsum, "softmax"), (linear, "linear")]
)
def test_every_form_is_found_and_names_the_tokens(forward: Callable[..., Any], form: str) -> None:
    block = analyse(block_of(forward), {"x": draw()}, [export_block, find_attention])
    assert block.attention == form
    assert block.token_symbols == {block.leaf_dims[0][1]}
    assert block.captured_sizes[block.leaf_dims[0][1]] == N


def feed_forward(self: Hand, x: Tensor) -> Tensor:
    return x + self.out(x.relu())


def mixing_channels(self: Hand, x: Tensor) -> Tensor:
    """A product of activations that contracts over the width alone."""
    return x * torch.einsum("bnd,bnd->bn", x, self.out(x)).unsqueeze(-1) + x


@pytest.mark.parametrize("forward", [feed_forward, mixing_channels])
def test_no_attention_is_refused(forward: Callable[..., Any]) -> None:
    with pytest.raises(Refused, match="no attention in its graph"):
        analyse(block_of(forward), {"x": draw()}, [export_block, find_attention])


def in_windows(self: Hand, x: Tensor) -> Tensor:
    windows = x.reshape(-1, 4, D)
    return x + self.attend(windows).reshape(x.shape)


def test_windows_of_fixed_size_are_refused() -> None:
    with pytest.raises(Refused, match="does not run on 11 or 5 tokens"):
        analyse(block_of(in_windows), {"x": draw(B, 8, D)}, BLOCK_PASSES)


def crossed(self: Hand, x: Tensor, text: Tensor) -> Tensor:
    q, _, _ = self.heads(x)
    _, k, v = self.heads(text)
    return x + self.join(torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_the_queries_name_the_tokens_not_the_keys() -> None:
    arguments = {"x": draw(), "text": draw(B, T, D, seed=1)}
    block = analyse(block_of(crossed), arguments, [export_block, find_attention])
    assert block.token_symbols == {block.leaf_dims[0][1]}
