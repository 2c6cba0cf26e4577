"""Prove a block's plan by running it: trust nothing that the graph suggested.

On a copy of the block whose parameters are drawn anew (a gate that is zero at initialisation would let anything pass),
with small sizes that all differ, at batch three, two things must hold:

* the routed program, with each sample keeping other tokens, equals the block run on each sample's kept tokens alone, and
  leaves the others as they came (law 3, law 2);
* the block commutes with a permutation of its tokens (law 6): positions made from the length, windows and convolutions
  over the grid do not.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..arguments import iterate_leaves, map_leaves, unbind_arguments
from ..config import DiffCRConfig
from ..context import ContextGraph
from ..defaults import as_written
from ..memory import Memory, allocate, remember_all_context
from ..plan import BlockPlan, LeafPlan, Lift
from ..primitives import place_indices, put_tokens, score_tokens, select_tokens, take_tokens
from ..routed import ROUTER, Program
from ..router import Router
from .analysis import Refused, TensorInfo, log, release_memory
from .block import BlockAnalysis
from .program import write_program
from .tokens import plan_leaves

BATCH = 3
NUM_TOKENS = 11
NUM_KEPT = 5
FEW_KEPT = 2
"""Fewer than the batch: a form that takes the kept tokens' axis for the samples' shows."""

MERGES = 8
"""So many ways of taking some equal sizes for one another are proved before that of all."""

DRAWS = 20
LENGTHS = (7, 13, 17, 19, 23, 29)
"""Sizes of the proof: all different, and different from usual widths and head counts."""

_UNBOUNDED = 1 << 40

TOLERANCE = 2e-4
"""Largest error, as a share of the largest value, in float32. Rounding stays below 1e-5; a rotary table that is cut by
length inside the block shows 3e-3."""

LONGEST, WORK = 1024, 1e10
"""The permutation is tried at the captured number of tokens too, up to this many (in large blocks fewer, so that parameters times
tokens stay below ``WORK``): windows, bands and frames show there."""

MASK_DENSITY = 0.8
"""Share of true entries in the masks of the proof."""


@as_written()
def prove_block(block: BlockAnalysis) -> BlockAnalysis:
    """Fill in ``plan``: the first form of lifting that the proof accepts. Refuses the block where none does.

    Export may leave two sizes apart that are one (a view with a free size in between): where the proof fails, lengths that
    were equal to the tokens', or sizes equal to the batch's, in the captured call are taken for the same and proved anew; as few
    of them as will do, for others may be equal by chance (a text as long as the picture).
    """
    try:
        return _prove(block)
    except Refused:
        for merged in _merge_equal_sizes(block):
            with contextlib.suppress(Refused):
                return _prove(plan_leaves(merged))
        raise


def _prove(block: BlockAnalysis) -> BlockAnalysis:
    _check_range(block)
    trial = Trial(block)
    trial.check_permutation(block.draft_plan("direct"))
    for variant in trial.variants():
        variant.check_permutation(block.draft_plan("direct"))
    trial.check_router()
    unbatched = [leaf for leaf in block.leaves if leaf.token_axes and leaf.batch_axis is None]
    forms: tuple[Lift, ...] = ("inserted axis", "vmap", "loop") if unbatched else ("direct", "vmap", "loop")
    forms = forms if unbatched or block.fixed_batch is not None else ("direct",)
    failures = []
    for form in forms:
        plan = block.draft_plan(form)
        try:
            error = trial.check_program(plan)
            if form == "inserted axis":
                error = max(error, trial.check_program(plan, FEW_KEPT))
            return replace(block, plan=replace(plan, error=error, in_place=trial.writes_into_tokens()))
        except Exception as error:  # a form that does not fit raises whatever the block's code does
            failures.append(f"{form}: {first_line(error)}")
            log.debug("%s: %s", block.fqn, failures[-1])
    raise Refused("the proof failed: " + "; ".join(failures))


def _check_range(block: BlockAnalysis) -> None:
    """Refuses a block whose code goes another way from some number of tokens on, as export's guards tell."""
    assert block.program is not None
    allowed = block.program.range_constraints.get(block.token)
    if allowed is not None and allowed.upper < _UNBOUNDED:
        raise Refused(f"it does something else beyond {allowed.upper} tokens (windows, or a table of fixed length)")


