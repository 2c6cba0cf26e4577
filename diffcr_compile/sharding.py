"""Models that FSDP2 has sharded. Its modules take seconds to import: who never imported them has sharded nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import iterate_leaves, map_leaves


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


class _Reach(torch.autograd.Function):
    """A tensor as it is, whose backward gives each of some weights a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *weights: Tensor) -> Tensor:
        ctx.kinds = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.kinds)


@contextlib.contextmanager
def all_weights_reached(model: nn.Module) -> Iterator[None]:
    """Inside, a backward gives every weight of a sharded model a gradient, if only of zero. FSDP2 reduces those that are there, and
    processes whose batches lie in different timestep regions leave out different blocks and routers."""
    parts = _sharded_parts(model)
    handles = [part.register_forward_hook(_reaching(part, set(parts)), prepend=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reaching(part: nn.Module, parts: set[Any]) -> Callable[..., Any]:
    """A forward hook for a sharded part, for the weights that are its own and not those of a part below."""
    below = {module for other in part.modules() if other in parts and other is not part for module in other.modules()}
    places = [(module, name) for module in part.modules() if module not in below for name in module._parameters]

    def reach(part: nn.Module, args: Any, output: Any) -> Any:
        weights = [module._parameters.get(name) for module, name in places]
        weights = [weight for weight in weights if weight is not None and weight.requires_grad]
        if not torch.is_grad_enabled() or not weights:
            return output
        leaves = (leaf for _, leaf in iterate_leaves(output))
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
        return map_leaves(lambda _, leaf: _Reach.apply(leaf, *weights) if leaf is first else leaf, output)

    return reach


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
