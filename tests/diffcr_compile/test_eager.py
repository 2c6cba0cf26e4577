"""``force_eager``: for a time, for the whole process, and never longer."""

from __future__ import annotations

import copy
import itertools
import threading
from contextlib import ExitStack

import pytest
import torch
from models import Shape, original, relative_error, routed, tiny_inputs
from torch._dynamo.testing import CompileCounter

import diffcr_compile
from diffcr_compile.eager import force_eager, in_a_graph

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiles() -> bool:
    """Whether what is compiled now is compiled."""
    counter = CompileCounter()
    torch.compile(lambda x: x + 1, backend=counter)(torch.zeros(2))
    return counter.frame_count == 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_overlapping_uses_end_in_any_order(order: tuple[int, ...]) -> None:
    assert compiles()
    uses = [ExitStack() for _ in order]
    for use in uses:
        use.enter_context(force_eager())
    for place in order:
        assert not compiles()
        uses[place].close()
    assert compiles()


def test_an_error_inside_ends_it() -> None:
    with pytest.raises(KeyError), force_eager():
        raise KeyError
    assert compiles()


def test_records_and_traces_that_overlap_in_two_threads_leave_nothing() -> None:
    """One begins while the other is under way, and ends after it."""
    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    first, second, ended = (threading.Event() for _ in range(3))

    def trace() -> None:
        with diffcr_compile.trace(routed(shape)):
            first.set()
            second.wait(60)
        ended.set()

    thread = threading.Thread(target=trace)
    thread.start()
    first.wait(60)
    with diffcr_compile.record(original(shape)) as batches:
        second.set()
        ended.wait(60)
        thread.join(60)
    assert len(batches) == 0
    diffcr_compile.transform(original(shape), example_inputs=tiny_inputs(shape))
    assert compiles()


class Elsewhere:
    """Another thread that is compiling something from now until ``end``."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._compile)

    def _compile(self) -> None:
        def backend(graph: torch.fx.GraphModule, _: object) -> object:
            self.begun.set()
            self.ended.wait(60)
            return graph.forward

        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))

    def begin(self) -> None:
        self.thread.start()
        assert self.begun.wait(60)

    def end(self) -> None:
        self.ended.set()
        self.thread.join()


def test_a_graph_is_this_threads() -> None:
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if in_a_graph() else x - 1

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(in_a_graph())
            return f(x)

    assert torch.equal(torch.compile(f, backend="eager", fullgraph=True)(torch.zeros(2)), torch.ones(2))
    torch.export.export(Module(), (torch.zeros(2),), strict=False)
    assert set(seen) == {True}
    other = Elsewhere()
    other.begin()
    try:
        assert not in_a_graph()
    finally:
        other.end()


@pytest.mark.parametrize(
    ("skip", "scope"),
    [
        ("identity", None),
        ("identity", "regional"),
        ("identity", "full"),
        ("reuse", None),
        ("reuse", "regional"),
        pytest.param("reuse", "full", marks=pytest.mark.nightly),
    ],
)
def test_a_forward_is_the_same_while_another_thread_compiles(skip: str, scope: str | None) -> None:
    shape = Shape("plain", depth=2, heads=1, head_dim=6)
    config = diffcr_compile.DiffCRConfig(skip=skip)  # type: ignore[arg-type]
    model = diffcr_compile.transform(original(shape), config, example_inputs=tiny_inputs(shape))
    diffcr_compile.set_ratios(model, 0.5)
    expected = copy.deepcopy(model)
    if scope is not None:
        diffcr_compile.lower(model, scope=scope, backend="eager")  # type: ignore[arg-type]
    with torch.no_grad():
        steps = [tiny_inputs(shape, timestep=step) for step in (900.0, 600.0, 300.0)]
        alone = [expected(**step) for step in steps]
        for step in steps:
            model(**step)  # its graphs are there
        other = Elsewhere()
        other.begin()
        try:
            beside = [model(**step) for step in steps]
        finally:
            other.end()
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(beside, alone, strict=True))
