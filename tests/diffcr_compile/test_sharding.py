"""Shards and whole tensors; more than one process is tested in ``tests/calibrate/test_processes.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Shape, original, routed, same_bits, tiny_inputs
from torch import nn

import diffcr_compile
from diffcr_compile import CaptureError
from diffcr_compile.cost import measure_costs
from diffcr_compile.sharding import is_shard, is_sharded, like, stay_sharded, whole


def test_importing_the_package_imports_nothing_of_fsdp() -> None:
    """Its modules take seconds; and a model is then known not to be sharded."""
    code = (
        "import sys, torch, diffcr_compile, diffcr_compile.sharding as s; m = torch.nn.Linear(2, 2); "
        "assert not s.is_sharded(m) and not s.is_shard(m.weight) and s.whole(m.weight) is m.weight; "
        "print(*(name for name in ('torch.distributed.fsdp', 'torch.distributed.tensor') if name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.strip() == ""


def test_other_tensors_are_as_they_are() -> None:
    tensor = torch.arange(3.0)
    assert whole(tensor) is tensor
    assert not is_shard(tensor)
    assert not is_sharded(nn.Linear(2, 2))


def test_like_takes_device_and_dtype() -> None:
    value = torch.arange(3.0)
    found = like(value, torch.zeros(5, dtype=torch.float64))
    assert found.dtype == torch.float64
    assert found.tolist() == [0.0, 1.0, 2.0]
    assert like(value, torch.zeros(1, device="meta")).device.type == "meta"


def test_a_sharded_tensor_is_put_together_and_taken_apart(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    value = torch.arange(12.0).reshape(6, 2)
    shard = distribute_tensor(value, mesh, [Shard(0)])
    assert is_shard(shard)
    assert not is_shard(whole(shard))
    assert torch.equal(whole(shard), value)
    other = like(value.double() + 1, shard)
    assert is_shard(other)
    assert (other.placements, other.dtype) == (shard.placements, torch.float32)
    assert torch.equal(whole(other), value + 1)


def test_a_sharded_model_is_known_by_any_of_its_parts(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model, inputs = routed(shape), tiny_inputs(shape)
    assert not is_sharded(model)
    flops = diffcr_compile.cost(model, inputs).dense_flops
    costs = measure_costs(model, inputs)
    fully_shard(model.blocks[1], mesh=mesh)
    assert is_sharded(model)
    assert not is_sharded(model.blocks[0])
    known = measure_costs(model, tiny_inputs(shape, num_tokens=5))
    assert known.dense == costs.dense == flops  # what was counted before it was sharded


def test_a_model_sharded_before_it_was_measured_says_what_to_do(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model = fully_shard(routed(shape), mesh=mesh)
    model.__dict__["_diffcr"].costs = model.__dict__["_diffcr"].measured = None
    with pytest.raises(CaptureError, match="Before fully_shard, call"):
        diffcr_compile.cost(model, tiny_inputs(shape))


def test_a_model_stays_sharded_through_forwards_without_gradients(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model, inputs = fully_shard(routed(shape), mesh=mesh), tiny_inputs(shape)

    def run() -> bool:
        with torch.no_grad():
            model(**inputs)
        return all(map(is_shard, model.parameters()))

    assert not run(), "torch leaves the root whole"
    with stay_sharded(model):
        assert all(map(is_shard, model.parameters()))
        assert run()
        model(**inputs).sum().backward()
        assert run()
    assert all(map(is_shard, model.parameters()))
    assert not run()


@pytest.mark.parametrize("parts", ["root", "blocks and root"])
def test_a_sharded_model_that_has_run_learns_as_one_that_has_not(mesh: Any, parts: str) -> None:
    """torch leaves the root whole after a forward: what it holds then are other tensors than those that learn."""
    from torch.distributed.fsdp import fully_shard

    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    batches = [tiny_inputs(shape, num_tokens=40, seed=seed, timestep=step) for seed, step in enumerate((20.0, 900.0))]
    config, found = diffcr_compile.CalibrationConfig(steps=4, learning_rate=1e-2), []
    for sharded, runs in ((False, False), (True, False), (True, True)):
        model = routed(shape)
        diffcr_compile.cost(model, batches[0])
        if sharded:
            for block in model.blocks if parts == "blocks and root" else ():
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        if runs:
            with torch.no_grad():
                model(**batches[0])
        report = diffcr_compile.calibrate(model, batches, budget=0.7, config=config)
        assert all(map(is_shard, model.parameters())) == sharded
        losses = torch.tensor([entry["loss"] for entry in report.history])
        found.append((report.table, losses, [whole(one).detach() for one in model.parameters()]))
    assert same_bits(found[1], found[0])
    assert same_bits(found[2], found[0])


def test_a_sharded_model_is_saved(mesh: Any, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    model, inputs = routed(shape), tiny_inputs(shape)
    expected = model(**inputs)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert is_shard(model.blocks[0].diffcr_router.weight)
    diffcr_compile.save(model, tmp_path / "routing")
    loaded = diffcr_compile.load(original(shape), tmp_path / "routing")
    assert torch.equal(loaded(**inputs), expected)
    for one, other in zip(loaded.blocks, routed(shape).blocks, strict=True):
        assert torch.equal(one.diffcr_router.weight, other.diffcr_router.weight)


@pytest.mark.filterwarnings("ignore:the routers are untrained")
def test_a_model_sharded_on_the_meta_device_has_its_routers_when_it_leaves_it(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    inputs = {name: value.to("meta") for name, value in tiny_inputs(shape).items()}
    model = diffcr_compile.transform(original(shape).to("meta"), example_inputs=inputs)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    model.to_empty(device="cpu")
    for block, expected in zip(model.blocks, routed(shape).blocks, strict=True):
        assert is_shard(block.diffcr_router.weight)
        assert torch.equal(whole(block.diffcr_router.weight), expected.diffcr_router.weight)
