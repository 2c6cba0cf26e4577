"""Compatibility: what routing holds together with, row by row and model by model, from the tests in ``tests/compatibility``.

    python examples/benchmarks/compatibility.py [--write] [PYTEST ARGUMENT ...]     # an hour on a core

Each cell is a test that compares numbers. ``--write`` renews ``compatibility.md`` and its raw ``compatibility.json``, or in
them the cells that ran; further arguments go to pytest (``-k lora``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "compatibility"
RECORD = Path(__file__).with_suffix(".md")
SUBJECTS = {
    1: "whole graphs",
    2: "regional compilation, CUDA graphs",
    3: "export",
    4: "LoRA (peft)",
    5: "quantisation (torchao)",
    6: "guidance and steps",
    7: "offload, casting, checkpointing, copies",
    8: "several processes (DDP, FSDP2)",
    9: "caches, repeated blocks",
    10: "residuals and image prompts",
    11: "other structures",
    12: "skip='reuse', with keys and values from all tokens",
}


@dataclass(frozen=True)
class Outcome:
    """What a cell says, and why where it does not work."""

    verdict: str
    reason: str = ""


Cells = dict[tuple[int, str], dict[str, Outcome]]
"""Outcomes by (row, title) and model."""


@dataclass
class Collector:
    """A pytest plugin: the outcome of every cell, by (row, title) and model. places: of all tests by their ids, whether they run or
    not."""

    cells: Cells = field(default_factory=dict)
    places: dict[str, tuple[tuple[int, str], str]] = field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            place = item.function.matrix
            self.places[item.nodeid] = ((place.row, place.title), item.callspec.params["name"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            line, model = self.places[report.nodeid]
            self.cells.setdefault(line, {})[model] = outcome_of(report)


def outcome_of(report: pytest.TestReport) -> Outcome:
    """works, refused (by a typed error), does not work yet (a known defect), not applicable, not run, or FAILED."""
    refusals = [str(value) for key, value in report.user_properties if key == "refused"]
    known = getattr(report, "wasxfail", "")
    if report.outcome == "skipped" and known:
        return Outcome("not yet", known.removeprefix("reason: "))
    if report.outcome == "skipped":
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        applicable, _, why = reason.partition("not applicable: ")
        return Outcome("not run", applicable) if applicable else Outcome("n/a", why)
    if report.outcome == "failed":
        return Outcome("FAILED")
    return Outcome("refused", f"{refusals[0]}, naming the way out") if refusals else Outcome("works")


def as_markdown(cells: Cells) -> str:
    """The tables: one of the five models, one of each line that has other columns; reasons below."""
    outcomes = [outcome for line in cells.values() for outcome in line.values()]
    counts = {
        verdict: sum(one.verdict == verdict for one in outcomes)
        for verdict in dict.fromkeys(o.verdict for o in outcomes)
    }
    reasons: dict[str, int] = {}
    main = ("dit", "pixart", "sd3", "flux", "wan")
    lines = [
        "# What routing works together with",
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f", of {len(outcomes)} cells.",
        "",
        f"Made by `python examples/benchmarks/compatibility.py --write` with torch {torch.__version__}: diffusers' classes, tiny, "
        "random weights, float32, batch 3, half of the tokens skipped unless a line says otherwise. Each cell is a test of "
        "`tests/compatibility` that compares outputs with the routed eager model's (to the bit where nothing changes numerics), "
        "and sees that tokens are skipped: by those kept and torch's count of FLOPs, or, of compiled code, by outputs that are no "
        "dense ones. Quantised: at most 1.5 times as far from the unquantised as the dense model is (float8, whose errors change "
        "which tokens are kept, block by block; with float8 activations 2.1 times: keys and values have errors of their own, and "
        "attention takes the mean of half as many), and lowered within 1e-5 of eager (int8 activations: 1.5 times what "
        "compiling changes of the dense model). Offload is to and from the CPU. Order: transform, adapters and quantisation "
        "before it or after, lower, then wrappers, hooks and sharding. Refused: a typed error that says what to do. "
        "Not yet: a known defect. Empty: not tried.",
    ]
    own = [line for line in sorted(cells) if not set(cells[line]) <= set(main)]
    _table(lines, [line for line in sorted(cells) if line not in own], main, cells, reasons)
    for line in own:
        _table(lines, [line], tuple(cells[line]), cells, reasons)
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines) + "\n"


def _table(
    lines: list[str],
    rows: list[tuple[int, str]],
    models: tuple[str, ...],
    cells: Cells,
    reasons: dict[str, int],
) -> None:
    lines += ["", "| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    before = None
    for line in rows:
        if line[0] != before:
            before = line[0]
            lines.append(f"| **{SUBJECTS[before]}** |" + " |" * len(models))
        found = []
        for model in models:
            outcome = cells[line].get(model, Outcome(""))
            note = f" ({reasons.setdefault(outcome.reason, len(reasons) + 1)})" if outcome.reason else ""
            found.append(outcome.verdict + note)
        lines.append(f"| {line[1]} | " + " | ".join(found) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"renew {RECORD.name}")
    arguments, rest = parser.parse_known_args()
    collector = Collector()
    os.environ.setdefault("HYPOTHESIS_PROFILE", "nightly")  # leaves no cell out for its time
    status = pytest.main(
        ["-q", f"--rootdir={ROOT}", f"-c={ROOT / 'pyproject.toml'}", str(TESTS), *rest], plugins=[collector]
    )
    if arguments.write:
        cells = merge(collector)
        RECORD.write_text(as_markdown(cells))
    print(as_markdown(collector.cells))
    sys.exit(status)


def merge(collector: Collector) -> Cells:
    """The cells of the record that are still tests, with those that ran in their places; the record is renewed."""
    record = RECORD.with_suffix(".json")
    known = json.loads(record.read_text()) if record.exists() else []
    places = set(collector.places.values())
    merged: Cells = {}
    for row, title, model, verdict, reason in known:
        if ((row, title), model) in places:
            merged.setdefault((row, title), {})[model] = Outcome(verdict, reason)
    for line, outcomes in collector.cells.items():
        merged[line] = {**merged.get(line, {}), **outcomes}
    flat = [[*line, model, one.verdict, one.reason] for line in sorted(merged) for model, one in merged[line].items()]
    record.write_text("[\n" + ",\n".join(map(json.dumps, flat)) + "\n]\n")
    return merged


if __name__ == "__main__":
    main()
