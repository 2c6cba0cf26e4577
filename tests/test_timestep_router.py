"""``router="timestep"``: one vector for each timestep region, at batch three, wherever a forward may come from."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffcr_compile.calibration.sensitivity import measure_suffering
from diffcr_compile.calibration.warm_start import fit_routers
from models import (
    Shape,
    TinyDiT,
    original,
    relative_error,
    same_bits,
    sinusoids,
    tiny_inputs,
)
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import diffcr_compile
from diffcr_compile import CalibrationConfig, DiffCRConfig
from diffcr_compile.artefact import record_checksum
from diffcr_compile.config import Estimator
from diffcr_compile.primitives import score_tokens, select_tokens
from diffcr_compile.ratios import capacity
from diffcr_compile.region import pin_region
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
STEPS = (10.0, 300.0, 600.0, 900.0)
"""One in each of four regions."""

TOLERANCE = 1e-5
"""Of the largest value, in float32, where a batch is another."""

BOTH = pytest.mark.parametrize("estimator", ["two-bin", "single-pass"])


class Checkpointed(TinyDiT):
    """A ``TinyDiT`` whose blocks are computed again in backward."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(x)
        cond = self.time(sinusoids(timestep, self.shape.width).to(x.dtype))
        for block in self.blocks:
            x = checkpoint(block, x, cond, None, None, use_reentrant=False)
        return self.head(x)


@functools.cache
def _transformed(kind: type[TinyDiT], options: tuple[tuple[str, Any], ...]) -> TinyDiT:
    plain = kind(SHAPE).eval()
    plain.load_state_dict(original(SHAPE).state_dict())
    return diffcr_compile.transform(plain, DiffCRConfig(**dict(options)), example_inputs=tiny_inputs(SHAPE))


def token_model(**options: Any) -> TinyDiT:
    return copy.deepcopy(_transformed(TinyDiT, tuple(sorted(options.items()))))


def model_with(kind: type[TinyDiT] = TinyDiT, **options: Any) -> TinyDiT:
    """A routed model whose routers have another vector in each region."""
    model = copy.deepcopy(_transformed(kind, (*sorted(options.items()), ("router", "timestep"))))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for router in routers_of(model):
            router.copy_(torch.randn(router.shape, generator=generator))
    return model


def routers_of(model: TinyDiT) -> list[Tensor]:
    return [block.diffcr_router.weight for block in model.blocks]  # type: ignore[union-attr,misc]


def region_model(model: TinyDiT, region: int, **options: Any) -> TinyDiT:
    """A token model whose routers are those of one region."""
    other = token_model(**options)
    with torch.no_grad():
        for mine, theirs in zip(routers_of(other), routers_of(model), strict=True):
            mine.copy_(theirs[region])
    return other


def inputs(*steps: float, **options: Any) -> dict[str, Any]:
    return tiny_inputs(SHAPE, batch=len(steps), timestep=torch.tensor(steps), **options)


@torch.no_grad()
def run(model: TinyDiT, *steps: float) -> Tensor:
    return model(**inputs(*steps))


def test_it_starts_as_a_token_router() -> None:
    model, tokens = copy.deepcopy(_transformed(TinyDiT, (("router", "timestep"),))), token_model()
    assert [tuple(router.shape) for router in routers_of(model)] == [(4, 6)] * 2
    for ratio in (0.0, 0.5):
        diffcr_compile.set_ratios(model, ratio)
        diffcr_compile.set_ratios(tokens, ratio)
        assert all(same_bits(run(model, *[step] * 3), run(tokens, *[step] * 3)) for step in STEPS)


def test_zero_ratio_is_the_original_and_reads_no_timestep() -> None:
    model = model_with()
    call = inputs(900.0, 10.0, 1400.0)  # beyond the range of training
    assert same_bits(model(**call), original(SHAPE)(**call))


@pytest.mark.parametrize("table", [0.5, [[0.5, 0.2], [0.2, 0.5], [0.5, 0.5], [0.9, 0.1]]], ids=["flat", "by region"])
def test_each_region_is_scored_by_its_vector(table: Any) -> None:
    model = model_with()
    diffcr_compile.set_ratios(model, table)
    outputs = []
    for region, step in enumerate(STEPS):
        tokens = region_model(model, region)
        diffcr_compile.set_ratios(tokens, table)
        outputs.append(run(model, *[step] * 3))
        assert same_bits(outputs[-1], run(tokens, *[step] * 3))
        assert not same_bits(outputs[-1], run(region_model(model, (region + 1) % 4), *[step] * 3))


