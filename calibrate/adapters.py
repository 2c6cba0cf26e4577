"""LoRA in place of the weights: peft's adapters on the routed blocks while they learn, merged into the weights at the end."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..defaults import on_cpu
from ..errors import UnsupportedError
from ..routed import ModelRouting
from ..sharding import is_shard, local

NAME = "diffcr"


@contextlib.contextmanager
def low_rank(model: nn.Module, state: ModelRouting, rank: int, seed: int) -> Iterator[None]:
    """Inside, every linear layer of the routed blocks has an adapter, and only adapters require gradients.

    Afterwards the layers are as before, with the adapters' products added to their weights; after an error without. peft draws the
    adapters' start from the global generator, which is put back. Raises UnsupportedError where peft is missing, where the model
    has adapters already, or where no routed block has a linear layer or one is quantised.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise UnsupportedError(
            f"trainable='lora' needs peft, which can't be imported ({error}): pip install 'diffcr-compile[peft]', or train 'all' "
            "or 'routers'."
        ) from error
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise UnsupportedError(
                f"{name} has an adapter already. trainable='all' trains it where the weights below are frozen; or fuse it first."
            )
    targets = [
        ".".join(filter(None, (block.fqn, name)))
        for block in state.blocks
        for name, module in model.get_submodule(block.fqn).named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not targets:
        raise UnsupportedError("no routed block has a linear layer to adapt: train 'all' or 'routers'.")
    for name in targets:
        weight: Any = model.get_submodule(name).weight
        if hasattr(type(weight), "__tensor_flatten__") and not is_shard(weight):
            raise UnsupportedError(
                f"the weight of {name} is quantised ({type(weight).__name__}), and an adapter's product can't be added to it. "
                "Quantise after calibrate, train 'routers', or put adapters of your own on the model and train 'all'."
            )
    described = vars(model).get("peft_config")
    exactly = "|".join(map(re.escape, targets))  # names in a list would be those of other modules too, by their ends
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly)
    try:
        with torch.random.fork_rng(), on_cpu():
            torch.manual_seed(seed)
            LoraModel(model, config, NAME)
        yield
        _merge([module for module in model.modules() if isinstance(module, BaseTunerLayer)])
    finally:
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        vars(model).pop("peft_config", None)
        if described is not None:
            described.pop(NAME, None)
            model.peft_config = described  # type: ignore[assignment]


def _merge(layers: list[Any]) -> None:
    """Add each adapter's product to the weight below; to none after an error, for which the CPU holds copies meanwhile."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            before.append((weight, local(weight.detach()).to("cpu", copy=True)))
            layer.merge()
    except BaseException:
        with torch.no_grad():
            for weight, value in reversed(before):  # one that two layers share was changed before it was noted again
                local(weight).copy_(value)
        raise
