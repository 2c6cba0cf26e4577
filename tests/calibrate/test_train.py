"""``calibrate``: budget, stages, and what it puts back."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffcr_compile.calibration import train
from models import Shape, TinyDiT, original, routed, same_bits, same_snapshot, snapshot, tiny_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import diffcr_compile
from diffcr_compile import CalibrationConfig, CalibrationError, UnsupportedError
from diffcr_compile.routed import routing_of

SHAPE = Shape("plain", depth=3, heads=2, head_dim=6)
STEPS = torch.tensor([20.0, 400.0, 950.0])
BATCHES = [tiny_inputs(SHAPE, num_tokens=20, seed=seed, timestep=STEPS.roll(seed)) for seed in range(4)]
QUICK = CalibrationConfig(steps=8, trainable="routers")


@pytest.fixture
def model() -> TinyDiT:
    return routed(SHAPE)


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.35])
def test_the_budget_is_met_and_never_exceeded(model: TinyDiT, budget: float) -> None:
    report = diffcr_compile.calibrate(model, BATCHES, budget=budget, config=QUICK)
    share = diffcr_compile.cost(model, BATCHES[0]).share
    assert 0.99 * budget <= share <= budget
    assert report.share == pytest.approx(share, rel=1e-12)
    assert (report.budget, report.blocks) == (budget, ("blocks.0", "blocks.1", "blocks.2"))
    assert torch.equal(report.table, diffcr_compile.ratios(model))


def test_the_history_tells_every_step(model: TinyDiT) -> None:
    report = diffcr_compile.calibrate(model, BATCHES, budget=0.7, config=CalibrationConfig(steps=20))
    assert [entry["step"] for entry in report.history] == list(range(20))
    assert [entry["phase"] for entry in report.history] == ["learn"] * 15 + ["settle"] * 5
    shares = [entry["share"] for entry in report.history]
    assert shares[:12] == sorted(shares[:12], reverse=True)
    assert shares[11] == pytest.approx(0.7)
    assert all(entry["loss"] >= 0 for entry in report.history)
    assert f"{len(report.history)} steps" in str(report)


def test_routers_alone_leave_the_weights(model: TinyDiT) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    routers = [block.diffcr_router.weight.clone() for block in model.blocks]
    diffcr_compile.calibrate(model, BATCHES, budget=0.6, config=QUICK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(
        not torch.equal(block.diffcr_router.weight, router) for block, router in zip(model.blocks, routers, strict=True)
    )


def test_weights_are_trained_jointly_by_default(model: TinyDiT) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.embed.weight.requires_grad_(False)
    diffcr_compile.calibrate(model, BATCHES, budget=0.6, config=CalibrationConfig(steps=8))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "blocks.0.stream.qkv.weight" in changed
    assert "embed.weight" not in changed, "what the user froze stays frozen"


@pytest.mark.parametrize("trainable", ["all", "routers"])
def test_flags_and_modes_are_put_back(model: TinyDiT, trainable: str) -> None:
    model.train()
    model.blocks[1].eval()
    model.embed.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    config = CalibrationConfig(steps=3, trainable=trainable)  # type: ignore[arg-type]
    with torch.no_grad():
        diffcr_compile.calibrate(model, BATCHES, budget=0.8, config=config)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_routers_that_learn_alone_unasked_are_told(model: TinyDiT) -> None:
    """Weights without gradients leave the default nothing else."""
    model.requires_grad_(False)
    config = CalibrationConfig(steps=2)
    with pytest.warns(UserWarning, match="no weight of the model requires a gradient"):
        diffcr_compile.calibrate(model, BATCHES, budget=0.8, config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffcr_compile.calibrate(model, BATCHES, budget=0.8, config=replace(config, trainable="routers"))


def test_gradients_of_the_users_are_kept(model: TinyDiT) -> None:
    model.head.weight.grad = torch.ones_like(model.head.weight)
    diffcr_compile.calibrate(model, BATCHES, budget=0.8, config=QUICK)
    assert model.head.weight.grad is not None
    assert bool((model.head.weight.grad == 1).all())


def test_the_same_seed_gives_the_same_table() -> None:
    tables = []
    for seed in (0, 0):
        model = routed(SHAPE)
        torch.manual_seed(len(tables))  # the global generator plays no part
        report = diffcr_compile.calibrate(model, BATCHES, budget=0.6, config=CalibrationConfig(steps=8, seed=seed))
        tables.append((report.table, [block.diffcr_router.weight.detach() for block in model.blocks]))
    assert same_bits(tables[0], tables[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the routers are untrained")
def test_learning_beats_the_same_budget_spread_evenly() -> None:
    """Routers and ratios together, weights frozen, against random routers at one ratio of the same FLOPs."""
    model, plain = routed(SHAPE), original(SHAPE)
    report = diffcr_compile.calibrate(
        model, BATCHES, budget=0.6, config=CalibrationConfig(steps=60, trainable="routers")
    )

    def distance(one: TinyDiT) -> float:
        with torch.no_grad():
            return float(sum((one(**batch) - plain(**batch)).square().mean() for batch in BATCHES))

    uniform = routed(SHAPE)
    low, high = 0.0, 1.0  # the ratio of the report's FLOPs lies between them; low costs more
    for _ in range(10):
        middle = (low + high) / 2
        diffcr_compile.set_ratios(uniform, middle)
        enough = diffcr_compile.cost(uniform, BATCHES[0]).share <= report.share
        low, high = (low, middle) if enough else (middle, high)
    diffcr_compile.set_ratios(uniform, low)
    assert distance(model) < distance(uniform)


def test_a_loss_of_ones_own(model: TinyDiT) -> None:
    seen: list[int] = []

    def loss(one: Any, batch: dict[str, Any]) -> Tensor:
        assert one is model
        seen.append(len(batch["x"]))
        return one(**batch).square().mean()

    diffcr_compile.calibrate(model, BATCHES, budget=0.7, loss=loss, config=QUICK)
    assert seen == [3] * QUICK.steps


def test_batches_may_come_from_a_generator(model: TinyDiT) -> None:
    report = diffcr_compile.calibrate(model, (batch for batch in BATCHES), budget=0.7, config=QUICK)
    assert len(report.history) == QUICK.steps


@pytest.mark.parametrize("trainable", ["all", "routers"])
def test_an_interrupt_leaves_table_routers_and_weights(model: TinyDiT, trainable: str) -> None:
    routers = [block.diffcr_router.weight.clone() for block in model.blocks]
    before, calls = snapshot(model), 0

    def loss(one: Any, batch: dict[str, Any]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return one(**batch).square().mean()

    with pytest.raises(KeyboardInterrupt):
        diffcr_compile.calibrate(model, BATCHES, budget=0.7, loss=loss, config=replace(QUICK, trainable=trainable))
    assert same_snapshot(snapshot(model), before)
    assert not diffcr_compile.ratios(model).any()
    assert all(
        torch.equal(block.diffcr_router.weight, router) for block, router in zip(model.blocks, routers, strict=True)
    )
    assert same_bits(model(**BATCHES[0]), original(SHAPE)(**BATCHES[0]))


def test_a_second_budget_starts_from_the_first(model: TinyDiT) -> None:
    first = diffcr_compile.calibrate(model, BATCHES, budget=0.8, config=QUICK)
    second = diffcr_compile.calibrate(model, BATCHES, budget=0.5, config=QUICK)
    assert second.history[0]["share"] == pytest.approx(first.share, abs=0.1)
    assert 0.495 <= second.share <= 0.5


def test_bfloat16_models_learn_with_float32_masters(model: TinyDiT) -> None:
    model = model.to(torch.bfloat16)
    batches = [{**batch, "x": batch["x"].bfloat16()} for batch in BATCHES]
    report = diffcr_compile.calibrate(model, batches, budget=0.6, config=QUICK)
    assert 0.594 <= report.share <= 0.6
    assert bool(torch.isfinite(model(**batches[0])).all())


@pytest.mark.parametrize("trainable", ["all", "lora", "routers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_move_as_those_of_float32(dtype: torch.dtype, trainable: Any) -> None:
    """A step of 1e-4 is less than half of what lies between two numbers of bfloat16 near one, and float16 has no 1e-8."""
    config = CalibrationConfig(steps=40, trainable=trainable, learning_rate=1e-4, router_learning_rate=1e-4, seed=3)

    def ends(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All parameters before and after."""
        model = routed(SHAPE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16().half())  # the same numbers in every dtype
        model = model.to(dtype)
        before = torch.cat([value.detach().flatten() for value in model.parameters()])
        batches = [{**batch, "x": batch["x"].to(dtype)} for batch in BATCHES]
        diffcr_compile.calibrate(model, batches, budget=0.6, config=config)
        return before, torch.cat([value.detach().flatten() for value in model.parameters()])

    (before, found), (_, expected) = ends(dtype), ends(torch.float32)
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    moved = expected.to(dtype) != before
    assert moved.sum() > 20
    assert (found[moved] != before[moved]).double().mean() > 0.5
    before, found, expected = (each[moved].double() for each in (before, found, expected))
    assert float((found - expected).norm() / (expected - before).norm()) < 0.5


