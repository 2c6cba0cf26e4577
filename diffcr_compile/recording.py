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

from .errors import ArtefactError

Batch = dict[str, Any]


class Recording(Sequence[Batch]):
    """A sequence of keyword dictionaries, in the order in which they were recorded.

    folder: a new or empty directory, one safetensors file a batch; None: they stay in memory. Raises ArtefactError where it is
    neither.
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
        self._batches: list[Batch | Path] = []
        self._number = 0

    def append(self, batch: Batch) -> None:
        """Add a batch at the end."""
        if self.folder is None:
            self._batches.append(batch)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
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
    """Write a batch: its tensors as such, its structure and its other values as JSON in the file's header."""
    leaves, spec = pytree.tree_flatten(batch)
    tensors = {str(place): leaf.contiguous() for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    others = {str(place): leaf for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    header = {"structure": pytree.treespec_dumps(spec), "others": json.dumps(others), "leaves": str(len(leaves))}
    save_file(tensors or {"none": torch.zeros(0)}, file, metadata=header)


def read_batch(file: Path) -> Batch:
    """Inverse of :func:`write_batch`. Raises ArtefactError for a file that is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as stream:  # type: ignore[no-untyped-call]
            header = stream.metadata()
            others = json.loads(header["others"])
            leaves = [
                others[str(place)] if str(place) in others else stream.get_tensor(str(place))
                for place in range(int(header["leaves"]))
            ]
            return pytree.tree_unflatten(leaves, pytree.treespec_loads(header["structure"]))
    except Exception as error:  # the file, its header, its structure: all of it comes from outside
        raise ArtefactError(f"{file} holds no recorded batch: {type(error).__name__}: {error}.") from error


def _read(batch: Batch | Path) -> Batch:
    return read_batch(batch) if isinstance(batch, Path) else batch
