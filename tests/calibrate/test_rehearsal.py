"""Learning on top of reuse: memory as a trajectory leaves it, values and slopes from what it foretells, and nothing left behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffcr_compile.calibration.rehearsal import find_predecessors, rehearsed
from models import Shape, TinyDiT, original, relative_error, routed_fqns, same_bits, sinusoids, tiny_inputs
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import diffcr_compile
from diffcr_compile import CalibrationConfig, CalibrationError, DiffCRConfig, UnsupportedError
from diffcr_compile.config import Estimator
from diffcr_compile.primitives import score_tokens
from diffcr_compile.ratios import capacity
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=2, heads=1, head_dim=6)
JOINT = Shape("joint", depth=2, heads=1, head_dim=8)
NUM_TOKENS = 17
"""So that neighbouring bins keep different numbers of tokens."""

RATIOS = 1e-5
"""Masters, and so their gradients, are float32."""

Options = tuple[tuple[str, Any], ...]
BOTH = pytest.mark.parametrize("estimator", ["two-bin", "single-pass"])
SELECTIONS = pytest.mark.parametrize("selection", ["score", "turn", "score and turn"])


class Checkpointed(TinyDiT):
    """A ``TinyDiT`` whose blocks are computed again in backward."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(x)
        cond = self.time(sinusoids(timestep, self.shape.width).to(x.dtype))
        for block in self.blocks:
            x = checkpoint(block, x, cond, None, None, use_reentrant=False)
        return self.head(x)


@functools.cache
def _transformed(kind: type[TinyDiT], shape: Shape, options: Options) -> TinyDiT:
    plain = kind(shape).eval()
    plain.load_state_dict(original(shape).state_dict())
    config = DiffCRConfig(skip="reuse", num_regions=4, **dict(options))
    return diffcr_compile.transform(plain, config, example_inputs=tiny_inputs(shape))


def model_with(shape: Shape = PLAIN, kind: type[TinyDiT] = TinyDiT, **options: Any) -> TinyDiT:
    return copy.deepcopy(_transformed(kind, shape, tuple(sorted(options.items()))))