@pytest.mark.parametrize(
    ("warm_start", "said"),
    [
        (True, r"the dense outputs of batches 0, 1, 2 are not finite"),  # put together by region
        (False, r"the loss is nan .* Table, routers and weights are as before"),
    ],
)
@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("trainable", ["all", "routers"])
def test_what_is_no_number_is_said_and_table_and_routers_are_put_back(
    model: TinyDiT, trainable: str, which: int, warm_start: bool, said: str
) -> None:
    diffcr_compile.set_ratios(model, 0.25)
    routers = [block.diffcr_router.weight.clone() for block in model.blocks]
    spoilt = [{**batch, "x": batch["x"].clone()} for batch in BATCHES]
    spoilt[which]["x"][0, 0, 0] = torch.nan
    config = CalibrationConfig(steps=8, trainable=trainable, warm_start=warm_start)  # type: ignore[arg-type]
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=said):
        diffcr_compile.calibrate(model, spoilt, budget=0.6, config=config)
    assert torch.equal(diffcr_compile.ratios(model), torch.full((4, 3), 0.25))
    assert same_snapshot(snapshot(model), before)
    assert all(
        torch.equal(block.diffcr_router.weight, router) for block, router in zip(model.blocks, routers, strict=True)
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_divergence_is_said(model: TinyDiT) -> None:
    config = CalibrationConfig(steps=40, learning_rate=0.3)
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"learning diverged: at step \d+ .* Lower the learning"):
        diffcr_compile.calibrate(model, BATCHES, budget=0.6, config=config)
    assert not diffcr_compile.ratios(model).any()
    assert same_snapshot(snapshot(model), before)


