"""Models whose weights or batches are spread over two processes: row 8.

``python test_processes.py FOLDER`` imports once, loads the routings that lie in the folder, and forks two processes for each model,
which do the work of all its cells. How several processes learn together is tested in ``tests/calibrate/test_processes.py``.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffcr_compile  # before the folder of tests, which has a folder of the same name, is on the path

if __name__ == "__main__":
    ROOT = Path(__file__).parents[2]
    sys.path += [str(ROOT / "tests"), str(ROOT / "examples" / "benchmarks")]
    torchvision = importlib.import_module("torchvision_operators").define()  # peft imports torchvision

import pytest
import torch
import torch.distributed as distributed
from models import routed_fqns, tensors_of
from torch import nn

from compatibility import matrix
from compatibility.matrix import (
    ORDER,
    TINY,
    assert_bits,
    assert_close,
    assert_routes,
    at_timestep,
    inputs,
    kept,
    one_sample,
    plain,
    routed,
    row,
    run,
    transform_first,
)

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

_NO_SHARDS = {"dit": "its forward uses a part of its first block outside it, sharded then, dense too"}


# In each of the two processes, `number`; what is returned is a refusal's type.


def _sharded(model: nn.Module, fqns: list[str]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for fqn in fqns:
        fully_shard(model.get_submodule(fqn), mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(model.get_submodule(fqn), FSDPModule) for fqn in fqns)
    return model


def shard_after(name: str, number: int) -> None:
    expected, dense, model = run(routed(name), inputs(name)), run(plain(name), inputs(name)), routed(name)
    _sharded(model, routed_fqns(model))
    assert_routes(name, model)
    assert_bits(run(model, inputs(name)), expected)
    given, whole = at_timestep(name, inputs(name), 0.6), routed(name)
    for one in (whole, model):
        tensors_of(one(**given))[0].square().mean().backward()
    for key, parameter in model.named_parameters():
        gradient = whole.get_parameter(key).grad
        assert (gradient is None) == (parameter.grad is None)
        if gradient is not None:  # the mean of two processes' equal ones
            assert_close(parameter.grad.full_tensor(), gradient)
    diffcr_compile.restore(model)
    assert_bits(run(model, inputs(name)), dense)


def shard_before(name: str, number: int) -> str:
    model = _sharded(plain(name), [f"{TINY[name].first}{index}" for index in range(TINY[name].family)])
    with pytest.raises(diffcr_compile.DiffCRError, match=ORDER) as caught:
        transform_first(model, name)
    assert_bits(run(model, inputs(name)), run(plain(name), inputs(name)))
    return type(caught.value).__name__


def data_parallel_after(name: str, number: int) -> None:
    model = routed(name)
    _learns_as_alone(name, number, nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), model)
    assert_routes(name, model)


def data_parallel_before(name: str, number: int) -> None:
    """``transform`` is given the wrapper, which would know of no routers: the model that comes back is wrapped anew."""
    parallel = functools.partial(nn.parallel.DistributedDataParallel, find_unused_parameters=True)
    model = transform_first(parallel(plain(name)), name)
    _learns_as_alone(name, number, parallel(model), model, first=True)
    assert_routes(name, model, first=True)


def _learns_as_alone(name: str, number: int, wrapped: nn.Module, model: nn.Module, *, first: bool = False) -> None:
    """Each process takes a sample of its own; gradients are the means of those that one process gets from the two."""
    given = at_timestep(name, inputs(name), 0.6)

    def learn(model: nn.Module, sample: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = tensors_of(model(**one_sample(given, sample)))[0].square().mean()
        loss.backward()
        inner = getattr(model, "module", model)
        return loss, {key: value.grad for key, value in inner.named_parameters() if value.grad is not None}

    alone = [learn(routed(name, first=first), sample) for sample in range(2)]
    loss, gradients = learn(wrapped, number)
    assert_bits(loss.detach(), alone[number][0].detach())
    halves = [gradients for _, gradients in alone]
    assert set(gradients) == {*halves[0], *halves[1]}
    assert {f"{fqn}.diffcr_router.weight" for fqn in kept(model, inputs(name))} <= set(gradients)
    for key, gradient in gradients.items():
        one, other = (half.get(key, torch.zeros_like(gradient)) for half in halves)
        assert_bits(gradient, one / 2 + other / 2)


WORKS: dict[str, Callable[[str, int], str | None]] = {
    work.__name__: work for work in (shard_after, shard_before, data_parallel_after, data_parallel_before)
}


def fork(name: str, number: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    found: dict[str, Any] = {}
    try:
        store = distributed.FileStore(str(folder / f"{name}-store"), 2)
        distributed.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=timedelta(seconds=60))
        for title, work in WORKS.items():
            if name not in _NO_SHARDS or work.__name__.startswith("data_parallel"):
                found[title] = {"refused": work(name, number)}
    except BaseException:
        failed = {"failed": traceback.format_exc()}
        found = {**dict.fromkeys(WORKS, failed), **found}
    finally:
        (folder / f"{name}-{number}.json").write_text(json.dumps(found))
        os._exit(0)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    @functools.cache
    def loaded(name: str) -> nn.Module:
        model = diffcr_compile.load(plain(name), folder / name)
        diffcr_compile.cost(model, inputs(name))
        return model

    matrix._routed = loaded
    importlib.import_module("torch.distributed.fsdp")  # once, before the forks
    for name in TINY:
        run(routed(name), inputs(name))
        children = [fork(name, number, folder) for number in range(2)]
        for child in children:
            os.waitpid(child, 0)


# In pytest's.

Found = Callable[[str, str], list[Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The types of a model's refusals in both processes, None where nothing was refused, by model and work."""
    folder = tmp_path_factory.mktemp("processes")
    for name in TINY:
        diffcr_compile.save(routed(name), folder / name)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr

    def read(name: str, work: str) -> list[Any]:
        results = [json.loads((folder / f"{name}-{number}.json").read_text())[work] for number in range(2)]
        assert [result["failed"] for result in results if "failed" in result] == []
        return [result["refused"] for result in results]

    return read


@row(8, "FSDP2 over blocks and root, after transform: outputs and gradients", without=_NO_SHARDS)
def test_sharded_after(name: str, found: Found) -> None:
    assert found(name, "shard_after") == [None, None]


@row(8, "FSDP2 over blocks and root, before transform", without=_NO_SHARDS)
def test_sharded_before(name: str, found: Found, record_property: Callable[[str, object], None]) -> None:
    refusals = found(name, "shard_before")
    assert refusals == ["CaptureError"] * 2
    record_property("refused", refusals[0])


@row(8, "DDP after transform: loss and gradients")
def test_data_parallel_after(name: str, found: Found) -> None:
    assert found(name, "data_parallel_after") == [None, None]


@row(8, "DDP before transform, and anew around what comes back: loss and gradients")
def test_data_parallel_before(name: str, found: Found) -> None:
    assert found(name, "data_parallel_before") == [None, None]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
