"""Compression ratios: integers in thousandths, and the number of tokens they keep."""

from __future__ import annotations

SCALE = 1000
"""Ratios are counted in thousandths: a float ceiling is wrong (0.7 of 10 tokens would keep 4)."""

BIN = 100
"""Width of a bin in thousandths: bins every 10 % (DiffCR, section 3)."""


def capacity(num_tokens: int, ratio: int) -> int:
    """Tokens kept of ``num_tokens`` at ``ratio`` thousandths: ``N - N r // 1000``, in [0, N]."""
    return num_tokens - num_tokens * ratio // SCALE


def nearest_bin(ratio: float) -> int:
    """The bin, in thousandths, nearest to ``ratio`` in [0, 1]; a half goes to the side of less compression."""
    position = ratio * SCALE / BIN
    whole = int(position)
    return BIN * (whole + (position - whole > 0.5))


def neighbour_bins(ratio: float) -> tuple[int, int]:
    """The two bins around ``ratio`` in [0, 1], in thousandths. At a bin exactly it is the lower of the two, so that a slope
    taken between them is that of more compression; at 1 it is the upper.

    >>> neighbour_bins(0.12), neighbour_bins(0.1), neighbour_bins(1.0)
    ((100, 200), (100, 200), (900, 1000))
    """
    slack = 1e-6  # float32 ratios: 0.3 may be stored as 0.29999998
    lower = min(int(ratio * SCALE / BIN + slack), SCALE // BIN - 1)
    return BIN * lower, BIN * (lower + 1)