def test_batches_of_a_data_loader(model: TinyDiT) -> None:
    from torch.utils.data import DataLoader

    samples = [{name: value[place] for name, value in batch.items()} for batch in BATCHES for place in range(3)]
    report = diffcr_compile.calibrate(model, DataLoader(samples, batch_size=4), budget=0.7, config=QUICK)  # type: ignore[arg-type]
    assert 0.693 <= report.share <= 0.7


def checkpointed(model: TinyDiT, *, reentrant: bool) -> TinyDiT:
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("estimator", ["two-bin", "single-pass"])
def test_gradient_checkpointing_gives_the_same_table_and_weights(estimator: str, reentrant: bool) -> None:
    """Batches in several regions are put together anew, one region each."""
    config = CalibrationConfig(steps=6, estimator=estimator)  # type: ignore[arg-type]
    found = []
    for model in (routed(SHAPE), checkpointed(routed(SHAPE), reentrant=reentrant)):
        report = diffcr_compile.calibrate(model, BATCHES, budget=0.6, config=config)
        losses = torch.tensor([entry["loss"] for entry in report.history])
        found.append([report.table, losses, *(parameter.detach() for parameter in model.parameters())])
    # reentrant, the gradients of a block that runs at two bins are summed in another order
    tolerance = 1e-7 if reentrant else 0.0
    assert all(torch.allclose(one, other, rtol=0.0, atol=tolerance) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_of_ones_own_batches_in_several_regions_is_refused(
    model: TinyDiT, reentrant: bool
) -> None:
    """With a loss of one's own they are as they came."""
    before = snapshot(checkpointed(model, reentrant=reentrant))
    options: dict[str, Any] = {"budget": 0.7, "config": CalibrationConfig(steps=4)}

    def loss(one: Any, batch: dict[str, Any]) -> Tensor:
        return one(**batch).square().mean()

    with pytest.raises(
        UnsupportedError, match=r"recomputed in backward .* regions \[0, 1, 3\].*turn gradient checkpointing"
    ):
        diffcr_compile.calibrate(model, BATCHES, loss=loss, **options)
    assert same_snapshot(snapshot(model), before)
    each = [tiny_inputs(SHAPE, num_tokens=20, timestep=step) for step in STEPS.tolist()]
    assert diffcr_compile.calibrate(model, each, loss=loss, **options).share <= 0.7


def test_reentrant_checkpoints_that_let_no_gradient_through_are_not_passed_over(model: TinyDiT) -> None:
    """Routers alone learn, so nothing that goes into the first block has a gradient, and torch gives none to what comes out."""
    checkpointed(model, reentrant=True)
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(CalibrationError, match="no gradient, so nothing would be learned"),
    ):
        diffcr_compile.calibrate(model, BATCHES, budget=0.7, config=QUICK)


