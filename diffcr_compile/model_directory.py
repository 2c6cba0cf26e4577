"""Model directories and files of inputs: what the command line reads."""

from __future__ import annotations

import importlib
import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from .arguments import map_leaves
from .errors import CaptureError, DiffCRError
from .recording import read_batch

INSTALL = "Install it with: pip install 'diffcr-compile[cli]'"


def build_model(folder: Path, device: str, *, weights: bool) -> Any:
    """The model of a directory, in eval mode: with its weights, in their dtype, or random ones (none on meta).

    Raises DiffCRError.
    """
    file = folder / "config.json"
    if not file.is_file():
        hint = (
            f" Of this pipeline it may be {folder / 'transformer'}." if (folder / "model_index.json").is_file() else ""
        )
        raise DiffCRError(
            f"{folder} holds no config.json; expected a model directory as save_pretrained writes it.{hint}"
        )
    config = read_json(file)
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise DiffCRError(
            f"{file} has no _class_name; expected the configuration of one diffusers model (not of a pipeline)."
        )
    kind = _find_class(name)
    try:
        if weights:
            dtype = _stored_dtype(folder)
            model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, torch_dtype=dtype)
        else:
            with torch.device(device):
                model = kind.from_config(config)
        return model.to(device).eval()
    except Exception as error:  # whatever a model's constructor raises on a configuration or file it does not know
        raise DiffCRError(f"{name} could not be built from {folder}: {type(error).__name__}: {error}") from error


def _stored_dtype(folder: Path) -> torch.dtype:
    """That of most of the weights in the directory's first file, which batches recorded from a pipeline share."""
    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as file:
        dtypes = Counter(file.get_tensor(name).dtype for name in file.keys())  # noqa: SIM118
    floating = [dtype for dtype, _ in dtypes.most_common() if dtype.is_floating_point]
    return floating[0] if floating else torch.float32


def has_weights(folder: Path) -> bool:
    """Whether the directory holds weights beside the configuration."""
    return any(folder.glob("*.safetensors"))


def _find_class(name: str) -> Any:
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError:
        raise DiffCRError(f"diffcr-compile on the command line needs diffusers. {INSTALL}") from None
    for place in (diffusers, importlib.import_module("diffusers.models.transformers")):
        found = getattr(place, name, None)
        if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
            return found
    raise DiffCRError(f"diffusers {diffusers.__version__} has no model class {name!r} (_class_name in config.json).")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DiffCRError where there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DiffCRError(f"{file} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise DiffCRError(f"{file} must hold a JSON object, found {type(data).__name__}.")
    return data


def read_inputs(model: nn.Module, file: Path, device: str) -> dict[str, Any]:
    """Keyword arguments from a safetensors file: one that ``record`` wrote, or one whose keys are the forward's keywords.

    In the latter, tensors without axes are numbers where the forward takes no tensor. Raises CaptureError, ArtefactError.
    """
    try:
        with safe_open(file, framework="pt") as stream:  # type: ignore[no-untyped-call]
            recorded = "structure" in (stream.metadata() or {})
        if recorded:
            move = lambda _, leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
            return map_leaves(move, read_batch(file))
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CaptureError(f"{file} is no safetensors file: {error}.") from error
    parameters = inspect.signature(model.forward).parameters
    unknown = [key for key in tensors if key not in parameters]
    if unknown or not tensors:
        found = ", ".join(map(repr, unknown)) or "nothing"
        raise CaptureError(
            f"{file} holds {found}, which {type(model).__name__}.forward does not take; expected keys of {', '.join(parameters)}."
        )
    return {
        key: value.item() if value.dim() == 0 and "Tensor" not in str(parameters[key].annotation) else value.to(device)
        for key, value in tensors.items()
    }
