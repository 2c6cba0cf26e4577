"""The sampler that is recovered from a recording: against samplings with the real one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffcr_compile.calibration import learner
from diffcr_compile.calibration.objective import dense_outputs
from diffcr_compile.calibration.sampler import recover_sampler
from diffcr_compile.calibration.trials import Trial, swap_steps
from models import CHANNELS, Shape, TinyDiT, original, tiny_inputs
from torch import Tensor

import diffcr_compile
from diffcr_compile.routed import STATE

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=2, heads=1, head_dim=6, masked=True)
STEPS = tuple(float(step) for step in range(980, 0, -90))
KEEP, MOVE, GUIDANCE = 0.97, -0.2, 3.0

Model = Callable[..., Tensor]


def reusing(ratio: float = 0.0) -> TinyDiT:
    model = original(PLAIN)
    config = diffcr_compile.DiffCRConfig(skip="reuse")
    diffcr_compile.transform(model, config, example_inputs=tiny_inputs(PLAIN))
    diffcr_compile.set_ratios(model, ratio)
    return model


def latents(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 11, CHANNELS, generator=torch.Generator().manual_seed(seed))


def call(model: Model, x: Tensor, step: float, seed: int = 0) -> Tensor:
    inputs = tiny_inputs(PLAIN, batch=len(x), timestep=step, seed=seed)
    return model(**{**inputs, "x": x.clone()})


def linear(model: Model, seed: int) -> Tensor:
    x = latents(seed)
    for step in STEPS:
        x = KEEP * x + MOVE * call(model, x, step)
    return x


def noisy(model: Model, seed: int) -> Tensor:
    x, generator = latents(seed), torch.Generator().manual_seed(seed)
    for step in STEPS:
        x = KEEP * x + MOVE * call(model, x, step) + 0.02 * torch.randn(x.shape, generator=generator)
    return x


def clipped(model: Model, seed: int) -> Tensor:
    """As diffusers' samplers of pixels do it: the foretold picture is held to its range, here at every other value."""
    x = latents(seed)
    for step in STEPS:
        answer = call(model, x, step)
        limit = answer.abs().median()
        x = KEEP * x + MOVE * answer.clamp(-limit, limit)
    return x


def multistep(model: Model, seed: int) -> Tensor:
    x, before = latents(seed), None
    for step in STEPS:
        answer = call(model, x, step)
        x = KEEP * x + MOVE * (answer if before is None else 1.5 * answer - 0.5 * before)
        before = answer
    return x


def guided(model: Model, seed: int) -> Tensor:
    x = latents(seed, 1)
    for step in STEPS:
        without, with_ = call(model, torch.cat([x, x]), step).chunk(2)
        x = KEEP * x + MOVE * (without + GUIDANCE * (with_ - without))
    return x


def guided_in_two_calls(model: Model, seed: int) -> Tensor:
    x = latents(seed)
    for step in STEPS:
        without, with_ = (call(model, x, step, seed=which) for which in (1, 2))
        x = KEEP * x + MOVE * (without + GUIDANCE * (with_ - without))
    return x


SAMPLERS = {each.__name__: each for each in (linear, noisy, multistep, guided, guided_in_two_calls)}


@torch.no_grad()
def recorded(sample: Callable[[Model, int], Tensor], seeds: tuple[int, ...] = (1, 2)) -> tuple[Any, ...]:
    """A model, what it was called with in two samplings one after the other, its answers, and the samples."""
    model = reusing()
    with diffcr_compile.record(model) as batches:
        samples = [sample(model, seed) for seed in seeds]
    return model, list(batches), [dense_outputs(model, batch) for batch in batches], samples


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_error_is_the_distance_of_real_samples(name: str) -> None:
    """Two trajectories in one recording; the same numbers at every step, so that the last one's are known."""
    model, batches, targets, samples = recorded(SAMPLERS[name])
    sampler = recover_sampler(model, model.__dict__[STATE], batches, targets)
    assert sampler is not None
    assert [step.begins for step in sampler.steps] == [place % len(STEPS) == 0 for place in range(2 * len(STEPS))]
    assert sampler.latents.paired == (name == "guided")
    skipping = reusing(0.5)
    with torch.no_grad():
        moved = sum(
            float((SAMPLERS[name](skipping, seed) - dense).square().mean())
            for seed, dense in zip((1, 2), samples, strict=True)
        )
    last = [batches[step.calls[0]]["x"] for step in (sampler.steps[len(STEPS) - 1], sampler.steps[-1])]
    expected = moved / sum(float(x.square().mean()) for x in last)
    tolerance = 0.1 if name == "noisy" else 1e-3  # noise blurs the numbers that are found
    diffcr_compile.reset(skipping)
    assert sampler.error(skipping, batches, targets) == pytest.approx(expected, rel=tolerance)