def _merge_equal_sizes(block: BlockAnalysis) -> Iterator[BlockAnalysis]:
    """The block with one symbol of the tokens' (or the batch's) captured size taken for it, with two, and so on to all of them."""
    sizes = block.captured_sizes
    names = {
        symbol: target
        for target in (block.token, block.batch)
        for symbol, size in sizes.items()
        if size == sizes[target] and symbol not in (block.token, block.batch)
    }
    parts = (part for count in range(1, len(names)) for part in itertools.combinations(names.items(), count))
    for part in itertools.chain(itertools.islice(parts, MERGES), [names.items()] if names else []):
        merged = dict(part)
        yield replace(block, leaf_dims=tuple(tuple(size.xreplace(merged) for size in dims) for dims in block.leaf_dims))


class Trial:
    """A copy of the block with random parameters, and random inputs of small sizes."""

    def __init__(self, block: BlockAnalysis) -> None:
        self.block = block
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.module = randomised_copy(block.module, self.generator)
        self.batch = BATCH if block.fixed_batch != BATCH else BATCH + 1
        self._draw(self.batch, self._within(block.token, NUM_TOKENS))

    def _draw_router(self, plan: BlockPlan, num_kept: int) -> tuple[Tensor, Tensor]:
        """A router by which every sample keeps other tokens, and those (B, K); two alike come by chance, once in 150 draws."""
        for _ in range(DRAWS):
            weight = self._normal(plan.width)
            scores = score_tokens(self.values[plan.stream], weight, plan.token_axis, plan.batch_axis)
            kept = select_tokens(scores, num_kept)
            if len(set(map(tuple, kept.tolist()))) == self.batch:
                return weight, kept
        raise Refused("the proof's samples keep the same tokens")

    def _draw(self, batch: int, num_tokens: int, *, any_integer: bool = False) -> None:
        self.num_tokens, self.any_integer = num_tokens, any_integer
        self.sizes = self._sizes(batch)
        self.values = [self._value(index, leaf) for index, (_, leaf) in enumerate(self.block.call_leaves)]

    def variants(self) -> Iterator[Trial]:
        """The same at the captured number of tokens, and with integers that the captured call did not have, where the block runs
        on them."""
        num_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        longest = min(LONGEST, max(round(WORK / max(num_parameters, 1)), 4 * NUM_TOKENS))
        captured = min(self.block.captured_sizes[self.block.token], longest)  # type: ignore[index]
        if captured > self.num_tokens:
            yield self._variant(1, captured)
        if any(isinstance(leaf, TensorInfo) and leaf.value is not None for _, leaf in self.block.call_leaves):
            trial = self._variant(self.batch, self.num_tokens, any_integer=True)
            try:
                trial._run(trial.values)
            except Refused:
                return
            yield trial

    def _variant(self, batch: int, num_tokens: int, *, any_integer: bool = False) -> Trial:
        trial = copy.copy(self)
        trial._draw(batch, num_tokens, any_integer=any_integer)
        return trial

    def _sizes(self, batch: int) -> dict[sympy.Symbol, int]:
        """Small distinct sizes for the batch, the tokens and what they are joined with; all others as they were captured."""
        block = self.block
        sizes = {**block.captured_sizes, block.batch: batch, block.token: self.num_tokens}
        joined = [size for leaf in block.leaves for axis in leaf.token_axes for size in (*axis.before, *axis.after)]
        free = iter(LENGTHS)
        for index, axis in dict.fromkeys(joined):
            symbol = block.leaf_dims[index][axis]
            if symbol.is_Symbol:
                sizes[symbol] = self._within(symbol, next(free))
        return sizes

    def _within(self, symbol: sympy.Expr | None, size: int) -> int:
        """A size for ``symbol`` at which the block does what it was exported doing, as far as its own range tells: ``size``, or one
        beyond the range's lower bound, if that is no large number."""
        program = self.block.program
        allowed = None if program is None else program.range_constraints.get(symbol)
        if allowed is None or allowed.lower <= size <= allowed.upper:
            return size
        if size > allowed.upper:
            return int(allowed.upper)
        return size if allowed.lower > LONGEST else int(min(allowed.lower + size, allowed.upper))

    def _value(self, index: int, leaf: Any) -> Any:
        if not isinstance(leaf, TensorInfo):
            return leaf
        shape = [int(size.subs(self.sizes)) for size in self.block.leaf_dims[index]]
        if leaf.dtype.is_complex:
            angles = self._uniform(shape) * 2 * torch.pi
            return torch.polar(torch.ones_like(angles), angles)
        if leaf.dtype.is_floating_point:
            return self._normal(*shape)
        if leaf.dtype == torch.bool:
            return self._uniform(shape) < MASK_DENSITY
        if leaf.value is None:
            return torch.zeros(shape, dtype=leaf.dtype)
        if self.any_integer:
            return torch.randint(1, self.num_tokens, shape, generator=self.generator).to(leaf.dtype)
        pool = leaf.value.flatten().cpu()
        picks = torch.randint(len(pool), (int(torch.tensor(shape).prod()),), generator=self.generator)
        return pool[picks].reshape(shape)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)

    def _uniform(self, shape: list[int]) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32)

    def check_permutation(self, plan: BlockPlan) -> None:
        """The block on permuted tokens gives the permuted result."""
        expected = self._run(self.values)
        self._check_finite(expected)
        for order in (torch.randperm(self.num_tokens, generator=self.generator), torch.arange(self.num_tokens).flip(0)):
            self._compare_permuted(plan, expected, order)

    def _compare_permuted(self, plan: BlockPlan, expected: list[Tensor], order: Tensor) -> None:
        permuted = self._run(
            [self._index(leaf, value, order) for leaf, value in zip(plan.leaves, self.values, strict=True)]
        )
        for output, value, result in zip(plan.outputs, expected, permuted, strict=True):
            if output.routed:
                value = value.index_select(output.dims.index("N"), order)
            error = relative_error(result, value)
            if not error < TOLERANCE:
                raise Refused(
                    f"its tokens are not interchangeable (error {error:.1e} under a permutation): positions made from the "
                    "length, windows, a convolution over the grid or a causal order"
                )

    def check_router(self) -> None:
        """The block computes the same with a router among its children, which stays for the rest of the proof."""
        expected = self._run(self.values)
        self.module.add_module(ROUTER, Router(1, "", dtype=torch.float32, device=torch.device("cpu")))
        with contextlib.suppress(Refused):
            found = self._run(self.values)
            if len(found) == len(expected) and all(map(torch.equal, found, expected)):
                return
        raise Refused(
            "it walks its children, of which a router would be one more (hold the layers it runs in a ModuleList)"
        )

    def _check_finite(self, outputs: list[Tensor]) -> None:
        """Refuses a block that gives NaN: on these values, or where a mask is all true or all false, as kept tokens may have it."""
        finite = [_finite(outputs)]
        if not finite[0] or any(isinstance(value, Tensor) and value.dtype == torch.bool for value in self.values):
            for value in (True, False):
                masked = [self._constant_mask(index, value) for index in range(len(self.values))]
                with contextlib.suppress(Refused):
                    finite.append(_finite(self._run(masked)))
        if any(finite) and not all(finite):
            raise Refused(
                "a mask that leaves a token nothing to attend to makes NaN of it, and a sample's kept tokens may all be masked. "
                "Mask by a large number instead of -inf; where these are torch's fused layers (any mask of numbers does so there), "
                "call torch.backends.mha.set_fastpath_enabled(False) before transform"
            )
        if not any(finite):
            raise Refused("its result is not finite on random inputs and weights")

    def _constant_mask(self, index: int, value: bool) -> Any:
        """An input's value; where it might be a mask (boolean, or without an axis of fixed size), nothing or all of it."""
        given, dims = self.values[index], self.block.leaf_dims[index]
        if not isinstance(given, Tensor):
            return given
        if given.dtype == torch.bool:
            return torch.full_like(given, value)
        wide = len(dims) < 2 or any(not size.free_symbols and size != 1 for size in dims)
        return given if wide or not given.is_floating_point() else torch.zeros_like(given)

    @torch.no_grad()
    def check_program(self, plan: BlockPlan, num_kept: int = NUM_KEPT) -> float:
        """The program at batch three equals the per-sample loop; returns the largest relative error."""
        program = write_program(plan, DiffCRConfig())
        weight, kept = self._draw_router(plan, num_kept)
        routed, _ = program(self._call, weight, num_kept, self.values)
        results = [leaf for _, leaf in iterate_leaves(routed) if isinstance(leaf, Tensor)]
        worst = 0.0
        for sample in range(self.batch):
            alone = self._run(
                [
                    self._index(leaf, _narrow(leaf, value, sample), kept[sample])
                    for leaf, value in zip(plan.leaves, self.values, strict=True)
                ]
            )
            for output, result, value in zip(plan.outputs, results, alone, strict=True):
                result = result.narrow(output.batch_axis, sample, 1)
                if output.routed:
                    axis = output.dims.index("N")
                    self._check_skipped(plan, output.source, result, kept[sample], sample, axis)
                    result = result.index_select(axis, kept[sample])
                worst = max(worst, relative_error(result, value))
        if not worst < TOLERANCE:
            raise Refused(f"differs by {worst:.1e} from each sample run alone")
        return worst

    @torch.no_grad()
    def check_context(self, plan: BlockPlan, graph: ContextGraph) -> float:
        """With keys and values from all tokens, kept tokens equal the dense block's; returns the largest relative error.

        Those that are remembered are of the same tokens; of others, they are changed at the kept tokens and nowhere else.
        """
        stale = plan.context == "stale"
        config = DiffCRConfig(skip="reuse", context="stale", selection="score") if stale else DiffCRConfig()
        program = write_program(plan, config)
        weight = self._normal(plan.width)
        own = graph.on(weight.device)
        memory = self._remember(plan, own, config, self.values) if stale else None
        routed, kept = program(own.bind(self.module), weight, NUM_KEPT, self.values, memory)
        if plan.states:
            self._check_renewal(plan, own, config, program, weight)
        results = [leaf for _, leaf in iterate_leaves(routed) if isinstance(leaf, Tensor)]
        worst = 0.0
        for output, result, value in zip(plan.outputs, results, self._run(self.values), strict=True):
            if output.routed:
                axes = (output.dims.index("N"), output.batch_axis)
                result, value = (take_tokens(tensor, kept, *axes) for tensor in (result, value))
            worst = max(worst, relative_error(result, value))
        if not worst < TOLERANCE:
            raise Refused(f"a kept token differs by {worst:.1e} from the dense block's")
        return worst

    def _remember(self, plan: BlockPlan, graph: ContextGraph, config: DiffCRConfig, values: list[Any]) -> Memory:
        """Memory of a dense call on ``values``, which is to give the block's own bits."""
        memory = allocate(plan, values, config, torch.zeros(1, dtype=torch.float32))
        if plan.states:
            tensors = [_clone(value) for value, leaf in zip(values, plan.leaves, strict=True) if leaf.is_tensor]
            found = graph.run_dense(self.module, tensors)
            if not all(map(torch.equal, found, self._run(values))):
                raise Refused("its graph gives other bits than the block")
            remember_all_context(memory, found[len(plan.outputs) :])
        return memory

    def _check_renewal(
        self, plan: BlockPlan, graph: ContextGraph, config: DiffCRConfig, program: Program, weight: Tensor
    ) -> None:
        earlier = [self._value(index, leaf) for index, (_, leaf) in enumerate(self.block.call_leaves)]
        memory = self._remember(plan, graph, config, earlier)
        before = [held.clone() for held in memory.context]
        _, kept = program(graph.bind(self.module), weight, NUM_KEPT, self.values, memory)
        fresh = self._remember(plan, graph, config, self.values).context
        for state, held, old, new in zip(plan.states, memory.context, before, fresh, strict=True):
            others = [
                sum(self.values[index].shape[axis] for index, axis in part)
                for part in (state.tokens.before, state.tokens.after)
            ]
            indices = place_indices(kept, others[0], self.num_tokens, others[1])
            axes = (state.tokens.axis, state.batch_axis)
            if not relative_error(held, put_tokens(old, indices, take_tokens(new, indices, *axes), *axes)) < TOLERANCE:
                raise Refused("its graph remembers other keys and values than the kept tokens'")

    def writes_into_tokens(self) -> bool:
        """Whether the block changes its token input in place. Refuses one that changes another input that follows the tokens:
        it is given a copy of the kept ones, so the change would be lost."""
        given = [_clone(value) for value in self.values]
        self._run(given, copy_inputs=False)
        for index, (leaf, value, after) in enumerate(zip(self.block.leaves, self.values, given, strict=True)):
            if index != self.block.stream and leaf.token_axes and not torch.equal(value, after):
                raise Refused(f"it writes into its input {leaf.name!r}, which follows the tokens")
        stream = self.block.stream
        return not torch.equal(given[stream], self.values[stream])

    def _check_skipped(
        self, plan: BlockPlan, source: int | None, result: Tensor, kept: Tensor, sample: int, axis: int
    ) -> None:
        skipped = torch.tensor([index for index in range(self.num_tokens) if index not in kept])
        found = result.index_select(axis, skipped)
        before = torch.zeros_like(found)
        if source is not None:
            before = _narrow(plan.leaves[source], self.values[source], sample).index_select(axis, skipped)
        if not torch.equal(found, before):
            raise Refused("a skipped token did not keep its bits")

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    @torch.no_grad()
    def _run(self, values: list[Any], *, copy_inputs: bool = True) -> list[Tensor]:
        remaining = iter([_clone(value) for value in values] if copy_inputs else values)
        bound = map_leaves(lambda _, leaf: None if leaf is None else next(remaining), self.block.call.arguments)
        plan_names = self.block.draft_plan("direct").positional
        args, kwargs = unbind_arguments(plan_names, bound)
        try:
            output = self._call(*args, **kwargs)
        except Exception as error:
            raise Refused(
                f"it does not run on {self.num_tokens} or {NUM_KEPT} tokens: windows, a grid, or positions made for one length "
                f"({first_line(error)})"
            ) from error
        release_memory()
        return [leaf for _, leaf in iterate_leaves(output) if isinstance(leaf, Tensor)]

    def _index(self, leaf: LeafPlan, value: Any, indices: Tensor) -> Any:
        """``value`` with its token axes indexed, the written-out way: other tokens of a joint axis stay in place."""
        for axis in leaf.token_axes:
            before = sum(self.values[index].shape[size] for index, size in axis.before)
            after = sum(self.values[index].shape[size] for index, size in axis.after)
            tail = range(before + self.num_tokens, before + self.num_tokens + after)
            positions = [*range(before), *(before + int(index) for index in indices), *tail]
            value = value.index_select(axis.axis, torch.tensor(positions))
        return value


