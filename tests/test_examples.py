"""Each numbered example runs alone, in an empty folder, and prints numbers that hold; and what the examples had to go around."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Shape, original, relative_error, tiny_inputs

import diffcr_compile
from diffcr_compile import DiffCRConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("0*.py"))
LONGEST = 79  # lines
ARGUMENTS = {"04_training_free": ["--steps", "6"], "06_lower": ["--backend", "aot_eager"]}
BUDGETED = {"04_training_free": 3, "03_your_own_dit": 2}
"""How many shares a script prints with their budgets, where not one."""

SHIM = f"""
import runpy, sys
sys.path.insert(0, {str(EXAMPLES / "benchmarks")!r})
import torchvision_operators
library = torchvision_operators.define()
sys.path[0] = {str(EXAMPLES)!r}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script as ``python SCRIPT`` does, where torchvision needs mending."""


def run_example(name: str, folder: Path, launcher: tuple[str, ...] = ()) -> str:
    """What the script prints, run in ``folder``."""
    shim = folder / "shim.py"
    shim.write_text(SHIM)
    command = [sys.executable, *launcher, str(shim), str(EXAMPLES / f"{name}.py"), *ARGUMENTS.get(name, [])]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def shares(printed: str) -> list[tuple[float, float]]:
    """Every share that is printed with its budget."""
    return [(float(a), float(b)) for a, b in re.findall(r"share[^\n(]*?(\d\.\d+) \(budget (\d\.\d+)\)", printed)]


def numbers(pattern: str, printed: str) -> list[float]:
    return [float(value) for value in re.findall(pattern + r"\s*([\d.]+(?:e[-+]\d+)?)", printed)]


def check_quick_start(printed: str) -> None:
    routed, fewer, restored = numbers(r"distance from the dense pictures, [\w ]+:", printed)
    assert restored == 0 < routed < fewer


def check_pipeline(printed: str) -> None:
    assert "picture: 64x64 pixels" in printed
    assert 0 < numbers("mean squared difference from the dense picture:", printed)[0] < 0.01


def check_your_own_dit(printed: str) -> None:
    ours, yours = numbers("distance from dense", printed)
    assert 0 < ours < 0.1
    assert 0.67 < ours / yours < 1.5  # like results
    assert printed.count("[") == 2 * (1 + 4)  # two tables of four regions


def check_training_free(printed: str) -> None:
    distances = numbers("distance from the dense pictures", printed)
    assert distances == sorted(distances)
    assert len(distances) == 3
    assert "report.json report.png" in printed


def check_lora(printed: str) -> None:
    assert printed.count("process 0 of 1") == 1
    assert "routing weights.safetensors" in printed


def check_lower(printed: str) -> None:
    errors = numbers("largest difference from eager", printed)
    assert len(errors) == 2
    assert max(errors) < 1e-5  # what lower promises


def check_quantise_and_cache(printed: str) -> None:
    routed, quantised, cached = numbers("block calls", printed)
    assert routed == quantised == 64 > cached
    assert min(numbers("distance from dense", printed)) > 0


def check_your_own_pass(printed: str) -> None:
    (routed,) = re.findall(r"routed: (.*)", printed)
    (dense,) = re.findall(r"stay dense: (.*)", printed)
    assert routed.split(", ") == [f"transformer_blocks.{index}" for index in range(1, 8)]
    assert dense.startswith("transformer_blocks.0 ")


def check_inpainting(printed: str) -> None:
    inside, outside = numbers("error inside the mask", printed), numbers("outside", printed)
    assert len(inside) == len(outside) == 2
    assert all(hidden > seen > 0 for hidden, seen in zip(inside, outside, strict=True))


CHECKS = {
    "01_quick_start": check_quick_start,
    "02_pipeline": check_pipeline,
    "03_your_own_dit": check_your_own_dit,
    "04_training_free": check_training_free,
    "05_lora_on_several_devices": check_lora,
    "06_lower": check_lower,
    "07_quantise_and_cache": check_quantise_and_cache,
    "08_your_own_pass": check_your_own_pass,
    "09_inpainting": check_inpainting,
}


def test_every_example_is_checked() -> None:
    assert [path.stem for path in SCRIPTS] == sorted(CHECKS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_an_example_runs_alone(name: str, tmp_path: Path) -> None:
    printed = run_example(name, tmp_path)
    found = shares(printed)
    assert len(found) == BUDGETED.get(name, 1), printed
    assert all(0 < share <= budget for share, budget in found), printed
    CHECKS[name](printed)


@pytest.mark.slow
def test_two_processes_end_with_one_table(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run_example("05_lora_on_several_devices", tmp_path, launcher)
    assert sorted(re.findall(r"process (\d) of 2", printed)) == ["0", "1"]
    assert len(set(re.findall(r"share .*", printed))) == 1, printed
    assert all(0 < share <= budget for share, budget in shares(printed))
    assert (tmp_path / "out" / "lora" / "routing" / "routing.json").is_file()


JOINT = Shape("joint")


def test_reuse_needs_no_example_inputs() -> None:
    model, inputs = original(Shape("plain")), tiny_inputs(Shape("plain"))
    diffcr_compile.transform(model, DiffCRConfig(skip="reuse"))
    with diffcr_compile.record(model) as batches, torch.no_grad():
        model(**inputs)
    assert len(batches) == 1


def test_full_context_costs_less_than_dense_in_joint_blocks() -> None:
    model, inputs = original(JOINT), tiny_inputs(JOINT, num_tokens=64)
    diffcr_compile.transform(model, DiffCRConfig(skip="reuse"), example_inputs=inputs)
    diffcr_compile.set_ratios(model, 0.25)
    assert diffcr_compile.cost(model).share < 1


def test_a_table_is_found_where_skipping_few_tokens_costs_more() -> None:
    batches = [tiny_inputs(JOINT, num_tokens=64, timestep=float(step)) for step in range(950, 0, -100)]
    model = diffcr_compile.transform(original(JOINT), DiffCRConfig(skip="reuse"), example_inputs=batches[0])
    assert diffcr_compile.calibrate(model, batches, budget=0.7).share <= 0.7


def test_blocks_quantised_later_keep_full_context() -> None:
    """Their graph, written anew, finds the plain tensors of quantised weights on the modules."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    shape = Shape("plain")
    model = diffcr_compile.transform(original(shape), DiffCRConfig(skip="reuse"), example_inputs=tiny_inputs(shape))
    diffcr_compile.set_ratios(model, 0.5)
    plain = original(shape)
    steps = [tiny_inputs(shape, timestep=timestep) for timestep in (900.0, 600.0, 300.0)]
    with torch.no_grad():
        before, dense = [model(**inputs) for inputs in steps], [plain(**inputs) for inputs in steps]
        for one in (model, plain):
            quantize_(one, Int8WeightOnlyConfig())
        after, quantised = [model(**inputs) for inputs in steps], [plain(**inputs) for inputs in steps]
    assert torch.equal(after[0], quantised[0])
    assert not torch.equal(after[2], quantised[2])
    for found, known, moved, still in zip(after, before, quantised, dense, strict=True):
        assert 0 < relative_error(found, known) < 1.5 * relative_error(moved, still)


def test_torchs_own_encoder_layers_are_routed() -> None:
    layers = (torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(2))
    model = torch.nn.Sequential(*layers).eval()
    inputs = {"input": torch.randn(2, 16, 32)}
    with torch.no_grad():
        dense = model(**inputs)
        diffcr_compile.transform(model, example_inputs=inputs)
        assert diffcr_compile.ratios(model).shape == (1, 2)
        assert torch.equal(model(**inputs), dense)
        diffcr_compile.set_ratios(model, 0.5)
        assert not torch.equal(model(**inputs), dense)
