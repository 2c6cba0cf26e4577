"""What every test needs before it is imported: the package, one thread, torchvision's operators, hypothesis profiles, golden
files."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
logging.getLogger("torch.__trace").disabled = True  # thousands of records for a test that fails


def _import_package() -> None:
    """Import the package before this folder, on sys.path for ``models``, can hide it: its folder ``diffcr_compile`` would come
    as a namespace package before the finder of an editable install is asked."""
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != Path(__file__).parent]
    importlib.import_module("diffcr_compile")
    sys.path[:] = path


_import_package()
_torchvision = importlib.import_module("torchvision_operators").define()

_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
settings.register_profile("ci", _PATIENT, derandomize=True, max_examples=20)
settings.register_profile("nightly", _PATIENT, max_examples=int(os.environ.get("HYPOTHESIS_CASES", "300")))
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(_PROFILE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write the golden files anew instead of comparing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what is for the night out of every other profile."""
    if _PROFILE != "nightly":
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly")])
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares ``text`` with the file ``golden/name.txt`` beside the test, or writes it anew."""
    folder = request.path.parent / "golden"
    renew = request.config.getoption("--renew-golden")

    def check(name: str, text: str) -> None:
        file = folder / f"{name}.txt"
        if renew:
            folder.mkdir(exist_ok=True)
            file.write_text(text)
        assert text == file.read_text(), f"{file} differs; look at the change, then run pytest --renew-golden"

    return check


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A device mesh of this process alone."""
    distributed = importlib.import_module("torch.distributed")  # seconds, for the few tests that ask
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield importlib.import_module("torch.distributed.device_mesh").init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()
