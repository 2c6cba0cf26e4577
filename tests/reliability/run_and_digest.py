"""Run as a script by ``test_determinism.py``: builds, transforms, runs; prints, as JSON, a digest of the outputs of each case.

Every case is made from nothing, and run twice: eagerly, with and without reuse, lowered, and on two threads.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import diffcr_compile  # before the folder of tests, which has a folder of the same name, is on the path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from models import Shape, TinyDiT, original, tiny_inputs

from reliability.support import sample

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
SMALL = Shape("plain", depth=1, heads=1, head_dim=6)
STEPS = (990.0, 700.0, 300.0, 10.0)
OPTIONS: dict[str, dict[str, Any]] = {"identity": {}, "reuse": {"skip": "reuse", "context": "kept"}}


def make(options: dict[str, Any], table: Any, shape: Shape = SHAPE) -> TinyDiT:
    config = diffcr_compile.DiffCRConfig(num_regions=4, **options)
    model = diffcr_compile.transform(original(shape), config, example_inputs=tiny_inputs(shape))
    diffcr_compile.set_ratios(model, table)
    return model


def digests(model: TinyDiT) -> list[str]:
    """Of the outputs of two trajectories, begun anew."""
    found = []
    for _ in range(2):
        diffcr_compile.reset(model)
        values = torch.stack(sample(model, model.shape, STEPS)).numpy().tobytes()
        found.append(hashlib.sha256(values).hexdigest())
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [[0.0, 0.2], [0.3, 0.4], [0.5, 0.9], [0.7, 0.0]]
    found = {name: digests(make(options, rows)) for name, options in OPTIONS.items()}
    found["dense"] = digests(make({}, 0.0))
    found["lowered"] = digests(diffcr_compile.lower(make({}, [[0.3]] * 4, SMALL), scope="full"))
    reusing = make(OPTIONS["reuse"], [[0.4]] * 4, SMALL)
    found["lowered, reuse"] = digests(diffcr_compile.lower(reusing, scope="regional"))
    torch.set_num_threads(2)
    found["two threads"] = digests(make(OPTIONS["reuse"], rows[::-1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
