"""Nothing that the package makes follows the default device or dtype that the user has set."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CHANNELS, Shape, TinyDiT, map_tensors, original, same_bits, tiny_inputs
from torch import Tensor

import diffcr_compile
from diffcr_compile import CalibrationConfig, DiffCRConfig
from diffcr_compile.defaults import on_cpu

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=2, head_dim=4)
ROOT = Path(__file__).parents[2]


class NamedDiT(TinyDiT):
    """Names the device and dtype of what its forward makes, as a model that is to run under any default must."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        half = self.shape.width // 2
        places = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * places / half)
        x, cond = self.embed(x), self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        for block in self.blocks:
            x = block(x, cond)
        return self.head(x)


def named() -> NamedDiT:
    model = original(SHAPE)
    model.__class__ = NamedDiT
    return model


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def journey(config: DiffCRConfig, how: CalibrationConfig, batches: list[dict[str, Any]], folder: Path) -> list[Any]:
    """What comes of most of what one can do."""
    plain = named()
    model, found = copy.deepcopy(plain), []
    diffcr_compile.transform(model, config, example_inputs=batches[0])
    diffcr_compile.set_ratios(model, 0.5)
    with torch.no_grad():
        found += [model(**batch) for batch in batches]
        with diffcr_compile.trace(model) as seen, diffcr_compile.record(model, limit=2) as recorded:
            found += [model(**batch) for batch in batches]
    found += [list(seen.kept.values()), list(recorded)]
    report = diffcr_compile.calibrate(model, batches, budget=0.7, config=how)
    found += [report.table, [entry["loss"] for entry in report.history], list(report.trials.values()), report.errors]
    found += [diffcr_compile.ratios(model), diffcr_compile.cost(model, batches[0]), str(diffcr_compile.explain(model))]
    diffcr_compile.save(model, folder)
    weights = model.state_dict()
    other = diffcr_compile.load(plain, folder)
    other.load_state_dict(weights)
    with torch.no_grad():
        for one in (model, other):
            found += [one(**batch) for batch in batches]
    found += [dict(other.named_parameters()), diffcr_compile.CalibrationReport.load(folder).table]
    return found


REUSE = DiffCRConfig(skip="reuse", num_regions=2)
CASES = {
    "identity": (DiffCRConfig(), CalibrationConfig(steps=2)),
    "all": (DiffCRConfig(context="all", router="timestep"), CalibrationConfig(steps=2)),
    "reuse": (REUSE, CalibrationConfig(preset="training-free")),
    "stale": (
        DiffCRConfig(skip="reuse", context="stale", selection="score and turn", num_regions=2),
        CalibrationConfig(steps=2, trainable="routers", estimator="two-bin"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_all_is_the_same_under_other_defaults(name: str, tmp_path: Path) -> None:
    config, how = CASES[name]
    batches = [tiny_inputs(SHAPE, timestep=torch.full((3,), 900.0 - 100 * step), seed=step) for step in range(6)]
    expected = journey(config, how, batches, tmp_path / "expected")
    routers = (tmp_path / "expected" / "routers.safetensors").read_bytes()
    for device, dtype in (("meta", torch.float64), ("cpu", torch.bfloat16)):
        with defaults(device, dtype):
            found = journey(config, how, batches, tmp_path / device)
        for one, other in zip(expected, found, strict=True):
            assert equal(one, other)
        assert (tmp_path / device / "routers.safetensors").read_bytes() == routers


def test_adapters_are_made_where_the_weights_are() -> None:
    """Their start is peft's, which draws it in the default dtype."""
    batches = [tiny_inputs(SHAPE, seed=seed) for seed in range(2)]
    with defaults("meta", torch.float64):
        model = diffcr_compile.transform(named(), example_inputs=batches[0])
        config = CalibrationConfig(steps=2, trainable="lora")
        report = diffcr_compile.calibrate(model, batches, budget=0.8, config=config)
    assert report.share <= 0.8
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("cpu", torch.float32)}


def equal(one: Any, other: Any) -> bool:
    leaves, others = torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other)
    return len(leaves) == len(others) and all(
        same_bits(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )


def test_a_model_on_the_meta_device_is_planned_where_it_was_made() -> None:
    """What its forward makes under the default device need not say which."""
    plan = diffcr_compile.explain(diffcr_compile.transform(original(SHAPE), example_inputs=tiny_inputs(SHAPE))).plan
    inputs = map_tensors(lambda tensor: tensor.to("meta"), tiny_inputs(SHAPE))
    with torch.device("meta"):
        model = MadeThereDiT(SHAPE).eval()
        found = diffcr_compile.explain(diffcr_compile.transform(model, example_inputs=inputs)).plan
    assert found.sites == plan.sites
    assert [family.leaves for family in found.families] == [family.leaves for family in plan.families]


class MadeThereDiT(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x + torch.ones(CHANNELS), timestep)


def test_the_cpu_is_entered_only_where_it_is_not_the_default() -> None:
    stack = torch.overrides._get_current_function_mode_stack
    with on_cpu():
        assert not stack()
    with torch.device("meta"), on_cpu():
        assert torch.zeros(1).device.type == "cpu"
        with torch.device("meta"):
            assert torch.zeros(1).is_meta


_DEVICE = {
    "zeros",
    "ones",
    "randn",
    "rand",
    "randint",
    "randperm",
    "arange",
    "tensor",
    "empty",
    "full",
    "linspace",
    "eye",
}
_DTYPE = _DEVICE - {"randint", "randperm", "arange", "tensor"}
_IN_A_CONTEXT = {"verify.py": "runs on the CPU", "layout.py": "runs on the CPU", "example_inputs.py": "given"}


@pytest.mark.parametrize("folder", ["diffcr_compile", "passes", "calibrate"])
def test_constructors_name_their_device_and_dtype(folder: str) -> None:
    """``torch.tensor`` of numbers that are no integers and ``torch.full`` take the default dtype; the journey finds these."""
    for path in sorted((ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            if name in _DEVICE and ast.unparse(node.func) == f"torch.{name}":  # type: ignore[attr-defined]
                given = {keyword.arg for keyword in node.keywords}  # type: ignore[attr-defined]
                where = f"{path.name}:{node.lineno}"  # type: ignore[attr-defined]
                assert "device" in given or path.name in _IN_A_CONTEXT, where
                assert "dtype" in given or name not in _DTYPE, where
