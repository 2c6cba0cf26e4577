"""Run a model without leaving a trace in it: on a shadow, and under fake tensors where no values are needed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .arguments import Path, map_leaves
from .errors import CaptureError


def shadow(model: nn.Module) -> nn.Module:
    """A copy of the module objects that shares every parameter and buffer; in eval mode.

    What a forward caches on its modules lands in the copy. Raises CaptureError where the model holds something that can't
    be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:  # whatever a user's attribute raises when copied
        raise CaptureError(
            f"{type(model).__name__} holds something that can't be copied ({type(error).__name__}: {error}), so it can't be "
            "looked at without changing it. Remove such objects (open files, locks, handles) before transform."
        ) from error


@contextlib.contextmanager
def dry_run(model: nn.Module, *, fake: bool) -> Iterator[Callable[[Path, Any], Any]]:
    """Context for a forward of a shadow: no gradients, the global generators put back, fake tensors if asked for.

    Yields the function that turns a leaf of the inputs (real, or a description on the meta device) into one to run with.
    """
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None

    def convert(_: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_meta and device.type != "meta":
            return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)
        return mode.from_tensor(leaf) if mode is not None else leaf

    with torch.random.fork_rng(devices=[]), torch.no_grad(), mode or contextlib.nullcontext():
        yield convert


def describe_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` with floating tensors replaced by descriptions (meta tensors); integers, which index, keep their values."""

    def describe(_: Path, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return (
                leaf.detach().to("meta")
                if leaf.dtype.is_floating_point or leaf.dtype.is_complex
                else leaf.detach().clone()
            )
        return leaf

    return map_leaves(describe, inputs)
