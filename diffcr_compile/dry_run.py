"""Run a model without leaving a trace in it: on a shadow, and under fake tensors where no values are needed."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from .arguments import Path, map_leaves
from .defaults import without_autocast_cache
from .eager import force_eager
from .errors import CaptureError
from .forget import note_run


def shadow(model: nn.Module) -> nn.Module:
    """A copy of the module objects that shares every parameter; in eval mode, and without what others have wrapped around forwards
    (offload, casting, caches): it moves weights, which are shared, and can't always be copied.

    What a forward caches on its modules, or writes into its buffers, lands in the copy. Raises CaptureError where the model holds
    something that can't be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    memo |= {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
    wrapped = {module: wrappers for module in model.modules() if (wrappers := _wrappers(module))}
    for module, wrappers in wrapped.items():
        memo.update((id(value), None) for value in (*wrappers, *_state_of(wrappers, module)))
    try:
        duplicate = copy.deepcopy(model, memo).eval()
        for module, wrappers in wrapped.items():
            memo[id(module)].forward = copy.deepcopy(wrappers[-1].__wrapped__, memo)
    except Exception as error:  # whatever a user's attribute raises when copied
        raise CaptureError(
            f"{type(model).__name__} holds something that can't be copied ({type(error).__name__}: {error}), so it can't be "
            "looked at without changing it. Remove such objects (open files, locks, handles) before transform; where the model was "
            "sharded (FSDP), transform first."
        ) from error
    return duplicate


def _wrappers(module: nn.Module) -> list[Any]:
    """What stands on the instance around its own forward, a bound method: functions, outermost first, that tell what they wrap as
    ``functools.wraps`` does."""
    found: list[Any] = []
    forward: Any = vars(module).get("forward")
    while not isinstance(forward, types.MethodType) and hasattr(forward, "__wrapped__"):
        found.append(forward)
        forward = forward.__wrapped__
    return found


def _state_of(wrappers: list[Any], module: nn.Module) -> list[Any]:
    """What wrappers keep on their module: objects whose classes come from the files of the functions that wrap. (A wrapper takes
    its name and file from what it wraps, so a partial is looked into; the files of the module's own class are not meant.)"""
    files = {getattr(wrapper, "func", wrapper).__module__ for wrapper in wrappers}
    files -= {kind.__module__ for kind in type(module).__mro__}
    return [value for value in vars(module).values() if type(value).__module__ in files]


def _own(leaf: Any) -> Any:
    """A copy of what a forward may write into (a cache of keys and values); the leaf itself where it can't be copied."""
    try:
        return copy.deepcopy(leaf)
    except Exception:  # whatever a user's object raises when copied
        return leaf


class _Unfused(TorchFunctionMode):
    """Changes nothing; but where a mode watches, torch's own layers call their parts instead of the fused operators of their
    evaluation, in which no attention is seen and no FLOPs are counted."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def dry_run(model: nn.Module, *, fake: bool, watched: bool = True) -> Iterator[Callable[[Path, Any], Any]]:
    """Context for a forward of a shadow: no gradients, the global generators put back, fake tensors if asked for, nothing compiled
    (flex attention compiles itself); ``watched``: torch's own layers show their parts, which they else may run fused.

    Fake tensors are all on one device, the shadow's too, wherever offload has put the weights (their values may be nowhere); and so
    is what the forward makes on the meta device by default.
    A forward may leave fakes in caches outside the model: :func:`forget_fakes` is to follow. Yields the function that turns a leaf
    of the inputs (real, or a description on the meta device) into one to run with.
    """
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    device = next(iter(devices), torch.device("cpu"))
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    if mode is not None:
        note_run(mode)

    def convert(_: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return _own(leaf)
        leaf = leaf.clone() if leaf.is_inference() else leaf
        if mode is not None:
            return mode.from_tensor(leaf) if leaf.device == device else torch.empty_like(leaf, device=device)
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device) if leaf.is_meta and devices else leaf

    unfused = _Unfused() if watched else contextlib.nullcontext()
    there = device if torch.get_default_device().type == "meta" else contextlib.nullcontext()
    with (
        force_eager(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),  # in it, operators come whole to a mode that watches
        torch.no_grad(),
        mode or contextlib.nullcontext(),
        unfused,
        there,
        without_autocast_cache(),
    ):
        if fake:
            _gather_on(device, model)
        yield convert


def _gather_on(device: torch.device, model: nn.Module) -> None:
    """Under fake tensors: stand-ins for the parameters and buffers that lie elsewhere, in their place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device != device:
                stand_in = torch.empty_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = torch.empty_like(buffer, device=device)


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
