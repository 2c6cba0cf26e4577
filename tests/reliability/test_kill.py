"""``save`` is killed: what lies at its target afterwards is one routing, whole, and the next ``save`` works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reliability.save_and_kill import Case
from reliability.support import cases

SCRIPT = Path(__file__).with_name("save_and_kill.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Case]]:
    """What was found after every kill, by how it was done; all by one process."""
    folder = tmp_path_factory.mktemp("kill") / "routing"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), str(folder), str(cases(8, 50)), str(cases(20, 300))]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return {how: [Case(**case) for case in listed] for how, listed in json.loads(finished.stdout).items()}


def test_killed_at_random_a_save_leaves_nothing_half_written(
    found: dict[str, list[Case]], record_property: Callable[[str, object], None]
) -> None:
    record_property("kills", len(found["random"]))
    assert len(found["random"]) == cases(8, 50)
    assert {case.found for case in found["random"]} <= {"first", "second"}


def test_killed_anywhere_a_save_leaves_nothing_half_written(
    found: dict[str, list[Case]], record_property: Callable[[str, object], None]
) -> None:
    record_property("kills", len(found["everywhere"]) - 1)  # the last one ended by itself
    outcomes = [case.found for case in found["everywhere"]]
    assert set(outcomes) <= {"first", "second"}
    assert outcomes[0] == "first"
    assert outcomes[-1] == "second"
    assert len(outcomes) > 6  # files and folders made, written, moved and removed


def test_what_a_killed_save_leaves_behind_does_not_hinder_the_next(found: dict[str, list[Case]]) -> None:
    assert {case.mended for case in (*found["random"], *found["everywhere"])} == {"first"}


def test_saves_to_one_place_at_once_leave_one_of_them(found: dict[str, list[Case]]) -> None:
    (case,) = found["together"]
    assert case.found in ("first", "second")
    assert case.mended == "first"
