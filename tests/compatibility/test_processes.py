"""Models whose weights or batches are spread over processes: row 8. A group of this process alone, through the same code.

Several processes are tested in ``tests/calibrate/test_processes.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from models import routed_fqns, tensors_of
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import diffcr_compile
from compatibility.matrix import (
    ORDER,
    TINY,
    assert_bits,
    assert_keeps,
    at_timestep,
    inputs,
    plain,
    refused,
    routed,
    row,
    run,
    transform_first,
)

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

Record = Callable[[str, object], None]


_NO_SHARDS = {"dit": "its forward uses a part of its first block outside it, sharded then, dense too"}


def _sharded(model: nn.Module, fqns: list[str], mesh: Any) -> nn.Module:
    for fqn in fqns:
        fully_shard(model.get_submodule(fqn), mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(model.get_submodule(fqn), FSDPModule) for fqn in fqns)
    return model


@row(8, "FSDP2 over blocks and root, after transform", without=_NO_SHARDS)
def test_sharded_after(name: str, mesh: Any) -> None:
    expected, dense, model = run(routed(name), inputs(name)), run(plain(name), inputs(name)), routed(name)
    _sharded(model, routed_fqns(model), mesh)
    assert_keeps(name, model)
    assert_bits(run(model, inputs(name)), expected)
    diffcr_compile.restore(model)
    assert_bits(run(model, inputs(name)), dense)


@row(8, "FSDP2 over blocks and root, before transform", without=_NO_SHARDS)
def test_sharded_before(name: str, mesh: Any, record_property: Record) -> None:
    model = _sharded(plain(name), [f"{TINY[name].first}{index}" for index in range(TINY[name].family)], mesh)
    message = refused(record_property, transform_first, model, name)
    assert_bits(run(model, inputs(name)), run(plain(name), inputs(name)))
    assert ORDER in message


@row(8, "DDP after transform: loss and gradients")
def test_data_parallel(name: str, mesh: Any) -> None:
    given = at_timestep(name, inputs(name), 0.6)
    model, other = routed(name), routed(name)
    wrapped = DistributedDataParallel(other, find_unused_parameters=True)
    for one in (model, wrapped):
        tensors_of(one(**given))[0].square().mean().backward()
    gradients = [
        {key: value.grad for key, value in one.named_parameters() if value.grad is not None} for one in (model, other)
    ]
    assert list(gradients[0]) == list(gradients[1])
    assert {f"{fqn}.diffcr_router.weight" for fqn in routed_fqns(model)} <= set(gradients[0])
    for key, gradient in gradients[0].items():
        assert_bits(gradients[1][key], gradient)
    assert_keeps(name, other)