def randomised_copy(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float32 CPU copy in eval mode with every float parameter drawn anew, of the scale of a usual initialisation, and every
    buffer that holds but one value: a gate may be switched off by either. Quantised parameters become plain ones: what the block
    does with its weights is proved on these.

    Weights of one scale are parts of one pool of values, each from another place: a large block's would take as much memory again.
    """
    weights = [tensor for tensor in module.parameters() if tensor.dtype.is_floating_point and tensor.ndim >= 2]
    memo: dict[int, Any] = {}
    for scale in sorted({_scale(weight) for weight in weights}):
        alike = [weight for weight in weights if _scale(weight) == scale]
        size = max(weight.numel() for weight in alike) + _STEP * len(alike)
        pool = torch.randn(size, generator=generator, dtype=torch.float32).mul_(scale)
        for place, weight in enumerate(alike):
            drawn = pool.narrow(0, place * _STEP, weight.numel()).view(weight.shape)
            memo[id(weight)] = nn.Parameter(drawn, requires_grad=False)
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in memo:
            values = _values(tensor)
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(_draw_vector(values, generator), requires_grad=False)
            else:
                memo[id(tensor)] = _draw_constant(values, generator)
    duplicate = copy.deepcopy(module, memo).eval()
    for submodule in duplicate.modules():
        submodule._forward_hooks.clear()
        submodule._forward_pre_hooks.clear()
    return duplicate


_STEP = 9973
"""Values by which the places of weights in their pool differ: a prime number, so that no two have equal rows."""


def _scale(weight: Tensor) -> float:
    """Standard deviation of a usual initialisation."""
    return float(max(weight.shape[1:].numel(), 1) ** -0.5)


def _values(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in float32 where it has floating numbers; zeros where there are no values to be had."""
    dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
    if tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        return torch.zeros(tensor.shape, dtype=dtype)
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True)


