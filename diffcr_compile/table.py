"""The ratio table: read it, set it, and keep the blocks' integers in step with the masters that learning moves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .ratios import SCALE
from .routed import ModelRouting, settle
from .unwrap import unwrap


def ratios(model: nn.Module) -> Tensor:
    """The ratio table in force: float32 CPU tensor (num_regions, num_blocks) of values in [0, 1].

    Rows are timestep regions from clean (low timesteps) to noisy; columns are blocks in order of first execution.
    Raises NotTransformedError; CaptureError where the blocks have not been looked for yet.
    """
    return read_table(settle(unwrap(model)))


def set_ratios(model: nn.Module, values: float | Tensor | Sequence[Sequence[float]]) -> None:
    """Set the table: one ratio for all, or a (num_regions, num_blocks) table. Taken as given to the thousandth, not snapped.

    values: share of the tokens that skip, in [0, 1]; rows from clean to noisy and columns as ``ratios`` gives them. Raises
    ValueError for values outside or another shape, TypeError for what is no table of real numbers, NotTransformedError, and
    CaptureError where the blocks have not been looked for yet. Warns once where routers that nobody calibrated are made to route.
    """
    state = settle(unwrap(model), sync=False)  # masters that are no numbers are overwritten
    shape = (state.num_regions, len(state.blocks))
    table = _as_table(values)
    if table.ndim == 0:
        table = table.expand(shape)
    if tuple(table.shape) != shape:
        raise ValueError(
            f"expected one ratio, or a table of shape {shape} (timestep regions, blocks); found shape {tuple(table.shape)}"
        )
    outside = (~((table >= 0) & (table <= 1))).nonzero().tolist()
    if outside:
        region, index = outside[0]
        raise ValueError(
            f"ratios must lie in [0, 1], found {table[region, index]:g} for {state.blocks[index].fqn} in timestep region {region}"
        )
    untrained = state.config.selection != "turn" and not state.trained
    if untrained and not state.warned and bool((table > 0).any()):
        state.warned = True
        warnings.warn(
            "the routers are untrained: tokens are chosen at random. Call diffcr_compile.calibrate.", stacklevel=2
        )
    write_table(state, [[round(float(value) * SCALE) for value in row] for row in table])


def _as_table(values: Any) -> Tensor:
    """``values`` in float64 on the CPU. Raises TypeError; truth values and complex numbers are no ratios."""
    if isinstance(values, np.ndarray):  # as torch takes arrays: bytes in this machine's order, no negative strides
        values = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
    if isinstance(values, Tensor) and (values.layout != torch.strided or values.is_nested or values.is_quantized):
        raise TypeError(f"expected ratios as a plain dense tensor, found {values!r:.80}")
    try:
        kind = torch.as_tensor(values, device="cpu").dtype
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # whatever torch makes of text, None or rows of several lengths
        raise TypeError(
            "expected one ratio, or a table of ratios (timestep regions, blocks) as a tensor or a list of rows of equal length; "
            f"found {values!r:.80}"
        ) from error
    if kind == torch.bool or kind.is_complex:
        raise TypeError(f"expected ratios as real numbers, found {str(kind).removeprefix('torch.')}: {values!r:.80}")
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def read_table(state: ModelRouting) -> Tensor:
    """The blocks' integers as a float32 table."""
    return torch.tensor([block.ratios for block in state.blocks], device="cpu").T.float() / SCALE


def write_table(state: ModelRouting, rows: list[list[int]]) -> None:
    """Give every block its column, in thousandths, and move the masters there."""
    for block, column in zip(state.blocks, zip(*rows, strict=True), strict=True):
        block.ratios = tuple(column)
    if state.masters is not None:
        with torch.no_grad():
            state.masters.copy_(read_table(state))
        state.note_masters()
