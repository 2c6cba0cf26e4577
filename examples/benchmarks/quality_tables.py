"""What a record of quality.py says: a page of tables, and a picture of them.

python examples/benchmarks/quality_tables.py examples/benchmarks/quality*.json     # both written anew from the records
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Cell = dict[str, Any]
"""What was measured of one method at one share with one seed."""

DRAWN = "ours (default)"
"""The method whose tables of ratios are drawn."""

TRAINED_ON = "dense, trained on"
"""The control."""

DPI = 110
COLUMNS = {
    "share": ("share", ".3f"),
    "time": ("time", ".2f"),
    "moved": ("moved", ".2g"),
    "Fréchet": ("frechet", ".0f"),
    "accuracy": ("accuracy", ".0%"),
    "error inside": ("inside", ".3g"),
    "seconds": ("seconds", ".0f"),
}
"""Columns of a table: what they show of a cell, and how numbers are written there."""


@dataclass(frozen=True)
class Settings:
    """What all cells of a record share. guidance: scale of classifier-free guidance, 1 for none; in one call or two."""

    model: str
    training_steps: int
    samples: int
    sampler_steps: int = 20
    guidance: float = 1.0
    two_calls: bool = False
    batch: int = 8

    @property
    def sampling(self) -> dict[str, Any]:
        """What a sampler is told, beside its steps."""
        return {"guidance": self.guidance, **({"two_calls": True} if self.two_calls else {})}

    def __str__(self) -> str:
        guidance = "no guidance"
        if self.guidance != 1:
            guidance = f"guidance {self.guidance:g} in {'two calls' if self.two_calls else 'one call'}"
        return (
            f"{self.model} DiT (256 tokens), {self.training_steps} training steps of batch {self.batch} where anything is "
            f"trained, {self.samples} samples, {self.sampler_steps} DDIM steps, {guidance}"
        )


def write(file: Path) -> None:
    """The page and the picture of a record, beside it."""
    record = json.loads(file.read_text())
    file.with_suffix(".md").write_text(as_markdown(record, file.with_suffix(".png").name))
    draw(list(record["cells"].values()), file.with_suffix(".png"))


def by_method(cells: Iterable[Cell], budget: float) -> dict[str, list[Cell]]:
    """The cells of a budget, of each method those of all seeds; first what moves least."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell["budget"] == budget:
            groups.setdefault(cell["method"], []).append(cell)
    return dict(sorted(groups.items(), key=lambda group: mean(group[1], "moved")))


def mean(cells: list[Cell], name: str) -> float:
    return statistics.mean(cell[name] for cell in cells)


def budgets(cells: Iterable[Cell]) -> list[float]:
    """From the largest share of the FLOPs to the smallest."""
    return sorted({cell["budget"] for cell in cells}, reverse=True)


def as_markdown(record: dict[str, Any], picture: str) -> str:
    """One table a share: means over seeds, the spread (half the range) behind ±."""
    lines = [
        "# Quality at equal FLOPs",
        "",
        f"By the commands at the end, torch {record['torch']}, CPU, float32, {Settings(**record['settings'])}. "
        "Share: FLOPs of the sampling over the dense one's. Time: of a sampling of a batch over the dense one's, blocks "
        "compiled, in turn. Moved: mean squared distance from the dense samples, equal noise. Fréchet: to held-out real "
        "pictures, comparable within this page. Accuracy: the asked class, by a classifier. Error inside: of inpainting, mean "
        "squared, inside the masks. Seconds: to make the model, search for blocks and dense outputs included; they compare "
        "only where the machine was idle. Means over the seeds given; ± half their range.",
        "",
        f"![Moved against FLOPs and time; learned ratios]({picture})",
    ]
    cells = list(record["cells"].values())
    shown = {name: how for name, how in COLUMNS.items() if any(cell.get(how[0]) is not None for cell in cells)}
    for budget in budgets(cells):
        lines += ["", f"## FLOPs share {budget:g}", ""]
        lines += [f"| method | seeds | {' | '.join(shown)} |", f"|{'---|' * (2 + len(shown))}"]
        for method, group in by_method(cells, budget).items():
            columns = [_spread([cell.get(name) for cell in group], form) for name, form in shown.values()]
            lines.append(f"| {method} | {len(group)} | " + " | ".join(columns) + " |")
    return "\n".join([*lines, "", "## Commands", "", "```", *record["commands"], "```"]) + "\n"


