"""Residual joins, on graphs of a few nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffcr_compile.passes.residual import residual_sources
from torch import Tensor, fx


def sources(function: Callable[..., Any]) -> set[str]:
    """Names of the inputs that the function's result is joined to, in its graph of aten operators."""
    inputs = [torch.randn(2, 3, 4) for _ in range(function.__code__.co_argcount)]
    graph = fx.experimental.proxy_tensor.make_fx(function)(*inputs).graph
    names = dict(zip([node for node in graph.nodes if node.op == "placeholder"], "xyz", strict=False))
    (output,) = (node for node in graph.nodes if node.op == "output")
    (result,) = output.all_input_nodes
    return {names[node] for node in residual_sources(result)}


def chain(x: Tensor, y: Tensor) -> Tensor:
    return (x + y.sin()) + (x + y.sin()).cos()


def in_place(x: Tensor, y: Tensor) -> Tensor:
    return x.clone().add_(y.sin())


def moved(x: Tensor, y: Tensor) -> Tensor:
    return ((x.transpose(0, 1) + y.transpose(0, 1).sin()).transpose(0, 1).contiguous().view(2, 3, 4)).clamp(-9, 9)


def both(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def gated(x: Tensor, y: Tensor) -> Tensor:
    return torch.addcmul(x, y, y.sin())


def difference(x: Tensor, y: Tensor) -> Tensor:
    return x - y


def cut(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], dim=1)[:, :3] + y.sin()


def times_one(x: Tensor) -> Tensor:
    return (x + x.sin()) * 1.0


def normed_last(x: Tensor) -> Tensor:
    return torch.layer_norm(torch.layer_norm(x + x.sin(), (4,)).relu() + torch.layer_norm(x + x.sin(), (4,)), (4,))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (chain, "x"),
        (in_place, "x"),
        (moved, "x"),
        (both, "xy"),
        (gated, "x"),
        (difference, "x"),
        (times_one, "x"),
        (normed_last, "x"),
    ],
)
def test_joins_are_followed(function: Callable[..., Any], expected: str) -> None:
    assert sources(function) == set(expected)


def scaled(x: Tensor) -> Tensor:
    return 0.5 * x + x.sin()


def mixed(x: Tensor) -> Tensor:
    return x.sin()


def product(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def spread(x: Tensor) -> Tensor:
    return (x + x.sin()).softmax(-1)


def normed_first(x: Tensor) -> Tensor:
    y = torch.layer_norm(x, (4,))
    return y + y.sin()


@pytest.mark.parametrize("function", [scaled, mixed, product, spread, normed_first])
def test_what_changes_a_value_is_no_join(function: Callable[..., Any]) -> None:
    """A skipped token must leave as it came."""
    assert sources(function) == set()
