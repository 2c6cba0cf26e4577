"""Pages and pictures of the quality records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quality_tables
from quality_tables import Settings

RECORDS = sorted(Path(quality_tables.__file__).parent.glob("quality*.json"))


def cell(method: str, budget: float, seed: int, moved: float, **others: Any) -> dict[str, Any]:
    measured = {"share": budget, "time": None, "frechet": 700.0, "accuracy": 0.5, "inside": None, "seconds": 3.0}
    return {"method": method, "budget": budget, "seed": seed, "moved": moved, **measured, **others}


CELLS = [
    cell("dense, trained on", 1.0, 0, 0.03),
    cell("worse", 0.5, 0, 0.2),
    cell("ours (default)", 0.5, 0, 0.1, table=[[0.0, 0.5]]),
    cell("ours (default)", 0.5, 1, 0.12, table=[[0.2, 0.7]], frechet=720.0),
]
RECORD = {
    "torch": "2.13",
    "commands": ["python quality.py", "python quality.py --seeds 1"],
    "settings": {"model": "digits", "training_steps": 80, "samples": 40, "guidance": 2.0},
    "cells": {str(place): each for place, each in enumerate(CELLS)},
}


def test_the_least_moved_come_first_with_their_spread_and_without_columns_of_nothing() -> None:
    page = quality_tables.as_markdown(RECORD, "quality.png").splitlines()
    assert page[-4:] == ["```", "python quality.py", "python quality.py --seeds 1", "```"]
    assert "guidance 2 in one call" in page[2]
    headings = [line for line in page if line.startswith("## ")]
    assert headings == ["## FLOPs share 1", "## FLOPs share 0.5", "## Commands"]
    assert "| method | seeds | share | moved | Fréchet | accuracy | seconds |" in page
    assert page[-9:-7] == [
        "| ours (default) | 2 | 0.500 | 0.11 ± 0.01 | 710 ± 10 | 50% | 3 |",
        "| worse | 1 | 0.500 | 0.2 | 700 | 50% | 3 |",
    ]


@pytest.mark.parametrize("timed", [False, True])
def test_a_record_is_written_as_a_page_and_a_picture(timed: bool, tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    cells = {key: {**each, "time": 0.6 if timed else None} for key, each in RECORD["cells"].items()}  # type: ignore[attr-defined]
    file.write_text(json.dumps({**RECORD, "cells": cells}))
    quality_tables.write(file)
    assert ("| time |" in (tmp_path / "quality.md").read_text()) == timed
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_settings_of_a_sampler_and_in_words() -> None:
    settings = Settings("captions", 80, 40, guidance=3.0, two_calls=True)
    assert settings.sampling == {"guidance": 3.0, "two_calls": True}
    assert str(settings).endswith("40 samples, 20 DDIM steps, guidance 3 in two calls")
    assert str(Settings("digits", 80, 40)).endswith("no guidance")


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_every_page_in_the_tree_says_what_its_record_holds(file: Path) -> None:
    page = quality_tables.as_markdown(json.loads(file.read_text()), file.with_suffix(".png").name)
    assert file.with_suffix(".md").read_text() == page
    assert file.with_suffix(".png").exists()
