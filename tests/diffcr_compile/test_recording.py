"""Recorded batches: kept in memory or on disk, all or some of them."""

from __future__ import annotations

from collections import Counter
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, original, routed, same_bits, tiny_inputs
from torch import Tensor

import diffcr_compile
from diffcr_compile.recording import read_batch, write_batch

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)


def test_a_batch_of_any_structure_survives_its_file(tmp_path: Path) -> None:
    batch = {
        "x": torch.randn(2, 3, dtype=torch.bfloat16),
        "nested": {"flags": (True, None, 2.5), "tables": [torch.arange(4), torch.zeros(0)]},
        "name": "a lighthouse",
        "kinds": [torch.bfloat16, torch.device("cuda", 1)],
    }
    write_batch(tmp_path / "batch.safetensors", batch)
    again = read_batch(tmp_path / "batch.safetensors")
    assert same_bits(again["x"], batch["x"])
    assert again["nested"]["flags"] == (True, None, 2.5)
    assert [tensor.tolist() for tensor in again["nested"]["tables"]] == [[0, 1, 2, 3], []]
    assert again["name"] == "a lighthouse"
    assert again["kinds"] == [torch.bfloat16, torch.device("cuda", 1)]


@pytest.mark.parametrize("damage", [b"", b"nothing of the kind", b"\xff" * 64])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "batch.safetensors"
    file.write_bytes(damage)
    with pytest.raises(diffcr_compile.ArtefactError, match="holds no recorded batch"):
        read_batch(file)


class Own(dict[Any, Any]):
    """A container of the user's."""


@pytest.mark.parametrize(
    "thing",
    [
        object(),
        {1: object()},
        slice(1),
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
        Own(size=(2, 3)),
        Own(device="cpu"),
        {(1, 2): 3},
        IntEnum("Kind", "photo")(1),
    ],
)
def test_what_no_file_holds_is_named_and_leaves_no_file(tmp_path: Path, thing: object) -> None:
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"can't be written to a file: .*Record without a folder"):
        write_batch(tmp_path / "batch.safetensors", {"x": torch.zeros(2), "thing": thing})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_made_is_found_before_the_first_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(diffcr_compile.ArtefactError, match=r"can't be made \(Not a directory\)"),
        diffcr_compile.record(original(SHAPE), folder=tmp_path / "file" / "calls"),
    ):
        pytest.fail("began to record")


def test_recording_to_disk_is_recording(tmp_path: Path) -> None:
    model, inputs = original(SHAPE), [tiny_inputs(SHAPE, seed=seed) for seed in range(3)]
    with diffcr_compile.record(model, folder=tmp_path / "calls") as batches:
        for one in inputs:
            model(**one)
    assert len(list((tmp_path / "calls").iterdir())) == len(batches) == 3
    assert all(same_bits(batch, one) for batch, one in zip(batches, inputs, strict=True))
    with (
        pytest.raises(diffcr_compile.ArtefactError, match="not an empty directory"),
        diffcr_compile.record(model, folder=tmp_path / "calls"),
    ):
        pass


def test_a_limit_is_spread_evenly_over_the_regions(tmp_path: Path) -> None:
    """Forty calls, thirty of them in one region: of eight kept, two lie in each, in the order in which they came."""
    model = routed(SHAPE)
    steps = [990.0] * 30 + [600.0] * 4 + [300.0] * 3 + [20.0] * 3
    with diffcr_compile.record(model, limit=8, folder=tmp_path / "calls") as batches:
        for number, step in enumerate(steps):
            model(**tiny_inputs(SHAPE, seed=number, timestep=torch.full((3,), step)))
    kept = [float(batch["timestep"][0]) for batch in batches]
    assert Counter(kept) == {990.0: 2, 600.0: 2, 300.0: 2, 20.0: 2}
    assert kept == sorted(kept, reverse=True)
    assert len(list((tmp_path / "calls").iterdir())) == 8


def test_with_a_limit_calls_outside_the_range_are_a_region_of_their_own() -> None:
    model = routed(SHAPE)
    with diffcr_compile.record(model, limit=4) as batches:
        for step in [500.0] * 6 + [5000.0] * 6:
            model(**tiny_inputs(SHAPE, timestep=step))
    assert Counter(float(batch["timestep"].max()) for batch in batches) == {500.0: 2, 5000.0: 2}


def test_with_a_limit_calls_may_leave_the_timestep_out() -> None:
    class Optional(TinyDiT):
        def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(x, x.new_full((len(x),), 500.0) if timestep is None else timestep)

    model = original(SHAPE)
    model.__class__ = Optional
    inputs = tiny_inputs(SHAPE)
    diffcr_compile.transform(model, example_inputs=inputs)
    with diffcr_compile.record(model, limit=4) as batches:
        model(x=inputs["x"])
        model(**inputs)
    assert [sorted(batch) for batch in batches] == [["x"], ["timestep", "x"]]


@pytest.mark.parametrize("limit", [0, -1, True, 1.5])
def test_a_bad_limit_is_named(limit: int) -> None:
    with pytest.raises(ValueError, match="limit must be"), diffcr_compile.record(original(SHAPE), limit=limit):
        pass


def test_recorded_files_calibrate(tmp_path: Path) -> None:
    model = routed(SHAPE)
    with diffcr_compile.record(model, folder=tmp_path / "calls") as batches:
        for seed in range(3):
            model(**tiny_inputs(SHAPE, num_tokens=40, seed=seed))
    config = diffcr_compile.CalibrationConfig(steps=4, trainable="routers")
    report = diffcr_compile.calibrate(model, batches, budget=0.7, config=config)
    assert 0.693 <= report.share <= 0.7
