"""Nothing fake is left in caches outside the model, whoever keeps them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, original, same_bits, tiny_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import diffcr_compile
from diffcr_compile import forget

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("rotary", depth=2, heads=1, head_dim=6)
PLAIN = Shape("plain", depth=2, heads=1, head_dim=6)


def table(length: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * torch.linspace(0.1, 1, SHAPE.head_dim)
    return angles.cos(), angles.sin()


class Holder:
    """What holds the tables: a dictionary, an attribute, a class's, a list in a dictionary, a function's cache."""

    shared: Any = None

    def __init__(self) -> None:
        self.entries: dict[int, Any] = {}
        self.own: Any = None
        self.cached = functools.lru_cache(table)

    def by_entry(self, length: int) -> Any:
        if length not in self.entries:
            self.entries[length] = table(length)
        return self.entries[length]

    def by_list(self, length: int) -> Any:
        if length not in self.entries:
            self.entries[length] = [list(table(length))]
        return tuple(self.entries[length][0])

    def by_attribute(self, length: int) -> Any:
        if self.own is None or len(self.own[0]) != length:
            self.own = table(length)
        return self.own

    def by_class(self, length: int) -> Any:
        if Holder.shared is None or len(Holder.shared[0]) != length:
            Holder.shared = table(length)
        return Holder.shared

    def by_cache(self, length: int) -> Any:
        return self.cached(length)


WAYS: dict[str, Callable[[Holder, int], Any]] = {
    "entry": Holder.by_entry,
    "list": Holder.by_list,
    "attribute": Holder.by_attribute,
    "class": Holder.by_class,
    "lru_cache": Holder.by_cache,
}
HELD: list[Any] = []
"""The holder of the model under test: models don't own it."""


class Caching(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        holder, way = HELD[-1]
        return super().forward(x, timestep, rope=way(holder, x.shape[1]))


@pytest.fixture(params=WAYS)
def model(request: pytest.FixtureRequest) -> Any:
    HELD.append((Holder(), WAYS[request.param]))
    Holder.shared = None
    plain = original(SHAPE)
    plain.__class__ = Caching
    yield plain
    HELD.clear()


def same_as_dense(model: TinyDiT, **sizes: Any) -> bool:
    given = tiny_inputs(PLAIN, **sizes)
    found = model(**given)
    return type(found) is Tensor and same_bits(found, original(SHAPE)(**given, rope=table(given["x"].shape[1])))


@pytest.mark.parametrize("when", ["transform", "first forward", "after a forward"])
def test_a_model_with_tables_elsewhere_gives_real_tensors(model: TinyDiT, when: str) -> None:
    if when == "after a forward":
        assert same_as_dense(model)
    diffcr_compile.transform(model, example_inputs=tiny_inputs(PLAIN) if when == "transform" else None)
    assert same_as_dense(model)
    assert same_as_dense(model, num_tokens=7)
    assert diffcr_compile.explain(model).plan.input_batch_axes


def test_costs_at_another_size_leave_nothing_there(model: TinyDiT) -> None:
    diffcr_compile.transform(model, example_inputs=tiny_inputs(PLAIN))
    diffcr_compile.cost(model, tiny_inputs(PLAIN, num_tokens=9))
    assert same_as_dense(model, num_tokens=9)


def test_without_leftovers_nothing_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forget.gc, "get_objects", lambda: pytest.fail("all objects were looked through"))
    generations, collect = [], gc.collect
    monkeypatch.setattr(
        forget.gc, "collect", lambda generation=2: generations.append(generation) or collect(generation)
    )
    gc.disable()  # what it collects meanwhile makes survivors older
    try:
        diffcr_compile.transform(original(PLAIN), example_inputs=tiny_inputs(PLAIN))
    finally:
        gc.enable()
    assert not forget.forget_fakes()
    assert set(generations) == {0}


def test_fakes_of_others_are_let_be() -> None:
    mode = FakeTensorMode()
    entries = {"theirs": mode.from_tensor(torch.zeros(2))}
    ours = FakeTensorMode()
    entries["ours"] = ours.from_tensor(torch.zeros(2))
    forget.note_run(ours)
    assert forget.forget_fakes()
    assert list(entries) == ["theirs"]
    assert isinstance(entries["theirs"], FakeTensor)
