"""Reliability, counted: property cases, kills and damaged files, from the tests at their nightly size.

    nice python examples/benchmarks/reliability.py [--free] [--cases N]

The laws are drawn 300 times each, over the seven structures of ``tests/test_laws.py``; ``--free`` draws the structures too, each
of which is transformed. Writes ``reliability.md`` beside it, but for another number of ``--cases``; the exit code is that of the
tests.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_suffix(".md")
CASES = 300
RELIABILITY, CHECKPOINTS = "tests/reliability", "tests/calibrate/test_checkpoint.py"


@dataclass(frozen=True)
class Line:
    """One line of the table. tests: arguments of pytest; structures: whether ``HYPOTHESIS_PROFILE`` is nightly, which draws
    more structures, and not only more cases; counts: what is shown of what the tests noted."""

    title: str
    tests: tuple[str, ...]
    counts: tuple[str, ...]
    structures: bool = True


LAWS = Line(
    "laws of `tests/test_laws.py`, structures of a pool", ("tests/test_laws.py",), ("property cases",), structures=False
)
LINES = (
    Line("the same, wider models, mixed timesteps", (f"{RELIABILITY}/test_generated.py",), ("property cases",)),
    Line(
        "the laws with reuse, over trajectories", ("tests/test_reuse_laws.py",), ("property cases",), structures=False
    ),
    Line("`save` killed (SIGKILL)", (f"{RELIABILITY}/test_kill.py",), ("kills",)),
    Line("`calibrate` killed, then gone on with", (CHECKPOINTS, "-k", "killed"), ("kills",)),
    Line("damaged routings, to `load`", (f"{RELIABILITY}/test_artefact_fuzz.py",), ("refused", "loaded")),
    Line("damaged checkpoints", (CHECKPOINTS, "-k", "flipped"), ("refused", "read the same")),
)


def run(line: Line, cases: int) -> tuple[Counter[str], int]:
    """What the tests of a line counted (``passed``, ``failed`` and ``skipped`` among it), and pytest's exit code."""
    environment = {key: value for key, value in os.environ.items() if key != "HYPOTHESIS_PROFILE"}
    environment["HYPOTHESIS_CASES"] = str(cases)
    if line.structures:
        environment["HYPOTHESIS_PROFILE"] = "nightly"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "--hypothesis-profile=nightly", f"--junit-xml={report}", "-o", "junit_family=xunit1"]
        command = [sys.executable, "-m", "pytest", *options, *line.tests]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        return read_counts(report), status


def read_counts(report: Path) -> Counter[str]:
    """Sums over a report in JUnit's format: of outcomes, of numbers that tests noted, and of hypothesis' cases."""
    counts: Counter[str] = Counter()
    root = ElementTree.parse(report).getroot()
    for test in root.iter("testcase"):
        kinds = {child.tag for child in test}
        counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    for noted in root.iter("property"):
        name, value = noted.attrib["name"], noted.attrib["value"]
        if name.startswith("hypothesis-statistics-"):
            found = re.findall(r"(\d+) passing, (\d+) failing", base64.b64decode(value).decode())
            counts["property cases"] += sum(int(number) for pair in found for number in pair)
        elif value.isdecimal():
            counts[name] += int(value)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--free", action="store_true", help="draw the structures of the laws too")
    parser.add_argument("--cases", type=int, default=CASES, help="of each property")
    options = parser.parse_args()
    laws = Line("laws of `tests/test_laws.py`, structures drawn", LAWS.tests, LAWS.counts) if options.free else LAWS
    rows, statuses = [], []
    for line in (laws, *LINES):
        start = time.perf_counter()
        counts, status = run(line, options.cases)
        statuses.append(status)
        shown = ", ".join(f"{counts[name]:,} {name}" for name in line.counts)
        rows.append(
            f"| {line.title} | {counts['passed']} passed, {counts['failed']} failed | {shown} | {time.perf_counter() - start:.0f} |"
        )
    text = "\n".join(
        [
            "# How hard it was tried",
            "",
            f"`python examples/benchmarks/reliability.py{' --free' if options.free else ''}`, torch {torch.__version__}, CPU. A "
            "case passes where its law holds; a kill where one whole routing is left and the next call works, or the calibration "
            "ends to the bit as one that nobody killed; damage where it is refused by a typed error with the model left alone. "
            "What loads is compared with what was saved, except where a value of the record was made another, checksum and all.",
            "",
            "| | tests | counted | seconds |",
            "|---|---|---|---|",
            *rows,
        ]
    )
    if options.cases == CASES:
        RECORD.write_text(text + "\n")
    print(text)
    sys.exit(max(statuses))


if __name__ == "__main__":
    main()
