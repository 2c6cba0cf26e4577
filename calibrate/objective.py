"""The default objective: self-distillation from the same model at ratio zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import iterate_leaves
from ..errors import CalibrationError
from ..learning import dense
from .processes import of_all_processes


@torch.no_grad()
def dense_outputs(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The floating tensors of the model's output with every block as it was."""
    with dense(model):
        return output_tensors(model(**batch))


def output_tensors(output: Any) -> list[Tensor]:
    """Floating tensors of an output, whatever holds them."""
    leaves = iterate_leaves(output)
    return [leaf for _, leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point]


class Finite:
    """Whether dense outputs are, batch after batch. name: of the batch that was read last."""

    def __init__(self, name: Callable[[], str]) -> None:
        self.name = name
        self.spoilt: str | None = None

    def look_at(self, output: Any) -> None:
        if self.spoilt is None and not all(bool(tensor.isfinite().all()) for tensor in output_tensors(output)):
            self.spoilt = self.name()

    def check(self) -> None:
        """Raises CalibrationError, in all processes, where one has met outputs that are not finite."""
        for spoilt in of_all_processes(self.spoilt):
            if spoilt is not None:
                raise CalibrationError(
                    f"the dense outputs of {spoilt} are not finite, so what skipping costs can't be told. Look at the batch, and "
                    "at the model's dtype."
                )


def distillation_loss(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Squared distance as a share of the targets' mean square, averaged over outputs: () float32."""
    losses = [
        (output.float() - target.float()).square().mean() / target.float().square().mean().clamp(min=1e-12)
        for output, target in zip(outputs, (target.to(outputs[0].device) for target in targets), strict=True)
    ]
    return torch.stack(losses).mean()
