"""The house: wheel contents, import direction, a lean import, no model named, no global state changed."""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from models import Shape, original, tiny_inputs
from zoo import LEFT_OUT, ZOO

import diffcr_compile

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "diffcr_compile": "diffcr_compile",
    "diffcr_compile.passes": "passes",
    "diffcr_compile.calibration": "calibrate",
}
MAY_IMPORT_PASSES = {"transform.py", "__init__.py"}
"""Files of ``diffcr_compile`` that put the folders together; all others run without passes and calibration."""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


ALL_SOURCES = [path for folder in FOLDERS.values() for path in sources(folder)]


def imported_modules(path: Path, package: str) -> set[str]:
    """Absolute names of everything that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def test_packages_are_the_folders() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(options["packages"]) == sorted(FOLDERS)
    assert options["package-dir"] == FOLDERS
    assert all((ROOT / folder / "__init__.py").is_file() for folder in FOLDERS.values())
    assert [path for folder in FOLDERS.values() for path in (ROOT / folder).iterdir() if path.is_dir()] == [
        path for folder in FOLDERS.values() for path in (ROOT / folder).glob("__pycache__")
    ]


def test_every_test_file_has_its_source() -> None:
    tests = [path for folder in FOLDERS.values() for path in (ROOT / "tests" / folder).glob("test_*.py")]
    assert tests
    assert [path.name for path in tests if not (ROOT / path.parent.name / path.name[len("test_") :]).is_file()] == []


@pytest.mark.slow
def test_the_wheel_holds_one_package_and_every_file(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(tree),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    expected = {
        f"{package.replace('.', '/')}/{path.name}" for package, folder in FOLDERS.items() for path in sources(folder)
    }
    typed = {"diffcr_compile/py.typed"} if (ROOT / "diffcr_compile" / "py.typed").is_file() else set()
    assert names - info == expected | typed
    assert {name.split("/")[0] for name in names - info} == {"diffcr_compile"}
    assert any(name.endswith("LICENSE") for name in info)


@pytest.mark.parametrize("path", sources("passes"), ids=lambda path: path.name)
def test_passes_know_nothing_of_calibration(path: Path) -> None:
    names = imported_modules(path, "diffcr_compile.passes")
    assert [name for name in names if name.startswith(("diffcr_compile.calibration", "calibrate"))] == []


@pytest.mark.parametrize("path", sources("calibrate"), ids=lambda path: path.name)
def test_calibration_knows_nothing_of_passes(path: Path) -> None:
    names = imported_modules(path, "diffcr_compile.calibration")
    assert [
        name for name in names if name.startswith(("diffcr_compile.passes", "diffcr_compile.transform", "passes"))
    ] == []


@pytest.mark.parametrize("path", sources("diffcr_compile"), ids=lambda path: path.name)
def test_the_run_time_imports_neither(path: Path) -> None:
    names = imported_modules(path, "diffcr_compile")
    upward = [name for name in names if name.startswith(("diffcr_compile.passes", "diffcr_compile.calibration"))]
    assert upward == [] or path.name in MAY_IMPORT_PASSES


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``code`` in a fresh interpreter, without what pytest put on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_import_is_lean(tmp_path: Path) -> None:
    code = """
import sys, torch, random
before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled()
import diffcr_compile
assert torch.equal(torch.get_rng_state(), before[0])
assert (random.getstate(), torch.get_default_dtype(), torch.is_grad_enabled()) == before[1:]
heavy = ("diffusers", "timm", "torchao", "matplotlib", "peft", "transformers", "accelerate", "torchvision", "triton")
print([name for name in heavy if name in sys.modules], torch.cuda.is_initialized())
"""
    finished = run_python(code, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split("\n")[-2] == "[] False"


@pytest.mark.parametrize("folder", ["passes", "calibrate"])
def test_a_bare_import_of_a_folder_fails(folder: str) -> None:
    finished = run_python(f"import {folder}.{'blocks' if folder == 'passes' else 'train'}", ROOT)
    assert finished.returncode != 0
    assert "ImportError" in finished.stderr


@pytest.mark.parametrize("path", ALL_SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_model_is_named(path: Path) -> None:
    text = path.read_text()
    classes = {*ZOO, *LEFT_OUT}
    assert [name for name in classes if name in text] == []
    families = (
        r"\b(flux|pixart|sd3|wan2?|sana|hunyuan\w*|qwen\w*|cogview\w*|lumina\w*|chroma|omnigen\w*|mochi|cosmos)\b"
    )
    assert re.findall(families, text, re.IGNORECASE) == []
    assert re.findall(r"^\s*(?:from|import) (?:diffusers|timm)\b", text, re.MULTILINE) == []
    assert re.findall(r"\b\w*Transformer\w*Block\b|\bDiTBlock\b|\bJointTransformer\w*", text) == []


def test_the_public_list_is_what_the_design_names() -> None:
    verbs = {
        "transform",
        "explain",
        "calibrate",
        "lower",
        "set_ratios",
        "ratios",
        "cost",
        "record",
        "trace",
        "learning",
    }
    assert verbs | {"budget_loss", "save", "load", "restore"} <= set(diffcr_compile.__all__)
    assert [name for name in diffcr_compile.__all__ if not getattr(diffcr_compile, name).__doc__] == []


def global_state() -> dict[str, Any]:
    """What a library must leave alone."""
    import torch._dynamo.config
    import torch._inductor.config

    return {
        "rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
        "numpy rng": numpy.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "sdp": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "dynamo": torch._dynamo.config.get_config_copy(),
        "inductor": torch._inductor.config.get_config_copy(),
        "cuda": torch.cuda.is_initialized(),
    }


@pytest.mark.filterwarnings("ignore:the routers are untrained")
def test_no_global_state_is_changed() -> None:
    shape = Shape("rotary", depth=2, heads=1, head_dim=6)
    model, inputs = original(shape), tiny_inputs(shape)
    torch.manual_seed(11)
    before = global_state()
    diffcr_compile.transform(model, example_inputs=inputs)
    assert global_state() == before
    diffcr_compile.set_ratios(model, 0.5)
    with diffcr_compile.learning(model):
        model(**inputs).sum().backward()
    diffcr_compile.cost(model)
    diffcr_compile.calibrate(model, [inputs], budget=0.7, config=diffcr_compile.CalibrationConfig(steps=3))
    diffcr_compile.lower(model)
    diffcr_compile.restore(model)
    assert global_state() == before
