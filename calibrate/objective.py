"""The default objective: self-distillation from the same model at ratio zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import iterate_leaves
from ..learning import dense


@torch.no_grad()
def dense_outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The floating tensors of the model's output with every block as it was."""
    with dense(model):
        return output_tensors(model(**batch))


def output_tensors(output: Any) -> list[Tensor]:
    """Floating tensors of an output, whatever holds them."""
    leaves = iterate_leaves(output)
    return [leaf for _, leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point]


def distillation_loss(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Squared distance as a share of the targets' mean square, averaged over outputs: () float32."""
    losses = [
        (output.float() - target.float()).square().mean() / target.float().square().mean().clamp(min=1e-12)
        for output, target in zip(outputs, (target.to(outputs[0].device) for target in targets), strict=True)
    ]
    return torch.stack(losses).mean()
