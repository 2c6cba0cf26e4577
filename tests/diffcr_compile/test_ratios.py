"""Integers in thousandths: bins around a ratio, and the nearest one."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffcr_compile.ratios import BIN, SCALE, capacity, nearest_bin, neighbour_bins


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(importlib.import_module("diffcr_compile.ratios")).failed == 0


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "kept"),
    [(10, 700, 3), (10, 0, 10), (10, 1000, 0), (10, 99, 10), (10, 100, 9), (3, 500, 2), (1, 999, 1), (1024, 333, 684)],
)
def test_capacity(num_tokens: int, ratio: int, kept: int) -> None:
    assert capacity(num_tokens, ratio) == kept


@given(num_tokens=st.integers(1, 5000), ratio=st.integers(0, 999))
def test_capacity_never_rises(num_tokens: int, ratio: int) -> None:
    assert capacity(num_tokens, ratio) >= capacity(num_tokens, ratio + 1)


@given(ratio=st.integers(0, 999))
def test_neighbours_enclose_the_ratio(ratio: int) -> None:
    low, high = neighbour_bins(ratio / SCALE)
    assert low <= ratio < high == low + BIN


@pytest.mark.parametrize("ratio", range(0, 1000, 100))
def test_at_a_bin_the_side_of_more_compression(ratio: int) -> None:
    """In float32 as well, where 0.3 is stored as 0.30000001 and 0.7 as 0.69999999."""
    stored = float(torch.tensor(ratio / 1000, dtype=torch.float32))
    assert neighbour_bins(stored) == neighbour_bins(ratio / 1000) == (ratio, ratio + 100)


def test_at_one_the_last_two_bins() -> None:
    assert neighbour_bins(1.0) == (900, 1000)


@given(ratio=st.integers(0, 1000).filter(lambda ratio: ratio % 100 != 50))
def test_nearest_bin(ratio: int) -> None:
    found = nearest_bin(float(torch.tensor(ratio / 1000, dtype=torch.float32)))
    assert found % BIN == 0
    assert abs(found - ratio) < 50


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_a_half_goes_to_less_compression(ratio: float) -> None:
    assert nearest_bin(ratio) == round(ratio * 1000) - 50
