"""What the report shows of a table at work: errors beside uniform ratios, and tokens."""

from __future__ import annotations

import contextlib

import pytest
import torch
from compatibility import matrix
from diffcr_compile.calibration.appraise import (
    APPRAISED,
    UNIFORM,
    TokenMap,
    map_tokens,
    spread_over_timesteps,
)
from diffcr_compile.calibration.objective import dense_outputs, distillation_loss, output_tensors
from diffcr_compile.calibration.rehearsal import REHEARSED
from models import Shape, TinyDiT, routed, routed_fqns, tiny_inputs

import diffcr_compile
from diffcr_compile import CalibrationConfig, CalibrationReport, DiffCRConfig
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

SHAPE = Shape("plain", depth=3, heads=1, head_dim=6)
TABLE = [[0.25, 0.5, 0.0], [0.5, 0.75, 1.0], [0.0, 0.0, 0.0], [0.25, 0.25, 0.25]]


def tokens_of(model: TinyDiT, batch: dict[str, torch.Tensor]) -> TokenMap:
    found = map_tokens(model, routing_of(model), batch, contextlib.nullcontext())
    assert found is not None
    return found


def test_batches_are_spread_over_the_timesteps_from_clean_to_noisy() -> None:
    model = routed(SHAPE)
    steps = [900.0, 10.0, 500.0, 20.0, 30.0, 510.0, 910.0, 15.0]
    batches = [tiny_inputs(SHAPE, timestep=step) for step in steps]
    places = spread_over_timesteps(model, routing_of(model), batches, list(range(1, 8)))
    assert [steps[place] for place in places] == [10.0, 20.0, 500.0, 910.0]
    assert spread_over_timesteps(model, routing_of(model), batches, [3]) == [3]
    many = [tiny_inputs(SHAPE, timestep=float(step)) for step in range(1000)]
    chosen = spread_over_timesteps(model, routing_of(model), many, list(range(1000)))
    assert len(chosen) == APPRAISED
    assert all(abs(place - 1000 * (part + 0.5) / APPRAISED) < 100 for part, place in enumerate(chosen))


def test_a_map_holds_the_first_samples_tokens() -> None:
    model, batch = routed(SHAPE), tiny_inputs(SHAPE, num_tokens=16, timestep=300.0)
    diffcr_compile.set_ratios(model, TABLE)
    with diffcr_compile.trace(model) as seen, torch.no_grad():
        model(**batch)
    found = tokens_of(model, batch)
    assert (found.timestep, found.grid, found.picture()) == (300.0, (1, 1, 16), None)
    masks = found.masks()
    assert list(masks) == routed_fqns(model)
    assert {fqn: mask.flatten().nonzero()[:, 0].tolist() for fqn, mask in masks.items()} == {
        fqn: calls[0][0].tolist() for fqn, calls in seen.kept.items()
    }
    assert [int(mask.sum()) for mask in masks.values()] == [8, 4, 0]
    expected = torch.stack(list(masks.values())).float().mean(dim=0)
    assert torch.allclose(found.pass_shares(), expected, atol=1 / 255)
    assert TokenMap.from_dict(vars(found)) == found


def test_a_map_of_a_batch_in_several_regions_is_its_first_sample_alone() -> None:
    model, batch = routed(SHAPE), tiny_inputs(SHAPE, num_tokens=16, timestep=torch.tensor([300.0, 10.0, 990.0]))
    diffcr_compile.set_ratios(model, TABLE)
    assert [int(mask.sum()) for mask in tokens_of(model, batch).masks().values()] == [8, 4, 0]


def test_tokens_of_latents_lie_on_their_grid() -> None:
    model, batch = matrix.routed("dit"), matrix.at_timestep("dit", matrix.inputs("dit"), 0.4)
    found = tokens_of(model, batch)
    latents = batch["hidden_states"]
    assert found.grid == (1, 5, 5)
    assert all(int(mask.sum()) == 13 for mask in found.masks().values())
    picture = found.picture()
    assert picture is not None
    assert picture.shape == latents.shape[2:]
    mean = latents[0].mean(dim=0)
    assert torch.corrcoef(torch.stack([picture.flatten(), mean.flatten()]))[0, 1] > 0.98


def calibrated(
    steps: tuple[float, ...], config: CalibrationConfig, **options: object
) -> tuple[TinyDiT, CalibrationReport]:
    model = routed(SHAPE)
    if options:
        diffcr_compile.restore(model)
        diffcr_compile.transform(
            model,
            DiffCRConfig(**options),  # type: ignore[arg-type]
            example_inputs=tiny_inputs(SHAPE),
        )
    batches = [tiny_inputs(SHAPE, num_tokens=40, seed=0, timestep=step) for step in steps]
    return model, diffcr_compile.calibrate(model, batches, budget=(0.8, 0.6), config=config)


def test_a_calibration_reports_errors_of_its_tables_and_of_uniform_ratios() -> None:
    steps = (100.0, 350.0, 600.0, 850.0)
    model, report = calibrated(steps, CalibrationConfig(steps=4, trainable="routers"))
    assert diffcr_compile.ratios(model).equal(report.table)
    assert len(report.uniform) == 1 + len(UNIFORM)
    assert report.uniform[1.0] == 0
    assert list(report.uniform) == sorted(report.uniform, reverse=True)
    assert min(report.uniform[share] for share in report.uniform if share < 1) > 0
    assert [one.timestep for one in report.tokens] == list(steps)
    assert list(report.errors)[-1] == report.share
    for (share, error), table in zip(reversed(report.errors.items()), report.tables.values(), strict=True):
        diffcr_compile.set_ratios(model, table)
        assert share == pytest.approx(diffcr_compile.cost(model, tiny_inputs(SHAPE, num_tokens=40)).share)
        distances = []
        for step in steps:
            batch = tiny_inputs(SHAPE, num_tokens=40, seed=0, timestep=step)
            with torch.no_grad():
                outputs = output_tensors(model(**batch))
            distances.append(float(distillation_loss(outputs, dense_outputs(model, batch))))
        assert error == pytest.approx(sum(distances) / len(distances), rel=1e-5)


def test_with_reuse_the_errors_are_those_of_the_trials() -> None:
    steps = tuple(float(step) for step in range(950, 0, -100))
    _, report = calibrated(steps, CalibrationConfig(preset="training-free"), skip="reuse", num_regions=4)
    assert report.errors[report.share] == pytest.approx(min(report.trials.values()), rel=1e-5)
    assert report.uniform[1.0] == 0
    assert [one.timestep for one in report.tokens] == [150.0, 350.0, 550.0, 750.0]


def test_with_reuse_tokens_are_those_after_the_steps_before() -> None:
    """Tokens take turns: what a step computes depends on the steps before it, of which the first is dense."""
    steps = tuple(float(step) for step in range(950, 0, -100))
    config = CalibrationConfig(steps=2, trainable="routers")
    model, report = calibrated(steps, config, skip="reuse", num_regions=1)
    found = report.tokens[0]
    place = steps.index(found.timestep)
    diffcr_compile.reset(model)
    with diffcr_compile.trace(model) as seen, torch.no_grad():
        for step in steps[place - REHEARSED : place + 1]:
            model(**tiny_inputs(SHAPE, num_tokens=40, seed=0, timestep=step))
    masks = found.masks()
    assert any(0 < int(mask.sum()) < 40 for mask in masks.values())
    for fqn, calls in seen.kept.items():
        assert masks[fqn].flatten().nonzero()[:, 0].tolist() == calls[-1][0].tolist()
        assert len(calls[0][0]) == 40
