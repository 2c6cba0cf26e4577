"""The report: text and pictures."""

from __future__ import annotations

import base64
import functools
import html
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffcr_compile.calibration.appraise import TokenMap
from diffcr_compile.calibration.report import CalibrationReport, draw_table
from models import Shape, original, reference_flops, routed, tiny_inputs

import diffcr_compile
from diffcr_compile import ArtefactError, CalibrationConfig, UnsupportedError
from diffcr_compile.plan import TimestepPlan


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
    assert lines[2:] == [
        "  0.10 0.20 0.30    80.0% of FLOPs,  80.0% of tokens",
        "  0.40 0.50 1.00    39.4% of FLOPs,  36.7% of tokens",
    ]


def test_regions_that_are_alike_share_a_line(report: CalibrationReport) -> None:
    table = report.table[[0, 0, 1, 0]]
    lines = str(replace(report, table=table, region_flops=(800, 800, 394, 800))).splitlines()
    assert [line.partition("tokens")[2] for line in lines[2:]] == ["   (2 regions)", "", ""]


def test_the_picture(report: CalibrationReport, tmp_path: Path) -> None:
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert len(figure.axes) >= 3


def test_without_matplotlib_the_json_is_written_and_it_says_what_to_install(
    report: CalibrationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"can't be imported \(.*pip install 'diffcr-compile\[plots\]'"):
        report.save(tmp_path)
    assert CalibrationReport.load(tmp_path) == report


def test_reports_are_equal_where_all_they_tell_is(report: CalibrationReport) -> None:
    assert report == replace(report, table=report.table.clone())
    assert report != replace(report, table=report.table + 0.1)
    assert report != replace(report, seconds=1.0)
    assert report != "a report"


def test_a_sampler_has_timesteps(report: CalibrationReport) -> None:
    for one in (report, replace(report, timestep=TimestepPlan("t", 0.0, 1000.0))):
        with pytest.raises(ValueError, match=r"expected a sampler's timesteps, found none; .* set_timesteps"):
            one.sampler_share([])


def test_the_heat_map_has_a_cell_for_every_ratio(report: CalibrationReport) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_table(axes, report.table)
    assert [text.get_text() for text in axes.texts] == ["0.1", "0.2", "0.3", "0.4", "0.5", "1.0"]
    assert axes.get_xlabel() == "block"


@pytest.fixture
def full(report: CalibrationReport) -> CalibrationReport:
    """Every field given."""
    return replace(
        report,
        budget_kind="tokens",
        tables={0.6: report.table, 0.4: report.table + 0.05},
        diagnostics=("a: <collapsed> & flat",),
        scores=((-1.0, 1.0, (1, 2, 3)), (0.0, 0.0, (0, 0, 0)), (0.5, 2.0, (5, 0, 1))),
        timestep=TimestepPlan("t", 0.0, 1000.0),
        errors={0.597: 0.01, 0.4: 0.03},
        uniform={1.0: 0.0, 0.5: 0.05},
        tokens=(TokenMap(500.0, (1, 2, 3), {"a": "101010", "c": "111100"}, "ff007fff007f", ("00ff", "80ff")),),
    )


def axes_by_title(report: CalibrationReport) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in report.plot().axes if axes.get_title()}


def test_only_what_there_is_is_drawn(report: CalibrationReport, full: CalibrationReport) -> None:
    assert set(axes_by_title(report)) == {"share of tokens that skip", "while it learned"}
    assert set(axes_by_title(replace(report, history=()))) == {"share of tokens that skip"}
    drawn = {"what saving costs", "router scores", "latents", "all blocks", "a", "c"}
    assert set(axes_by_title(full)) == {"share of tokens that skip", "while it learned"} | drawn


def test_error_is_drawn_against_cost_beside_uniform_ratios(full: CalibrationReport) -> None:
    axes = axes_by_title(full)["what saving costs"]
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert lines["one ratio for all"] == [(0.5, 0.05), (1.0, 0.0)]
    assert lines["calibrated"] == [(0.4, 0.03), (0.597, 0.01), (1.0, 0.0)]
    assert axes.get_xlabel() == "share of the dense tokens"


