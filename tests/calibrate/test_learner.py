"""Stages and steps of one calibration: schedules, draws, accumulation, kinds of budget."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffcr_compile.calibration import learner, train
from hand import hand_costs
from models import Shape, TinyDiT, original, relative_error, routed, same_snapshot, snapshot, tiny_inputs
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import BudgetError, CalibrationConfig, CalibrationError
from diffcr_compile.cost import CostModel
from diffcr_compile.latency import BlockTime
from diffcr_compile.ratios import capacity
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
STEPS = torch.tensor([20.0, 400.0, 950.0])
BATCHES = [tiny_inputs(SHAPE, num_tokens=40, seed=seed, timestep=STEPS.roll(seed)) for seed in range(3)]
QUICK = CalibrationConfig(steps=12, trainable="routers")


@pytest.fixture
def model() -> TinyDiT:
    return routed(SHAPE)


@pytest.fixture(scope="module", autouse=True)
def count_once() -> Iterator[None]:
    """Counting a model's FLOPs takes longer than most of what is tested here."""
    measure, known = train.measure_costs, {}

    def count(model: Any, inputs: Any) -> CostModel:
        key = tuple(inputs["x"].shape)
        if key not in known:
            known[key] = measure(model, inputs)
        return known[key]

    train.measure_costs = count  # type: ignore[assignment]
    yield
    train.measure_costs = measure


# Several budgets.


@pytest.mark.parametrize("budgets", [(0.8, 0.5), [0.5, 0.65, 0.9]])
@pytest.mark.parametrize("estimator", ["two-bin", "single-pass"])
def test_every_budget_has_a_table_that_meets_it(model: TinyDiT, budgets: Any, estimator: str) -> None:
    config = replace(QUICK, estimator=estimator)
    report = diffcr_compile.calibrate(model, BATCHES, budget=budgets, config=config)
    assert sorted(report.tables) == sorted(budgets)
    assert report.budget == budgets[0]
    assert torch.equal(diffcr_compile.ratios(model), report.table)
    assert torch.equal(report.table, report.tables[budgets[0]])
    shares = []
    for budget in sorted(budgets):
        diffcr_compile.set_ratios(model, report.tables[budget])
        shares.append(diffcr_compile.cost(model, BATCHES[0]).share)
        assert 0.99 * budget <= shares[-1] <= budget
    assert shares == sorted(shares)


def test_the_schedule_falls_from_budget_to_budget_and_settling_takes_turns(model: TinyDiT) -> None:
    report = diffcr_compile.calibrate(model, BATCHES, budget=(0.5, 0.8), config=replace(QUICK, steps=16))
    shares = [entry["share"] for entry in report.history]
    assert shares[:12] == sorted(shares[:12], reverse=True)
    assert shares[5] == pytest.approx(0.8)
    assert shares[11] == pytest.approx(0.5)
    assert [0.99 * budget <= share <= budget for share, budget in zip(shares[12:], (0.5, 0.8) * 2, strict=True)] == [
        True
    ] * 4


def test_learning_begins_at_the_table_in_force(model: TinyDiT) -> None:
    """At zero; or at what a calibration without training left, within the budget already."""
    budget, still = 0.6, replace(QUICK, ratio_learning_rate=1e-9, settle=0.0)
    assert diffcr_compile.calibrate(model, BATCHES, budget=budget, config=still).history[0]["share"] > 0.9
    begun = routed(SHAPE)
    free = diffcr_compile.calibrate(begun, BATCHES, budget=budget, config=CalibrationConfig(preset="training-free"))
    report = diffcr_compile.calibrate(begun, BATCHES, budget=budget, config=still)
    assert torch.equal(report.table, free.table)
    assert all(0.99 * budget <= entry["share"] <= budget for entry in report.history)


