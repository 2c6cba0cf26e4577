"""What a calibration did: its history, the table it ended with, and their pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class CalibrationReport:
    """history: one entry per step (``step``, ``loss``, ``share``: expected share of the dense FLOPs, ``phase``).

    table: float32 (num_regions, num_blocks), the ratios in force. share: of the dense FLOPs, at most ``budget``. blocks: names
    of the table's columns. seconds: wall time.
    """

    history: tuple[dict[str, Any], ...]
    table: Tensor
    blocks: tuple[str, ...]
    budget: float
    share: float
    dense_flops: int
    region_flops: tuple[int, ...]
    seconds: float

    def __str__(self) -> str:
        losses = [entry["loss"] for entry in self.history]
        how = f"{len(losses)} steps" if losses else "training-free"
        lines = [
            f"budget {self.budget:.1%} of the dense FLOPs, met with {self.share:.2%}; {how} in {self.seconds:.0f} s"
            + (f", last loss {losses[-1]:.4f}" if losses else ""),
            "ratio of skipped tokens, one row per timestep region from clean to noisy, one column per block:",
        ]
        for row, flops in zip(self.table, self.region_flops, strict=True):
            lines.append(
                "  " + " ".join(f"{value:4.2f}" for value in row) + f"   {flops / self.dense_flops:6.1%} of FLOPs"
            )
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Heat map of the table beside the curves of loss and FLOPs; a matplotlib figure, written to ``path`` if given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.6), layout="constrained")
        heat, loss_axes = figure.subplots(1, 2, width_ratios=(3, 2))
        draw_table(heat, self.table)
        steps = [entry["step"] for entry in self.history]
        loss_axes.plot(steps, [entry["loss"] for entry in self.history], color="tab:blue", linewidth=1)
        loss_axes.set(xlabel="step", ylabel="loss", title="loss and share of the dense FLOPs")
        share_axes = loss_axes.twinx()
        share_axes.plot(steps, [entry["share"] for entry in self.history], color="tab:orange")
        share_axes.axhline(self.budget, color="tab:orange", linestyle=":")
        share_axes.set(ylabel="FLOPs share", ylim=(0, 1.02))
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure


def draw_table(axes: Any, table: Tensor) -> None:
    """Heat map of a ratio table: timestep regions upwards from clean to noisy, blocks to the right in order of execution."""
    image = axes.imshow(table.numpy(), origin="lower", aspect="auto", vmin=0, vmax=1, cmap="magma")
    for (row, column), value in [
        ((r, c), float(table[r, c])) for r in range(table.shape[0]) for c in range(table.shape[1])
    ]:
        axes.text(
            column, row, f"{value:.1f}", ha="center", va="center", color="white" if value < 0.6 else "black", fontsize=7
        )
    axes.set(xlabel="block", ylabel="timestep region (noisy upwards)", title="share of tokens that skip")
    axes.set_xticks(range(table.shape[1]))
    axes.set_yticks(range(table.shape[0]))
    axes.figure.colorbar(image, ax=axes, fraction=0.04)
