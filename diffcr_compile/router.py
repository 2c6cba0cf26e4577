"""The router of one block: a bias-free vector that scores tokens, or one for each timestep region."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .sharding import like


class Router(nn.Module):
    """Holds ``weight``, in the block's dtype and on its device: one vector (D,), or where the router sees the timestep one for each
    region, (R, D). A bias that depends on the timestep would add the same to every token's score and change nothing.

    Not an ``nn.Linear``, which quantisation, adapters and layerwise casting would take for one of the model's; and absent
    from state dicts in both directions, so that a dense checkpoint loads strictly and a saved one is plain. Routers are
    saved with ``diffcr_compile.save``. The start, the same in all regions, is drawn from a generator seeded by the block's name:
    different scores from the first call on (equal ones would make top-k keep whatever comes first), and no draw from the global
    generator.
    """

    def __init__(
        self, width: int, fqn: str, *, dtype: torch.dtype, device: torch.device, num_regions: int | None = None
    ) -> None:
        super().__init__()
        seed = int.from_bytes(hashlib.sha256(fqn.encode()).digest()[:7])
        generator = torch.Generator("cpu").manual_seed(seed)
        start = torch.randn(width, generator=generator, dtype=torch.float32, device="cpu") * width**-0.5
        if num_regions is not None:
            start = start.repeat(num_regions, 1)
        with torch.inference_mode(False):  # it learns later, wherever the blocks were looked for
            self.weight = nn.Parameter(start.to(dtype=dtype, device=device, copy=True))
        vars(self)["_taken"] = nn.Parameter(start.to(dtype)) if self.weight.is_meta else self.weight

    def fill(self, values: Tensor) -> None:
        """Set the vector, wherever it is; on the meta device, what it will be when it leaves it."""
        with torch.no_grad():
            (vars(self)["_taken"] if self.weight.is_meta else self.weight).copy_(values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves or casts a model moves and casts the vector, and leaves it its values: no dense checkpoint brings back what
        ``to_empty`` takes."""
        self._leave_meta()
        values = self.weight.detach()
        super()._apply(fn, recurse)
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(values)
        return self

    def _leave_meta(self) -> None:
        """Come back from the meta device, where the vector is there, to the one it was on or, sharded, is meant for."""
        if self.weight.is_meta:
            taken: Tensor = vars(self)["_taken"].detach()
            mesh = getattr(self.weight, "device_mesh", None)  # of a shard
            device = taken.device if mesh is None else mesh.device_type
            values = like(taken, torch.empty_like(self.weight, device=device))
            self.weight = vars(self)["_taken"] = nn.Parameter(values, requires_grad=self.weight.requires_grad)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Leaves nothing in a state dict. Remembers the vector: who takes a model's weights by its state dict (sequential offload)
        may leave meta tensors in their place."""
        if not self.weight.is_meta:
            vars(self)["_taken"] = self.weight

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Asks nothing of a state dict; where a model on the meta device is given its tensors, the vector is there too."""
        if local_metadata.get("assign_to_params_buffers", False):
            self._leave_meta()

    def __setattr__(self, name: str, value: Any) -> None:
        """As in any module, but a router is never offloaded: it takes no wrapper around its forward, and where one is set that has
        put the vector on the meta device, the vector comes back."""
        if name != "forward":
            super().__setattr__(name, value)
        elif self.weight.is_meta:
            self.weight = vars(self)["_taken"]

    def forward(self, x: Any) -> Any:
        """The identity: a block that runs all its children in turn (``nn.Sequential``) runs its router too."""
        return x
