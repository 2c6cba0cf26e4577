"""The table and the pictures of the demo."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffcr_compile.calibration.report import draw_table
from matplotlib.figure import Figure
from torch import Tensor

from diffcr_compile import CalibrationReport

PATCH = 2  # pixels to a token's side
GRID = 16  # tokens to a canvas's side
SKIPPED = torch.tensor([0.55, 0.16, 0.20])  # colour laid over skipped tokens
DPI = 130


@dataclass(frozen=True)
class Run:
    """What one variant made: labels (M,), noise and images (M, 1, 32, 32), and the seconds of each batch."""

    labels: Tensor
    noise: Tensor
    images: Tensor
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """One row of the table.

    flops_share, time_shares (one per round): of the dense model's. frechet: distance of the classifier's features to those
    of held-out digits. accuracy: share of pictures that the classifier names as asked. moved: mean squared distance from the
    dense model's pictures of equal noise. memory: bytes that a picture's sampling remembers between steps, beside the weights.
    """

    name: str
    flops_share: float
    time_shares: tuple[float, ...]
    frechet: float
    accuracy: float
    moved: float
    memory: int


def format_table(results: list[Result]) -> str:
    """A table in Markdown that also reads well as it is; times are medians with quartiles."""
    width = max(len(result.name) for result in results)
    lines = [
        f"| {'':{width}} | FLOPs | time (quartiles)   | memory  | Fréchet | asked class | moved   |",
        f"|{'-' * (width + 2)}|-------|--------------------|---------|---------|-------------|---------|",
    ]
    for row in results:
        low, middle, high = quartiles(row.time_shares)
        spread = f"{middle:.2f} ({low:.2f}..{high:.2f})"
        lines.append(
            f"| {row.name:{width}} | {row.flops_share:5.2f} | {spread:18} | {row.memory / 1e6:4.1f} MB "
            f"| {row.frechet:7.0f} | {row.accuracy:11.0%} | {row.moved:.5f} |"
        )
    notes = (
        "FLOPs and time are shares of the dense, compiled model's; a time is a round's share, all rows taking turns.",
        "Memory: what a picture's sampling remembers between steps, beside the weights.",
        "Fréchet: distance between classifier features of the pictures and of held-out digits (lower is better).",
        "Moved: mean squared distance from the dense model's own pictures of equal noise.",
    )
    return "\n".join([*lines, "", *notes])


def quartiles(values: tuple[float, ...]) -> tuple[float, float, float]:
    """25 %, 50 % and 75 %."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def draw_samples(path: Path, results: list[Result], runs: list[Run], columns: int = 20) -> None:
    """One strip of pictures for each row of the table, the same noise and label above each other."""
    columns = min(columns, len(runs[0].labels))
    figure = Figure(figsize=(2.9 + 0.62 * columns, 0.6 + 0.66 * len(runs)), layout="constrained")
    figure.suptitle("samples from equal noise", fontsize=13)
    axes = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for row, (result, run) in enumerate(zip(results, runs, strict=True)):
        strip = torch.cat([framed(image) for image in run.images[:columns, 0]], dim=1)
        axes[row].imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        label = f"{result.name}\n{result.flops_share:.2f} FLOPs, moved {result.moved:.3f}"
        axes[row].set_yticks([strip.shape[0] / 2], [label])
        axes[row].set_xticks([])
        axes[row].tick_params(length=0, labelsize=9)
        for side in axes[row].spines.values():
            side.set_visible(False)
    side = strip.shape[1] / columns
    axes[0].set_xticks(
        [(i + 0.5) * side for i in range(columns)], [str(int(label)) for label in runs[0].labels[:columns]]
    )
    axes[0].xaxis.tick_top()
    figure.savefig(path, dpi=DPI)


def framed(image: Tensor) -> Tensor:
    """A picture (32, 32) with a thin grey line around it."""
    return torch.nn.functional.pad(image, (1, 1, 1, 1), value=-0.3)


