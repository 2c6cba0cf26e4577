"""What calibration is fed: read once, moved to the model when used, drawn in an order that a seed decides."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import Path, bind_arguments, iterate_leaves, leaf_name, map_leaves, positional_names
from ..errors import CalibrationError, CaptureError, DiffCRError, UnsupportedError
from ..region import group_samples, pick_samples, pin_region, region_of, regions_of_call, timestep_value
from ..routed import ModelRouting

Batch = dict[str, Any]


class Batches(Sequence[Batch]):
    """Batches that are read when they are used, and the one that was read last: what the model raises then is about that.

    origins: of each the numbers, among those that calibrate was given, of the batches that its samples are from; None: its own.
    count: how many there are in all, the first ones once more behind the last; None: each once.
    """

    def __init__(
        self, batches: Sequence[Batch], origins: Sequence[Sequence[int]] | None = None, count: int | None = None
    ) -> None:
        self._batches, self._origins = batches, origins
        self._count = len(batches) if count is None else count
        self._last: int | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        self._last = None  # where there is none, as at the end of a loop
        batch = self._batches[self._place(place)]
        self._last = place
        return batch

    def name(self, place: int) -> str:
        """``batch 3``, as the user counts them from 0."""
        place = self._place(place)
        origins = [place] if self._origins is None else self._origins[place]
        return f"{'batch' if len(origins) == 1 else 'batches'} {', '.join(map(str, origins))}"

    def _place(self, place: int) -> int:
        return range(self._count)[place] % len(self._batches)

    def last(self) -> str:
        """The name of the batch that was read last."""
        return "a batch" if self._last is None else self.name(self._last)

    def repeated(self, count: int) -> Batches:
        """So many, the first ones once more behind the last."""
        return Batches(self._batches, self._origins, count)

    @contextlib.contextmanager
    def named(self, model: nn.Module) -> Iterator[None]:
        """Around what runs the model on one batch after the other: an error says on which.

        What the model raises becomes a CalibrationError. Memory that is short is no fault of a batch.
        """
        self._last = None
        try:
            yield
        except Exception as error:  # whatever the user's model raises
            if self._last is None or isinstance(error, torch.OutOfMemoryError):
                raise
            name = self.name(self._last)
            if isinstance(error, CaptureError | UnsupportedError):
                raise type(error)(f"{name}: {error}") from error
            if isinstance(error, DiffCRError):
                raise
            raise CalibrationError(
                f"{type(model).__name__} could not be run on {name}. It raised {type(error).__name__}: {error}. Expected batches "
                "that model(**batch) accepts."
            ) from error
        finally:
            self._last = None


def read_batches(batches: Iterable[Batch]) -> Sequence[Batch]:
    """All of them; a sequence stays as it is, and may read its batches when asked. Raises CalibrationError where there are none,
    or one holds meta tensors; TypeError where one is no dictionary, or where they are no several."""
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        found = "a single one: put it into a list" if isinstance(batches, Mapping) else type(batches).__name__
        raise TypeError(f"batches must be several keyword dictionaries of the model's forward, found {found}")
    read = batches if isinstance(batches, Sequence) else list(batches)
    if not read:
        raise CalibrationError("calibrate was given no batches; expected keyword dictionaries of the model's forward.")
    for place, batch in enumerate(read):
        if not isinstance(batch, dict):
            raise TypeError(
                f"batches must be keyword dictionaries of the model's forward, found {type(batch).__name__}"
            )
        for path, leaf in iterate_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                raise CalibrationError(
                    f"batch {place} holds a meta tensor ({leaf_name(path)}), which has no values to learn from. Expected the "
                    "denoiser's inputs, as diffcr_compile.record collects them."
                )
    return read


def to_device(model: nn.Module, batch: Batch) -> Batch:
    """The batch with copies of its tensors on the model's device: a forward may write into its inputs, and what was made under
    ``torch.inference_mode`` can't be learned from. Where the weights are offloaded (on the meta device between forwards), hooks
    move what a forward is given."""
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    device = next(devices, torch.device("cpu"))

    def move(_: Path, leaf: Any) -> Any:
        return leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf

    return map_leaves(move, batch)


def model_inputs(model: nn.Module, batch: Batch) -> Batch:
    """What the model's forward takes of a batch that holds more, for a loss of one's own (targets, noise, weights)."""
    parameters = inspect.signature(type(model).forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return batch
    return {name: value for name, value in batch.items() if name in parameters}


def drawn(num_batches: int, draw: int, seed: int) -> int:
    """Index of a draw's batch: all of them in a new random order each time round."""
    turn, place = divmod(draw, num_batches)
    return _shuffled(num_batches, seed * 1_000_003 + turn)[place]