@pytest.mark.parametrize(
    "budgets",
    [
        *((), [], (0.5, 0.5), (0.5, 0.0), (0.5, 1.1), (0.5, True), ("a",), "0.5", None),
        *([[0.9]], {0.9}, {0.9: 1}, torch.tensor([[0.9]]), np.zeros((0,)), torch.tensor([0.5, 0.5])),
    ],
)
def test_other_budgets_are_refused(model: TinyDiT, budgets: Any) -> None:
    with pytest.raises(ValueError, match="budget"):
        diffcr_compile.calibrate(model, BATCHES, budget=budgets, config=QUICK)


@pytest.mark.parametrize(
    ("budget", "read"),
    [
        (torch.tensor(0.75), [0.75]),
        (np.float32(0.75), [0.75]),
        (np.array([0.75, 0.5]), [0.75, 0.5]),
        ([torch.tensor(0.75), 0.5], [0.75, 0.5]),
        (1, [1]),
    ],
)
def test_budgets_may_be_numbers_of_tensors_and_arrays(model: TinyDiT, budget: Any, read: list[float]) -> None:
    config = CalibrationConfig(preset="training-free")
    assert list(diffcr_compile.calibrate(model, BATCHES, budget=budget, config=config).tables) == read


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"config": {"steps": 2}}, "config must be a CalibrationConfig, found dict"),
        ({"config": diffcr_compile.DiffCRConfig()}, "config must be a CalibrationConfig, found DiffCRConfig"),
        ({"loss": "mse"}, "loss must be a function of the model and a batch, found 'mse'"),
        ({"loss": lambda *_: 0.5}, "loss must return a tensor of one real number, with its gradient, found float"),
        (
            {"loss": lambda *_: torch.ones(1, dtype=torch.complex64)},
            r"real number, .*of shape \(1,\) in torch.complex64",
        ),
        ({"loss": lambda *_: torch.ones((), dtype=torch.int64)}, r"real number, .*of shape \(\) in torch.int64"),
        ({"loss": lambda *_: None}, "found NoneType"),
        ({"loss": lambda one, batch: one(**batch)}, r"found Tensor of shape \(3, 40, 5\)"),
        ({"batches": None}, "batches must be several keyword dictionaries of the model's forward, found NoneType"),
        ({"batches": BATCHES[0]}, "found a single one: put it into a list"),
        ({"batches": ["x"]}, "batches must be keyword dictionaries .*, found str"),
    ],
)
def test_what_is_of_another_kind_is_named(model: TinyDiT, options: dict[str, Any], says: str) -> None:
    before = snapshot(model)
    given = {"batches": BATCHES, "config": replace(QUICK, trainable="all"), **options}
    with pytest.raises(TypeError, match=says):
        diffcr_compile.calibrate(model, budget=0.8, **given)
    assert same_snapshot(snapshot(model), before)


def test_all_budgets_must_be_within_reach(model: TinyDiT) -> None:
    with pytest.raises(BudgetError, match=r"budget 0\.01 can't be reached"):
        diffcr_compile.calibrate(model, BATCHES, budget=(0.8, 0.01), config=QUICK)


def test_more_budgets_than_steps_of_learning_are_refused_before_anything_runs(model: TinyDiT) -> None:
    budgets = (0.9, 0.8, 0.7)
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=r"3 budgets need as many steps of learning, found 2 .*steps=3, settle=0\.25"):
        diffcr_compile.calibrate(model, BATCHES, budget=budgets, config=replace(QUICK, steps=3))
    handle.remove()
    report = diffcr_compile.calibrate(model, BATCHES, budget=budgets, config=replace(QUICK, steps=4))
    assert sorted(report.tables) == sorted(budgets)


# Settling alone.


