"""What a calibration did: its history, the table it ended with, and their pictures."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..config import BudgetKind
from ..cost import UNITS
from ..errors import ArtefactError
from ..plan import TimestepPlan
from ..region import region_of

TYPE, VERSION = "diffcr_compile.report", 1
_JSON, _PICTURE = "report.json", "report.png"

MOST_WRITTEN = 20
"""Rows and columns of a heat map up to which every cell has its number."""

Histograms = tuple[tuple[float, float, tuple[int, ...]], ...]


@dataclass(frozen=True)
class CalibrationReport:
    """history: one entry per step (``step``, ``loss``, ``share``: expected share of the dense cost, ``phase``).

    table: float32 (num_regions, num_blocks), the ratios in force. tables: by budget, where there were several. share: of the dense
    cost, at most ``budget``; ``budget_kind``: of what. blocks: names of the table's columns. dense_flops, region_flops: of one
    forward, dense and at each row. seconds: wall time. diagnostics: what looks wrong, in words. scores: for each block the
    lowest and the highest router score, and how many tokens lie in equal steps between. timestep: the model's timestep input.
    trials: without training, the tables that were tried for ``budget``, and what their outputs were off by.
    """

    history: tuple[dict[str, Any], ...]
    table: Tensor
    blocks: tuple[str, ...]
    budget: float
    share: float
    dense_flops: int
    region_flops: tuple[int, ...]
    seconds: float
    budget_kind: BudgetKind = "flops"
    tables: dict[float, Tensor] = field(default_factory=dict)
    diagnostics: tuple[str, ...] = ()
    scores: Histograms = ()
    timestep: TimestepPlan | None = None
    trials: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        losses = [entry["loss"] for entry in self.history]
        how = f"{len(losses)} steps" if losses else "training-free"
        lines = [
            f"budget {self.budget:.1%} of the dense {UNITS[self.budget_kind]}, met with {self.share:.2%}; {how} in "
            f"{self.seconds:.0f} s" + (f", last loss {losses[-1]:.4f}" if losses else ""),
            "ratio of skipped tokens, one row per timestep region from clean to noisy, one column per block:",
        ]
        for row, flops in zip(self.table, self.region_flops, strict=True):
            lines.append(
                "  "
                + " ".join(f"{value:4.2f}" for value in row)
                + f"   {flops / self.dense_flops:6.1%} of FLOPs, {1 - float(row.mean()):6.1%} of tokens"
            )
        for name, error in sorted(self.trials.items(), key=lambda item: item[1]):
            lines.append(f"tried: {name}: error {error:.2e}")
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.diagnostics)])

    def sampler_share(self, timesteps: Iterable[float]) -> float:
        """Mean share of the dense FLOPs over a sampler's timesteps (``scheduler.timesteps``): a table is indexed by training
        timestep, and every sampler weighs its rows anew. Raises ValueError outside the range of training."""
        if self.timestep is None:
            return self.region_flops[0] / self.dense_flops
        regions = [region_of(float(value), self.timestep, len(self.table))[0] for value in timesteps]
        return sum(self.region_flops[region] for region in regions) / len(regions) / self.dense_flops

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Heat map of the table, curves of loss and cost, histograms of the routers' scores; a matplotlib figure, written to
        ``path`` if given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(15, 3.6), layout="constrained")
        heat, curves, scores = figure.subplots(1, 3, width_ratios=(3, 2, 2))
        draw_table(heat, self.table)
        self._draw_history(curves)
        self._draw_scores(scores)
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``report.json`` and ``report.png`` into a folder, which is made where there is none."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / _JSON).write_text(json.dumps(self.to_dict(), indent=1))
        self.plot(target / _PICTURE)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """The report in a folder that :meth:`save` or ``diffcr_compile.save`` wrote. Raises ArtefactError."""
        file = Path(folder) / _JSON
        if not file.is_file():
            raise ArtefactError(f"{folder} holds no report; expected the file {_JSON} there.")
        try:
            return cls.from_dict(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
            raise ArtefactError(f"{file} is damaged or newer than this package: {error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary with the keys ``type`` and ``version`` beside the fields."""
        timestep = self.timestep
        return {
            "type": TYPE,
            "version": VERSION,
            **{name: value for name, value in vars(self).items() if name not in ("table", "tables", "timestep")},
            "table": self.table.tolist(),
            "tables": [[budget, table.tolist()] for budget, table in self.tables.items()],
            "timestep": None if timestep is None else [timestep.argument, timestep.low, timestep.high],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`. Raises ValueError for another type or a newer version."""
        data = dict(data)
        kind, version = data.pop("type"), data.pop("version")
        if kind != TYPE or not isinstance(version, int) or version > VERSION:
            raise ValueError(
                f"expected type {TYPE!r} of version {VERSION} or older, found {kind!r} of version {version!r}"
            )
        data["table"] = torch.tensor(data["table"])
        data["tables"] = {float(budget): torch.tensor(table) for budget, table in data["tables"]}
        data["timestep"] = None if data["timestep"] is None else TimestepPlan(*data["timestep"])
        data["scores"] = tuple((low, high, tuple(counts)) for low, high, counts in data["scores"])
        for name in ("history", "blocks", "region_flops", "diagnostics"):
            data[name] = tuple(data[name])
        report = cls(**data)
        report._check()
        return report

    def _check(self) -> None:
        """Raises ValueError where a field is not what it should be: it may come from a file."""
        numbers = (self.budget, self.share, self.seconds, *self.region_flops, self.dense_flops)
        shape = (len(self.region_flops), len(self.blocks))
        for holds, what in (
            (all(type(value) in (int, float) for value in numbers), "numbers"),
            (self.budget_kind in UNITS, f"one of {', '.join(UNITS)} for budget_kind"),
            (
                all(tuple(table.shape) == shape for table in (self.table, *self.tables.values())),
                f"tables of shape {shape}",
            ),
            (all(isinstance(name, str) for name in (*self.blocks, *self.diagnostics)), "names"),
            (all(type(error) is float for error in self.trials.values()), "errors of what was tried"),
            (all({"step", "loss", "share", "phase"} <= set(entry) for entry in self.history), "steps in the history"),
        ):
            if not holds:
                raise ValueError(f"a report holds {what}")

    def _repr_png_(self) -> bytes:
        """The plot, for notebooks."""
        picture = io.BytesIO()
        self.plot().savefig(picture, dpi=110, format="png")
        return picture.getvalue()

    def _repr_html_(self) -> str:
        """Text and plot on one page, for notebooks and for a file of its own."""
        picture = base64.b64encode(self._repr_png_()).decode()
        return (
            f"<pre>{html.escape(str(self))}</pre>\n"
            f'<img alt="ratio table, history and router scores" style="max-width:100%" src="data:image/png;base64,{picture}">'
        )

    def _draw_history(self, axes: Any) -> None:
        steps = [entry["step"] for entry in self.history]
        axes.plot(steps, [entry["loss"] for entry in self.history], color="tab:blue", linewidth=1)
        axes.set(xlabel="step", ylabel="loss", title=f"loss and share of the dense {UNITS[self.budget_kind]}")
        share = axes.twinx()
        share.plot(steps, [entry["share"] for entry in self.history], color="tab:orange")
        share.axhline(self.budget, color="tab:orange", linestyle=":")
        share.set(ylabel="share", ylim=(0, 1.02))

    def _draw_scores(self, axes: Any) -> None:
        """One histogram a block, each over its own range."""
        axes.set(xlabel="router score, from a block's lowest to its highest", ylabel="block", title="router scores")
        if self.scores:
            counts = torch.tensor([counts for _, _, counts in self.scores], dtype=torch.float64)
            shares = counts / counts.amax(dim=1, keepdim=True).clamp(min=1)
            axes.imshow(
                shares.numpy(), aspect="auto", cmap="viridis", origin="lower", extent=(0, 1, -0.5, len(counts) - 0.5)
            )


def draw_table(axes: Any, table: Tensor) -> None:
    """Heat map of a ratio table: timestep regions upwards from clean to noisy, blocks to the right in order of execution."""
    image = axes.imshow(table.numpy(), origin="lower", aspect="auto", vmin=0, vmax=1, cmap="magma")
    written = [(row, column) for row in range(table.shape[0]) for column in range(table.shape[1])]
    for row, column in written if max(table.shape) <= MOST_WRITTEN else []:
        value = float(table[row, column])
        axes.text(
            column, row, f"{value:.1f}", ha="center", va="center", color="white" if value < 0.6 else "black", fontsize=7
        )
    axes.set(xlabel="block", ylabel="timestep region (noisy upwards)", title="share of tokens that skip")
    axes.set_xticks(range(0, table.shape[1], -(-table.shape[1] // MOST_WRITTEN)))
    axes.set_yticks(range(0, table.shape[0], -(-table.shape[0] // MOST_WRITTEN)))
    axes.figure.colorbar(image, ax=axes, fraction=0.04)