def test_skipped_tokens_are_tinted_where_they_lie(full: CalibrationReport) -> None:
    """Block a keeps tokens 0, 2 and 4 of a grid of two rows; the picture's lower left corner is grey, all others black or white."""
    axes = axes_by_title(full)
    (image,) = axes["a"].images
    red = torch.as_tensor(image.get_array())[..., 0] > torch.as_tensor(image.get_array())[..., 1] + 1e-4
    wide = replace(full.tokens[0], latents=("000000", "000000"))
    (exact,) = axes_by_title(replace(full, tokens=(wide,)))["a"].images
    tint = torch.as_tensor(exact.get_array())
    assert (tint[..., 0] > tint[..., 1]).tolist() == [[False, True, False], [True, False, True]]
    assert red.shape == (2, 2)
    (passes,) = axes["all blocks"].images
    assert torch.as_tensor(passes.get_array()).flatten().tolist() == pytest.approx([1, 0, 127 / 255, 1, 0, 127 / 255])
    assert axes["a"].get_xlabel() == "50%"


def same(left: CalibrationReport, right: CalibrationReport) -> bool:
    tables = [left.tables, right.tables]
    return (
        left.to_dict() == right.to_dict()
        and left.timestep == right.timestep
        and left.scores == right.scores
        and torch.equal(left.table, right.table)
        and list(tables[0]) == list(tables[1])
        and all(torch.equal(one, tables[1][budget]) for budget, one in tables[0].items())
    )


@pytest.mark.parametrize("name", ["report", "full"])
def test_it_survives_json_and_the_disk(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    report: CalibrationReport = request.getfixturevalue(name)
    assert same(CalibrationReport.from_dict(json.loads(json.dumps(report.to_dict()))), report)
    report.save(tmp_path / "made" / "here")
    found = CalibrationReport.load(tmp_path / "made" / "here")
    assert same(found, report)
    assert str(found) == str(report)
    assert (found.history, found.blocks, found.region_flops) == (report.history, report.blocks, report.region_flops)
    assert sorted(path.name for path in (tmp_path / "made" / "here").iterdir()) == ["report.json", "report.png"]


def test_a_report_that_can_not_be_written_leaves_the_old_one(
    full: CalibrationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_bytes

    def cut_short(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", cut_short)
    with pytest.raises(OSError, match="No space left"):
        replace(full, seconds=1234.0).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_cost_over_a_samplers_steps_is_the_mean_of_its_regions(full: CalibrationReport) -> None:
    assert full.sampler_share([999.0, 750.0, 500.0, 499.9]) == pytest.approx((3 * 394 + 800) / 4 / 1000)
    assert full.sampler_share(torch.tensor([10, 20])) == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"timestep 't' is 1200, outside 0\.\.1000"):
        full.sampler_share([1200.0])


def test_with_reuse_a_sampling_begins_densely(full: CalibrationReport) -> None:
    reused = replace(full, starts_dense=True)
    assert reused.sampler_share([999.0, 750.0, 500.0, 499.9]) == pytest.approx((1000 + 2 * 394 + 800) / 4 / 1000)
    kept = 1 - full.table.mean(dim=1)
    assert full.sampler_tokens([999.0, 499.0]) == pytest.approx(float(kept[1] + kept[0]) / 2)
    assert reused.sampler_tokens([999.0, 499.0]) == pytest.approx((1 + float(kept[0])) / 2)
    assert CalibrationReport.from_dict(reused.to_dict()).starts_dense
    older = {name: value for name, value in full.to_dict().items() if name != "starts_dense"}
    assert not CalibrationReport.from_dict(older).starts_dense
    with pytest.raises(ValueError, match="truth value for starts_dense"):
        CalibrationReport.from_dict({**full.to_dict(), "starts_dense": 1})


def test_without_a_timestep_input_every_step_costs_the_same(report: CalibrationReport) -> None:
    one = replace(report, table=report.table[:1], region_flops=(800,))
    assert one.sampler_share([3.0, 1e9]) == 0.8


@pytest.mark.parametrize("name", ["report", "full"])
def test_notebooks_show_text_and_picture(name: str, request: pytest.FixtureRequest) -> None:
    report: CalibrationReport = request.getfixturevalue(name)
    page = report._repr_html_()
    found = re.search(r'<img [^>]*src="data:image/png;base64,([A-Za-z0-9+/=]+)"', page)
    assert found is not None
    assert base64.b64decode(found[1]).startswith(b"\x89PNG\r\n\x1a\n")
    assert html.escape(str(report)) in page
    assert "<collapsed>" not in page
    assert report._repr_png_().startswith(b"\x89PNG")


HUGE = 10**400
"""More than any float."""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        "[" * 5000,
        '{"type": "diffcr_compile.routing", "version": 1}',
        '{"type": "diffcr_compile.report", "version": 2}',
        '{"type": "diffcr_compile.report", "version": "1"}',
        '{"type": "diffcr_compile.report", "version": 1}',
    ],
)
def test_a_damaged_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"report\.json is damaged or newer than this package"):
        CalibrationReport.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("table", "x"), ("tables", [[0.5]]), ("timestep", [1]), ("scores", [1]), ("unknown", 1)],
        *(
            pytest.param(field, value, id=f"{field} {value!r:.40}")
            for field, value in (
                ("table", None),
                ("history", [3]),
                ("budget", "x"),
                ("budget_kind", "x"),
                ("region_flops", [1]),
                ("errors", [["x", 1.0]]),
                ("errors", [[0.5, HUGE]]),
                ("dense_flops", 0),
                ("dense_flops", float("nan")),
                ("region_flops", [HUGE] * 2),
                ("budget", HUGE),
                ("table", [[HUGE]]),
                ("tables", [[HUGE, [[0.5]]]]),
                ("history", [{"step": 0, "loss": HUGE, "share": 0.5, "phase": "learn"}]),
                ("history", [{"step": 0, "loss": "low", "share": 0.5, "phase": "learn"}]),
                ("scores", [[0.0, HUGE, [1, 2]]]),
                ("tokens", [{}]),
                ("tokens", [vars(TokenMap(None, (1, 1, 3), {"a": "10"}, "ff00ff"))]),
                ("tokens", [vars(TokenMap(None, (1, 1, 2), {"a": "1x"}, "ff00"))]),
                ("tokens", [vars(TokenMap(None, (1, 1, 2), {"a": "10"}, "ff00", ("zz",)))]),
            )
        ),
    ],
)
def test_a_damaged_entry_is_refused(full: CalibrationReport, field: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(full.to_dict() | {field: value}))
    with pytest.raises(ArtefactError, match=r"report\.json is damaged"):
        CalibrationReport.load(tmp_path)


