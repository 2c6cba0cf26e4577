"""``save`` and ``load``: a routing as a small directory, JSON beside safetensors, never pickled.

    routing.json         type, version, configuration, the plan (with the kinds of call that were met later), fingerprint of the
                         model, ratio table
    routers.safetensors  one float vector per block, or one per block and timestep region
    report.json          of the calibration that made the table, if one did: read by ``CalibrationReport.load``

The record decides: it is moved into place when the routers that it names by their hash are there, under a name that ends with it;
then they are moved too. ``load`` needs no inputs: it writes the programs from the stored plan. The fingerprint ties the plan to the
model's classes and parameter shapes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from .arguments import is_record, record_fields
from .config import DiffCRConfig
from .errors import AlreadyTransformedError, ArtefactError
from .files import REPORT_TYPE, holds_type, record_checksum, write_files
from .fingerprint import fingerprint
from .plan import ModelPlan, plan_from_dict, plan_to_dict
from .ratios import SCALE
from .routed import ROUTER, ModelRouting, router_weight, routing_of, settle
from .sharding import is_sharded, whole
from .table import read_table, write_table
from .transform import attach, restore
from .unwrap import unwrap

TYPE = "diffcr_compile.routing"
VERSION = 2
"""1: a plan for the first kind of call alone."""

_JSON, _TENSORS, _REPORT = "routing.json", "routers.safetensors", "report.json"
_LARGEST_JSON_BYTES = 4 * 2**20
_SLACK_BYTES = 2**16
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)
"""What comes of values that no plan has."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a transformed model's routing to the directory ``path``: plan, table and routers, not the model's weights.

    Weights that ``calibrate`` trained are saved as those of any model (``save_pretrained``, safetensors), and loaded before
    ``load``. A routing that was there is replaced, in one step: a failure leaves it, or the new one. Other files there are let be.
    Of a model that FSDP2 has sharded all processes must save; the first one writes. Raises NotTransformedError, CaptureError
    (blocks not looked for yet), ArtefactError where ``path`` exists and is no such directory.
    """
    model = unwrap(model)
    state = settle(model)
    target = Path(path).resolve()
    if target.exists() and not (target.is_dir() and is_ours(target)):
        raise ArtefactError(f"{target} exists and is no saved routing; expected a new path, or one written by save.")
    weights = {block.fqn: whole(router_weight(model.get_submodule(block.fqn)).detach()) for block in state.blocks}
    if is_sharded(model) and torch.distributed.get_rank() != 0:
        return
    tensors = save_safetensors({fqn: weight.cpu().contiguous() for fqn, weight in weights.items()})
    record = {
        "type": TYPE,
        "version": VERSION,
        "config": state.config.to_dict(),
        "fingerprint": state.fingerprint,
        "plan": _encode(plan_to_dict(state.plan)),
        "table": state.rows,
        "trained": state.trained,
        "degree": state.degree,
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    record["checksum"] = record_checksum(record)
    incoming = _incoming(target, record["sha256"])
    contents = {incoming: tensors, target / _JSON: json.dumps(record, indent=1).encode()}
    made_here = state.report is not None and read_table(state).tolist() in _tables(state.report)
    if made_here:
        contents = {target / _REPORT: json.dumps(state.report, indent=1).encode(), **contents}
    target.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        write_files(contents)
        os.replace(incoming, target / _TENSORS)
        if not made_here and holds_type(target / _REPORT, REPORT_TYPE):
            (target / _REPORT).unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Route a plain model as it was when :func:`save` wrote ``path``; in place, returns the same object. Needs no inputs.

    Raises AlreadyTransformedError; ArtefactError for files that are missing, damaged, newer than this package, or made for
    another architecture. The model is then as it was before.

    What the blocks do with a call is proved at the first forward that skips tokens (or learns to), on random weights as in
    ``transform``; it raises ArtefactError where that is not what the plan says. That skipped tokens may keep their input is read
    off graphs, and not looked at again. A graph that is compiled or exported whole before such a forward goes by the fingerprint,
    as does a sharded model.
    """
    model = unwrap(model)
    if routing_of(model) is not None:
        raise AlreadyTransformedError(f"{type(model).__name__} is already transformed; restore(model) before load.")
    source = Path(path)
    record = _read_record(source)
    try:
        config = DiffCRConfig.from_dict(record["config"])
        plan = plan_from_dict(_decode(record["plan"]))
        table, expected, trained = record["table"], record["fingerprint"], record["trained"]
        degree = float(record.get("degree", config.extrapolation))
    except _DAMAGE as error:
        raise ArtefactError(f"{source / _JSON} is damaged: {type(error).__name__}: {error}.") from error
    report = _read_report(source)
    found = fingerprint(model)
    if expected != found:
        raise ArtefactError(
            f"{source} was made for another architecture than this {type(model).__name__} (fingerprint {expected!s:.12}, this "
            f"model's {found:.12}). Classes, names and shapes of all parameters must agree."
        )
    _check_table(source, table, trained, degree, plan, config)
    state = ModelRouting(config)
    try:
        tensors = _read_tensors(source, record, plan, config)
        attach(model, state, plan)
    except _DAMAGE as error:
        raise ArtefactError(f"{source} is damaged, or fits no {type(model).__name__}: {error}.") from error
    try:
        for block in state.blocks:
            getattr(model.get_submodule(block.fqn), ROUTER).fill(tensors[block.fqn])
        write_table(state, table)
        state.trained, state.degree, state.report = trained, degree, report
    except Exception:
        restore(model)
        raise
    return model


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One save at a time, where the file system can lock a folder; a process that ends lets go of it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_ours(target: Path) -> bool:
    """Whether a folder is a saved routing, or empty but for hidden files, such as a save that was killed has left."""
    return holds_type(target / _JSON, TYPE) or all(entry.name.startswith(".") for entry in target.iterdir())


