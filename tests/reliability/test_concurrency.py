"""One routed model in several threads and processes at once, and for a long time: nothing leaks, between them or at all.

Threads meet at a barrier inside a block, so that every forward is under way while the other is; each must compute the bits that
it computes alone.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, original, same_bits, tiny_inputs
from torch import Tensor, nn

import diffcr_compile
from reliability.support import cases, randomise_routers, sample, transformed

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

SHAPE = Shape("rotary", depth=2, heads=2, head_dim=4)
TABLE = [[0.0, 0.0], [0.2, 0.3], [0.5, 0.4], [0.8, 1.0]]
STEPS = ((990.0, 760.0, 510.0, 260.0, 20.0), (980.0, 640.0, 430.0, 330.0, 110.0))
"""Timesteps of two samplers: at most steps they lie in different regions."""

REUSE: dict[str, Any] = {"skip": "reuse", "context": "kept"}
WAIT = 15.0
"""Seconds after which a barrier or a child is given up."""


def model_of(**options: Any) -> TinyDiT:
    model = randomise_routers(transformed(SHAPE, **options))
    diffcr_compile.set_ratios(model, TABLE)
    return model


@contextmanager
def meeting_in(module: nn.Module, parties: int) -> Iterator[None]:
    """Inside, every call of ``module`` waits, on its way in and on its way out, until all threads have come there."""
    barrier = threading.Barrier(parties, timeout=WAIT)

    def meet(*_: Any) -> None:
        barrier.wait()

    handles = [module.register_forward_pre_hook(meet), module.register_forward_hook(meet)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """Results of ``works``, each run in a thread of its own; the first error is raised."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * WAIT)
    for error in errors:
        raise error
    return results


def in_process(work: Callable[[], Any]) -> Any:
    """Starts ``work`` in a forked child; returns a function that gives its result."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(int(WAIT))
            with os.fdopen(writer, "wb") as stream:
                pickle.dump(work(), stream)
        finally:
            os._exit(0)
    os.close(writer)

    def result() -> Any:
        with os.fdopen(reader, "rb") as stream:
            data = stream.read()
        os.waitpid(child, 0)
        return pickle.loads(data)

    return result


def numbers(outputs: list[Tensor]) -> list[Any]:
    return [output.tolist() for output in outputs]


@pytest.mark.parametrize("options", [{}, REUSE, {"skip": "reuse"}], ids=["identity", "reuse", "reuse, full context"])
def test_threads_at_different_timesteps_compute_what_each_computes_alone(options: dict[str, Any]) -> None:
    model = model_of(**options)
    alone = [sample(copy.deepcopy(model), SHAPE, steps, seed=index) for index, steps in enumerate(STEPS)]
    with meeting_in(model.blocks[0], 2), meeting_in(model.blocks[1], 2):
        together = in_threads(*(lambda i=i, s=s: sample(model, SHAPE, s, seed=i) for i, s in enumerate(STEPS)))
    assert all(same_bits(found, expected) for found, expected in zip(together, alone, strict=True))
    assert not same_bits(alone[0][-1], alone[1][-1])


@pytest.mark.parametrize("scope", ["regional", "full"])
@pytest.mark.parametrize(
    "options", [pytest.param({}, id="identity", marks=pytest.mark.nightly), pytest.param(REUSE, id="reuse")]
)
def test_threads_of_a_lowered_model_at_different_timesteps_compute_what_each_computes_alone(
    options: dict[str, Any], scope: Any
) -> None:
    """They meet at the model's own call; which row of the table each takes is told outside the graph."""
    torch._dynamo.reset()
    model = diffcr_compile.lower(model_of(**options), scope=scope, backend="aot_eager")
    alone = [sample(model, SHAPE, steps, seed=index) for index, steps in enumerate(STEPS)]
    diffcr_compile.reset(model)
    with meeting_in(model, 2):
        together = in_threads(*(lambda i=i, s=s: sample(model, SHAPE, s, seed=i) for i, s in enumerate(STEPS)))
    assert all(same_bits(found, expected) for found, expected in zip(together, alone, strict=True))
    assert not same_bits(alone[0][-1], alone[1][-1])


def test_threads_with_batches_in_several_regions_compute_what_each_computes_alone() -> None:
    model = model_of()
    timesteps = [torch.tensor([10.0, 600.0, 990.0]), torch.tensor([990.0, 300.0, 20.0])]
    inputs = [tiny_inputs(SHAPE, timestep=timestep, seed=index) for index, timestep in enumerate(timesteps)]
    with torch.no_grad():
        alone = [model(**one) for one in inputs]
    with meeting_in(model.blocks[0], 2):
        together = in_threads(*(lambda one=one: torch.no_grad()(model)(**one) for one in inputs))
    assert same_bits(together, alone)