def test_a_batch_in_several_regions_is_each_sample_alone() -> None:
    model = model_with()
    diffcr_compile.set_ratios(model, 0.5)
    call = inputs(900.0, 10.0, 950.0, 300.0)
    with torch.no_grad():
        whole = model(**call)
        for place in range(4):
            alone = model(**{name: value[place : place + 1] for name, value in call.items()})
            assert relative_error(whole[place : place + 1], alone) < TOLERANCE


def test_trace_shows_the_regions_choice() -> None:
    model = model_with()
    diffcr_compile.set_ratios(model, 0.5)
    for region, step in enumerate(STEPS):
        call = inputs(*[step] * 3)
        tokens: list[Tensor] = []
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args, seen=tokens: seen.append(args[0]))
        with torch.no_grad(), diffcr_compile.trace(model) as seen:
            model(**call)
        handle.remove()
        scores = score_tokens(tokens[0], routers_of(model)[0][region], 1, 0)
        assert torch.equal(seen.kept["blocks.0"][0], select_tokens(scores, capacity(scores.shape[1], 500)))


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_lowered_equals_eager(scope: str) -> None:
    """More regions than Dynamo recompiles one code object; regional graphs are shared by regions and layers."""
    torch._dynamo.reset()
    model, counter = model_with(num_regions=12), CompileCounterWithBackend("eager")
    diffcr_compile.set_ratios(model, 0.5)
    eager = copy.deepcopy(model)
    diffcr_compile.lower(model, scope=scope, backend=counter)  # type: ignore[arg-type]
    for _ in range(2):
        for step in range(20, 1000, 80):
            assert same_bits(run(model, *[float(step)] * 3), run(eager, *[float(step)] * 3))
    assert counter.frame_count == (12 if scope == "full" else 1)
    assert same_bits(run(model, 900.0, 10.0, 300.0), run(eager, 900.0, 10.0, 300.0))


def test_a_graph_of_ones_own_follows_the_region_or_is_refused() -> None:
    model = model_with()
    diffcr_compile.set_ratios(model, 0.5)
    expected = [run(model, *[step] * 3) for step in STEPS]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert all(same_bits(run(compiled, *[step] * 3), out) for step, out in zip(STEPS, expected, strict=True))  # type: ignore[arg-type]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"looked up outside the graph: compile the model by diffcr_compile\.lower"):
        run(torch.compile(model, backend="eager", fullgraph=True), *[10.0] * 3)  # type: ignore[arg-type]
    with pytest.raises(diffcr_compile.UnsupportedError, match="looked up outside the graph"):
        torch.export.export(model, (), inputs(*[10.0] * 3), strict=False)


def gradients(model: TinyDiT, call: dict[str, Any], estimator: Estimator) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    with diffcr_compile.learning(model, estimator=estimator) as learnable:
        learnable.ratios.grad = None
        model(**call).square().sum().backward()
    assert learnable.ratios.grad is not None
    return learnable.ratios.grad, [torch.zeros_like(one) if one.grad is None else one.grad for one in routers_of(model)]


@BOTH
@pytest.mark.parametrize("ratio", [0.0, 0.34])
def test_only_the_regions_vector_learns_and_as_a_token_routers_would(estimator: Estimator, ratio: float) -> None:
    model = model_with().double()
    diffcr_compile.set_ratios(model, ratio)
    for region, step in enumerate(STEPS):
        tokens = region_model(model, region).double()
        diffcr_compile.set_ratios(tokens, ratio)
        call = inputs(*[step] * 3, num_tokens=17, dtype=torch.float64)
        (slopes, routers), (expected, vectors) = (gradients(each, call, estimator) for each in (model, tokens))
        assert same_bits(slopes, expected)
        assert bool(slopes[region].all())
        for router, vector in zip(routers, vectors, strict=True):
            assert same_bits(router[region], vector)
            assert not router[[r for r in range(4) if r != region]].any()
            assert bool(vector.any()) or estimator == "two-bin"