def test_with_settle_one_the_table_stays(model: TinyDiT) -> None:
    config = CalibrationConfig(steps=3, settle=1.0)
    diffcr_compile.set_ratios(model, 0.5)
    report = diffcr_compile.calibrate(model, BATCHES, budget=0.7, config=config)
    assert torch.equal(report.table, torch.full((4, 2), 0.5))
    assert [entry["phase"] for entry in report.history] == ["settle"] * 3
    with pytest.raises(ValueError, match="settle=1 the present table stays, which has one cost"):
        diffcr_compile.calibrate(model, BATCHES, budget=(0.7, 0.8), config=config)
    with pytest.raises(BudgetError, match=r"above the budget of 0\.2,"):
        diffcr_compile.calibrate(model, BATCHES, budget=0.2, config=config)
    assert torch.equal(diffcr_compile.ratios(model), report.table)


@pytest.mark.parametrize("row", [0.0, 1.0])
def test_where_no_router_has_to_choose_a_step_moves_nothing(model: TinyDiT, row: float) -> None:
    """Routers alone learn, and the table keeps or skips everything in a region: its batches have no gradient to give."""
    diffcr_compile.set_ratios(model, [[row, row], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    batches = [tiny_inputs(SHAPE, num_tokens=40, timestep=step) for step in (10.0, 400.0)]
    routers = [block.diffcr_router.weight for block in model.blocks]  # type: ignore[union-attr]
    config = replace(QUICK, steps=2, settle=1.0, ramp=0.0, warm_start=False)
    before = [router.detach().clone() for router in routers]  # type: ignore[operator]
    report = diffcr_compile.calibrate(model, batches, budget=0.9, config=config)
    assert len(report.history) == 2
    assert all(not torch.equal(router, start) for router, start in zip(routers, before, strict=True))


@pytest.mark.parametrize("steps", [2, 5])
def test_at_a_fixed_table_a_loss_without_a_gradient_on_all_batches_is_refused(model: TinyDiT, steps: int) -> None:
    """Weights learn, and had their chance on each batch, or in each step."""
    seen: list[float] = []

    def loss(one: Any, batch: dict[str, Any]) -> Tensor:
        seen.append(float(batch["x"].sum()))
        return mean_square(one, batch).detach()

    config = CalibrationConfig(steps=steps, settle=1.0)
    with pytest.raises(CalibrationError, match="has no gradient, so nothing would be learned"):
        diffcr_compile.calibrate(model, BATCHES, budget=1.0, config=config, loss=loss)
    assert len(set(seen)) == len(seen) == min(steps, len(BATCHES))
    losses = iter([mean_square, *[loss] * (steps - 1)])
    report = diffcr_compile.calibrate(
        model, BATCHES, budget=1.0, config=config, loss=lambda one, batch: next(losses)(one, batch)
    )
    assert len(report.history) == steps


# Accumulation.


def mean_square(model: Any, batch: dict[str, Any]) -> Tensor:
    """A mean over samples: that of halves is that of the whole."""
    return (model(**batch) - batch["x"]).square().mean()


@pytest.mark.parametrize("estimator", ["two-bin", "single-pass"])
def test_two_halves_are_one_batch(estimator: str) -> None:
    """float64, so that Adam makes no whole step of a rounding; masters and routers' scores are float32."""
    whole = tiny_inputs(SHAPE, batch=4, num_tokens=40, dtype=torch.float64, timestep=600.0)
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(2), slice(2, 4))]
    found = []
    for batches, accumulation in (([whole], 1), (halves, 2)):
        model = routed(SHAPE, torch.float64)
        config = CalibrationConfig(
            steps=8,
            accumulation=accumulation,
            estimator=estimator,
            learning_rate=1e-3,
            warm_start=False,  # type: ignore[arg-type]
        )
        report = diffcr_compile.calibrate(model, batches, budget=0.6, config=config, loss=mean_square)
        found.append((report, [parameter.detach() for parameter in model.parameters()]))
    (one, weights), (two, others) = found
    assert torch.equal(one.table, two.table)
    assert [entry["loss"] for entry in two.history] == pytest.approx([entry["loss"] for entry in one.history], rel=1e-5)
    for ours, theirs in zip(others, weights, strict=True):
        assert relative_error(ours, theirs) < 1e-4  # of steps of 1e-3, eight times, on gradients that agree to 1e-6