def draw_tables(path: Path, reports: dict[float, CalibrationReport]) -> None:
    """The learned tables side by side."""
    figure = Figure(figsize=(5.6 * len(reports), 3.4), layout="constrained")
    figure.suptitle("learned ratios: share of tokens that skip each block, by noise level")
    for axes, (budget, report) in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports.items(), strict=True):
        draw_table(axes, report.table)
        axes.set_title(f"{budget:.0%} of the FLOPs")
    figure.savefig(path, dpi=DPI)


def draw_tokens(path: Path, kept: dict[str, list[Tensor]], run: Run, title: str, sample: int = 0) -> None:
    """One picture on its way: a row for each of four steps, a column for each block, skipped tokens tinted."""
    names, steps = list(kept), len(next(iter(kept.values())))
    shown = [round((i + 0.5) * steps / 4 - 0.5) for i in range(4)]
    figure = Figure(figsize=(1.25 * len(names) + 0.8, 6.0), layout="constrained")
    figure.suptitle(f"{title} (bright: kept, red: skipped)")
    grid = figure.subplots(4, len(names), squeeze=False)
    for axes_row, step in zip(grid, shown, strict=True):
        for column, (axes, name) in enumerate(zip(axes_row, names, strict=True)):
            tokens = kept[name][step][sample]
            axes.imshow(tinted(run.images[sample, 0], tokens), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{len(tokens) / GRID**2:.0%} kept", fontsize=8, labelpad=2)
            if step == shown[0]:
                axes.set_title(f"block {column}", fontsize=10)
        axes_row[0].set_ylabel(f"step {step + 1} of {steps}\n{noise_words(step, steps)}", fontsize=9)
    figure.savefig(path, dpi=DPI)


def noise_words(step: int, steps: int) -> str:
    return ("most noise", "much noise", "little noise", "nearly clean")[min(4 * step // steps, 3)]


def tinted(image: Tensor, kept: Tensor) -> Tensor:
    """The picture (32, 32) in colours (32, 32, 3), the tokens that are not in ``kept`` (K,) under a tint."""
    grey = ((image + 1) / 2).clamp(0, 1).unsqueeze(-1)
    mask = torch.zeros(GRID * GRID)
    mask[kept] = 1.0
    mask = upsampled(mask).unsqueeze(-1)
    bright = 0.25 + 0.75 * grey
    return mask * bright.expand(-1, -1, 3) + (1 - mask) * (0.45 * grey + SKIPPED * (1 - 0.45 * grey))


def upsampled(values: Tensor) -> Tensor:
    """Values of tokens (256,) as a picture (32, 32)."""
    return values.view(GRID, GRID).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)


def draw_compute(path: Path, kept: dict[str, list[Tensor]], run: Run, title: str) -> None:
    """Several pictures, and below each how many blocks its tokens went through at four steps of the way."""
    names, steps = list(kept), len(next(iter(kept.values())))
    num = len(next(iter(kept.values()))[0])
    shown = [round((i + 0.5) * steps / 4 - 0.5) for i in range(4)]
    figure = Figure(figsize=(1.1 * num + 1.8, 6.4), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(5, num, squeeze=False)
    image: Any = None
    for sample in range(num):
        grid[0][sample].imshow(run.images[sample, 0], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        for axes, step in zip(grid[1:, sample], shown, strict=True):
            counts = torch.zeros(GRID * GRID)
            for name in names:
                counts[kept[name][step][sample]] += 1
            image = axes.imshow(
                counts.view(GRID, GRID), cmap="viridis", vmin=0, vmax=len(names), interpolation="nearest"
            )
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    grid[0][0].set_ylabel("result", fontsize=9)
    for axes, step in zip(grid[1:, 0], shown, strict=True):
        axes.set_ylabel(f"step {step + 1}\n{noise_words(step, steps)}", fontsize=9)
    figure.colorbar(image, ax=grid[1:, :].ravel().tolist(), fraction=0.02, label="blocks")
    figure.savefig(path, dpi=DPI)