def test_no_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"holds no report; expected the file report\.json"):
        CalibrationReport.load(tmp_path)


def test_save_writes_the_report_of_the_calibration(tmp_path: Path) -> None:
    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model = routed(shape)
    diffcr_compile.save(model, tmp_path / "before")
    with pytest.raises(ArtefactError, match="holds no report"):
        CalibrationReport.load(tmp_path / "before")
    batches = [tiny_inputs(shape, num_tokens=40, seed=seed, timestep=300.0 * seed) for seed in range(4)]
    config = CalibrationConfig(steps=4, trainable="routers")
    report = diffcr_compile.calibrate(model, batches, budget=(0.8, 0.6), config=config)
    diffcr_compile.save(model, tmp_path / "after")
    found = CalibrationReport.load(tmp_path / "after")
    assert same(found, report)
    assert list(found.tables) == [0.8, 0.6]
    assert "as well for budget 60.0%: set_ratios(model, report.tables[0.6])" in str(found)
    # regions of equal width, one step in each: the mean of the rows
    assert found.sampler_share([100.0, 300.0, 600.0, 900.0]) == pytest.approx(found.share)
    found.plot()


def test_with_reuse_the_share_is_that_of_a_sampling() -> None:
    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model, steps = original(shape), (950.0, 700.0, 400.0, 100.0)
    config = diffcr_compile.DiffCRConfig(skip="reuse")
    batches = [tiny_inputs(shape, num_tokens=40, timestep=step) for step in steps]
    diffcr_compile.transform(model, config, example_inputs=batches[0])
    free = CalibrationConfig(preset="training-free", steps=0)
    report = diffcr_compile.calibrate(model, batches, budget=0.6, config=free)
    counted = [reference_flops(functools.partial(model, **batch)) for batch in batches]
    assert counted[0] > max(counted[1:])
    assert report.sampler_share(steps) == pytest.approx(sum(counted) / 4 / counted[0], rel=1e-3)


def test_sampler_share_is_that_of_the_forwards(tmp_path: Path) -> None:
    """FLOPs counted by torch in forwards at each timestep."""
    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model, steps = routed(shape), (950.0, 600.0, 580.0, 20.0)
    batches = [tiny_inputs(shape, num_tokens=40, seed=place, timestep=step) for place, step in enumerate(steps)]
    config = CalibrationConfig(steps=4, trainable="routers")
    report = diffcr_compile.calibrate(model, batches, budget=0.6, config=config)
    plain = original(shape)
    counted = [reference_flops(functools.partial(model, **batch)) for batch in batches]
    dense = reference_flops(functools.partial(plain, **batches[0]))
    assert report.sampler_share(steps) == pytest.approx(sum(counted) / 4 / dense, rel=1e-6)
