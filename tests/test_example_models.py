"""The photograph and caption models of `examples/`: committed weights and records, routing, guidance, training scripts."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import routed_fqns
from torch import Tensor, nn

import diffcr_compile

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("photos", "captions")
DEPTHS = {"photos": 8, "captions": 6}
RECORD_FIELDS = {
    "command",
    "seed",
    "minutes",
    "threads",
    "torch",
    "num_samples",
    "sampling_steps",
    "steps",
    "model_seconds",
    "last_loss",
    "quality",
}
MEGABYTES = 1e6
ROUNDING = 1e-5
"""Largest difference of pictures in [-1, 1], float32, where only the batch that a sample is computed in differs."""

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")


@functools.cache
def example(name: str) -> ModuleType:
    return importlib.import_module(name)


@functools.cache
def inputs(name: str) -> dict[str, Tensor]:
    return example(name).calibration_batches(1, 2)[0]


@functools.cache
def _transformed(name: str) -> nn.Module:
    return diffcr_compile.transform(example(name).load_model(), example_inputs=inputs(name))


def transformed(name: str, ratio: float) -> nn.Module:
    model = _transformed(name)
    diffcr_compile.set_ratios(model, ratio)
    return model


def asked(name: str) -> Any:
    return torch.tensor([3, 8]) if name == "photos" else ["a seven, top left", "the digit two, lower right"]


def noise(name: str) -> Tensor:
    module = example(name)
    shape = (2, module.CHANNELS, module.CANVAS_SIZE, module.CANVAS_SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", NAMES)
def test_record(name: str) -> None:
    record = json.loads((EXAMPLES / "weights" / f"{name}.json").read_text())
    assert record.keys() >= RECORD_FIELDS
    assert min(record["steps"].values()) > 0
    assert record["quality"]["frechet_train_to_held_out"] > 0
    measures = {"class_accuracy", "frechet_to_held_out"} | ({"quarter_accuracy"} if name == "captions" else set())
    for guidance in ("guidance_1.0", "guidance_2.0"):
        assert record["quality"][guidance].keys() >= measures


def test_weights_are_small() -> None:
    files = [file for name in NAMES for file in (EXAMPLES / "weights").glob(f"{name}_*.safetensors")]
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) < 8 * MEGABYTES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_routed(name: str) -> None:
    assert routed_fqns(transformed(name, 0)) == [f"blocks.{index}" for index in range(DEPTHS[name])]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ratio_zero_changes_no_bit(name: str) -> None:
    with torch.no_grad():
        expected = example(name).load_model()(**inputs(name))
        assert torch.equal(transformed(name, 0)(**inputs(name)), expected)
        assert not torch.equal(transformed(name, 0.3)(**inputs(name)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0, 0.3])
def test_short_sampling(name: str, ratio: float) -> None:
    images = example(name).sample(transformed(name, ratio), asked(name), steps=4, guidance=2.0, noise=noise(name))
    assert images.shape == noise(name).shape
    assert images.isfinite().all()
    assert images.std(dim=(1, 2, 3)).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0, 0.3])
def test_two_calls_equal_batched_guidance(ratio: float) -> None:
    captions, model = example("captions"), transformed("captions", ratio)
    batched, apart = (
        captions.sample(model, asked("captions"), steps=4, guidance=2.0, two_calls=two, noise=noise("captions"))
        for two in (False, True)
    )
    unguided = captions.sample(model, asked("captions"), steps=4, guidance=1.0, noise=noise("captions"))
    assert (batched - apart).abs().max() < ROUNDING
    assert (batched - unguided).abs().max() > 100 * ROUNDING


def test_captions_name_what_the_pictures_show() -> None:
    captions = example("captions")
    images, labels, quarters = captions.pictures(200, torch.Generator().manual_seed(0), train=False)
    assert captions.class_accuracy(images, labels) > 0.95
    # The middle of a digit's ink is off the middle of its square by less than the 3 pixels that the quarters leave free.
    assert captions.quarter_accuracy(images, quarters) == 1
    assert captions.quarter_accuracy(images.flip(2), quarters) == 0


def test_tokenize() -> None:
    captions = example("captions")
    words = captions.tokenize(["The digit two, lower right", ""])
    assert [captions.VOCABULARY[word] for word in words[0]] == ["the", "digit", "two", ",", "lower", "right"]
    assert words[1].tolist() == [0] * captions.NUM_WORDS
    for text in ("a horse", "a a a a a a a"):
        with pytest.raises(ValueError, match="at most 6 words"):
            captions.tokenize([text])


def test_photograph_splits_share_no_pixel() -> None:
    photos = example("photos")
    before = [photo.clone() for photo in photos.photographs()]
    try:
        for photo in photos.photographs():
            photo[:, :, -photos.HELD_OUT_WIDTH :] = 2.0
        images, _ = photos.pictures(200, torch.Generator().manual_seed(0))
        held_out, _ = photos.pictures(200, torch.Generator().manual_seed(0), train=False)
    finally:
        for photo, saved in zip(photos.photographs(), before, strict=True):
            photo.copy_(saved)
    assert images.max() <= 1
    assert held_out.min() == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = example(f"train_{name}")
    extra = ["--classifier-steps", "2"] if name == "photos" else []
    command = ["--minutes", "0.02", "--batch", "2", "--num-samples", "2", "--guidance", "1.0"]
    monkeypatch.setattr(sys, "argv", [f"train_{name}.py", *command, *extra, "--output", str(tmp_path)])
    script.main()
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record.keys() >= RECORD_FIELDS
    assert record["steps"]["window"] > 0
    assert record["steps"]["canvas"] > 0
    weights = example(name).load_model(tmp_path / f"{name}_dit.safetensors").state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["head.weight"].abs().max() > 0  # zero at the start


@pytest.fixture(scope="module")
def inpainting() -> ModuleType:
    return example("inpainting")


@pytest.mark.slow
def test_inpainting_leaves_what_is_not_hidden_and_knows_what_is(inpainting: ModuleType) -> None:
    hidden, labels = inpainting.subjects(12)
    model = inpainting.load_model()
    images = inpainting.sample(model, hidden, steps=6, generator=torch.Generator().manual_seed(0))
    inside, outside = inpainting.errors(images, hidden)
    assert outside == 0
    assert 0 < inside < inpainting.errors(torch.full_like(images, -1.0), hidden)[0]
    guided = inpainting.sample(model, hidden, steps=2, guidance=2.0, generator=torch.Generator().manual_seed(0))
    assert guided.shape == images.shape
    later, last = inpainting.subjects(2, 10)
    assert torch.equal(later.pictures, hidden.pictures[10:])
    assert torch.equal(last, labels[10:])


def test_every_example_says_what_a_sampling_is_asked_for() -> None:
    for name in ("digits", *NAMES):
        asked_for, labels = example(name).subjects(12)
        assert len(asked_for) == len(labels) == 12
        later, last = example(name).subjects(2, 10)
        assert list(later) == list(asked_for[10:])
        assert torch.equal(last, labels[10:])


@pytest.mark.slow
def test_training_script_of_inpainting(inpainting: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--steps", "2", "--batch", "2", "--num-samples", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_inpainting.py", *command])
    example("train_inpainting").main()
    record = json.loads((tmp_path / "inpainting.json").read_text())
    assert record.keys() >= RECORD_FIELDS - {"minutes"}
    weights = inpainting.load_model(tmp_path / "inpainting_dit.safetensors").state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["pos_embed.proj.weight"][:, 1:].abs().max() > 0  # zero at the start
    trained = json.loads((EXAMPLES / "weights" / "inpainting.json").read_text())
    assert trained["quality"]["completed"]["error_inside"] < trained["quality"]["empty"]["error_inside"]