def test_the_papers_way_at_few_steps() -> None:
    config = diffcr_compile.DiffCRConfig(gate="sigmoid")
    model = diffcr_compile.transform(original(SHAPE), config, example_inputs=BATCHES[0])
    noise = torch.randn(BATCHES[0]["x"].shape, generator=torch.Generator().manual_seed(0))

    def loss(one: Any, batch: dict[str, Any]) -> Tensor:
        return (one(**batch) - noise).square().mean()

    report = diffcr_compile.calibrate(
        model, BATCHES, budget=0.7, loss=loss, config=CalibrationConfig(preset="paper", steps=6)
    )
    assert report.budget_kind == "tokens"
    assert 0.693 <= report.share <= 0.7
    assert [entry["phase"] for entry in report.history] == ["learn"] * 6
    assert 1 - float(report.table.mean()) == pytest.approx(report.share, abs=0.01)


@pytest.mark.parametrize("gate", ["exact", "sigmoid"])
@pytest.mark.parametrize("own_loss", [False, True])
def test_half_of_the_papers_way_is_said(gate: str, own_loss: bool) -> None:
    model = diffcr_compile.transform(
        original(SHAPE),
        diffcr_compile.DiffCRConfig(gate=gate),  # type: ignore[arg-type]
        example_inputs=BATCHES[0],
    )
    loss = (lambda one, batch: one(**batch).square().mean()) if own_loss else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = CalibrationConfig(preset="paper", steps=2, trainable="routers")
        diffcr_compile.calibrate(model, BATCHES, budget=0.7, loss=loss, config=config)
    said = [warning for warning in caught if "preset 'paper' without" in str(warning.message)]
    assert len(said) == (not own_loss or gate == "exact")
    for warning in said:
        assert warning.filename == __file__, "where the user called"
        assert ("as loss=" in str(warning.message)) == (not own_loss)
        assert ('gate="sigmoid"' in str(warning.message)) == (gate == "exact")


def test_an_error_inside_a_batch_of_several_regions_spoils_no_later_forward(model: TinyDiT) -> None:
    steps = torch.tensor([20.0, 950.0, 20.0])

    def stop(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt), diffcr_compile.learning(model):
        model(**tiny_inputs(SHAPE, timestep=steps))
    handle.remove()
    assert same_bits(model(**BATCHES[0]), original(SHAPE)(**BATCHES[0]))