def _spread(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    half = (max(known) - min(known)) / 2
    return f"{statistics.mean(known):{form}}" + (f" ± {half:{form}}" if half else "")


def draw(cells: list[Cell], path: Path) -> None:
    """Moved against the share of the FLOPs and of the time, and the learned tables, means over seeds."""
    from diffcr_compile.calibration.report import draw_table
    from matplotlib.figure import Figure

    below = [budget for budget in budgets(cells) if budget < 1]
    tables = {budget: _mean_table(by_method(cells, budget).get(DRAWN, [])) for budget in below}
    tables = {budget: table for budget, table in tables.items() if table is not None}
    timed = any(cell.get("time") is not None for cell in cells if cell["budget"] < 1)
    figure = Figure(figsize=(13, 9 if tables else 5), layout="constrained")
    rows = figure.subfigures(1 + bool(tables), 1, height_ratios=(3, 2)[: 1 + bool(tables)], squeeze=False)[:, 0]
    across = rows[0].subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    for axes, name in zip(across, ("share", "time")[: 1 + timed], strict=True):
        _draw_moved(axes, cells, below, name)
    across[0].set_ylabel("mean squared distance from the dense pictures")
    handles, labels = across[0].get_legend_handles_labels()
    rows[0].legend(handles, labels, loc="outside right upper", fontsize=8, handlelength=3)
    if tables:
        rows[1].suptitle(f"{DRAWN}: ratios, mean over seeds", fontsize=10)
        for axes, (budget, table) in zip(
            rows[1].subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True
        ):
            draw_table(axes, table)
            axes.set_title(f"{budget:g} of the FLOPs", fontsize=9)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _draw_moved(axes: Any, cells: list[Cell], below: list[float], name: str) -> None:
    """A line a method, through its means, with the range over the seeds; as a level the dense model trained on."""
    groups = [group for budget in reversed(below) for group in by_method(cells, budget).values()]
    for place, method in enumerate(dict.fromkeys(group[0]["method"] for group in groups)):
        shown = [group for group in groups if group[0]["method"] == method]
        shown = [group for group in shown if all(cell.get(name) is not None for cell in group)]
        middles = [mean(group, "moved") for group in shown]
        ranges = [[cell["moved"] for cell in group] for group in shown]
        lower = [middle - min(values) for middle, values in zip(middles, ranges, strict=True)]
        upper = [max(values) - middle for middle, values in zip(middles, ranges, strict=True)]
        axes.errorbar(
            [mean(group, name) for group in shown],
            middles,
            yerr=[lower, upper],
            label=method,
            color=f"C{place % 10}",
            linestyle=("-", "--", ":")[place // 10 % 3],
            marker="o",
            markersize=4,
            capsize=2,
        )
    trained = [cell["moved"] for cell in cells if cell["method"] == TRAINED_ON]
    if trained:
        axes.axhline(statistics.mean(trained), color="gray", linewidth=1, label=TRAINED_ON)
    axes.set(yscale="log", xlabel=f"share of the dense sampling's {'FLOPs' if name == 'share' else 'time, lowered'}")
    axes.grid(alpha=0.3)


def _mean_table(cells: list[Cell]) -> torch.Tensor | None:
    tables = [torch.tensor(cell["table"]) for cell in cells if cell.get("table")]
    return torch.stack(tables).mean(dim=0) if tables else None


if __name__ == "__main__":
    for given in sys.argv[1:]:
        write(Path(given))