def test_a_sampler_that_clips_is_taken_for_one_without_memory() -> None:
    """Smooth paths are foretold better from their past, by factors that a deviation does not follow."""
    model, batches, targets, _ = recorded(clipped)
    sampler = recover_sampler(model, model.__dict__[STATE], batches, targets)
    assert sampler is not None
    assert all(len(step.factors) == 2 for step in sampler.steps)


def test_a_dense_model_has_no_error() -> None:
    model, batches, targets, _ = recorded(linear)
    sampler = recover_sampler(model, model.__dict__[STATE], batches, targets)
    assert sampler is not None
    assert sampler.error(model, batches, targets) < 1e-12


def drawn_anew(model: Model, seed: int) -> Tensor:
    for place, step in enumerate(STEPS):
        x = latents(100 * seed + place)
        call(model, x, step)
    return x


def only_scaled(model: Model, seed: int) -> Tensor:
    for step in STEPS:
        call(model, x := latents(seed) * (1 + step / 1000), step)
    return x


def one_step(model: Model, seed: int) -> Tensor:
    return call(model, latents(seed), STEPS[0])


@pytest.mark.parametrize("sample", [drawn_anew, only_scaled, one_step])
def test_what_is_no_sampling_is_not_taken_for_one(sample: Callable[[Model, int], Tensor]) -> None:
    model, batches, targets, _ = recorded(sample)
    assert recover_sampler(model, model.__dict__[STATE], batches, targets) is None