def test_accumulated_batches_are_all_drawn(model: TinyDiT) -> None:
    seen: list[float] = []

    def loss(one: Any, batch: dict[str, Any]) -> Tensor:
        seen.append(float(batch["x"].sum()))
        return mean_square(one, batch)

    config = replace(QUICK, steps=4, accumulation=3)
    report = diffcr_compile.calibrate(model, BATCHES, budget=0.8, config=config, loss=loss)
    sums = sorted(float(batch["x"].sum()) for batch in BATCHES)
    assert [sorted(seen[start : start + 3]) for start in range(0, 12, 3)] == [sums] * 4
    assert len(report.history) == 4


# Kinds of budget.


def test_a_budget_of_tokens_is_the_mean_share_kept(model: TinyDiT) -> None:
    report = diffcr_compile.calibrate(model, BATCHES, budget=0.5, config=replace(QUICK, budget_kind="tokens"))
    kept = [capacity(40, round(1000 * ratio)) for ratio in report.table.flatten().tolist()]
    assert report.share == pytest.approx(sum(kept) / len(kept) / 40)
    assert 0.495 <= report.share <= 0.5
    assert report.budget_kind == "tokens"
    assert "of the dense tokens" in str(report)
    assert report.dense_flops == diffcr_compile.cost(model, BATCHES[0]).dense_flops