def _incoming(folder: Path, digest: Any) -> Path:
    """Where the routers with this hash lie until the record that names them is in place."""
    return folder / f".{_TENSORS}.{digest}"


def _tensors_file(source: Path, record: dict[str, Any]) -> Path:
    """The routers that the record names: still incoming where a save was killed when all but their place was right."""
    digest = str(record.get("sha256"))
    return _incoming(source, digest) if digest.isalnum() and _incoming(source, digest).is_file() else source / _TENSORS


def _read_record(source: Path) -> dict[str, Any]:
    file = source / _JSON
    if not file.is_file():
        raise ArtefactError(_missing(source))
    if file.stat().st_size > _LARGEST_JSON_BYTES:
        raise ArtefactError(
            f"{file} is {file.stat().st_size} bytes long; no routing is longer than {_LARGEST_JSON_BYTES}."
        )
    try:
        record = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{file} is damaged: {error}. Save the routing again.") from error
    if not isinstance(record, dict) or record.get("type") != TYPE:
        raise ArtefactError(f"{file} is no saved routing: expected type {TYPE!r}.")
    version = record.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ArtefactError(
            f"{file} has version {version!r}, newer than this package knows ({VERSION}). Upgrade diffcr-compile."
        )
    if record.get("checksum") != record_checksum(record):
        raise ArtefactError(f"{file} is not as it was written (truncated or changed). Save the routing again.")
    return record


def _missing(source: Path) -> str:
    return f"{source} holds no saved routing; expected the files {_JSON} and {_TENSORS} there."


def _read_report(source: Path) -> dict[str, Any] | None:
    """The report as it was written, for the next save; no routing depends on it."""
    file = source / _REPORT
    if not file.is_file():
        return None
    try:
        report = json.loads(file.read_text())
        _tables(report)
        return report  # type: ignore[no-any-return]
    except (*_DAMAGE, UnicodeDecodeError) as error:
        raise ArtefactError(
            f"{file} is damaged: {type(error).__name__}: {error}. Delete it, and the routing loads without a report."
        ) from error


def _tables(report: dict[str, Any]) -> list[Any]:
    """Tables that a report's calibration made: that of its budget, and those of others."""
    return [report["table"], *(table for _, table in report["tables"])]


def _read_tensors(source: Path, record: dict[str, Any], plan: ModelPlan, config: DiffCRConfig) -> dict[str, Tensor]:
    """One router for each block of the plan; no more is read than they take."""
    file = _tensors_file(source, record)
    if not file.is_file():
        raise ArtefactError(_missing(source))
    widths = {site.fqn: plan.families[site.family].width for site in plan.sites}
    rows = (config.num_regions,) if config.router == "timestep" else ()
    largest = _SLACK_BYTES + sum(8 * math.prod((*rows, width)) + 512 + len(fqn) for fqn, width in widths.items())
    if file.stat().st_size > largest:
        raise ArtefactError(
            f"{file} is {file.stat().st_size} bytes long; the routers of this plan take at most {largest}."
        )
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.get("sha256"):
        raise ArtefactError(
            f"{file} is not the one that {_JSON} was written with (truncated or changed). Save the routing again."
        )
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise ArtefactError(f"{file} is damaged: {error}.") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.dtype.is_floating_point}
    if len(tensors) > len(found) or found != {fqn: (*rows, width) for fqn, width in widths.items()}:
        raise ArtefactError(f"{file} does not hold one router of floating numbers for each block of the plan.")
    return tensors


def _check_table(source: Path, table: Any, trained: Any, degree: float, plan: ModelPlan, config: DiffCRConfig) -> None:
    shape = (config.num_regions if plan.timestep is not None else 1, len(plan.sites))
    rows = table if isinstance(table, list) else []
    if len(rows) != shape[0] or any(not isinstance(row, list) or len(row) != shape[1] for row in rows):
        raise ArtefactError(f"{source / _JSON} is damaged: expected a ratio table of shape {shape}.")
    if not all(type(value) is int and 0 <= value <= SCALE for row in rows for value in row):
        raise ArtefactError(f"{source / _JSON} is damaged: expected ratios of whole thousandths, 0..{SCALE}.")
    if not 0 <= degree <= config.extrapolation:
        raise ArtefactError(
            f"{source / _JSON} is damaged: expected a number from 0 to {config.extrapolation} for 'degree', found {degree!r}."
        )
    if not isinstance(trained, bool):
        raise ArtefactError(f"{source / _JSON} is damaged: expected true or false for 'trained'.")


def _encode(value: Any) -> Any:
    """JSON form of a plan's dictionary; what JSON has no word for is tagged."""
    if is_record(value):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"record": [kind, [[name, _encode(getattr(value, name))] for name in record_fields(value)]]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, frozenset):
        return {"frozenset": sorted((_encode(item) for item in value), key=repr)}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "dict":
        return {_decode(key): _decode(item) for key, item in content}
    if tag == "record":
        kind, items = content
        return _loaded_dataclass(kind)(**{name: _decode(item) for name, item in items})
    if tag in ("tuple", "frozenset"):
        return {"tuple": tuple, "frozenset": frozenset}[tag](_decode(item) for item in content)
    raise ValueError(f"unknown tag {tag!r}")


def _loaded_dataclass(kind: str) -> Any:
    """The dataclass ``module:name`` that a block returns; it must be there already, nothing is imported."""
    module, _, name = kind.partition(":")
    found = getattr(sys.modules.get(module), name, None)
    if not isinstance(found, type) or not is_dataclass(found):
        raise ValueError(f"a block returns the dataclass {kind}, which is not loaded")
    return found