def test_an_input_that_holds_more_than_the_latents() -> None:
    """Inpainting: mask and masked picture lie beside them, and stay."""

    class Inpainter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = original(PLAIN)
            self.narrow = torch.nn.Linear(CHANNELS, 2)

        def forward(self, x: Tensor, timestep: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.narrow(self.model(x=x, timestep=timestep, mask=mask))

    torch.manual_seed(0)
    model = Inpainter()
    config = diffcr_compile.DiffCRConfig(skip="reuse")
    diffcr_compile.transform(model, config, example_inputs=tiny_inputs(PLAIN))

    def sample() -> Tensor:
        z, beside = latents(1)[..., :2], latents(2)[..., 2:]
        for step in STEPS:
            z = KEEP * z + MOVE * call(model, torch.cat([z, beside], dim=-1), step)
        return z

    with torch.no_grad(), diffcr_compile.record(model) as batches:
        dense = sample()
    targets = [dense_outputs(model, batch) for batch in batches]
    sampler = recover_sampler(model, model.__dict__[STATE], list(batches), targets)
    assert sampler is not None
    assert (sampler.latents.axis, sampler.latents.length) == (2, 2)
    diffcr_compile.set_ratios(model, 0.5)
    with torch.no_grad():
        moved = float((sample() - dense).square().mean() / batches[len(STEPS) - 1]["x"][..., :2].square().mean())
    diffcr_compile.reset(model)
    assert sampler.error(model, batches, targets) == pytest.approx(moved, rel=1e-3)


def of_tokens(number: int, seed: int = 3) -> list[dict[str, Any]]:
    """What a sampling of pictures of so many tokens calls the model with."""
    model, x = reusing(), torch.randn(2, number, CHANNELS, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), diffcr_compile.record(model) as batches:
        for step in STEPS:
            inputs = tiny_inputs(PLAIN, batch=2, num_tokens=number, timestep=step)
            x = KEEP * x + MOVE * model(**{**inputs, "x": x.clone()})
    return list(batches)


@pytest.mark.parametrize("sizes", [(16, 8), (8, 16)])
def test_pictures_of_several_sizes_are_tried_on_what_was_recorded(sizes: tuple[int, int]) -> None:
    model, batches = reusing(), [batch for size in sizes for batch in of_tokens(size)]
    targets = [dense_outputs(model, batch) for batch in batches]
    assert recover_sampler(model, model.__dict__[STATE], batches, targets) is None
    assert diffcr_compile.calibrate(model, batches, budget=0.6).share <= 0.6


@pytest.mark.parametrize("later", [torch.zeros(2, 0, CHANNELS), None, "missing"], ids=["empty", "none", "missing"])
def test_an_input_that_is_not_always_there_is_not_the_latents(later: Any) -> None:
    class Controlled(TinyDiT):
        def forward(self, control: Tensor | None, x: Tensor, timestep: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(x=x, timestep=timestep, mask=mask)

    model, batches, targets, _ = recorded(linear)
    model.__class__ = Controlled
    given = [{"control": batches[0]["x"] if place < 3 else later, **batch} for place, batch in enumerate(batches)]
    for batch in given:
        if isinstance(batch["control"], str):
            del batch["control"]
    sampler = recover_sampler(model, model.__dict__[STATE], given, targets)
    assert sampler is not None
    assert sampler.latents.path == ("x",)


def test_calibrate_tries_tables_on_samplings_of_their_own() -> None:
    model, batches, targets, _ = recorded(linear)
    report = diffcr_compile.calibrate(model, batches, budget=0.6)
    sampler = recover_sampler(model, model.__dict__[STATE], batches, targets)
    assert sampler is not None
    assert sampler.error(model, batches, targets) == pytest.approx(min(report.trials.values()), rel=1e-3)


def test_swapping_steps_brings_samples_nearer_within_the_budget() -> None:
    errors = {}
    for steps in (0, 30):
        model, batches, _, _ = recorded(linear)
        config = diffcr_compile.CalibrationConfig(preset="training-free", steps=steps)
        report = diffcr_compile.calibrate(model, batches, budget=0.5, config=config)
        assert report.share <= 0.5
        errors[steps] = min(report.trials.values())
        assert any("swapped" in name for name in report.trials) == (errors[steps] < errors[0])
    assert errors[30] < 0.9 * errors[0]


def test_what_is_left_of_the_trials_goes_to_the_next_best_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few steps there are few to swap, and which table is the best afterwards is not known before."""
    monkeypatch.setattr(sys.modules[__name__], "STEPS", STEPS[::3])
    handed: list[tuple[float, int, float, int]] = []

    def watched(trial: Trial, visited: Any, error: Any, fits: Any, calls: int, seed: int) -> tuple[Trial, int]:
        found, left = swap_steps(trial, visited, error, fits, calls, seed)
        handed.append((trial.error, calls, found.error, left))
        return found, left

    monkeypatch.setattr(learner, "swap_steps", watched)
    model, batches, _, _ = recorded(linear)
    config = diffcr_compile.CalibrationConfig(preset="training-free", steps=40)
    report = diffcr_compile.calibrate(model, batches, budget=0.6, config=config)
    before, given, after, left = map(list, zip(*handed, strict=True))
    assert before == sorted(before)
    assert len(before) == len(report.trials) - any("swapped" in name for name in report.trials)
    assert given == [40, *left[:-1]]
    assert left[0] > 0
    assert min(report.trials.values()) == min(after)


def test_without_a_sampler_no_step_is_swapped() -> None:
    model, batches, _, _ = recorded(drawn_anew)
    report = diffcr_compile.calibrate(model, batches, budget=0.6)
    assert report.trials
    assert not any("swapped" in name for name in report.trials)
