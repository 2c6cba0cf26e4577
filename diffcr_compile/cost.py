"""What a routed model costs as a function of its table: FLOPs, counted by torch's counter, or the tokens that its blocks keep."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import ExampleInputs, bind_inputs, iterate_leaves, map_leaves
from .config import BudgetKind
from .dry_run import describe_inputs, dry_run, shadow
from .errors import CaptureError, UnsupportedError
from .flops import count_flops
from .forget import forget_fakes
from .memory import allocate
from .observe import watch_calls
from .ratios import BIN, SCALE, capacity
from .routed import BlockRouting, ModelRouting, forward_at, prepare_context, routing_of, settle
from .settings import settings_of
from .sharding import is_sharded
from .unwrap import unwrap

_SAMPLED_RATIOS = (250, 500, 750)
"""A block's FLOPs are a parabola in k (products with tokens, and of tokens with tokens): three points fix it."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward of the example's whole batch (a multiplication and an addition count as two).

    dense_flops: of the model at ratio zero. routed_flops: of the table's row of each timestep region, from clean to noisy.
    memory_bytes: what ``skip="reuse"`` remembers of one trajectory (twice that with guidance in two calls); 0 without. share: the
    mean of routed_flops over the regions, as a share of dense_flops; a sampler weighs regions by its steps
    (``CalibrationReport.sampler_share``). The router's own products (N D a block) are not matrix products and are not counted, nor
    are gathers.
    """

    dense_flops: int
    routed_flops: tuple[int, ...]
    memory_bytes: int = 0

    @property
    def share(self) -> float:
        """Mean over the regions of the share of the dense FLOPs, in (0, 1]."""
        return sum(self.routed_flops) / len(self.routed_flops) / self.dense_flops


@dataclass(frozen=True)
class BlockCost:
    """FLOPs of one block: ``dense`` at k = N, ``skipped`` at ratio one, ``a + b k + c k^2`` between. memory: bytes it remembers."""

    num_tokens: int
    dense: int
    skipped: int
    curve: tuple[float, float, float]
    memory: int = 0

    def at(self, ratio: int) -> int:
        """FLOPs at a ratio in thousandths."""
        k = capacity(self.num_tokens, ratio)
        if k == self.num_tokens:
            return self.dense
        return self.skipped if k == 0 else self._at_capacity(k)

    def _at_capacity(self, k: int) -> int:
        a, b, c = self.curve
        return round(a + b * k + c * k * k)


UNITS: dict[BudgetKind, str] = {"flops": "FLOPs", "tokens": "tokens", "latency": "milliseconds"}
"""What a budget of each kind counts."""


class Curve(Protocol):
    """What one block costs at every ratio: a :class:`BlockCost`, or times that were measured."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def dense(self) -> float: ...

    @property
    def memory(self) -> int: ...

    def at(self, ratio: int) -> float:
        """Cost at a ratio in thousandths; never rises with it."""