def test_threads_that_learn_from_different_regions_get_the_gradients_of_each_alone() -> None:
    gradients: list[dict[str, Tensor]] = []

    def learn(model: TinyDiT, step: float) -> None:
        model(**tiny_inputs(SHAPE, timestep=step)).square().sum().backward()

    for together in (False, True):
        model = model_of()
        steps = [lambda step=step, model=model: learn(model, step) for step in (900.0, 400.0)]
        if together:
            with meeting_in(model.blocks[0], 2):
                in_threads(*steps)
        else:
            for one in steps:
                one()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert gradients[0]
    assert list(gradients[0]) == list(gradients[1])
    # two summands, in either order: addition of two numbers commutes
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_first_forward_in_two_threads_at_once_finds_the_blocks_once() -> None:
    plain, inputs = original(SHAPE), tiny_inputs(SHAPE)
    model = diffcr_compile.transform(original(SHAPE))
    barrier = threading.Barrier(2, timeout=WAIT)

    def first() -> Tensor:
        barrier.wait()
        with torch.no_grad():
            return model(**inputs)

    outputs = in_threads(first, first)
    with torch.no_grad():
        expected = plain(**inputs)
    assert all(same_bits(output, expected) for output in outputs)
    assert diffcr_compile.ratios(model).shape == (4, SHAPE.depth)
    diffcr_compile.set_ratios(model, 0.5)
    with diffcr_compile.trace(model) as seen, torch.no_grad():
        model(**inputs)
    assert [kept.shape[1] for calls in seen.kept.values() for kept in calls] == [6, 6]


def test_tracing_in_one_thread_changes_no_number_in_another() -> None:
    model = model_of(**REUSE)
    alone = [sample(copy.deepcopy(model), SHAPE, steps, seed=index) for index, steps in enumerate(STEPS)]
    stop = threading.Event()

    def watch() -> list[Tensor]:
        outputs: list[Tensor] = []
        while not stop.is_set():
            with diffcr_compile.trace(model), diffcr_compile.record(model):
                outputs = sample(model, SHAPE, STEPS[1], seed=1)
        return outputs

    def run() -> list[list[Tensor]]:
        try:
            return [sample(model, SHAPE, STEPS[0], seed=0) for _ in range(cases(10, 200))]
        finally:
            stop.set()

    runs, watched = in_threads(run, watch)
    assert all(same_bits(outputs, alone[0]) for outputs in runs)
    assert same_bits(watched, alone[1])


def test_a_trace_tells_of_its_own_threads_forwards_alone() -> None:
    model = model_of()

    def watch() -> dict[str, list[Tensor]]:
        with diffcr_compile.trace(model) as seen:
            sample(model, SHAPE, STEPS[0])
        return seen.kept

    expected = watch()
    with meeting_in(model.blocks[0], 2):
        found, _ = in_threads(watch, lambda: sample(model, SHAPE, STEPS[1]))
    assert {name: len(calls) for name, calls in found.items()} == {name: len(calls) for name, calls in expected.items()}
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_a_record_collects_its_own_threads_inputs_alone() -> None:
    model = model_of()

    def watch() -> list[float]:
        with diffcr_compile.record(model) as batches:
            sample(model, SHAPE, STEPS[0])
        return [float(batch["timestep"][0]) for batch in batches]

    with meeting_in(model.blocks[0], 2):
        found, _ = in_threads(watch, lambda: sample(model, SHAPE, STEPS[1]))
    assert found == list(STEPS[0])


@pytest.mark.parametrize("options", [{}, REUSE], ids=["identity", "reuse"])
def test_forked_processes_compute_what_each_computes_alone(options: dict[str, Any]) -> None:
    model = model_of(**options)
    alone = [numbers(sample(copy.deepcopy(model), SHAPE, steps, seed=i)) for i, steps in enumerate(STEPS)]
    sample(model, SHAPE, STEPS[0][:2])  # the parent is on a trajectory of its own, which the children begin anew
    children = [in_process(lambda s=s, i=i: numbers(sample(model, SHAPE, s, seed=i))) for i, s in enumerate(STEPS)]
    assert [child() for child in children] == alone


def test_a_fork_continues_the_trajectory_that_it_was_made_on() -> None:
    model = model_of(**REUSE)
    whole = numbers(sample(model, SHAPE, STEPS[0]))
    sample(model, SHAPE, STEPS[0][:2])
    child = in_process(lambda: numbers(sample(model, SHAPE, STEPS[0][2:])))
    assert numbers(sample(model, SHAPE, STEPS[0][2:])) == whole[2:]
    assert child() == whole[2:]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settled_blocks() -> int:
    """Python's blocks of memory, once collecting finds no more: what earlier tests left may take several rounds (an object freed
    frees others), and would else be freed later, which hides a leak."""
    counts = [sys.getallocatedblocks()]
    while len(counts) < 2 or counts[-1] < counts[-2]:
        gc.collect()
        counts.append(sys.getallocatedblocks())
    return counts[-1]


