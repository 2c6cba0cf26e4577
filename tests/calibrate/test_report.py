"""The report: text and pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffcr_compile.calibration.report import CalibrationReport, draw_table


@pytest.fixture
def report() -> CalibrationReport:
    history = tuple({"step": n, "loss": 1 / (n + 1), "share": 1 - n / 10, "phase": "learn"} for n in range(5))
    return CalibrationReport(
        history=history,
        table=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 1.0]]),
        blocks=("a", "b", "c"),
        budget=0.6,
        share=0.597,
        dense_flops=1000,
        region_flops=(800, 394),
        seconds=12.3,
    )


def test_the_text(report: CalibrationReport) -> None:
    lines = str(report).splitlines()
    assert lines[0] == "budget 60.0% of the dense FLOPs, met with 59.70%; 5 steps in 12 s, last loss 0.2000"
    assert lines[2:] == ["  0.10 0.20 0.30    80.0% of FLOPs", "  0.40 0.50 1.00    39.4% of FLOPs"]


def test_the_picture(report: CalibrationReport, tmp_path: Path) -> None:
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert len(figure.axes) >= 3


def test_the_heat_map_has_a_cell_for_every_ratio(report: CalibrationReport) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_table(axes, report.table)
    assert [text.get_text() for text in axes.texts] == ["0.1", "0.2", "0.3", "0.4", "0.5", "1.0"]
    assert axes.get_xlabel() == "block"
