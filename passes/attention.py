"""Find the attention of a block in its graph: the product that contracts over tokens.

Three forms are known: an SDPA operator, softmax written out between two products, and linear attention, whose first
product contracts keys with values over the tokens. The length of the queries names the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from .analysis import Refused
from .block import BlockAnalysis

_aten = torch.ops.aten
_PRODUCTS = {_aten.matmul.default: 0, _aten.bmm.default: 0, _aten.baddbmm.default: 1, _aten.mm.default: 0}
"""Matrix products, with the position of their first factor."""


def find_attention(block: BlockAnalysis) -> BlockAnalysis:
    """Fill in ``attention`` (its form) and ``token_symbols`` (symbols in the queries' lengths)."""
    found = list(_attentions(block))
    if not found and block.layout is not None:
        symbols = _symbols_at(block, *block.layout)
        return replace(block, attention="none: each token for itself", token_symbols=symbols)
    if not found:
        raise Refused("no attention in its graph")
    symbols = frozenset(symbol for _, length in found for symbol in length.free_symbols)
    if not symbols:
        raise Refused(
            "its attention runs over a fixed number of tokens (windows, a grid, or positions made for one length)"
        )
    return replace(block, attention=found[0][0], token_symbols=symbols)


def _symbols_at(block: BlockAnalysis, rank: int, axis: int) -> frozenset[sympy.Symbol]:
    """Without attention nothing tells tokens from samples: what was called before it, or one more sample, has told."""
    return frozenset(symbol for dims in block.leaf_dims if len(dims) == rank for symbol in dims[axis].free_symbols)


def _attentions(block: BlockAnalysis) -> Iterator[tuple[str, sympy.Expr]]:
    """(form, length of the queries) of every attention in the graph."""
    assert block.graph is not None
    softmax = any("softmax" in str(node.target) for node in block.graph.nodes)
    for node in block.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        if "scaled_dot_product" in name or "flex_attention" in name:
            yield "sdpa", block.dims(node.args[0])[-2]
        elif any(part in name.lower() for part in ("flash_attn", "attention", "sageattn", "fmha")):
            for query in node.args[:1]:
                for length in block.dims(query)[-3:-1]:
                    yield "custom attention operator", length
        else:
            for rows, contracted in _contractions(block, node):
                if contracted.free_symbols:
                    yield ("softmax", rows) if rows.free_symbols and softmax else ("linear", contracted)


def _contractions(block: BlockAnalysis, node: fx.Node) -> list[tuple[sympy.Expr, sympy.Expr]]:
    """(rows of the result, contracted length) of a product of two tensors."""
    if node.target in _PRODUCTS:
        first = block.dims(node.args[_PRODUCTS[node.target]])  # type: ignore[index]
        return [(first[-2], first[-1])] if len(first) >= 2 else []
    if node.target is _aten.einsum.default:
        return _einsum_contractions(block, node)
    return []


def _einsum_contractions(block: BlockAnalysis, node: fx.Node) -> list[tuple[sympy.Expr, sympy.Expr]]:
    equation: Any = node.args[0]
    left, _, right = equation.replace(" ", "").replace("...", "").partition("->")
    terms = left.split(",")
    factors: Any = node.args[1]
    operands = [block.dims(factor) for factor in factors]
    sizes = {
        letter: size
        for term, dims in zip(terms, operands, strict=True)
        for letter, size in zip(term[::-1], dims[::-1], strict=False)
    }
    rows = [sizes[letter] for letter in terms[0] if letter in right and letter not in terms[-1]]
    return [
        (rows[-1] if rows else sympy.Integer(1), sizes[letter])
        for letter in terms[0]
        if letter in terms[-1] and letter not in right
    ]
