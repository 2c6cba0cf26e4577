"""How tokens lie in the picture or the video, read off a call, and the order in which they take turns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .arguments import Path, iterate_leaves
from .defaults import on_cpu

Grids = tuple[tuple[int, ...], ...]
"""Sizes that the tokens may be laid out in, or square patches of them: (height, width) or (frames, height, width) each."""


def grids_of_call(bound: dict[str, Any]) -> Grids:
    """The grids that a bound call of the root tells of, likeliest first.

    Of latents with axes of their own (B, C, H, W) or (B, C, F, H, W) their last sizes. Where latents are packed into tokens before:
    of a table of positions (N, 2..4) or (B, N, 2..4) the numbers of its rows and columns, if it goes along them in raster order;
    and two or three integers that stand together, as heights and widths are given. The host reads such tables.
    """
    leaves = list(iterate_leaves(bound))
    tensors = [leaf for _, leaf in leaves if isinstance(leaf, Tensor)]
    latents = latents_of_call(bound)
    if latents is not None:
        return (tuple(latents.shape[2:]),)
    found = (*(_grid_of_positions(tensor) for tensor in tensors), *_grids_of_numbers(leaves))
    return tuple(dict.fromkeys(grid for grid in found if grid is not None))


def latents_of_call(bound: dict[str, Any]) -> Tensor | None:
    """Latents with axes of their own (B, C, H, W) or (B, C, F, H, W), if a bound call of the root holds such."""
    tensors = (leaf for _, leaf in iterate_leaves(bound) if isinstance(leaf, Tensor))
    latents = next((tensor for tensor in tensors if tensor.ndim in (4, 5)), None)
    return latents if latents is not None and latents.dtype.is_floating_point else None


def _grid_of_positions(table: Tensor) -> tuple[int, ...] | None:
    if table.ndim not in (2, 3) or not 2 <= table.shape[-1] <= 4 or 0 in table.shape or table.is_complex():
        return None
    rows = (table if table.ndim == 2 else table[0]).detach().cpu().double()
    if not torch.equal(rows, rows.round()):
        return None
    place, sizes = torch.zeros(len(rows), dtype=torch.int64, device="cpu"), []
    for column in rows.unbind(dim=1):
        values, at = column.unique(return_inverse=True)
        if len(values) > 1:
            sizes.append(len(values))
            place = place * len(values) + at
    in_order = torch.equal(place, torch.arange(len(rows), device="cpu"))
    return tuple(sizes) if in_order and len(sizes) in (2, 3) and math.prod(sizes) == len(rows) else None


def _grids_of_numbers(leaves: list[tuple[Path, Any]]) -> Iterator[tuple[int, ...]]:
    groups: dict[Path, list[int]] = {}
    for path, leaf in leaves:
        if type(leaf) is int and leaf > 0:
            groups.setdefault(path[:-1], []).append(leaf)
    return (tuple(group) for group in groups.values() if len(group) in (2, 3))


@on_cpu()
def interleaved_rank(num_tokens: int, grids: Grids) -> Tensor:
    """Order in which to keep the tokens so that any run of it covers the picture evenly: float32 (N,) in [0, 1).

    The tokens are taken for square patches of the first of the grids that they can be, in raster order, and ordered as in Bayer's
    dither matrix, so that the first half is a checkerboard and the first quarter one cell of each
    2 x 2, shifted from frame to frame. Where none fits: by multiples of the golden ratio along the sequence.
    """
    tokens = token_grid(num_tokens, grids)
    if tokens is None:
        golden = (math.sqrt(5) - 1) / 2
        keys = (torch.arange(num_tokens, dtype=torch.float64) * golden) % 1
        return _ranks(keys)
    frames, height, width = tokens
    frame, row, column = torch.meshgrid(*(torch.arange(size) for size in (frames, height, width)), indexing="ij")
    keys, row, column = torch.zeros(frames, height, width, dtype=torch.float64), row + frame, column + frame // 2
    scale = 1.0
    for level in range(max(height, width, 2).bit_length()):
        bit_row, bit_column = (row >> level) & 1, (column >> level) & 1
        scale /= 4
        keys += scale * (2 * (bit_row ^ bit_column) + bit_row)
    return _ranks(keys.flatten())


def token_grid(num_tokens: int, grids: Grids) -> tuple[int, int, int] | None:
    """(frames, height, width) of so many tokens that are square patches of one of the grids, the first that fits; or None."""
    for grid in grids:
        frames, height, width = (1, *grid) if len(grid) == 2 else grid
        for patch in range(1, min(height, width) + 1):
            for step in range(1, frames + 1):
                sizes = (frames // step, height // patch, width // patch)
                if height % patch == width % patch == frames % step == 0 and math.prod(sizes) == num_tokens:
                    return sizes
    return None


def _ranks(keys: Tensor) -> Tensor:
    ranks = torch.empty(len(keys), dtype=torch.float64)
    ranks[keys.argsort(stable=True)] = torch.arange(len(keys), dtype=torch.float64)
    return (ranks / len(keys)).float()
