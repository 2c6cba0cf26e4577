"""Models that FSDP2 has sharded. Its modules take seconds to import: who never imported them has sharded nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or a part of it."""
    return bool(_sharded_parts(model))


def _sharded_parts(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]


@contextlib.contextmanager
def stay_sharded(model: nn.Module) -> Iterator[None]:
    """Inside and afterwards the parameters of a sharded model are its shards. A forward leaves those of the root whole, with other
    tensors in their place, until a backward: one without gradients for good."""
    parts = _sharded_parts(model)

    def reshard() -> None:
        for part in parts:
            part.reshard()

    def reshard_after(*_: Any) -> None:
        if not torch.is_grad_enabled():
            reshard()

    reshard()
    try:
        with model.register_forward_hook(reshard_after) if parts else contextlib.nullcontext():
            yield
    finally:
        reshard()


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def whole(tensor: Any) -> Tensor:
    """A sharded tensor put together (all processes must ask); any other as it is."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """The part of a sharded tensor that this process holds, in the same memory; any other as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor


def like(value: Tensor, other: Any) -> Tensor:
    """``value``, which every process has whole, on the device of ``other``, in its dtype, and sharded as it is."""
    value = value.to(device=other.device, dtype=other.dtype)
    if not is_shard(other):
        return value
    tensors = sys.modules["torch.distributed.tensor"]
    return tensors.distribute_tensor(
        value, other.device_mesh, other.placements, src_data_rank=None
    )  # all have it: no scatter