def test_a_budget_of_time_is_met_in_what_was_measured(model: TinyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block gains little from skipping: the first skips more than FLOPs alone would ask."""
    blocks = (
        BlockTime(40, tuple(4 - 0.4 * place for place in range(11))),
        BlockTime(40, tuple(4 - 0.1 * place for place in range(11))),
    )
    costs = CostModel(10.0, blocks, "latency")
    monkeypatch.setattr(train, "measure_latency", lambda model, inputs, flops: costs)
    report = diffcr_compile.calibrate(model, BATCHES, budget=0.75, config=replace(QUICK, budget_kind="latency"))
    rows = [[round(1000 * value) for value in row] for row in report.table.tolist()]
    times = [2.0 + blocks[0].at(row[0]) + blocks[1].at(row[1]) for row in rows]
    assert report.share == pytest.approx(sum(times) / 4 / 10)
    assert 0.7425 <= report.share <= 0.75
    assert report.budget_kind == "latency"
    with pytest.raises(BudgetError, match="dense milliseconds remain"):
        diffcr_compile.calibrate(model, BATCHES, budget=0.4, config=replace(QUICK, budget_kind="latency"))


def test_a_hand_made_cost_model_of_time_is_met_for_several_budgets(
    model: TinyDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = replace(hand_costs(2, fixed=300_000), unit="latency")
    monkeypatch.setattr(train, "measure_latency", lambda model, inputs, flops: costs)
    config = replace(QUICK, budget_kind="latency")
    report = diffcr_compile.calibrate(model, BATCHES, budget=(0.9, 0.4), config=config)
    for budget, table in report.tables.items():
        rows = [[round(1000 * value) for value in row] for row in table.tolist()]
        assert 0.99 * budget <= costs.share(rows) <= budget


# The report.


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("examine_routers", "the routers' scores"),
        ("distillation_loss", "what saving costs"),
        ("map_tokens", "which tokens are computed"),
    ],
)
@pytest.mark.parametrize("preset", ["default", "training-free"])
def test_what_can_not_be_looked_at_is_said_in_the_report(
    model: TinyDiT, monkeypatch: pytest.MonkeyPatch, place: str, what: str, preset: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("no such thing")

    def loss(one: Any, batch: dict[str, Any]) -> Tensor:
        return mean_square(one, batch)

    monkeypatch.setattr(learner, place, fail)
    config = CalibrationConfig(preset=preset, steps=2 if preset == "default" else 0)  # type: ignore[arg-type]
    report = diffcr_compile.calibrate(
        model, BATCHES, budget=0.8, config=config, loss=loss if preset == "default" else None
    )
    assert any(
        remark.startswith(f"{what} could not be looked at: ") and "IndexError: no such thing" in remark
        for remark in report.diagnostics
    )
    assert torch.equal(report.table, diffcr_compile.ratios(model))
    assert diffcr_compile.explain(model).trained


def test_an_interrupt_in_the_report_is_one_of_the_whole(model: TinyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(learner, "map_tokens", stop)
    with pytest.raises(KeyboardInterrupt):
        diffcr_compile.calibrate(model, BATCHES, budget=0.8, config=replace(QUICK, steps=2))
    assert not diffcr_compile.explain(model).trained
    assert not diffcr_compile.ratios(model).any()


def test_a_sequence_need_not_know_slices(model: TinyDiT) -> None:
    class Drawn(Sequence[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, place: Any) -> Any:
            if not isinstance(place, int):
                raise TypeError("a number, please")
            if place >= 6:
                raise IndexError
            return BATCHES[place % 3]

    report = diffcr_compile.calibrate(model, Drawn(), budget=0.8, config=replace(QUICK, steps=2))
    assert report.diagnostics == ()


def test_inside_a_learning_mode_of_ones_own(model: TinyDiT) -> None:
    expected = diffcr_compile.calibrate(routed(SHAPE), BATCHES, budget=0.8, config=QUICK)
    with diffcr_compile.learning(model):
        report = diffcr_compile.calibrate(model, BATCHES, budget=0.8, config=QUICK)
        assert routing_of(model).learning is not None
    assert replace(report, seconds=0.0).to_dict() == replace(expected, seconds=0.0).to_dict()


# A user's own settings.


def test_autocast_around_it(model: TinyDiT) -> None:
    seen: list[torch.dtype] = []
    handle = model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = diffcr_compile.calibrate(model, BATCHES, budget=0.6, config=CalibrationConfig(steps=8))
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert 0.594 <= report.share <= 0.6
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert bool(torch.isfinite(torch.tensor([entry["loss"] for entry in report.history])).all())


def test_under_autocast_each_step_sees_the_weights_of_the_one_before(model: TinyDiT) -> None:
    """Autocast keeps casts of weights until its outermost context ends, which is the user's."""
    config = CalibrationConfig(steps=8, settle=1.0, learning_rate=1e-2, weight_decay=0.0)

    def loss(model: Any, batch: Any) -> Tensor:
        return model(**batch).float().square().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = diffcr_compile.calibrate(model, BATCHES[:1], budget=1.0, loss=loss, config=config)
        assert torch.is_autocast_cache_enabled()
    losses = [entry["loss"] for entry in report.history]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 8


def test_a_gradient_that_lay_on_the_masters_does_nothing(model: TinyDiT) -> None:
    """What a trainer of one's own left behind."""
    expected = diffcr_compile.calibrate(routed(SHAPE), BATCHES, budget=0.6, config=QUICK)
    with diffcr_compile.learning(model) as learnable:
        learnable.ratios.grad = torch.full_like(learnable.ratios, 1e3) * torch.tensor([1.0, -1.0])
    found = diffcr_compile.calibrate(model, BATCHES, budget=0.6, config=QUICK)
    assert [entry["loss"] for entry in found.history] == [entry["loss"] for entry in expected.history]


@pytest.mark.parametrize("outcome", ["done", "failed", "interrupted"])
def test_masters_and_their_gradient_are_the_users(model: TinyDiT, outcome: str) -> None:
    """Between bins, as a trainer of one's own leaves them; after an error with what had been learned."""
    with diffcr_compile.learning(model) as learnable:
        with torch.no_grad():
            learnable.ratios.fill_(0.03)
        learnable.ratios.grad = torch.ones_like(learnable.ratios)
    calls = 0

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5 and outcome == "interrupted":
            raise KeyboardInterrupt
        return mean_square(model, batch) * (float("nan") if calls == 5 and outcome == "failed" else 1.0)

    expected = {"failed": CalibrationError, "interrupted": KeyboardInterrupt}.get(outcome)
    with pytest.raises(expected) if expected else contextlib.nullcontext():
        diffcr_compile.calibrate(model, BATCHES, budget=0.6, loss=loss, config=QUICK)
    with diffcr_compile.learning(model) as learnable:
        assert bool((learnable.ratios.grad == 1).all())
        assert bool((learnable.ratios == 0.03).all()) == (outcome != "done")
    assert bool((diffcr_compile.ratios(model) == 0).all()) == (outcome != "done")


def test_a_gradient_of_the_ratios_that_is_no_number_stops_it(model: TinyDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where those of weights and routers are."""
    backward = learner.Learner._backward

    def spoilt(self: Any) -> float:
        value = backward(self)
        self.ratios.masters.grad[0, 0] = torch.nan
        return value

    monkeypatch.setattr(learner.Learner, "_backward", spoilt)
    with pytest.raises(CalibrationError, match="gradient norm nan at step 0"):
        diffcr_compile.calibrate(model, BATCHES, budget=0.6, config=QUICK)
    assert not diffcr_compile.ratios(model).any()


def test_a_model_that_writes_into_its_inputs_leaves_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halving(TinyDiT):
        def forward(self, x: Tensor, **inputs: Any) -> Tensor:  # type: ignore[override]
            return super().forward(x.mul_(0.5), **inputs)

    model, batches = original(SHAPE), copy.deepcopy(BATCHES)
    model.__class__ = Halving
    diffcr_compile.transform(model, example_inputs=copy.deepcopy(BATCHES[0]))
    report = diffcr_compile.calibrate(model, batches, budget=0.6, config=QUICK)
    assert all(torch.equal(batch["x"], given["x"]) for batch, given in zip(batches, BATCHES, strict=True))
    assert report.uniform[1.0] == 0, "dense, it is its own teacher"


def test_recorded_samplings_are_measured_at_all_their_timesteps() -> None:
    """Of 24 samplings of four steps every fourth batch is a first step."""
    model = routed(SHAPE)
    steps = (950.0, 700.0, 400.0, 100.0)
    batches = [
        tiny_inputs(SHAPE, batch=1, num_tokens=20, seed=seed, timestep=step) for seed in range(24) for step in steps
    ]
    seen: list[float] = []
    free = CalibrationConfig(preset="training-free", warm_start=False)
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(float(inputs["timestep"].max())), with_kwargs=True
    )
    diffcr_compile.calibrate(model, batches, budget=0.6, config=free)
    hook.remove()
    measured = Counter(seen[: learner.MEASURED_BATCHES])
    assert set(measured) == set(steps)
    assert min(measured.values()) >= 4


def test_a_spoilt_batch_is_named_before_routers_are_fitted(model: TinyDiT) -> None:
    batches = [tiny_inputs(SHAPE, batch=1, num_tokens=8, seed=seed, timestep=500.0) for seed in range(48)]
    batches[11]["x"][0, 0, 0] = torch.nan
    free = CalibrationConfig(preset="training-free")
    before = snapshot(model)
    with pytest.raises(CalibrationError, match="dense outputs of batch 11 are not finite"):
        diffcr_compile.calibrate(model, batches, budget=0.6, config=free)
    assert same_snapshot(snapshot(model), before)


def test_batches_of_one_step_may_leave_the_loss_alone_where_others_do_not() -> None:
    """At a fixed table, with all that learns inside blocks that one timestep region leaves out."""
    model = routed(SHAPE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks."))
    diffcr_compile.set_ratios(model, torch.tensor([[1.0] * SHAPE.depth] * 2 + [[0.0] * SHAPE.depth] * 2))
    batches = [tiny_inputs(SHAPE, num_tokens=20, timestep=step) for step in (100.0, 900.0)]
    config = CalibrationConfig(settle=1.0, steps=2, accumulation=4)
    report = diffcr_compile.calibrate(model, batches, budget=0.9, config=config)
    assert len(report.history) == 2
