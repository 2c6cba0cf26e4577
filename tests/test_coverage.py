"""``examples/benchmarks/coverage.md`` is whole, and what it says of some classes is what the command finds today."""

from __future__ import annotations

from pathlib import Path

import coverage as table
import pytest
from zoo import LEFT_OUT, ZOO

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

TEXT = (Path(table.__file__).parent / "coverage.md").read_text()
ROWS = {line.split(" | ")[0].removeprefix("| "): line for line in TEXT.splitlines() if line.startswith("| ")}
CHECKED = ("DiTTransformer2DModel", "AuraFlowTransformer2DModel", "SanaTransformer2DModel", "Lumina2Transformer2DModel")
"""Classes run again: one direct, one joint, one by its branches, one with text and image in one stream."""


def test_every_class_of_the_zoo_has_its_row() -> None:
    assert set(ROWS) - {"class"} == set(ZOO)
    assert all(f"- {name}:" in TEXT for name in LEFT_OUT)


def test_no_check_failed() -> None:
    assert "Failed checks: 0." in TEXT


def test_a_handful_is_refused_and_each_says_why() -> None:
    refused = {name: row for name, row in ROWS.items() if "refused:" in row}
    assert len(refused) <= 6
    assert all(len(row.partition("refused:")[2].strip(" |")) > 20 for row in refused.values())


@pytest.mark.parametrize("name", CHECKED)
def test_the_row_is_what_the_command_finds(name: str) -> None:
    found = table.check(ZOO[name], compile_too=False)
    assert not found.failures
    cells = [cell.strip() for cell in ROWS[name].strip("| ").split(" | ")]
    assert cells[1] == ", ".join(found.families)
    assert cells[2] == ", ".join(dict.fromkeys(found.lifts))
    assert cells[7] == found.context