def trajectory(
    *steps: float, shape: Shape = PLAIN, batch: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[dict[str, Any]]:
    """Batches in the order of sampling; the tokens change a little from one to the next."""
    batches = []
    for step in steps:
        call = tiny_inputs(shape, batch=batch, num_tokens=NUM_TOKENS, timestep=step, dtype=dtype, seed=seed)
        batches.append({**call, "x": call["x"] * (1 + step / 1000)})
    return batches


STEPS = (990.0, 900.0, 780.0, 600.0)


@contextmanager
def learning_ready(model: TinyDiT, batches: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Inside, the last batch has the others behind it."""
    *before, last = range(len(batches))
    with rehearsed(model, routing_of(model), before, last, batches.__getitem__):
        yield batches[last]


@torch.no_grad()
def sampled(model: TinyDiT, batches: list[dict[str, Any]]) -> Tensor:
    """The last output of a sampling at the present table."""
    diffcr_compile.reset(model)
    return [model(**batch) for batch in batches][-1]


# Which batches go before which.


def test_predecessors() -> None:
    model = model_with()
    batches = trajectory(900.0, 700.0, 500.0, 300.0, 200.0, 10.0, 900.0, 600.0)
    expected = [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [], [6]]
    assert find_predecessors(model, routing_of(model), batches) == expected


def test_guidance_in_two_calls_has_predecessors_of_its_own() -> None:
    model = model_with()
    batches = trajectory(900.0, 900.0, 600.0, 600.0)
    assert find_predecessors(model, routing_of(model), batches) == [[], [], [0], [1]]


def test_another_batch_size_begins_anew() -> None:
    model = model_with()
    batches = [*trajectory(900.0, 600.0), *trajectory(300.0, 10.0, batch=2)]
    assert find_predecessors(model, routing_of(model), batches) == [[], [0], [], [2]]


@pytest.mark.parametrize("steps", [(900.0,), (10.0, 900.0), ()])
def test_single_steps_are_refused(steps: tuple[float, ...]) -> None:
    model = model_with()
    with pytest.raises(CalibrationError, match="order of sampling"):
        find_predecessors(model, routing_of(model), trajectory(*steps))


# What is remembered.


@pytest.mark.parametrize("steps", [(990.0, 900.0, 780.0, 600.0), (900.0, 780.0)])
@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_memory_is_what_sampling_leaves(ratio: float, steps: tuple[float, ...]) -> None:
    """At ratio zero too: every block remembers for when it may skip something."""
    model = model_with(extrapolation=2).double()
    diffcr_compile.set_ratios(model, ratio)
    batches = trajectory(*steps)
    with learning_ready(model, batches):
        rehearsal = routing_of(model).rehearsal
        found = {key: pytree.tree_map(torch.clone, memory) for key, memory in rehearsal.memories.items()}
    if ratio == 0:
        diffcr_compile.set_ratios(model, 0.001)  # none of so few tokens: dense, and remembered
    sampled(model, batches[:-1])
    expected = routing_of(model).current.trajectory.memories
    assert set(found) == set(expected) == {(0, 0), (0, 1)}
    for key, memory in expected.items():
        assert same_bits(found[key].updates, memory.updates)
        assert torch.equal(found[key].times, memory.times)
        assert torch.equal(found[key].age, memory.age)
        assert bool(memory.age.any()) == (ratio > 0 and len(steps) > 2)


def test_processes_that_share_a_model_run_it_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is repeated, and leaves what it left the first time."""
    model, batches, found = model_with().double(), trajectory(900.0, 780.0, 600.0), []
    diffcr_compile.set_ratios(model, 0.5)
    for sharded, forwards in ((False, 2), (True, 4)):
        monkeypatch.setattr("diffcr_compile.calibration.rehearsal.is_sharded", lambda model, answer=sharded: answer)
        calls: list[int] = []
        handle = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        with learning_ready(model, batches):
            memory = routing_of(model).rehearsal.memories[0, 0]
        handle.remove()
        assert len(calls) == forwards
        found.append((*memory.updates, memory.times, memory.age))
    assert same_bits(*found)


def test_timesteps_may_rise() -> None:
    """A first rise begins another picture in sampling; which batches belong together is known here."""
    model = model_with().double()
    with learning_ready(model, trajectory(10.0, 300.0, 600.0)):
        times = routing_of(model).rehearsal.memories[0, 0].times
    assert bool((times[0] == 300.0).all())
    assert bool((times[1] == 10.0).all())


def test_a_second_step_knows_one_before_it() -> None:
    model = model_with(extrapolation=2).double()
    batches = trajectory(900.0, 780.0)
    with learning_ready(model, batches):
        memory = routing_of(model).rehearsal.memories[0, 0]
        assert all(same_bits(update, memory.updates[0][0]) for update in memory.updates[0])
        assert bool((memory.times == 900.0).all())


@BOTH
@SELECTIONS
@pytest.mark.parametrize("context", ["kept", "all", "stale"])
@pytest.mark.parametrize("shape", [PLAIN, JOINT], ids=lambda shape: shape.kind)
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_at_a_bin_learning_has_the_values_of_sampling(
    shape: Shape, context: str, selection: str, estimator: Estimator, ratio: float
) -> None:
    model = model_with(shape, context=context, selection=selection).double()
    batches = trajectory(*STEPS, shape=shape)
    bypass = copy.deepcopy(model)
    for each in (model, bypass):
        diffcr_compile.set_ratios(each, ratio)
    expected = sampled(model, batches)
    with torch.no_grad():
        with learning_ready(model, batches) as batch, diffcr_compile.learning(model, estimator=estimator):
            found = model(**batch)
        with diffcr_compile.learning(bypass, estimator=estimator):
            bypassed = bypass(**batches[-1])
    assert relative_error(found, expected) < RATIOS
    assert relative_error(bypassed, expected) > 1e-3


@BOTH
def test_learning_at_ratio_zero_is_the_original(estimator: Estimator) -> None:
    model, batches = model_with().double(), trajectory(*STEPS)
    with learning_ready(model, batches) as batch, diffcr_compile.learning(model, estimator=estimator):
        assert same_bits(model(**batch), original(PLAIN, torch.float64)(**batch))


# Slopes.


def learn(model: TinyDiT, batch: dict[str, Any], estimator: Estimator) -> tuple[Tensor, list[Any], list[Tensor]]:
    """The ratios' gradients; what each block was called with; the gradients of their outputs."""
    calls: list[Any] = []
    outputs: list[Tensor] = []

    def before(module: Any, args: Any) -> None:
        calls.append([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in args])

    def after(module: Any, args: Any, output: Any) -> None:
        outputs.append(output)
        output.retain_grad()

    handles = [block.register_forward_pre_hook(before) for block in model.blocks]
    handles += [block.register_forward_hook(after) for block in model.blocks]
    with diffcr_compile.learning(model, estimator=estimator) as learnable:
        learnable.ratios.grad = None
        model(**batch).square().sum().backward()
    for handle in handles:
        handle.remove()
    assert learnable.ratios.grad is not None
    return learnable.ratios.grad, calls, [output.grad for output in outputs]  # type: ignore[misc]


def at(model: TinyDiT, fqn: str, call: Any, ratio: float) -> Tensor:
    """A block at a ratio, on what is rehearsed."""
    diffcr_compile.set_ratios(model, ratio)
    with torch.no_grad():
        return model.get_submodule(fqn)(*call)


@SELECTIONS
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.34, 1.0])
def test_the_two_bin_slope(selection: str, ratio: float) -> None:
    model = model_with(selection=selection).double()
    diffcr_compile.set_ratios(model, ratio)
    low = min(int(ratio * 10 + 1e-6), 9) / 10
    with learning_ready(model, trajectory(*STEPS)) as batch:
        found, calls, slopes = learn(model, batch, "two-bin")
        for column, fqn in enumerate(routed_fqns(model)):
            lower, upper = (at(model, fqn, calls[column], bin_) for bin_ in (low, low + 0.1))
            expected = float((slopes[column] * (upper - lower)).sum()) / 0.1
            assert expected != 0
            assert float(found[2, column]) == pytest.approx(expected, rel=RATIOS, abs=RATIOS)


