"""Let torchvision be imported where its C extension can't be loaded (a CUDA build beside a CPU torch).

Set-up of tests and benchmarks whose models need timm: call ``define`` before the first import of diffusers or timm.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def define() -> torch.library.Library:
    """torchvision registers fake kernels for operators of its C extension; their schemas are all that it asks for. Its own
    extension comes first, where it loads. The library that is returned must be kept alive."""
    package = importlib.util.find_spec("torchvision")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    for path in (path for folder in folders for path in Path(folder).glob("_C*.so")):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    return library