@dataclass(frozen=True)
class CostModel:
    """What every table costs on inputs of one shape, without running it; ``unit`` says of what: FLOPs, tokens, or latency (ms)."""

    dense: float
    blocks: tuple[Curve, ...]
    unit: BudgetKind = "flops"

    @property
    def fixed(self) -> float:
        """Cost outside the routed blocks."""
        return self.dense - sum(block.dense for block in self.blocks)

    def row_cost(self, row: Sequence[int]) -> float:
        """Cost of one forward at one row of ratios in thousandths."""
        return self.fixed + sum(block.at(ratio) for block, ratio in zip(self.blocks, row, strict=True))

    def share(self, rows: Sequence[Sequence[int]]) -> float:
        """Mean share of the dense cost over the rows of a table."""
        return sum(map(self.row_cost, rows)) / len(rows) / self.dense

    @property
    def minimum_share(self) -> float:
        """Share of the dense cost at ratio one everywhere."""
        return self.share([[SCALE] * len(self.blocks)])

    def in_tokens(self) -> CostModel:
        """The same blocks, each costing the tokens that it keeps (the paper's budget: their mean share)."""
        blocks = tuple(BlockCost(block.num_tokens, block.num_tokens, 0, (0, 1, 0)) for block in self.blocks)
        return CostModel(sum(block.dense for block in blocks), blocks, "tokens")

    def expected_share(self, masters: Tensor) -> Tensor:
        """Share at ratios between bins, as the two-bin estimator mixes them: differentiable, () float32.

        masters: (num_regions, num_blocks) in [0, 1].
        """
        rows = [[block.at(ratio) for ratio in range(0, SCALE + 1, BIN)] for block in self.blocks]
        at_bins = torch.tensor(rows, dtype=torch.float32, device="cpu").double() / self.dense
        position = masters.double() * (SCALE / BIN)
        lower = (position.detach() + 1e-5).floor().clamp(0, SCALE // BIN - 1)
        columns = torch.arange(len(self.blocks), device="cpu")
        low, high = at_bins[columns, lower.long()], at_bins[columns, lower.long() + 1]
        spent = (low + (position - lower) * (high - low)).sum(dim=1).mean()
        return (spent + self.fixed / self.dense).float()


def cost(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Cost:
    """FLOPs of the model, dense and at its present table.

    example_inputs: keyword arguments of ``model.forward``, or ``(args, kwargs)`` (only shapes, and the values of integers,
    matter); None: those that the model was transformed with or, where it was loaded, first measured with. Raises
    NotTransformedError, CaptureError, TypeError.
    """
    model = unwrap(model)
    inputs = None if example_inputs is None else bind_inputs(model, example_inputs)
    state = settle(model, inputs)
    costs = cost_model(model) if inputs is None else measure_costs(model, inputs)
    memory = sum(block.memory for block, routing in zip(costs.blocks, state.blocks, strict=True) if any(routing.ratios))
    return Cost(int(costs.dense), tuple(int(costs.row_cost(row)) for row in state.rows), memory)


def cost_model(model: nn.Module) -> CostModel:
    """The cost model of a transformed model, on the inputs that it was transformed with; where it was loaded, on the first that it
    was measured with. Raises CaptureError where there were none yet."""
    state = settle(model)
    if state.costs is None and not state.example_inputs:
        raise CaptureError(
            f"{type(model).__name__} was loaded, which takes no inputs, so what it costs is unknown. Call "
            "diffcr_compile.cost(model, example_inputs) once; later calls, and budget_loss, then need none."
        )
    if state.costs is None:
        state.costs = measure_costs(model, state.example_inputs)
    return state.costs


def measure_costs(model: nn.Module, inputs: dict[str, Any]) -> CostModel:
    """Count the FLOPs of a model and of each of its blocks on ``inputs``, under fake tensors where the model allows.

    A model sharded by FSDP2 can't be looked at any more: what was counted last, by ``cost`` or ``transform``, is taken.
    """
    state: ModelRouting = routing_of(model)
    if not is_sharded(model):
        state.measured = _measure_shadow(model, inputs)
        if not state.example_inputs:
            state.example_inputs, state.costs = describe_inputs(inputs), state.measured
    if state.measured is None:
        raise CaptureError(
            f"{type(model).__name__} is sharded, so its FLOPs can't be counted. Before fully_shard, call "
            "transform(model, example_inputs=...) in the process group, or diffcr_compile.cost(model, inputs)."
        )
    return state.measured


def _measure_shadow(model: nn.Module, inputs: dict[str, Any]) -> CostModel:
    try:
        return _measure_anyhow(model, inputs)
    finally:
        forget_fakes()


def _measure_anyhow(model: nn.Module, inputs: dict[str, Any]) -> CostModel:
    errors = []
    for fake in (True, False):
        try:
            return _measure(shadow(model), inputs, fake=fake)
        except Exception as error:  # whatever the user's model raises
            if isinstance(error, UnsupportedError) and _planned_more(model, inputs):
                return measure_costs(model, inputs)
            errors.append(error)
    if isinstance(errors[-1], CaptureError):
        raise errors[-1]
    raise CaptureError(
        f"{type(model).__name__} could not be run on the inputs it was given: {type(errors[-1]).__name__}: {errors[-1]}"
    ) from errors[-1]


def _planned_more(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Look at this call of the model; whether it makes kinds of call that were new, and are planned now."""
    state: ModelRouting = routing_of(model)
    known = state.num_programs
    state.look_at(model, (), inputs)
    return state.num_programs > known


def _measure(model: nn.Module, inputs: dict[str, Any], *, fake: bool) -> CostModel:
    state: ModelRouting = routing_of(model)
    modules = [model.get_submodule(block.fqn) for block in state.blocks]
    calls: dict[str, list[tuple[Any, Any]]] = {block.fqn: [] for block in state.blocks}
    state.dense, state.observers, state.masters = True, [], None
    for block in state.blocks:
        block.compiled = None
    with dry_run(model, fake=fake) as convert:
        with (
            count_flops() as counter,
            watch_calls(model, state, before=lambda block, *call: calls[block.fqn].append(call)),
        ):
            model(**map_leaves(convert, inputs))
        state.dense = False
        if counter.get_total_flops() == 0:
            raise CaptureError(
                f"{type(model).__name__} computes nothing on these inputs: its forward has no FLOPs, of which to take a share. "
                "They hold no samples, or no tokens: expected at least one."
            )
        idle = [fqn for fqn, seen in calls.items() if not seen]
        if idle:
            raise CaptureError(
                f"{', '.join(idle)}: routed, but not called on these inputs, so what it costs is unknown. Give inputs on which "
                "every routed block runs, or leave it out by filter_fn at transform."
            )
        known: dict[Any, BlockCost] = {}
        alike: dict[Any, tuple[int, int]] = {}
        blocks = []
        for block, module in zip(state.blocks, modules, strict=True):
            seen = calls[block.fqn]
            kind = (next(iter(block.programs)), type(module), block_shapes(module, seen))
            told = (kind, tuple((type(part), settings_of(part, wrappers=False)) for part in module.modules()))
            if told not in alike:  # by a number in its settings, which may be its place in the stack, or what it costs
                alike[told] = (_count(block, module, seen, 0), _count(block, module, seen, SCALE // 2))
            key = (kind, alike[told])
            if key not in known:
                known[key] = _measure_block(block, module, seen)
            blocks.append(known[key])
    return CostModel(counter.get_total_flops(), tuple(blocks))


def block_shapes(module: nn.Module, calls: list[tuple[Any, Any]]) -> Any:
    """Shapes of a block's parameters and of what it is called with: blocks of one family that agree in them, and in the FLOPs of
    one call, cost the same."""
    parameters = tuple(tuple(parameter.shape) for parameter in module.parameters())
    leaves = tuple(tuple(leaf.shape) for _, leaf in iterate_leaves(list(calls)) if isinstance(leaf, Tensor))
    return parameters, leaves


def _measure_block(block: BlockRouting, module: nn.Module, calls: list[tuple[Any, Any]]) -> BlockCost:
    """Sum over the block's calls in one forward."""
    num_tokens = _num_tokens(block, calls[0])
    flops = functools.partial(_count, block, module, calls)
    ks = [capacity(num_tokens, ratio) for ratio in _SAMPLED_RATIOS]
    powers = np.array([[1.0, k, k * k] for k in ks])
    found = np.array([float(flops(ratio)) for ratio in _SAMPLED_RATIOS])
    a, b, c = np.linalg.lstsq(powers, found, rcond=None)[0].tolist()
    return BlockCost(num_tokens, flops(0), flops(SCALE), (a, b, c), _memory(block, calls[0]))


def _count(block: BlockRouting, module: nn.Module, calls: list[tuple[Any, Any]], ratio: int) -> int:
    """FLOPs of the block's calls in one forward at a ratio."""
    for args, kwargs in calls:
        prepare_context(module, block, args, kwargs)  # not counted: an export's operations are counted like any others
    with count_flops() as counter:
        for args, kwargs in calls:
            forward_at(module, ratio, args, kwargs)
    return counter.get_total_flops()


def _memory(block: BlockRouting, call: tuple[Any, Any]) -> int:
    config = block.model.config
    if config.skip != "reuse":
        return 0
    program, values = block.read_call(*call)
    now = torch.zeros(1, dtype=torch.float32, device=values[program.plan.stream].device)
    return allocate(program.plan, values, config, now).nbytes


def _num_tokens(block: BlockRouting, call: tuple[Any, Any]) -> int:
    program, values = block.read_call(*call)
    return values[program.plan.stream].shape[program.plan.token_axis]