@SELECTIONS
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.34])
def test_the_single_pass_slope_counts_from_what_is_foretold(selection: str, ratio: float) -> None:
    """-<dL/dout, output - foretold> over the tokens that the larger bin keeps and the smaller does not, over the width."""
    model = model_with(selection=selection).double()
    diffcr_compile.set_ratios(model, ratio)
    low = int(ratio * 10 + 1e-6) / 10
    with learning_ready(model, trajectory(*STEPS)) as batch:
        found, calls, slopes = learn(model, batch, "single-pass")
        for column, fqn in enumerate(routed_fqns(model)):
            diffcr_compile.set_ratios(model, 0.0)
            kept = {}
            for ratio_ in (low, low + 0.1):
                diffcr_compile.set_ratios(model, ratio_)
                with torch.no_grad(), diffcr_compile.trace(model) as seen:
                    model.get_submodule(fqn)(*calls[column])
                kept[ratio_] = torch.zeros(3, NUM_TOKENS).scatter(1, seen.kept[fqn][0], 1.0)
            between = kept[low] - kept[low + 0.1]
            assert int(between.sum()) == 3 * (
                capacity(NUM_TOKENS, round(1000 * low)) - capacity(NUM_TOKENS, round(1000 * low) + 100)
            )
            update = at(model, fqn, calls[column], low) - at(model, fqn, calls[column], 1.0)
            expected = -float(((slopes[column] * update).sum(-1) * between).sum()) / 0.1
            assert expected != 0
            assert float(found[2, column]) == pytest.approx(expected, rel=RATIOS, abs=RATIOS)