@BOTH
def test_checkpointed_blocks_are_recomputed_by_the_same_vector(estimator: Estimator) -> None:
    plain, recomputing = model_with().double(), model_with(Checkpointed).double()
    for model in (plain, recomputing):
        diffcr_compile.set_ratios(model, 0.34)  # a flat table: the vectors alone differ by region
    for step in STEPS:
        call = inputs(*[step] * 3, num_tokens=17, dtype=torch.float64)
        assert same_bits(*(gradients(model, call, estimator) for model in (plain, recomputing)))
    call = inputs(10.0, 600.0, 900.0, num_tokens=17, dtype=torch.float64)
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"regions \[0, 2, 3\]"):
        recomputing(**call).sum().backward()


def test_the_warm_start_fits_each_region_and_gives_the_others_all_tokens() -> None:
    model = model_with()
    batches = [inputs(10.0, 600.0, 20.0, seed=seed) for seed in range(4)]
    fit_routers(model, routing_of(model), batches)
    found = [router.clone() for router in routers_of(model)]
    for rows, chosen in (([0], (0, 2)), ([2], (1,)), ([1, 3], (0, 1, 2))):
        tokens = token_model()
        fit_routers(tokens, routing_of(tokens), [{n: v[list(chosen)] for n, v in batch.items()} for batch in batches])
        for router, expected in zip(found, routers_of(tokens), strict=True):
            for row in rows:
                assert relative_error(router[row], expected.detach()) < 1e-3  # updates in float32 of other batches


@pytest.mark.parametrize("trainable", ["all", "routers"])
def test_calibrate_learns_the_vectors_apart_and_goes_on_where_it_was_stopped(trainable: str, tmp_path: Path) -> None:
    batches = [inputs(10.0, 600.0, 300.0, seed=seed) for seed in range(3)]
    config = CalibrationConfig(steps=6, trainable=trainable, checkpoint_every=2)  # type: ignore[arg-type]
    straight = copy.deepcopy(_transformed(TinyDiT, (("router", "timestep"),)))
    stopped, again = copy.deepcopy(straight), copy.deepcopy(straight)
    report = diffcr_compile.calibrate(straight, batches, budget=0.8, config=config)
    assert report.share <= 0.8
    assert all(len(counts) == 24 and sum(counts) > 0 for _, _, counts in report.scores)
    for router in routers_of(straight):
        assert len({tuple(row) for row in router.tolist()}) == 4

    class Stop(Exception):
        pass

    def stop_at_fourth(calls: list[int], step: Any = torch.optim.AdamW.step) -> Any:
        def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            if len(calls) == 4:
                raise Stop
            return step(self, *args, **kwargs)

        return stepping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop_at_fourth([]))
        with pytest.raises(Stop):
            diffcr_compile.calibrate(stopped, batches, budget=0.8, config=config, checkpoint=tmp_path / "progress")
    resumed = diffcr_compile.calibrate(again, batches, budget=0.8, config=config, checkpoint=tmp_path / "progress")
    assert torch.equal(resumed.table, report.table)
    assert resumed.scores == report.scores
    assert all(same_bits(a, b) for a, b in zip(again.parameters(), straight.parameters(), strict=True))


def test_training_free_measures_each_region_by_its_vector() -> None:
    """What the router of a region leaves out there, and nowhere else, is what skipping costs there."""
    model = model_with()
    batches = [inputs(step, step, step) for step in STEPS]
    found = measure_suffering(model, routing_of(model), batches)
    for region in range(4):
        tokens = region_model(model, region)
        expected = measure_suffering(tokens, routing_of(tokens), batches)
        assert relative_error(found[region], expected[region]) < TOLERANCE
    assert relative_error(found[0], measure_suffering(tokens, routing_of(tokens), batches)[0]) > 1e-3


def test_save_and_load(tmp_path: Path) -> None:
    model = model_with()
    diffcr_compile.set_ratios(model, 0.5)
    diffcr_compile.save(model, tmp_path / "routing")
    loaded = diffcr_compile.load(original(SHAPE), tmp_path / "routing")
    assert same_bits(run(loaded, 900.0, 10.0, 300.0), run(model, 900.0, 10.0, 300.0))
    assert same_bits(routers_of(loaded), routers_of(model))