def _draw_vector(values: Tensor, generator: torch.Generator) -> Tensor:
    if not values.dtype.is_floating_point:
        return values
    noise = torch.randn(values.shape, generator=generator, dtype=torch.float32)
    return 0.2 * noise + values.abs().clamp(max=1.0)


def _draw_constant(values: Tensor, generator: torch.Generator) -> Tensor:
    if values.dtype.is_floating_point and values.numel() and bool((values == values.flatten()[0]).all()):
        return torch.rand(values.shape, generator=generator, dtype=torch.float32) + 0.5
    return values


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value; infinite where either is not finite or shapes differ."""
    if result.shape != expected.shape:
        return float("inf")
    difference = (result.to(torch.complex64) if result.is_complex() else result.float()) - expected
    worst, scale = difference.abs().max(), expected.abs().max().clamp(min=1e-6)
    return float(worst / scale) if bool(torch.isfinite(worst) & torch.isfinite(scale)) else float("inf")


def _finite(outputs: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(output).all()) for output in outputs)


def _narrow(leaf: LeafPlan, value: Any, sample: int) -> Any:
    return value if leaf.batch_axis is None else value.narrow(leaf.batch_axis, sample, 1)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def first_line(error: Exception) -> str:
    """What an error says, without its traceback."""
    lines: Iterator[str] = iter(str(error).strip().splitlines())
    return f"{type(error).__name__}: {next(lines, '')[:200]}" if not isinstance(error, Refused) else str(error)
