"""The model behind what a user hands over: the first line of every public function that takes one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .routed import BlockRouting, routing_of

_DENOISERS = ("transformer", "unet", "dit")
"""Attributes under which a pipeline keeps its denoiser."""


def unwrap(model: Any) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper or ``DistributedDataParallel``, however nested; any other as it is.

    Raises TypeError for what is no module, naming a pipeline's denoiser, for a module of TorchScript, whose forward is no Python
    any more, and for one routed block of a model.
    """
    while isinstance(model, torch._dynamo.eval_frame.OptimizedModule | DistributedDataParallel):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    if not isinstance(model, nn.Module):
        hint = next((f" Pass its denoiser: .{name}." for name in _DENOISERS if hasattr(model, name)), "")
        raise TypeError(f"expected a torch.nn.Module, found {type(model).__name__}.{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"expected a module whose forward is Python, found {type(model).__name__} of TorchScript. Pass the module that it was "
            "traced or scripted from."
        )
    state = routing_of(model)
    if isinstance(state, BlockRouting):
        raise TypeError(
            f"expected a whole model, found {type(model).__name__}, the routed block {state.fqn!r} of one. Pass that model."
        )
    return model