def change(folder: Path, **changes: Any) -> None:
    """Write other values into a saved routing, under a checksum that fits."""
    file = folder / "routing.json"
    record = {**json.loads(file.read_text()), **changes}
    record["checksum"] = record_checksum({name: value for name, value in record.items() if name != "checksum"})
    file.write_text(json.dumps(record))


def write_routers(folder: Path, vectors: Tensor) -> str:
    """Other routers for a saved routing; returns the file's hash."""
    save_file({f"blocks.{place}": vectors.clone() for place in range(2)}, folder / "routers.safetensors")
    return hashlib.sha256((folder / "routers.safetensors").read_bytes()).hexdigest()


def test_a_damaged_artefact_is_refused(tmp_path: Path) -> None:
    folder, model = tmp_path / "routing", model_with()
    diffcr_compile.save(model, folder)
    record = json.loads((folder / "routing.json").read_text())
    change(folder, config={**record["config"], "router": "token"})
    with pytest.raises(diffcr_compile.ArtefactError, match="does not hold one router"):
        diffcr_compile.load(original(SHAPE), folder)
    change(folder, config=record["config"], sha256=write_routers(folder, torch.ones(3, 6)))
    with pytest.raises(diffcr_compile.ArtefactError, match="does not hold one router"):
        diffcr_compile.load(original(SHAPE), folder)


def test_explain_names_it() -> None:
    assert "routers untrained, one vector for each timestep region" in str(diffcr_compile.explain(model_with()))
    assert "one vector" not in str(diffcr_compile.explain(token_model()))


class Timeless(TinyDiT):
    """Knows no timestep."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, torch.zeros(len(x), self.shape.width), None, None)
        return self.head(x)


def test_a_model_without_a_timestep_is_refused(tmp_path: Path) -> None:
    model, config, given = Timeless(SHAPE).eval(), DiffCRConfig(router="timestep"), {"x": tiny_inputs(SHAPE)["x"]}
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"router='timestep' needs to know.*timestep_argument"):
        diffcr_compile.transform(model, config, example_inputs=given)
    assert not hasattr(model.blocks[0], "diffcr_router")
    diffcr_compile.transform(model, example_inputs=given)
    diffcr_compile.save(model, tmp_path / "routing")
    digest = write_routers(tmp_path / "routing", torch.ones(4, 6))
    change(tmp_path / "routing", config=config.to_dict(), sha256=digest)
    with pytest.raises(diffcr_compile.ArtefactError, match="routers see a timestep"):
        diffcr_compile.load(diffcr_compile.restore(model), tmp_path / "routing")
    digest = write_routers(tmp_path / "routing", torch.ones(6))
    change(tmp_path / "routing", config=DiffCRConfig(skip="reuse").to_dict(), sha256=digest)
    with pytest.raises(diffcr_compile.ArtefactError, match="reuse follows a timestep"):
        diffcr_compile.load(model, tmp_path / "routing")


def test_a_single_region_is_a_token_router() -> None:
    model, tokens = model_with(num_regions=1), token_model(num_regions=1)
    with torch.no_grad():
        for mine, theirs in zip(routers_of(tokens), routers_of(model), strict=True):
            mine.copy_(theirs[0])
    for each in (model, tokens):
        diffcr_compile.set_ratios(each, 0.5)
    assert same_bits(run(model, 900.0, 10.0, 300.0), run(tokens, 900.0, 10.0, 300.0))


def test_with_reuse_a_batch_in_several_regions_is_refused() -> None:
    model = model_with(skip="reuse", selection="score", num_regions=4)
    diffcr_compile.set_ratios(model, 0.5)
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"regions \[0, 3\].*router='token'"):
        run(model, 900.0, 10.0, 950.0)


def test_a_call_without_a_timestep_is_refused() -> None:
    model = model_with()
    diffcr_compile.set_ratios(model, 0.5)
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"timestep region is unknown.*router='token'"):
        model(inputs(10.0)["x"], None)


def test_a_pinned_region_decides() -> None:
    model = model_with()
    diffcr_compile.set_ratios(model, 0.5)
    with torch.no_grad(), pin_region(routing_of(model), 2):
        found = model(**inputs(10.0, 10.0, 10.0))
    tokens = region_model(model, 2)
    diffcr_compile.set_ratios(tokens, 0.5)
    assert same_bits(found, run(tokens, 10.0, 10.0, 10.0))