def assert_steady(cycle: Callable[[], None], *, calls: int, cycles: int, warm_up: int = 2) -> None:
    """Memory after ``cycles`` of so many ``calls`` is what it was after ``warm_up`` of them: Python's blocks (counted, since
    tracing each would take longer than the calls), and the process's bytes within 2 %."""
    for _ in range(warm_up):
        cycle()
    before = settled_blocks(), resident_bytes()
    for _ in range(cycles):
        cycle()
    after = settled_blocks(), resident_bytes()
    # a call that leaks leaves an object or more; dictionaries that reach their final size take some hundred blocks at first, and
    # half as many in every ten cycles that follow
    assert after[0] - before[0] < 800 + calls * cycles // 2, f"{after[0] - before[0]} blocks of Python's memory more"
    assert after[1] - before[1] < 0.02 * before[1], f"the process grew from {before[1]} to {after[1]} bytes"


def test_the_measurement_notices_a_small_leak() -> None:
    leaked: list[object] = []
    with pytest.raises(AssertionError, match="blocks of Python's memory more"):
        assert_steady(lambda: leaked.extend(object() for _ in range(300)), calls=30, cycles=10)


class _Chain:
    """Garbage that each round of collecting finds a link of."""

    def __init__(self, links: int) -> None:
        self.links, self.me, self.ballast = links, self, [object() for _ in range(3000 * links)]

    def __del__(self) -> None:
        if self.links:
            _Chain(self.links - 1)


def test_garbage_of_earlier_tests_hides_no_leak() -> None:
    leaked: list[object] = []
    _Chain(5)
    with pytest.raises(AssertionError, match="blocks of Python's memory more"):
        assert_steady(lambda: leaked.extend(object() for _ in range(300)), calls=30, cycles=10)


TABLES = (TABLE, 0.0, 0.5, [[0.25, 0.75]] * 4, 1.0)


def test_memory_is_steady_over_regions_mixed_batches_and_tables() -> None:
    model = model_of()
    mixed = tiny_inputs(SHAPE, timestep=torch.tensor([10.0, 400.0, 990.0]))

    def cycle() -> None:
        for table in TABLES:
            diffcr_compile.set_ratios(model, table)
            sample(model, SHAPE, STEPS[0])
            model(**mixed).sum().backward()
        model.zero_grad()

    assert_steady(cycle, calls=30, cycles=cases(8, 65))


@pytest.mark.parametrize("options", [{}, REUSE], ids=["identity", "reuse"])
def test_memory_is_steady_over_two_thousand_calls(options: dict[str, Any]) -> None:
    model = model_of(**options)

    def cycle() -> None:
        sample(model, SHAPE, STEPS[0])

    assert_steady(cycle, calls=5, cycles=400)


@pytest.mark.parametrize("context", ["kept", "all", "stale"])
def test_memory_is_steady_over_trajectories_with_reuse(context: str) -> None:
    model = model_of(skip="reuse", context=context)

    def cycle() -> None:
        for index, table in enumerate(TABLES):
            diffcr_compile.set_ratios(model, table)
            sample(model, SHAPE, STEPS[index % 2], batch=1 + index % 3, num_tokens=9 + index)
        diffcr_compile.reset(model)

    assert_steady(cycle, calls=25, cycles=cases(4, 80))


def test_memory_is_steady_over_threads_that_come_and_go() -> None:
    model = model_of(**REUSE)

    def cycle() -> None:
        in_threads(*(lambda steps=steps: sample(model, SHAPE, steps) for steps in STEPS))

    assert_steady(cycle, calls=10, cycles=cases(10, 200))


def test_memory_is_steady_over_copies_saves_loads_and_restores(tmp_path: Path) -> None:
    model = model_of()

    def cycle() -> None:
        duplicate = copy.deepcopy(model)
        sample(duplicate, SHAPE, STEPS[0][:2])
        diffcr_compile.save(duplicate, tmp_path / "routing")
        diffcr_compile.restore(duplicate)
        sample(diffcr_compile.load(duplicate, tmp_path / "routing"), SHAPE, STEPS[0][:2])

    assert_steady(cycle, calls=4, cycles=cases(15, 300))


@pytest.mark.parametrize("scope", ["regional", "full"])
def test_memory_is_steady_over_a_lowered_model_whose_table_changes(scope: Any) -> None:
    shape = Shape("plain", depth=1, heads=1, head_dim=6)
    model = diffcr_compile.lower(transformed(shape), scope=scope, backend="eager")

    def cycle() -> None:
        for table in (0.0, [[0.3], [0.3], [0.6], [0.6]]):
            diffcr_compile.set_ratios(model, table)
            sample(model, shape, (900.0, 100.0))

    assert_steady(cycle, calls=4, cycles=cases(25, 500))