@BOTH
def test_routers_learn_what_keeping_a_token_changes(estimator: Estimator) -> None:
    """As if a kept token's distance from what is foretold were scaled by the sigmoid of its score, divided by itself."""
    shape = Shape("plain", depth=1, heads=1, head_dim=6)
    model = model_with(shape, selection="score").double()
    diffcr_compile.set_ratios(model, 0.3)
    with learning_ready(model, trajectory(*STEPS, shape=shape)) as batch:
        _, calls, slopes = learn(model, batch, estimator)
        found = model.blocks[0].diffcr_router.weight.grad.clone()  # type: ignore[union-attr]
        update = at(model, "blocks.0", calls[0], 0.3) - at(model, "blocks.0", calls[0], 1.0)
    weight, x = model.blocks[0].diffcr_router.weight.detach(), calls[0][0]  # type: ignore[union-attr,operator]
    scores = score_tokens(x, weight, 1, 0)
    kept = torch.zeros(3, NUM_TOKENS).scatter(1, scores.topk(capacity(NUM_TOKENS, 300), dim=1).indices, 1.0)
    pull = (slopes[0] * update).sum(-1) * kept * (1 - scores.double().sigmoid())
    assert relative_error(found, (pull.unsqueeze(-1) * x).sum((0, 1))) < RATIOS


@BOTH
@pytest.mark.parametrize("ratio", [0.0, 0.34])
def test_in_turn_no_router_learns(estimator: Estimator, ratio: float) -> None:
    model = model_with(selection="turn").double()
    diffcr_compile.set_ratios(model, ratio)
    with learning_ready(model, trajectory(*STEPS)) as batch:
        learn(model, batch, estimator)
    gradients = [block.diffcr_router.weight.grad for block in model.blocks]  # type: ignore[union-attr]
    assert not any(gradient is not None and bool(gradient.any()) for gradient in gradients)  # type: ignore[operator]


@SELECTIONS
def test_learning_writes_nothing(selection: str) -> None:
    model = model_with(selection=selection).double()
    diffcr_compile.set_ratios(model, 0.34)
    with learning_ready(model, trajectory(*STEPS)) as batch:
        memories = routing_of(model).rehearsal.memories
        before = {key: pytree.tree_map(torch.clone, memory) for key, memory in memories.items()}
        first = [learn(model, batch, name)[0].clone() for name in ("two-bin", "single-pass")]  # type: ignore[arg-type]
        diffcr_compile.set_ratios(model, 0.5)
        settled = model(**batch)
        assert same_bits(settled, model(**batch))
        diffcr_compile.set_ratios(model, 0.34)
        again = [learn(model, batch, name)[0] for name in ("two-bin", "single-pass")]  # type: ignore[arg-type]
        assert same_bits(first, again)
        for key, memory in memories.items():
            assert same_bits(tuple(memory.updates), tuple(before[key].updates))
            assert same_bits((memory.times, memory.age), (before[key].times, before[key].age))
    assert routing_of(model).rehearsal is None
    assert routing_of(model).current.trajectory is None


@BOTH
@pytest.mark.parametrize("learns", [True, False], ids=["learning", "settling"])
def test_checkpointed_blocks_find_the_same_memory(estimator: Estimator, learns: bool) -> None:
    gradients = []
    for kind in (TinyDiT, Checkpointed):
        model = model_with(kind=kind, selection="score and turn").double()
        diffcr_compile.set_ratios(model, 0.34)
        with learning_ready(model, trajectory(*STEPS)) as batch:
            if learns:
                learn(model, batch, estimator)
            else:
                model(**batch).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10
    assert same_bits(*gradients)


