"""What a calibration did: its history, the table it ended with, and their pictures."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..config import BudgetKind
from ..cost import UNITS
from ..errors import ArtefactError, UnsupportedError
from ..files import REPORT_TYPE, write_files
from ..plan import TimestepPlan
from ..region import region_of
from .appraise import TokenMap

TYPE, VERSION = REPORT_TYPE, 1
_JSON, _PICTURE = "report.json", "report.png"

MOST_WRITTEN = 20
"""Rows and columns of a heat map up to which every cell has its number."""

LONGEST_NAME = 20
"""Characters of a block's name, from its end, that are written over a token map."""

SKIPPED = torch.tensor([0.55, 0.16, 0.20], dtype=torch.float32, device="cpu")
"""Colour laid over skipped tokens."""

Histograms = tuple[tuple[float, float, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class CalibrationReport:
    """history: one entry per step (``step``, ``loss``, ``share``: expected share of the dense cost, ``phase``).

    table: float32 (num_regions, num_blocks), the ratios in force. tables: by budget, where there were several. share: of the dense
    cost, at most ``budget``; ``budget_kind``: of what. blocks: names of the table's columns. dense_flops, region_flops: of one
    forward, dense and at each row. seconds: wall time. diagnostics: what looks wrong, in words. scores: for each block the
    lowest and the highest router score, and how many tokens lie in equal steps between. timestep: the model's timestep input.
    trials: without training, the tables that were tried for ``budget``, and how far off they were (``trials.py``). errors: by share
    of the dense cost, squared distance from the dense outputs over their square, at each of ``tables``; uniform: at ratios that are
    everywhere the same, zero among them; both on a few batches at the end. tokens: which blocks compute them there, from clean to
    noisy. starts_dense: with reuse, that the first step of a sampling is dense whatever its row says.
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
    errors: dict[float, float] = field(default_factory=dict)
    uniform: dict[float, float] = field(default_factory=dict)
    tokens: tuple[TokenMap, ...] = ()
    starts_dense: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibrationReport) and self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        losses = [entry["loss"] for entry in self.history]
        how = f"{len(losses)} steps" if losses else "training-free"
        lines = [
            f"budget {self.budget:.1%} of the dense {UNITS[self.budget_kind]}, met with {self.share:.2%}; {how} in "
            f"{self.seconds:.0f} s" + (f", last loss {losses[-1]:.4f}" if losses else ""),
            *(
                f"as well for budget {budget:.1%}: set_ratios(model, report.tables[{budget:g}])"
                for budget in self.tables
                if budget != self.budget
            ),
            "ratio of skipped tokens, one row per timestep region from clean to noisy, one column per block:",
        ]
        rows = [
            " ".join(f"{value:4.2f}" for value in row)
            + f"   {flops / self.dense_flops:6.1%} of FLOPs, {1 - float(row.mean()):6.1%} of tokens"
            for row, flops in zip(self.table, self.region_flops, strict=True)
        ]
        for text, alike in itertools.groupby(rows):
            count = len(list(alike))
            lines.append(f"  {text}" + (f"   ({count} regions)" if count > 1 else ""))
        for name, error in sorted(self.trials.items(), key=lambda item: item[1]):
            lines.append(f"tried: {name}: error {error:.2e}")
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.diagnostics)])

    def sampler_share(self, timesteps: Iterable[float]) -> float:
        """Mean share of the dense FLOPs over a sampler's timesteps, in its order: a table is indexed by training timestep, and
        every sampler weighs its rows anew; with reuse its first step is dense. timesteps: as the model is given them; of most
        pipelines ``scheduler.timesteps``, which some divide by 1000. Raises ValueError outside the range of training, and where
        there are none."""
        return self._over_steps([flops / self.dense_flops for flops in self.region_flops], timesteps)

    def sampler_tokens(self, timesteps: Iterable[float]) -> float:
        """Likewise the mean share of tokens, over steps and blocks, that are computed."""
        return self._over_steps((1 - self.table.mean(dim=1)).tolist(), timesteps)

    def _over_steps(self, shares: Sequence[float], timesteps: Iterable[float]) -> float:
        """The mean of what each region has, over a sampler's steps."""
        timesteps = list(timesteps)
        if not timesteps:
            raise ValueError("expected a sampler's timesteps, found none; schedulers make theirs by set_timesteps")
        if self.timestep is None:
            return shares[0]
        spent = [shares[region_of(float(value), self.timestep, len(self.table))[0]] for value in timesteps]
        if self.starts_dense:
            spent[0] = 1.0
        return sum(spent) / len(spent)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Heat map of the table; error against share of the cost; curves of both while it learned; histograms of the routers'
        scores; the tokens of one sample at several timesteps: those of which there is anything. A matplotlib figure, written to
        ``path`` if given. Raises UnsupportedError without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UnsupportedError(
                f"pictures need matplotlib, which can't be imported ({error}): pip install 'diffcr-compile[plots]'. Text and "
                f"{_JSON} go without."
            ) from error

        panels = [lambda axes: draw_table(axes, self.table)]
        panels += [self._draw_tradeoff] if self.errors else []
        panels += [self._draw_history] if self.history else []
        panels += [self._draw_scores] if self.scores else []
        heights = [3.6, *([0.5 + 1.5 * len(self.tokens)] if self.tokens else [])]
        figure = Figure(figsize=(15, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        widths = (1.5, *[1] * (len(panels) - 1))
        for draw, axes in zip(
            panels, parts[0].subplots(1, len(panels), width_ratios=widths, squeeze=False)[0], strict=True
        ):
            draw(axes)
        if self.tokens:
            draw_tokens(parts[1], self.tokens)
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``report.json`` and ``report.png`` into a folder, which is made where there is none; each whole or not at all.
        Without matplotlib the first alone, and UnsupportedError is raised."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        written = {target / _JSON: json.dumps(self.to_dict(), indent=1).encode()}
        try:
            written[target / _PICTURE] = self._picture(dpi=130)
        finally:
            write_files(written)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """The report in a folder that :meth:`save` or ``diffcr_compile.save`` wrote. Raises ArtefactError."""
        file = Path(folder) / _JSON
        if not file.is_file():
            raise ArtefactError(f"{folder} holds no report; expected the file {_JSON} there.")
        try:
            return cls.from_dict(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ArtefactError(f"{file} is damaged or newer than this package: {error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary with the keys ``type`` and ``version`` beside the fields."""
        timestep = self.timestep
        return {
            "type": TYPE,
            "version": VERSION,
            **vars(self),
            "table": self.table.tolist(),
            "tables": [[budget, table.tolist()] for budget, table in self.tables.items()],
            "errors": list(self.errors.items()),
            "uniform": list(self.uniform.items()),
            "tokens": [vars(one) for one in self.tokens],
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
        data["table"] = _read_table(data["table"])
        data["tables"] = {float(budget): _read_table(table) for budget, table in data["tables"]}
        data["timestep"] = None if data["timestep"] is None else TimestepPlan(*data["timestep"])
        data["errors"], data["uniform"] = dict(data.get("errors", ())), dict(data.get("uniform", ()))
        data["tokens"] = tuple(TokenMap.from_dict(one) for one in data.get("tokens", ()))
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
            (all(map(_is_number, numbers)), "numbers"),
            (self.dense_flops > 0, "FLOPs of the dense model"),
            (isinstance(self.starts_dense, bool), "a truth value for starts_dense"),
            (self.budget_kind in UNITS, f"one of {', '.join(UNITS)} for budget_kind"),
            (
                all(tuple(table.shape) == shape for table in (self.table, *self.tables.values())),
                f"tables of shape {shape}",
            ),
            (all(isinstance(name, str) for name in (*self.blocks, *self.diagnostics)), "names"),
            (all(type(error) is float for error in self.trials.values()), "errors of what was tried"),
            (
                all(
                    _is_number(value)
                    for line in (self.errors, self.uniform)
                    for point in line.items()
                    for value in point
                ),
                "errors by share",
            ),
            (all(_is_step(entry) for entry in self.history), "steps in the history"),
            (all(_is_number(value) for *ends, counts in self.scores for value in (*ends, *counts)), "counts of scores"),
        ):
            if not holds:
                raise ValueError(f"a report holds {what}")

    def _repr_png_(self) -> bytes:
        """The plot, for notebooks."""
        return self._picture(dpi=110)

    def _picture(self, dpi: int) -> bytes:
        """The plot as a PNG file."""
        picture = io.BytesIO()
        self.plot().savefig(picture, dpi=dpi, format="png")
        return picture.getvalue()

    def _repr_html_(self) -> str:
        """Text and plot on one page, for notebooks and for a file of its own."""
        picture = base64.b64encode(self._repr_png_()).decode()
        return (
            f"<pre>{html.escape(str(self))}</pre>\n"
            f'<img alt="ratio table, error against cost, tokens" style="max-width:100%" src="data:image/png;base64,{picture}">'
        )

    def _draw_tradeoff(self, axes: Any) -> None:
        """Error against share: this calibration's tables beside uniform ratios; zero has no place on the scale."""
        dense = {share: error for share, error in self.uniform.items() if share == 1}
        for line, style, label in (
            (self.uniform, {"color": "tab:gray", "marker": "o", "linestyle": ":"}, "one ratio for all"),
            (self.errors | dense, {"color": "tab:red", "marker": "D"}, "calibrated"),
        ):
            shares = sorted(line)
            axes.plot(shares, [line[share] for share in shares], label=label, markersize=5, **style)
        axes.set(
            xlabel=f"share of the dense {UNITS[self.budget_kind]}",
            ylabel="distance from the dense outputs",
            title="what saving costs",
            yscale="log",
        )
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    def _draw_history(self, axes: Any) -> None:
        steps = [entry["step"] for entry in self.history]
        axes.plot(steps, [entry["loss"] for entry in self.history], color="tab:blue", linewidth=1)
        axes.set(xlabel="step", ylabel="loss", title="while it learned")
        share = axes.twinx()
        share.plot(steps, [entry["share"] for entry in self.history], color="tab:orange")
        share.axhline(self.budget, color="tab:orange", linestyle=":")
        share.set(ylabel=f"share of the dense {UNITS[self.budget_kind]}", ylim=(0, 1.02))

    def _draw_scores(self, axes: Any) -> None:
        """One histogram a block, each over its own range."""
        axes.set(xlabel="score, from lowest to highest", ylabel="block", title="router scores")
        if self.scores:
            counts = torch.tensor([counts for _, _, counts in self.scores], dtype=torch.float64, device="cpu")
            shares = counts / counts.amax(dim=1, keepdim=True).clamp(min=1)
            axes.imshow(
                shares.numpy(), aspect="auto", cmap="viridis", origin="lower", extent=(0, 1, -0.5, len(counts) - 0.5)
            )


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float holds; one that is not finite may be measured."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def _is_step(entry: dict[str, Any]) -> bool:
    return "phase" in entry and all(_is_number(entry.get(name)) for name in ("step", "loss", "share"))


def _read_table(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


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


def draw_tokens(figure: Any, maps: Sequence[TokenMap]) -> None:
    """A row for each map: the latents, how many blocks each token goes through, and which tokens single blocks leave out."""
    figure.suptitle("one sample: how many blocks compute each token (bright: all), and what single blocks skip (red)")
    grid = figure.subplots(len(maps), 2 + len(maps[0].kept), squeeze=False)
    for row, one in zip(grid, maps, strict=True):
        frame, picture, shares = one.grid[0] // 2, one.picture(), one.pass_shares()
        masks = [mask[frame] for mask in one.masks().values()]
        shown = [picture, shares[frame], *(_tinted(mask, picture) for mask in masks)]
        under = ["", *(f"{float(part.float().mean()):.0%}" for part in (shares, *one.masks().values()))]
        for axes, values, text in zip(row, shown, under, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(text, fontsize=8, labelpad=2)
            if values is None:
                axes.set_visible(False)
                continue
            colours = "gray" if values is picture else "viridis"
            aspect = "equal" if len(values) > 1 else "auto"
            axes.imshow(values.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect=aspect)
        place = 0 if picture is not None else 1
        row[place].set_ylabel("" if one.timestep is None else f"timestep {one.timestep:g}", fontsize=9)
    for axes, title in zip(grid[0], ["latents", "all blocks", *maps[0].kept], strict=True):
        axes.set_title(title[-LONGEST_NAME:], fontsize=8)


def _tinted(kept: Tensor, picture: Tensor | None) -> Tensor:
    """The picture in colours (height, width, 3), the tokens that are not kept (bool, of another size) under a tint."""
    grey = torch.full(kept.shape, 0.7, dtype=torch.float32, device="cpu") if picture is None else picture
    mask = torch.nn.functional.interpolate(kept[None, None].float(), size=grey.shape)[0, 0].unsqueeze(-1)
    grey = grey.unsqueeze(-1)
    return mask * (0.25 + 0.75 * grey) + (1 - mask) * (0.45 * grey + SKIPPED * (1 - 0.45 * grey))
