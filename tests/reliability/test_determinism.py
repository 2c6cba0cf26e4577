"""The same input gives the same bits: run to run, model to model, process to process, eager and lowered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("run_and_digest.py")


@pytest.fixture(scope="module")
def processes() -> list[dict[str, list[str]]]:
    """What two processes found side by side, which hash strings differently and lower without a cache of graphs."""
    running = []
    for seed in ("1", "2"):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"PYTHONHASHSEED": seed, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        command = [sys.executable, str(SCRIPT)]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    found = []
    for process in running:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
        found.append(json.loads(output))
    return found


def test_two_runs_give_the_same_bits(processes: list[dict[str, list[str]]]) -> None:
    for first, second in (pair for found in processes for pair in found.values()):
        assert first == second


@pytest.mark.parametrize("case", ["dense", "identity", "reuse", "lowered", "lowered, reuse", "two threads"])
def test_two_processes_give_the_same_bits(processes: list[dict[str, list[str]]], case: str) -> None:
    first, second = processes
    assert first[case] == second[case]


def test_the_cases_are_different_ones(processes: list[dict[str, list[str]]]) -> None:
    digests = [pair[0] for pair in processes[0].values()]
    assert len(set(digests)) == len(digests)
