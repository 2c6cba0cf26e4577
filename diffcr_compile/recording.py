"""Batches that were recorded: in memory, or as files that are read when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import ArtefactError, UnsupportedError
from .files import make_folder

Batch = dict[str, Any]


class Recording(Sequence[Batch]):
    """A sequence of keyword dictionaries, in the order in which they were recorded.

    folder: a new or empty directory, one safetensors file a batch, made where there is none; None: they stay in memory. Raises
    ArtefactError where it is neither, or can't be made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        if (
            self.folder is not None
            and self.folder.exists()
            and (not self.folder.is_dir() or any(self.folder.iterdir()))
        ):
            raise ArtefactError(
                f"{self.folder} exists and is not an empty directory; batches are recorded into a new one."
            )
        if self.folder is not None:
            make_folder(self.folder)
        self._batches: list[Batch | Path] = []
        self._number = 0

    def append(self, batch: Batch) -> None:
        """Add a batch at the end."""
        if self.folder is None:
            self._batches.append(batch)
            return
        file = self.folder / f"{self._number:06d}.safetensors"
        write_batch(file, batch)
        self._number += 1
        self._batches.append(file)

    def drop(self, place: int) -> None:
        """Forget the batch at a place, and delete its file."""
        batch = self._batches.pop(place)
        if isinstance(batch, Path):
            batch.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, place: int) -> Batch: ...

    @overload
    def __getitem__(self, place: slice) -> list[Batch]: ...

    def __getitem__(self, place: int | slice) -> Batch | list[Batch]:
        found = self._batches[place]
        if isinstance(found, list):
            return [_read(batch) for batch in found]
        return _read(found)


def write_batch(file: Path, batch: Batch) -> None:
    """Write a batch: its tensors as such, its structure and its other values as JSON in the file's header.

    Raises UnsupportedError for a value that is neither a tensor, a number, text, a dtype nor a device, or in a container that is
    not Python's own.
    """
    leaves, spec = pytree.tree_flatten(batch)
    try:
        others = {str(place): _to_json(leaf) for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        structure, values = pytree.treespec_dumps(spec), json.dumps(others)
        if pytree.treespec_loads(structure) != spec:
            raise TypeError("its dictionaries have keys that JSON has no words for")
        header = {"structure": structure, "others": values, "leaves": str(len(leaves))}
        tensors = {str(place): leaf.contiguous() for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        save_file(tensors or {"none": torch.zeros(0, dtype=torch.float32, device="cpu")}, file, metadata=header)
    except (
        TypeError,
        ValueError,
        NotImplementedError,
        KeyError,
        RuntimeError,
    ) as error:  # the last two: kinds of tensors
        raise UnsupportedError(
            f"this call can't be written to a file: {error}. Record without a folder, which keeps calls in memory as they are."
        ) from error


def read_batch(file: Path) -> Batch:
    """Inverse of :func:`write_batch`. Raises ArtefactError for a file that is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as stream:  # type: ignore[no-untyped-call]
            header = stream.metadata()
            others = json.loads(header["others"], object_hook=_from_json)
            leaves = [
                others[str(place)] if str(place) in others else stream.get_tensor(str(place))
                for place in range(int(header["leaves"]))
            ]
            return pytree.tree_unflatten(leaves, pytree.treespec_loads(header["structure"]))
    except Exception as error:  # the file, its header, its structure: all of it comes from outside
        raise ArtefactError(f"{file} holds no recorded batch: {type(error).__name__}: {error}.") from error


def _to_json(value: Any) -> Any:
    """A leaf as JSON gives it back; what JSON has no word for under the name of its type. What is of a type derived
    from one that JSON knows would come back as that."""
    if type(value) in (torch.dtype, torch.device):
        return {type(value).__name__: str(value)}
    if type(value) in (type(None), bool, int, float, str):
        return value
    raise TypeError(
        f"it has an argument of type {type(value).__name__}, expected tensors, numbers, text, dtypes or devices"
    )


def _from_json(value: dict[str, Any]) -> Any:
    if set(value) == {"device"}:
        return torch.device(value["device"])
    if set(value) == {"dtype"}:
        found = getattr(torch, value["dtype"].removeprefix("torch."))
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{found!r} is no dtype")
        return found
    return value


def _read(batch: Batch | Path) -> Batch:
    return read_batch(batch) if isinstance(batch, Path) else batch
