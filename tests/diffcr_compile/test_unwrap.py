"""What a user may hand over in place of a model: a wrapper of it; and what not, at every public function."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from models import Shape, original, same_bits, tiny_inputs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import diffcr_compile
from diffcr_compile.unwrap import unwrap

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
INPUTS = tiny_inputs(SHAPE)

FUNCTIONS = {
    name: function
    for name in diffcr_compile.__all__
    if inspect.isfunction(function := getattr(diffcr_compile, name))
    and next(iter(inspect.signature(function).parameters)) == "model"
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "set_ratios": (0.5,),
    "budget_loss": (0.5,),
    "save": ("nowhere",),
    "load": ("nowhere",),
    "calibrate": ([INPUTS],),
}
"""Arguments after the model, where a function needs some."""


class Pipeline:
    """What a user has in hands, and no module."""

    def __init__(self) -> None:
        self.transformer = original(SHAPE)


def call(name: str, model: Any) -> None:
    options = {"budget": 0.5} if name == "calibrate" else {}
    entered = FUNCTIONS[name](model, *OTHERS.get(name, ()), **options)
    if isinstance(entered, contextlib.AbstractContextManager):
        with entered:
            pass


def test_every_function_of_a_model_is_here() -> None:
    """As many as there are: a guard against a signature that the search above misses."""
    assert set(FUNCTIONS) == {
        *("transform", "restore", "save", "load", "explain", "cost", "lower", "calibrate", "reset"),
        *("ratios", "set_ratios", "record", "trace", "learning", "budget_loss"),
    }


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("handed", "says"),
    [
        (lambda: None, r"expected a torch.nn.Module, found NoneType\.$"),
        (lambda: "model", r"expected a torch.nn.Module, found str\.$"),
        (Pipeline, r"expected a torch.nn.Module, found Pipeline\. Pass its denoiser: \.transformer\.$"),
        (
            lambda: diffcr_compile.transform(original(SHAPE), example_inputs=INPUTS).blocks[1],
            r"expected a whole model, found Block, the routed block 'blocks\.1' of one\. Pass that model\.$",
        ),
        (
            lambda: torch.jit.trace(original(SHAPE), (INPUTS["x"], INPUTS["timestep"])),
            r"expected a module whose forward is Python, found TopLevelTracedModule .* that it was traced or scripted from\.$",
        ),
        (lambda: torch.jit.script(nn.Linear(2, 2)), r"found RecursiveScriptModule of TorchScript"),
    ],
    ids=["None", "text", "pipeline", "block", "traced", "scripted"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_is_no_model_is_named(name: str, handed: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call(name, handed())


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "distributed": DistributedDataParallel,
    "distributed and compiled": lambda model: compiled(DistributedDataParallel(model)),
    "compiled and distributed": lambda model: DistributedDataParallel(compiled(model)),
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
class TestWrappers:
    def test_are_taken_off(self, wrap: Callable[[nn.Module], Any]) -> None:
        model = original(SHAPE)
        assert unwrap(wrap(model)) is model
        assert unwrap(model) is model

    def test_serve_at_every_function(self, wrap: Callable[[nn.Module], Any], tmp_path: Path) -> None:
        """From a plain model to a plain model, all by one wrapper, as on the model itself."""
        model, path = original(SHAPE), tmp_path / "routing"
        wrapper = wrap(model)
        assert diffcr_compile.transform(wrapper, example_inputs=INPUTS) is model
        with pytest.raises(diffcr_compile.AlreadyTransformedError, match="TinyDiT is already transformed"):
            diffcr_compile.transform(wrapper)
        diffcr_compile.set_ratios(wrapper, 0.5)
        with torch.no_grad():
            routed = model(**INPUTS)
            assert same_bits(wrapper(**INPUTS), routed)
        assert float(diffcr_compile.ratios(wrapper).mean()) == 0.5
        assert str(diffcr_compile.explain(wrapper)).startswith("TinyDiT: 2 routed blocks")
        assert diffcr_compile.cost(wrapper, INPUTS) == diffcr_compile.cost(model, INPUTS)
        with torch.no_grad(), diffcr_compile.record(wrapper) as batches, diffcr_compile.trace(wrapper) as seen:
            wrapper(**INPUTS)
        assert same_bits(batches[0]["x"], INPUTS["x"])
        assert [len(calls) for calls in seen.kept.values()] == [1, 1]
        with diffcr_compile.learning(wrapper) as learnable:
            (model(**INPUTS).square().mean() + diffcr_compile.budget_loss(wrapper, 0.5)).backward()
        assert learnable.ratios.grad is not None
        diffcr_compile.reset(wrapper)
        report = diffcr_compile.calibrate(
            wrapper, [INPUTS], budget=0.8, config=diffcr_compile.CalibrationConfig(preset="training-free")
        )
        assert report.share <= 0.8
        diffcr_compile.save(wrapper, path)
        with torch.no_grad():
            calibrated = model(**INPUTS)
        assert diffcr_compile.lower(wrapper, backend="eager") is model
        assert diffcr_compile.restore(wrapper) is model
        assert diffcr_compile.load(wrapper, path) is model
        with torch.no_grad():
            assert same_bits(model(**INPUTS), calibrated)
