"""``examples/benchmarks/compatibility.json`` tells of every cell that there is; what it calls not applicable fails dense."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import compatibility as tests_of_cells
import pytest
import torch
from compatibility.matrix import CELLS, inputs, plain, run
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context

RECORD = Path(__file__).parents[1] / "examples" / "benchmarks" / "compatibility.json"


def test_every_cell_is_in_the_table_and_none_failed() -> None:
    for file in Path(str(tests_of_cells.__file__)).parent.glob("test_*.py"):
        importlib.import_module(f"compatibility.{file.stem}")
    recorded = {(row, title, model): verdict for row, title, model, verdict, _ in json.loads(RECORD.read_text())}
    assert set(recorded) == {(place.row, place.title, model) for place, model in CELLS}
    assert set(recorded.values()) <= {"works", "refused", "n/a", "not run"}


def test_group_offload_of_the_plain_dit_is_refused_by_diffusers() -> None:
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="group offload"):
        plain("dit").enable_group_offload(device, device, offload_type="block_level", num_blocks_per_group=1)


def test_first_block_cache_fails_on_the_plain_sd3() -> None:
    model = plain("sd3")
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=-1.0))
    _set_cache_context(model, CacheContext("cond"))
    with pytest.raises((AttributeError, TypeError)):
        run(model, inputs("sd3"))
