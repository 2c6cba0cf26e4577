"""What the benchmarks of time make of what they measured: rounds in turn, records that are gone on with, sentences that count."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import pytest
import speed
import timing
from speed import Case

HERE = {"device": "CPU", "threads": 2, "torch": "2"}


def options(folder: Path | None, **others: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"quick": False, "again": False, "out": folder, **others})


def row(efficiency: float, mode: str = "lowered") -> dict[str, Any]:
    spread = [1.0, 2.0, 3.0]
    measured = {"dense_ms": spread, "routed_ms": spread, "speedup": spread, "promised": 2.0, "rounds": 5}
    return {"mode": mode, "ratio": 0.5, "efficiency": efficiency, **measured}


def entry(case: Case, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"case": vars(case), "command": "python speed.py", "machine": HERE, "load": 0.5, "rows": list(rows)}


class TestMeasureInTurn:
    def test_every_round_makes_every_call_after_what_comes_before_it(self) -> None:
        made: list[str] = []
        calls = {
            name: (lambda name=name: made.append(f"before {name}"), lambda name=name: made.append(name))
            for name in "ab"
        }
        times = timing.measure_in_turn(calls, timing.Rounds(3, 3, 0.0, warmup=1))
        assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
        assert made[:8] == ["before a", "a", "before b", "b", "before b", "b", "before a", "a"]
        assert len(made) == 2 * 2 * (3 + 1)

    @pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (100.0, 7)])
    def test_rounds_end_with_the_time_but_not_before_the_fewest(self, seconds: float, rounds: int) -> None:
        times = timing.measure_in_turn({"a": (int, int)}, timing.Rounds(5, 7, seconds))
        assert len(times["a"]) == rounds


def test_a_grid_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what another machine measured is measured anew."""
    cases = [Case("S", 4, tokens, 1) for tokens in (256, 1024)]
    measured: list[str] = []
    monkeypatch.setitem(speed.SECTIONS, "grid", ("Grid", cases, timing.Rounds()))
    monkeypatch.setattr(speed, "measure", lambda case, rounds: [measured.append(case.name) or row(1.0)])
    monkeypatch.setattr(speed, "machine", lambda: HERE)

    def go(count: int, **others: Any) -> list[str]:
        measured.clear()
        for record in itertools.islice(speed.run("grid", options(tmp_path, **others)), count):
            timing.write_record(tmp_path / "speed.json", record, speed.format_markdown(record))
        return list(measured)

    first, second = (case.name for case in cases)
    assert go(1) == [first]
    assert go(2) == [second]
    assert go(2) == []
    assert go(2, again=True) == [first, second]
    monkeypatch.setattr(speed, "machine", lambda: {**HERE, "threads": 1})
    assert go(2) == [first, second]
    assert "1 threads" in (tmp_path / "speed.md").read_text()


def test_the_summary_counts_and_names_what_misses_the_aim() -> None:
    cases = [entry(Case("S", 4, 256, 1), row(0.91), row(0.89)), entry(Case("XL", 2, 1024, 8), row(0.94, "eager"))]
    text = speed.summarise(cases)
    assert "0 of 1 eager, 1 of 2 lowered" in text
    assert text.endswith(
        "Below it: S 256 tokens, batch 1, float32, lowered, 0.5: 0.89; XL 1024 tokens, batch 8, float32, eager, 0.5: 0.94."
    )


def test_the_grid_holds_every_setting_once() -> None:
    settings = {(case.shape, case.tokens, case.batch, case.dtype) for case in speed.GRID}
    assert settings == set(itertools.product(("S", "XL"), (256, 1024), (1, 2, 8), ("float32", "bfloat16")))
    assert len(speed.GRID) == len(settings)
    assert {(case.modes, case.ratios) for case in speed.GRID} == {(("eager", "lowered"), (0.25, 0.5, 0.75))}
