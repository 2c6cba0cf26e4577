"""What blocks take at every ratio, measured on the device at hand: the cost model of a latency budget."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from .cost import CostModel, block_shapes
from .learning import dense
from .lower import unlowered
from .observe import watch_calls
from .ratios import BIN, SCALE
from .region import pin_region
from .routed import ModelRouting, routing_of
from .trajectory import Trajectory

ROUNDS = 7
"""Every ratio is timed once in each round, in turn; the median counts."""


@dataclass(frozen=True)
class BlockTime:
    """Milliseconds of one block at each bin, straight lines between; never rising with the ratio."""

    num_tokens: int
    times_ms: tuple[float, ...]
    memory: int = 0

    @property
    def dense(self) -> float:
        return self.times_ms[0]

    def at(self, ratio: int) -> float:
        """Milliseconds at a ratio in thousandths."""
        place, rest = divmod(ratio, BIN)
        if not rest:
            return self.times_ms[place]
        return self.times_ms[place] + rest / BIN * (self.times_ms[place + 1] - self.times_ms[place])


def latency_to_dict(costs: CostModel) -> dict[str, Any]:
    """JSON form of measured costs."""
    blocks = [[block.num_tokens, list(block.times_ms)] for block in costs.blocks if isinstance(block, BlockTime)]
    return {"dense": costs.dense, "blocks": blocks}


def latency_from_dict(data: dict[str, Any]) -> CostModel:
    """Inverse of :func:`latency_to_dict`."""
    return CostModel(data["dense"], tuple(BlockTime(n, tuple(times)) for n, times in data["blocks"]), "latency")


@torch.no_grad()
def measure_latency(model: nn.Module, inputs: dict[str, Any], costs: CostModel, *, rounds: int = ROUNDS) -> CostModel:
    """Time one block of each family at each bin on what it is called with, and the whole model at ratio zero.

    As the model runs: compiled where it is lowered (with the full scope, by one graph a block), else eagerly; with reuse, as a step
    in the midst of a sampling. inputs: on the model's device. costs: the FLOPs of the same model. Milliseconds; medians of
    ``rounds`` rounds. In eval mode, as a sampler runs it; the global generators are put back.
    """
    state: ModelRouting = routing_of(model)
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices), _evaluated(model):
        calls = _record_calls(model, state, inputs)
        return _measure(model, state, inputs, calls, costs, rounds)


def _measure(
    model: nn.Module,
    state: ModelRouting,
    inputs: dict[str, Any],
    calls: dict[str, list[tuple[Any, Any]]],
    costs: CostModel,
    rounds: int,
) -> CostModel:
    known: dict[Any, tuple[float, ...]] = {}
    blocks = []
    with _compiled_by_block(model, state):
        for block, flops in tqdm(list(zip(state.blocks, costs.blocks, strict=True)), desc="latency", leave=False):
            module = model.get_submodule(block.fqn)
            programs = tuple(id(program) for program in block.programs.values())
            key = (programs, block_shapes(module, calls[block.fqn]), *map(flops.at, range(0, SCALE + 1, BIN)))
            if key not in known:
                known[key] = _time_block(module, state, block.index, calls[block.fqn], rounds)
            blocks.append(BlockTime(flops.num_tokens, known[key]))
        zero = (0,) * len(state.blocks)
        with pin_region(state, 0, zero):
            whole = _medians([lambda: model(**inputs)], rounds)[0]
    return CostModel(max(whole, sum(block.dense for block in blocks)), tuple(blocks), "latency")


def _time_block(
    module: nn.Module, state: ModelRouting, index: int, calls: list[tuple[Any, Any]], rounds: int
) -> tuple[float, ...]:
    def at(ratio: int) -> Callable[[], None]:
        row = tuple(ratio if place == index else 0 for place in range(len(state.blocks)))

        def run() -> None:
            with pin_region(state, 0, row):
                for place, (args, kwargs) in enumerate(calls):
                    if trajectory is not None:
                        trajectory.slot = place
                        trajectory.step(0.0, first=(place, index) not in trajectory.memories)
                    module(*args, **kwargs)

        return run

    # with reuse, as in the midst of a trajectory: what is skipped takes from memory, and what is computed goes there
    trajectory = Trajectory(fills=True, degree=state.degree) if state.config.skip == "reuse" else None
    before, state.current.trajectory = state.current.trajectory, trajectory
    try:
        times = _medians([at(ratio) for ratio in range(0, SCALE + 1, BIN)], rounds)
    finally:
        state.current.trajectory = before
    return tuple(min(times[: place + 1]) for place in range(len(times)))


def _medians(functions: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds of each function, timed in turn after one call that does not count."""
    timers = [Timer("function()", globals={"function": function}) for function in functions]
    for timer in timers:
        timer.timeit(1)
    measured = [[timer.timeit(1).mean * 1e3 for timer in timers] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*measured, strict=True)]


def _record_calls(model: nn.Module, state: ModelRouting, inputs: dict[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    """What every block is called with in one dense forward."""
    calls: dict[str, list[tuple[Any, Any]]] = {block.fqn: [] for block in state.blocks}
    with dense(model), watch_calls(model, state, before=lambda block, *call: calls[block.fqn].append(call)):
        model(**inputs)
    return calls


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode."""
    training = {module: module.training for module in model.modules()}
    nn.Module.train(model, False)  # exported modules refuse eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextlib.contextmanager
def _compiled_by_block(model: nn.Module, state: ModelRouting) -> Iterator[None]:
    """Inside, a model lowered whole has its blocks compiled one by one instead."""
    lowered = state.lowered
    if lowered is None or lowered.scope == "regional":
        yield
        return
    with unlowered(model, state), lowered.by_block(model):
        yield
