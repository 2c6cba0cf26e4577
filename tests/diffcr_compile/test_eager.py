"""``force_eager``: for a time, for the whole process, and never longer."""

from __future__ import annotations

import itertools
import threading
from contextlib import ExitStack

import pytest
import torch
from models import Shape, original, routed, tiny_inputs
from torch._dynamo.testing import CompileCounter

import diffcr_compile
from diffcr_compile.eager import force_eager


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
