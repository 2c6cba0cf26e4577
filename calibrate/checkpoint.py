"""Where a calibration has come to, on disk, so that one that was interrupted goes on as if it had not been.

    calibration.json          what was asked for, the step, the history; names the file of tensors and its hash
    step-000050.safetensors   masters, routers, trained weights, the optimiser's moments
    targets-0.safetensors     the dense outputs that weights learn from, as they were before the first step, one file a process

The JSON file is moved into place last: it decides which tensors count, whenever the process is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from ..errors import ArtefactError
from ..files import record_checksum, write_files
from ..routed import ROUTER
from ..sharding import whole
from .processes import of_all_processes, rank

TYPE, VERSION = "diffcr_compile.calibration", 4
_JSON = "calibration.json"
_PROGRESS = {"step", "history", "learned", "tables", "targets", "start_share", "weights", "table"}
_MOVED = ("weights", "table")
"""What a calibration changes of what it began with."""

_MIX = (-7046029254386353131, -4658895280553007687)
"""Odd numbers of 64 bits: a product spreads each bit over those above it (Steele et al. 2014, SplitMix64)."""

_CHUNK_BYTES = 1 << 20
"""Of a tensor, summed at a time: what fits a core's cache."""


class Checkpoint:
    """One directory. ``settings``: what must agree between the run that wrote it and the one that goes on. ``weights`` and
    ``table`` among them may also be those of the last checkpoint, in its progress: of a model that holds them already."""

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        self.targets: list[str] = []
        if self.path.exists() and not self._is_ours():
            raise ArtefactError(
                f"{self.path} exists and holds no calibration's checkpoints; expected a new path, or one written by calibrate."
            )

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Progress and tensors of the last checkpoint; None where there is none yet.

        Raises ArtefactError where it is damaged, of another version of this package, or of a run with other settings.
        """
        file = self.path / _JSON
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text())
            kind, version = record["type"], record["version"]
            settings, progress = record["settings"], record["progress"]
            tensors, digest, checksum = str(record["tensors"]), record["sha256"], record.pop("checksum")
            self.targets = [str(target) for target in record["targets"]]
            if not isinstance(settings, dict) or not set(progress) >= _PROGRESS:
                raise ValueError(f"expected settings, and a progress of {', '.join(sorted(_PROGRESS))}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtefactError(
                f"{file} is damaged: {type(error).__name__}: {error}. Delete {self.path} to start anew."
            ) from error
        if kind != TYPE or version != VERSION:
            raise ArtefactError(
                f"{file} is of type {kind!r}, version {version!r}; expected {TYPE!r}, version {VERSION}. Go on with "
                f"the diffcr_compile that wrote it, or delete {self.path} to start anew."
            )
        if checksum != record_checksum(record):
            raise ArtefactError(f"{file} is not as it was written. Delete {self.path} to start anew.")
        settings |= {name: progress[name] for name in _MOVED if self.settings[name] == progress[name]}
        other = sorted(key for key in {*settings, *self.settings} if settings.get(key) != self.settings.get(key))
        if other:
            raise ArtefactError(
                f"{self.path} is of a calibration with other settings ({', '.join(other)}). Give the settings it was begun with, "
                "another path, or delete it to start anew."
            )
        return progress, self._tensors(tensors, digest)

    def write(self, progress: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Make this the checkpoint to go on from; the one before is deleted then."""
        self.path.mkdir(parents=True, exist_ok=True)
        name = f"step-{progress['step']:06d}.safetensors"
        data = save_safetensors(_on_cpu(tensors))
        write_files({self.path / name: data})
        record = {
            "type": TYPE,
            "version": VERSION,
            "settings": self.settings,
            "progress": progress,
            "tensors": name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "targets": self.targets,
        }
        record["checksum"] = record_checksum(record)
        write_files({self.path / _JSON: json.dumps(record, indent=1).encode()})
        for old in self.path.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def read_targets(self) -> list[list[Tensor]]:
        """The dense outputs, by batch; raises ArtefactError where they are missing or damaged."""
        name = f"targets-{rank()}.safetensors"
        if rank() >= len(self.targets):
            raise ArtefactError(f"{self.path} lacks the file {name!r}. Delete the directory to start anew.")
        tensors = self._tensors(name, self.targets[rank()])
        targets: dict[int, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            batch, place = name.split(".")
            targets.setdefault(int(batch), {})[int(place)] = tensor
        return [[targets[batch][place] for place in sorted(targets[batch])] for batch in sorted(targets)]

    def write_targets(self, targets: list[list[Tensor]]) -> None:
        """Keep the dense outputs: later the weights that made them are gone."""
        self.path.mkdir(parents=True, exist_ok=True)
        tensors = {f"{batch}.{place}": tensor for batch, row in enumerate(targets) for place, tensor in enumerate(row)}
        data = save_safetensors(_on_cpu(tensors))
        write_files({self.path / f"targets-{rank()}.safetensors": data})
        self.targets = of_all_processes(hashlib.sha256(data).hexdigest())

    def _is_ours(self) -> bool:
        if not self.path.is_dir():
            return False
        names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        known = ("targets-", "step-")  # a first checkpoint may have been cut short before its record was there
        return not names or any(name == _JSON or name.startswith(known) for name in names)

    def _tensors(self, name: str, digest: str) -> dict[str, Tensor]:
        file = self.path / name
        if Path(name).name != name or not file.is_file():
            raise ArtefactError(f"{self.path} lacks the file {name!r}. Delete the directory to start anew.")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ArtefactError(f"{file} is truncated or changed. Delete {self.path} to start anew.")
        try:
            return load_safetensors(data)
        except SafetensorError as error:
            raise ArtefactError(f"{file} is damaged: {error}. Delete {self.path} to start anew.") from error


def digest(leaves: Iterable[tuple[Any, Any]]) -> str:
    """SHA-256 of names and what they name: shape, dtype and a sum over the bits of each tensor, numbers and text themselves, of
    other things their type. Sharded tensors are put together: all processes must ask."""
    found = hashlib.sha256()
    for name, leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = whole(leaf.detach())
            flatten = getattr(leaf, "__tensor_flatten__", None)  # a quantised one can't be sliced
            parts: list[str] = flatten()[0] if flatten else []
            sums = [_sum(part) for part in [getattr(leaf, each) for each in parts] or [leaf]]
            found.update(repr((name, tuple(leaf.shape), leaf.dtype, parts, sums)).encode())
        else:
            plain = leaf is None or isinstance(leaf, bool | int | float | str)
            found.update(repr((name, leaf if plain else type(leaf).__qualname__)).encode())
    return found.hexdigest()


def digest_weights(model: nn.Module) -> str:
    """:func:`digest` of a model's parameters, but for its routers."""
    return digest((name, weight) for name, weight in model.named_parameters() if f"{ROUTER}." not in name)


def _sum(tensor: Tensor) -> int:
    """All of a tensor's bits, eight bytes at a time, each mixed with its place and summed modulo 2**64, where the tensor lies:
    other bits, or the same ones elsewhere, make another sum, on every device the same one."""
    data = tensor.reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(data), _CHUNK_BYTES):
        part = data[start : start + _CHUNK_BYTES]
        words = nn.functional.pad(part, (0, -len(part) % 8)).view(torch.int64)  # a copy
        places = torch.arange(start // 8, start // 8 + len(words), device=words.device)
        words ^= places.mul_(_MIX[0])
        words *= _MIX[1]
        total += (words ^ words >> 32).sum()
    return int(total)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