def some(places: Sequence[int], count: int) -> list[int]:
    """At most so many of the places, at random and in their order: recorded samplings repeat their timesteps, and what is evenly
    apart may always meet the same ones."""
    return [places[place] for place in sorted(_shuffled(len(places), 0)[:count])]


def _shuffled(number: int, seed: int) -> list[int]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(number, generator=generator, device="cpu").tolist()


def by_region(model: nn.Module, state: ModelRouting, batches: Batches) -> Batches:
    """The same samples, put together so that each batch lies in one timestep region.

    A batch of samples from all regions runs as several small forwards, one for each. Batches are left as they are where that is
    so already, where the model's batch axes were not proved, or where their halves belong together.
    """
    timestep, axes = state.plan.timestep, state.plan.input_batch_axes
    if timestep is None or state.num_regions == 1 or state.config.guidance == "shared":
        return batches
    names = positional_names(type(model))
    regions_of = [region_of(timestep_value(batch, timestep, model), timestep, state.num_regions) for batch in batches]
    if all(len(set(regions)) == 1 for regions in regions_of):
        return batches  # which may be on disk: what follows holds them all
    piles: dict[Any, list[tuple[Batch, list[int]]]] = {}
    for place, (batch, regions) in enumerate(zip(batches, regions_of, strict=True)):
        leaves = [(leaf, axes[path]) for path, leaf in iterate_leaves(batch) if path in axes and leaf is not None]
        sizes = [leaf.shape[axis] if isinstance(leaf, Tensor) and leaf.ndim > axis else 1 for leaf, axis in leaves]
        if set(sizes) != {len(regions)}:  # batch axes unknown, or one timestep for several samples
            return batches
        for region in dict.fromkeys(regions):
            samples = torch.tensor([row for row, found in enumerate(regions) if found == region], device="cpu")
            try:
                part = bind_arguments(names, *pick_samples(model, state, samples, len(regions), (), batch))
            except UnsupportedError:
                return batches
            piles.setdefault((region, _kind(axes, part)), []).append((part, [place] * len(samples)))
    largest = max(map(len, regions_of))
    joined = [each for pile in piles.values() for each in _join(axes, pile, largest)]
    return Batches([batch for batch, _ in joined], [places for _, places in joined])


def as_routers_see(model: nn.Module, state: ModelRouting, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; for routers that see the timestep, each taken apart by timestep region, which is pinned until the next is asked
    for. Raises UnsupportedError where that can't be done."""
    names = positional_names(type(model))
    for batch in batches:
        if state.config.router == "token":
            yield batch
            continue
        regions = regions_of_call(model, state, batch)
        groups = group_samples(state, regions)
        for region, samples in groups.items():
            part = batch
            if len(groups) > 1:
                part = bind_arguments(names, *pick_samples(model, state, samples, len(regions), (), batch))
            with pin_region(state, region):
                yield part


def _join(axes: dict[Path, int], pile: list[tuple[Batch, list[int]]], size: int) -> Iterator[tuple[Batch, list[int]]]:
    """The samples of a pile in batches of ``size``, and of each the places that its samples come from; the last may be smaller."""
    columns = [dict(iterate_leaves(part)) for part, _ in pile]
    places = [place for _, from_places in pile for place in from_places]
    joined = {
        path: torch.cat([column[path] for column in columns], dim=axis)
        for path, axis in axes.items()
        if columns[0].get(path) is not None
    }

    def part(start: int, length: int) -> Batch:
        return map_leaves(
            lambda at, other: joined[at].narrow(axes[at], start, length) if at in joined else other, pile[0][0]
        )

    for start in range(0, len(places), size):
        own = places[start : start + size]
        yield part(start, len(own)), sorted(set(own))


def _kind(axes: dict[Path, int], bound: Batch) -> tuple[Any, ...]:
    """What samples must share to lie in one batch: the other axes' sizes, and all that has no batch axis."""

    def describe(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        if path in axes:
            return tuple(size for place, size in enumerate(leaf.shape) if place != axes[path]), leaf.dtype
        data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return tuple(leaf.shape), leaf.dtype, hashlib.sha256(data.tobytes()).hexdigest()

    return tuple((path, describe(path, leaf)) for path, leaf in iterate_leaves(bound))
