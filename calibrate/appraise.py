"""Look at a table at work, for the report: what the outputs are off by, and which tokens go through which blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..arguments import bind_arguments, positional_names
from ..errors import UnsupportedError
from ..layout import grids_of_call, latents_of_call, token_grid
from ..observe import trace
from ..region import group_samples, pick_samples, pin_region, regions_of_call, timestep_value
from ..routed import ModelRouting
from .batches import Batch, some

APPRAISED = 4
"""Batches that are looked at."""

UNIFORM = (0.25, 0.5, 0.75)
"""Ratios that are tried everywhere alike, to compare with."""

MOST_SHOWN = 8
"""Blocks whose tokens are drawn one by one."""

MOST_PIXELS = 64
"""To a side of the latents as they are drawn."""


@dataclass(frozen=True)
class TokenMap:
    """Which tokens of one sample go through which blocks, in one forward.

    timestep: None for a model without. grid: (frames, height, width) of the tokens; (1, 1, N) where they are no grid.
    kept: by block, for at most ``MOST_SHOWN`` of them, a 1 for each token that it computes and a 0 for each that skips.
    passes: for each token, which share of all blocks with as many tokens computes it. latents: rows of brightness, of the middle
    frame; empty where the model is called with no latents. Both in two hexadecimal digits a value, ff for one.
    """

    timestep: float | None
    grid: tuple[int, int, int]
    kept: dict[str, str]
    passes: str
    latents: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of ``vars``, from JSON. Raises ValueError, TypeError or KeyError where it is none."""
        found = cls(**{**data, "grid": tuple(data["grid"]), "latents": tuple(data["latents"])})
        sizes = {found.pass_shares().numel(), *(mask.numel() for mask in found.masks().values())}
        found.picture()
        if len(sizes) != 1 or not isinstance(found.timestep, float | None):
            raise ValueError(
                f"a token map holds masks of one size and a timestep, found {sorted(sizes)} and {found.timestep!r}"
            )
        return found

    def masks(self) -> dict[str, Tensor]:
        """By block, bool of the grid's shape: true where it computes the token."""
        return {
            name: torch.tensor([int(bit, 2) for bit in bits], device="cpu").bool().view(self.grid)
            for name, bits in self.kept.items()
        }

    def pass_shares(self) -> Tensor:
        """Of the grid's shape, in [0, 1]."""
        return _from_text(self.passes).view(self.grid)

    def picture(self) -> Tensor | None:
        """The latents (height, width) in [0, 1], if any."""
        return torch.stack([_from_text(row) for row in self.latents]) if self.latents else None


def spread_over_timesteps(
    model: nn.Module, state: ModelRouting, batches: Sequence[Batch], places: Sequence[int], count: int = APPRAISED
) -> list[int]:
    """At most so many of the places, from clean to noisy in equal steps of their order, out of sixteen times as many."""
    few = some(places, 16 * count)
    timestep = state.plan.timestep
    if timestep is not None:
        few = sorted(few, key=lambda place: _largest(timestep_value(batches[place], timestep, model)))
    count = min(count, len(few))
    return [few[int((part + 0.5) * len(few) / count)] for part in range(count)]


def map_tokens(model: nn.Module, state: ModelRouting, batch: Batch, context: Any) -> TokenMap | None:
    """The first sample's tokens at the present table; ``context`` is entered around the forward.

    None where the sample can't be taken out of a batch of several timestep regions.
    """
    given = _of_one_region(model, state, batch)
    if given is None:
        return None
    with torch.no_grad(), trace(model) as all_kept, pin_region(state, 0, (0,) * len(state.blocks)):
        model(**given)
    with context, torch.no_grad(), trace(model) as seen:
        model(**given)
    state.current.trajectory = None
    sizes = {fqn: calls[-1].shape[1] for fqn, calls in all_kept.kept.items() if calls and seen.kept[fqn]}
    layouts = grids_of_call(given)
    grids = {size: token_grid(size, layouts) for size in sizes.values()}
    known = [size for size in sizes.values() if grids[size] is not None] or list(sizes.values())
    num_tokens = Counter(known).most_common(1)[0][0]
    bits = {
        fqn: torch.zeros(num_tokens, dtype=torch.float32, device="cpu").index_fill_(0, seen.kept[fqn][-1][0], 1.0)
        for fqn, size in sizes.items()
        if size == num_tokens
    }
    names = list(bits)
    shown = [names[len(names) * part // min(MOST_SHOWN, len(names))] for part in range(min(MOST_SHOWN, len(names)))]
    timestep = state.plan.timestep
    return TokenMap(
        None if timestep is None else _largest(timestep_value(given, timestep, model)),
        grids[num_tokens] or (1, 1, num_tokens),
        {fqn: "".join(str(int(bit)) for bit in bits[fqn].tolist()) for fqn in shown},
        _as_text(torch.stack(list(bits.values())).mean(dim=0)),
        tuple(_as_text(row) for row in _brightness(given)),
    )


def _of_one_region(model: nn.Module, state: ModelRouting, batch: Batch) -> Batch | None:
    """The batch, or where its samples lie in several regions, those that lie where the first does."""
    regions = regions_of_call(model, state, batch)
    if len(set(regions)) == 1:
        return batch
    try:
        samples = group_samples(state, regions)[regions[0]]
        return bind_arguments(
            positional_names(type(model)), *pick_samples(model, state, samples, len(regions), (), batch)
        )
    except UnsupportedError:
        return None


def _largest(value: Tensor | float) -> float:
    return float(value.max()) if isinstance(value, Tensor) else float(value)


def _brightness(given: Batch) -> Tensor:
    """The first sample's latents (height, width) in [0, 1], the mean over their channels, at most ``MOST_PIXELS`` to a side; none
    where they are packed."""
    latents = latents_of_call(given)
    if latents is None:
        return torch.zeros(0, dtype=torch.float32, device="cpu")
    picture = latents[0].detach().float().cpu().mean(dim=0)
    picture = picture[len(picture) // 2] if picture.ndim == 3 else picture
    height, width = (min(side, MOST_PIXELS) for side in picture.shape)
    picture = torch.nn.functional.adaptive_avg_pool2d(picture[None], (height, width))[0]
    low, high = picture.quantile(0.01), picture.quantile(0.99)
    return ((picture - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _as_text(values: Tensor) -> str:
    """Values in [0, 1] as pairs of hexadecimal digits."""
    return bytes((values * 255).round().int().tolist()).hex()


def _from_text(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.float32, device="cpu") / 255