@pytest.mark.parametrize("preset", ["default", "training-free"])
def test_under_inference_mode_all_is_as_without(preset: str) -> None:
    config = CalibrationConfig(preset=preset, steps=2 if preset == "default" else 0)  # type: ignore[arg-type]
    expected = diffcr_compile.calibrate(routed(SHAPE), BATCHES, budget=0.7, config=config)
    model = diffcr_compile.lower(routed(SHAPE), backend="eager")
    model.head.weight.grad = torch.ones_like(model.head.weight)
    with torch.inference_mode():
        recorded = [{name: value.clone() for name, value in batch.items()} for batch in BATCHES]
        found = diffcr_compile.calibrate(model, recorded, budget=0.7, config=config)
    assert replace(found, seconds=0.0).to_dict() == replace(expected, seconds=0.0).to_dict()
    assert model.head.weight.grad is not None
    assert all(block.compiled is not None for block in routing_of(model).blocks)


def test_a_model_transformed_and_recorded_under_inference_mode_learns() -> None:
    model = diffcr_compile.transform(original(SHAPE))
    with torch.inference_mode(), diffcr_compile.record(model) as batches:
        model(**BATCHES[0])
    report = diffcr_compile.calibrate(model, batches, budget=0.7, config=replace(QUICK, steps=2))
    assert report.share <= 0.7


def test_weights_made_under_inference_mode_are_refused(model: TinyDiT) -> None:
    with torch.inference_mode():
        model.head.weight = torch.nn.Parameter(model.head.weight.clone())
    with pytest.raises(UnsupportedError, match=r"head\.weight was made under torch\.inference_mode.* outside of it"):
        diffcr_compile.calibrate(model, BATCHES, budget=0.7, config=QUICK)


def test_what_goes_wrong_before_the_first_step_leaves_lowering_and_gradients(
    model: TinyDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise KeyboardInterrupt

    diffcr_compile.lower(model, backend="eager")
    model.head.weight.grad = torch.ones_like(model.head.weight)
    monkeypatch.setattr(train, "learnables", fail)
    with pytest.raises(KeyboardInterrupt):
        diffcr_compile.calibrate(model, BATCHES, budget=0.7, config=QUICK)
    assert model.head.weight.grad is not None
    assert all(block.compiled is not None for block in routing_of(model).blocks)


def test_without_training_what_only_learning_needs_is_refused(model: TinyDiT, tmp_path: Path) -> None:
    config = CalibrationConfig(preset="training-free")
    options: dict[str, Any] = {"checkpoint": tmp_path / "new", "loss": lambda one, batch: one(**batch).mean()}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"learns nothing, so {name} has no effect: leave it out"):
            diffcr_compile.calibrate(model, BATCHES, budget=0.7, config=config, **{name: value})
    assert not (tmp_path / "new").exists()


def offloaded() -> TinyDiT:
    model = routed(SHAPE)
    accelerate.cpu_offload(model, torch.device("cpu"))
    return model


def test_offloaded_weights_are_calibrated_without_training() -> None:
    config = CalibrationConfig(preset="training-free")
    report = diffcr_compile.calibrate(offloaded(), BATCHES, budget=0.6, config=config)
    expected = diffcr_compile.calibrate(routed(SHAPE), BATCHES, budget=0.6, config=config)
    assert torch.equal(report.table, expected.table)


@pytest.mark.parametrize("config", [QUICK, CalibrationConfig(steps=4)])
def test_offloaded_weights_do_not_learn(config: CalibrationConfig) -> None:
    with pytest.raises(UnsupportedError, match=r"is on the meta device: .*preset='training-free'"):
        diffcr_compile.calibrate(offloaded(), BATCHES, budget=0.6, config=config)


def test_the_first_forward_after_it_knows_the_weights_that_were_learned(model: TinyDiT) -> None:
    """Autocast keeps casts of weights; those that were made before a calibration are of other weights."""
    config = CalibrationConfig(steps=8, settle=1.0, learning_rate=1e-2)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        before = model(**BATCHES[0])
        loss = lambda model, batch: model(**batch).float().square().mean()  # noqa: E731
        diffcr_compile.calibrate(model, BATCHES, budget=1.0, loss=loss, config=config)
        found = model(**BATCHES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, model(**BATCHES[0]))
    assert not torch.equal(found, before)