def test_another_batch_than_the_rehearsed_is_refused() -> None:
    model, batches = model_with().double(), trajectory(*STEPS)
    diffcr_compile.set_ratios(model, 0.5)
    with learning_ready(model, batches) as batch, diffcr_compile.learning(model):
        with pytest.raises(UnsupportedError, match="let the loss call the model on the batch it is given"):
            model(**{name: value[:2] for name, value in batch.items()})
        with pytest.raises(UnsupportedError, match="a batch takes its steps together"):
            model(**{**batch, "timestep": torch.tensor([900.0, 10.0, 600.0])})


def test_an_error_leaves_nothing_behind() -> None:
    model, batches = model_with().double(), trajectory(*STEPS)
    bad = {**batches[1], "x": batches[1]["x"][..., :2]}
    state = routing_of(model)
    with diffcr_compile.learning(model):
        learning = state.learning
        for given in ([batches[0], bad, batches[2]], batches):
            with pytest.raises(RuntimeError), learning_ready(model, given):
                raise RuntimeError
            assert state.rehearsal is None
            assert state.current.trajectory is None
            assert state.learning is learning
    assert not state.current.pinned


# Calibration.


def recorded(num: int = 2) -> list[dict[str, Any]]:
    steps = tuple(float(step) for step in range(990, 0, -160))
    return [batch for seed in range(num) for batch in trajectory(*steps, dtype=torch.float32, seed=seed)]


CONFIG = CalibrationConfig(steps=8, checkpoint_every=3, learning_rate=1e-3)


@pytest.mark.parametrize("trainable", ["all", "routers", "lora"])
@SELECTIONS
def test_calibrate_learns_and_goes_on_where_it_was_stopped(selection: str, trainable: str, tmp_path: Path) -> None:
    config = replace(CONFIG, trainable=trainable, lora_rank=2)  # type: ignore[arg-type]
    straight, stopped, again = (model_with(selection=selection) for _ in range(3))
    report = diffcr_compile.calibrate(straight, recorded(), budget=0.8, config=config)
    assert 0.8 * 0.99 <= report.share <= 0.8
    assert len(report.history) == 8
    steps = torch.optim.AdamW.step
    calls = []

    class Stop(Exception):
        pass

    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 6:
            raise Stop
        return steps(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stepping)
        with pytest.raises(Stop):
            diffcr_compile.calibrate(stopped, recorded(), budget=0.8, config=config, checkpoint=tmp_path / "progress")
    resumed = diffcr_compile.calibrate(again, recorded(), budget=0.8, config=config, checkpoint=tmp_path / "progress")
    assert torch.equal(resumed.table, report.table)
    assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in report.history]
    assert all(same_bits(a, b) for a, b in zip(again.parameters(), straight.parameters(), strict=True))
    state = routing_of(straight)
    assert state.rehearsal is state.current.trajectory is None


def test_calibrate_with_a_loss_of_ones_own_draws_no_first_step() -> None:
    model = model_with()
    seen: list[float] = []

    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        seen.append(float(batch["timestep"][0]))
        inputs = {name: value for name, value in batch.items() if name != "target"}
        return (model(**inputs) - batch["target"]).square().mean()

    batches = [{**batch, "target": batch["x"] * 0.5} for batch in recorded()]
    diffcr_compile.calibrate(model, batches, budget=0.8, loss=loss, config=CalibrationConfig(steps=12))
    assert len(seen) == 12
    assert 990.0 not in seen
    assert len(set(seen)) > 4


def test_the_loss_falls() -> None:
    """With the table fixed, routers and weights learn to live with what is reused."""
    model = model_with(selection="score")
    diffcr_compile.set_ratios(model, 0.3)
    config = CalibrationConfig(steps=240, settle=1, ramp=0, learning_rate=1e-3, warm_start=False)
    report = diffcr_compile.calibrate(model, recorded(), budget=0.9, config=config)
    losses = [entry["loss"] for entry in report.history]
    assert sum(losses[-24:]) < 0.75 * sum(losses[:24])  # each batch twice


def test_the_default_stays_training_free() -> None:
    model = model_with()
    assert not diffcr_compile.calibrate(model, recorded(1), budget=0.8).history
