"""What stays in a routed model at run time: the routed forward of a block, and the state it reads.

A block keeps its class and its own forward. ``bind`` sets a routed forward on the *instance*, which looks up the block's
:class:`BlockRouting`, decides how many tokens to keep, and runs either the original forward on the original tensors or the
FX program that the passes wrote. Without its routing state the bound forward is the original again, whoever still holds it.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from .arguments import Signature, bind_arguments, given_leaves, iterate_leaves, leaf_name, map_leaves, signature_of
from .config import DiffCRConfig
from .context import (
    MOST_GRAPHS,
    MOST_STATES,
    ContextGraph,
    ContextKey,
    Parts,
    are_in_place,
    context_key,
    open_settings,
    parts_of,
)
from .eager import in_a_graph
from .errors import CalibrationError, CaptureError, NotTransformedError, UnsupportedError
from .memory import Memory, blank, remember_all, remember_all_context, remember_beside, resume_beside, resume_tokens
from .plan import BlockPlan, ModelPlan
from .primitives import OneByOne
from .ratios import capacity, nearest_bin
from .router import Router
from .sharding import is_sharded
from .trajectory import Trajectory

STATE = "_diffcr"
"""Attribute under which a routed block, and the root of a routed model, hold their state."""

ROUTER = "diffcr_router"
"""Name of the submodule that a routed block gains."""


_NOT_HERE = (
    "It is analysed when the model is called so eagerly, which it is not here (compiled or exported, or the block alone): call the "
    "model so once before, or pass such inputs as example_inputs to transform."
)
_COMPILED_ALONE = (
    "skip='reuse' remembers outside the graph of a block: compile by diffcr_compile.lower, not the block by module.compile or "
    "torch.compile."
)
_REFUSED = "Leave the input out, or set this block's ratios to 0, or leave the block out by filter_fn."

_BACKWARDS = 64
"""Backwards at once whose regions are known: one that fails tells nobody of its end, so that the oldest go."""

_LOOKING = threading.RLock()
"""A thread that meets a new kind of call while another looks at one waits, and may find it planned."""


Recalled = tuple[Memory, bool]
"""A block's memory in this forward, and whether it is empty: then the block runs dense, and fills it."""

ContextKind = tuple[Signature, tuple[object, ...]]
"""What a rewritten graph is for: a kind of call, and what such a call leaves open beside tensors."""


class Current(threading.local):
    """The forward under way in this thread: its timestep region; ``pinned``: chosen by the caller, not to be looked up, and
    ``row`` with it, where a graph is shared by the regions that have it; ``split``: what is left to run of a batch that lies in
    several regions; ``call``: the model (weakly: a forward that Ctrl-C ends never leaves) and its arguments, where it runs eagerly;
    ``inside``: it began where its region is looked up, and has not ended; ``trajectory``, with reuse; ``recalled``: what each block
    remembers in this forward, where it runs in one graph of the whole model."""

    def __init__(self) -> None:  # in each thread; a graph is compiled for the fields that are there
        self.region: int | None = None
        self.pinned = False
        self.inside = False
        self.row: tuple[int, ...] | None = None
        self.split: Any = None
        self.call: tuple[weakref.ref[nn.Module], tuple[Any, ...], dict[str, Any]] | None = None
        self.trajectory: Trajectory | None = None
        self.recalled: dict[int, Recalled] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Current:
        return Current()

    def __reduce__(self) -> tuple[type[Current], tuple[()]]:
        return Current, ()


@dataclass(frozen=True, eq=False)
class Program:
    """The routed program of one family at one call signature: its plan and its FX graph (shared, never copied).

    contexts: with context from every token, the rewritten graphs of the block itself for each state its modules have been met in,
    and what it was given beside tensors: one, or where its code goes by sizes others for other sizes.
    """

    plan: BlockPlan
    graph: fx.GraphModule
    contexts: dict[tuple[ContextKey, Any], tuple[ContextGraph, ...]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def __call__(
        self, block: Callable[..., Any], weight: Tensor, k: int, values: Sequence[Any], memory: Memory | None = None
    ) -> tuple[Any, Tensor]:
        """The block's output with ``k`` tokens kept, and their positions (B, K); ``values`` are the call's leaves in the order of
        the plan, ``memory`` is brought up to date."""
        given = () if memory is None else (memory,)
        outputs, kept = self.graph.forward(block, weight, k, *given, *values)
        return self.output(outputs), kept

    def output(self, tensors: Sequence[Tensor]) -> Any:
        """What the block returns, made of its output tensors in order."""
        return map_leaves(lambda _, index: None if index is None else tensors[index], self.plan.output_template)

    def skip(self, values: Sequence[Any], memory: Memory | None = None) -> Any:
        """The output of a block that is skipped whole: what came in, and what the memory foretells of the block's update. Like a
        block's own output it is a new tensor: the caller may write into it, and still hold what came in."""

        def take(_: Any, index: int | None) -> Tensor | None:
            if index is None:
                return None
            found = self.fallback(index, values, memory)
            return found.clone() if any(found is value for value in values) else found

        return map_leaves(take, self.plan.output_template)

    def fallback(self, index: int, values: Sequence[Any], memory: Memory | None = None) -> Tensor:
        """What output ``index`` is where a token, or the whole block, is skipped."""
        output, before = self.plan.outputs[index], self.before(index, values)
        if memory is None:
            return before
        if not output.routed:
            beside = list(self.plan.beside)
            return resume_beside(before, memory, beside.index(index), output.batch_axis) if index in beside else before
        routed = sum(other.routed for other in self.plan.outputs[:index])
        return resume_tokens(before, memory, routed, output.dims.index("N"), output.batch_axis)

    def before(self, index: int, values: Sequence[Any]) -> Tensor:
        """What output ``index`` falls back on: the input that it is joined to, or zeros."""
        output, tokens = self.plan.outputs[index], values[self.plan.stream]
        if output.source is not None:
            return values[output.source]
        return tokens.new_zeros(*tokens.shape[:-1], int(output.dims[-1]))

    def values(self, bound: dict[str, Any], fqn: str) -> list[Any]:
        """The leaves of a bound call, after a check that the lengths which follow the tokens do so here; what the caller leaves to
        be broadcast over the samples is given to each."""
        values = given_leaves(bound)
        num_tokens = values[self.plan.stream].shape[self.plan.token_axis]
        batches = [
            value.shape[leaf.batch_axis]
            for leaf, value in zip(self.plan.leaves, values, strict=True)
            if leaf.batch_axis is not None
        ]
        batch = max(batches) if min(batches) else 0
        for leaf, value in zip(self.plan.leaves, values, strict=True):
            for place, size in enumerate(leaf.dims):
                if size == "1" and value.shape[place] != 1:
                    raise UnsupportedError(
                        f"{fqn}: input {leaf.name!r} has shape {tuple(value.shape)}, where axis {place} was of size one when the "
                        "model was analysed: whether it follows the tokens is unknown. Transform it again with example_inputs of "
                        "this kind."
                    )
            for axis in leaf.token_axes:
                others = sum(values[index].shape[size] for index, size in (*axis.before, *axis.after))
                if value.shape[axis.axis] != num_tokens + others:
                    raise UnsupportedError(
                        f"{fqn}: input {leaf.name!r} has shape {tuple(value.shape)}, where axis {axis.axis} should hold "
                        f"{num_tokens + others} tokens like the other inputs. When the model was analysed it followed the "
                        "tokens; transform it again with example_inputs of this kind."
                    )
        return [_broadcast(value, leaf.batch_axis, batch) for leaf, value in zip(self.plan.leaves, values, strict=True)]


def _broadcast(value: Any, axis: int | None, batch: int) -> Any:
    """``value`` with an axis of size one, of a larger batch, widened to it."""
    if axis is None or value.shape[axis] != 1 or batch == 1:
        return value
    return value.expand([batch if place == axis else size for place, size in enumerate(value.shape)])


class _Whole:
    """State that is copied with its model, and not pickled: a pickle would hold programs of this version of the package."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        duplicate = object.__new__(type(self))
        memo[id(self)] = duplicate
        for name, value in vars(self).items():
            setattr(duplicate, name, copy.deepcopy(value, memo))
        return duplicate

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "a routed model can't be pickled whole. Save its weights by state_dict and its routing by diffcr_compile.save, or "
            "restore it first."
        )


def _are_equal(ratios: tuple[int, ...]) -> bool:
    return ratios.count(ratios[0]) == len(ratios)


@dataclass(eq=False)
class ModelRouting(_Whole):
    """State at the root of a routed model.

    plan: None while the search for blocks is ``deferred``. positional: names of the parameters of the root's forward that may be
    given by position. blocks: in order of first execution, the columns of the ratio
    table. masters: float32 (num_regions, num_blocks) leaf that learning moves; ``synced``: its values when the blocks'
    integers were last taken from it. learning: what blocks compute while they learn; dense: every block as it was. trained: the
    routers have been learned. rehearsal: with reuse, what forwards that learn find remembered, and leave as it is.
    lowered: what ``lower`` put in place. example_inputs: a description of those it was analysed with; of a loaded model, of the
    first it was measured with. costs: the cost model on those; measured: on the inputs last measured. report: of the calibration
    that made the table. rebuild: rewrites a block's graph for context from every token where its modules have changed.
    analyse: plans new kinds of call, see :meth:`look_at`. unproved: programs of plans that were loaded and have not routed
    since; prove: proves one on its block.
    degree: with reuse, of the polynomial through a token's last updates that is followed, at most the configured one.
    outlined: how to give a graph module its one flat graph back. fingerprint: of the model as it was before.
    observers: called with each block's name and kept tokens (B, K). reached: by number of a backward under way, the regions of the
    forwards whose outputs it has come to.
    """

    config: DiffCRConfig
    plan: ModelPlan = None  # type: ignore[assignment]
    positional: tuple[str, ...] = ()
    blocks: list[BlockRouting] = field(default_factory=list)
    current: Current = field(default_factory=Current)
    last_region: int = 0
    masters: Tensor | None = None
    synced: Tensor | None = None
    deferred: Callable[..., None] | None = None
    learning: Callable[..., Any] | None = None
    dense: bool = False
    trained: bool = False
    rehearsal: Trajectory | None = None
    warned: bool = False
    lowered: Any = None
    example_inputs: dict[str, Any] = field(default_factory=dict)
    rebuild: Callable[..., ContextGraph] | None = None
    analyse: Callable[..., dict[str, str]] | None = None
    unproved: set[Program] = field(default_factory=set)
    prove: Callable[..., None] | None = None
    outlined: Any = None
    fingerprint: str = ""
    costs: Any = None
    measured: Any = None
    report: dict[str, Any] | None = None
    degree: float = None  # type: ignore[assignment]
    observers: list[Callable[[str, Tensor], None]] = field(default_factory=list)
    reached: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.degree is None:
            self.degree = float(self.config.extrapolation)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy is in no mode that the original is in for a while: nobody would take it out of it."""
        self.sync_with_masters()
        duplicate = super().__deepcopy__(memo)
        duplicate.learning, duplicate.dense, duplicate.rehearsal, duplicate.observers = None, False, None, []
        return duplicate

    @property
    def num_regions(self) -> int:
        """Rows of the ratio table: the configured number, or 1 where the model has no timestep input."""
        return self.config.num_regions if self.plan.timestep is not None else 1

    @property
    def rows(self) -> list[list[int]]:
        """The ratio table in thousandths: of each region the blocks' ratios, in order."""
        return [list(row) for row in zip(*(block.ratios for block in self.blocks), strict=True)]

    @property
    def routes(self) -> bool:
        """Whether some block skips anything in some region."""
        return any(any(block.ratios) for block in self.blocks)

    @property
    def varies_by_region(self) -> bool:
        """Whether some block's ratio depends on the timestep."""
        return not all(_are_equal(block.ratios) for block in self.blocks)

    @property
    def needs_region(self) -> bool:
        """Whether a forward depends on its timestep region: by ratios that differ, or by routers that see the timestep."""
        sees = self.config.router == "timestep" and self.num_regions > 1 and self.routes
        return sees or self.varies_by_region

    def sync_with_masters(self) -> None:
        """Where an optimiser has moved the masters, put every block at its nearest bin (DiffCR, section 3).

        Raises CalibrationError where it has moved them to no number.
        """
        masters = self.masters
        if masters is None or (self.synced is not None and torch.equal(masters, self.synced)):
            return
        if bool(masters.isnan().any()):
            raise CalibrationError(
                "the learned ratios are NaN: an optimiser took a step on a gradient that was. Put a table back with set_ratios, "
                "and look before a step whether the loss is finite."
            )
        with torch.no_grad():
            masters.clamp_(0, 1)
        for block, column in zip(self.blocks, masters.detach().T.tolist(), strict=True):
            block.ratios = tuple(nearest_bin(value) for value in column)
        self.note_masters()

    def note_masters(self) -> None:
        """The blocks' integers are those of the masters as they are now."""
        assert self.masters is not None
        self.synced = self.masters.detach().clone()

    def look_at(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
        """Plan the kinds of call that this call of the model makes of its blocks for the first time; returns the reason, by name,
        for each block where that can't be. The blocks run as they were, and what they meet meanwhile is not looked at."""
        assert self.analyse is not None
        call, self.current.call = self.current.call, None
        try:
            return self.analyse(self, model, args, kwargs)
        finally:
            self.current.call = call

    @property
    def num_programs(self) -> int:
        """Over all blocks; it grows with each kind of call that is planned."""
        return sum(len(block.programs) for block in self.blocks)

    def region(self) -> int:
        """The region of the forward under way; of the last one where a thread has none."""
        region = self.current.region
        return self.last_region if region is None else region

    def tell_backward(self, outputs: Any, regions: Sequence[int]) -> None:
        """A backward that comes to these outputs is told the regions of their forward, before it comes to anything else of it."""

        def reach(_: Tensor) -> None:
            task = torch._C._current_graph_task_id()

            def forget() -> None:
                self.reached.pop(task, None)

            if task not in self.reached:
                if len(self.reached) >= _BACKWARDS:
                    del self.reached[min(self.reached)]
                self.reached[task] = set()
                torch.autograd.Variable._execution_engine.queue_callback(forget)  # when it ends
            self.reached[task].update(regions)

        for _, leaf in iterate_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(reach)

    def find_recomputed(self, fqn: str) -> None:
        """Gradient checkpointing runs a block again in backward: its region is that of the outputs which the backward came from.
        Raises UnsupportedError where they lie in several, or where it came from none."""
        task = torch._C._current_graph_task_id()
        if task == -1 or self.current.pinned:
            return
        if self.config.skip == "reuse" and self.routes and self.learning is None and self.rehearsal is None:
            raise UnsupportedError(
                f"{fqn} is recomputed in backward (gradient checkpointing), and with skip='reuse' what its skipped tokens took "
                "from memory is gone by then. Turn gradient checkpointing off, or use skip='identity'."
            )
        if self.current.inside or not (self.learning or self.needs_region):
            return
        regions = self.reached.get(task, set())
        if len(regions) != 1:
            raise UnsupportedError(
                f"{fqn} is recomputed in backward (gradient checkpointing) after forwards in timestep regions "
                f"{sorted(regions)}, and which of them it belongs to is unknown. Let each backward follow forwards of "
                "one region, from the model's outputs, or turn gradient checkpointing off."
            )
        (self.current.region,) = regions


@dataclass(eq=False)
class BlockRouting(_Whole):
    """State of one routed block: its column of the table in thousandths, and by call signature its programs and, with full
    context, their graphs for its modules as they are, each for other sizes; parts: these modules; states: how many states of them a
    graph was written for."""

    fqn: str
    index: int
    base: Callable[..., Any]
    positional: tuple[str, ...]
    programs: dict[Signature, Program]
    model: ModelRouting
    ratios: tuple[int, ...]
    compiled: Callable[..., Any] | None = None
    contexts: dict[ContextKind, tuple[ContextGraph, ...]] = field(default_factory=dict)
    parts: Parts = ()
    states: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        parts, self.parts = self.parts, ()  # a copy's modules are others
        try:
            return super().__deepcopy__(memo)
        finally:
            self.parts = parts

    def ratio(self) -> int:
        """The ratio in force, in thousandths; reads no region where all are equal, or where a row is pinned."""
        row = self.model.current.row
        if row is not None:
            return row[self.index]
        ratios = self.ratios
        return ratios[0] if _are_equal(ratios) else ratios[self.model.region()]

    @property
    def rests(self) -> bool:
        """Whether the block's own forward is all that its calls ask for, whatever their timestep: it skips nothing, and nobody
        learns from it, looks on, pins another row or wants its updates remembered."""
        state, current = self.model, self.model.current
        asked = state.learning is not None or state.observers or state.rehearsal is not None or current.row is not None
        return not (asked or any(self.ratios) or (current.trajectory is not None and current.trajectory.fills))

    def check_entered(self) -> None:
        """Raises UnsupportedError in a forward of the model that did not begin by calling it, where the timestep must be known."""
        state, current = self.model, self.model.current
        if current.inside or current.pinned or torch._C._current_graph_task_id() != -1:
            return
        ratios, several = self.ratios, state.num_regions > 1
        reuse = state.config.skip == "reuse" and state.rehearsal is None and state.plan.timestep is not None
        follows = reuse or (several and (state.config.router == "timestep" or not _are_equal(ratios)))
        if (follows and any(ratios)) if state.learning is None else several:
            raise UnsupportedError(
                f"{self.fqn} runs in a forward whose timestep was not looked up: the model's forward was called instead of the "
                "model. Write model(...) for model.forward(...), and self(...) for self.forward(...) in methods of its own."
            )

    def program(self, bound: dict[str, Any]) -> Program:
        """The program for this kind of call; one that is met for the first time is analysed. Raises UnsupportedError where that
        can't be done here, or where such a call can't be routed."""
        program = self.programs.get(signature_of(bound))
        if program is None:
            if in_a_graph() or self.model.current.call is None:
                raise UnsupportedError(self._unknown_call(bound, _NOT_HERE))
            program = self._analysed(bound)
        return program

    def contexts_at(self, key: ContextKey) -> dict[ContextKind, tuple[ContextGraph, ...]]:
        """The rewritten graphs in force that are of modules in this state."""
        return {
            (signature, given): graphs
            for (signature, given), graphs in self.contexts.items()
            if set(graphs) <= set(self.programs[signature].contexts.get((key, given), ()))
        }

    def context(self, plan: BlockPlan, values: Sequence[Any]) -> ContextGraph | None:
        """The rewritten graph in force for a call with these leaves, if there is one for what it holds and for its sizes."""
        return _of_sizes(self.contexts.get((plan.signature, open_settings(values)), ()), plan, values)

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, list[Any]]:
        """The program for a call of this block, and the call's leaves in the order of the program's plan."""
        bound = bind_arguments(self.positional, args, kwargs)
        return self.program(bound), given_leaves(bound)

    def own_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call, on a copy of its tensors where the block writes into its tokens and they are needed afterwards."""
        if not any(program.plan.in_place for program in self.programs.values()):
            return args, kwargs
        return map_leaves(lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))

    def _analysed(self, bound: dict[str, Any]) -> Program:
        """The program for a new kind of call, planned in the middle of the model's forward that makes it."""
        signature, state = signature_of(bound), self.model
        with _LOOKING:
            if signature not in self.programs:
                assert state.current.call is not None
                model, *given = state.current.call
                reasons = state.look_at(model(), *given)  # type: ignore[arg-type]
                if signature not in self.programs:
                    refused = reasons.get(self.fqn, "the model does not call it so when it is looked at")
                    raise UnsupportedError(
                        self._unknown_call(bound, f"Such a call can't be routed: {refused}. {_REFUSED}")
                    )
        return self.programs[signature]

    def _unknown_call(self, bound: dict[str, Any], why: str) -> str:
        found = dict(signature_of(bound))
        known = [dict(signature) for signature in self.programs]
        new = sorted(leaf_name(path) for path in found if all(found[path] != plan.get(path) for plan in known))
        gone = sorted(leaf_name(path) for path in known[0] if path not in found)
        return (
            f"{self.fqn} is called in a way it was not analysed for (new or of another kind: {', '.join(new) or 'none'}; "
            f"missing: {', '.join(gone) or 'none'}). {why}"
        )


def routing_of(module: nn.Module) -> Any:
    """The routing state of a block or root, or None."""
    return module.__dict__.get(STATE)


def settle(model: nn.Module, inputs: dict[str, Any] | None = None, *, sync: bool = True) -> ModelRouting:
    """The routing state of a transformed model; a search still owed is done first, on ``inputs``. ``sync``: the table is that of
    the masters.

    Raises NotTransformedError, or CaptureError where the search is owed and there are no inputs.
    """
    state = routing_of(model)
    if not isinstance(state, ModelRouting):
        raise NotTransformedError(
            f"{type(model).__name__} is not transformed. Call diffcr_compile.transform(model) first."
        )
    if state.deferred is not None:
        if inputs is None:
            raise CaptureError(
                f"the blocks of {type(model).__name__} have not been looked for yet: transform was called without "
                "example_inputs and the model has not run since. Run it once, or pass example_inputs to transform."
            )
        state.deferred(model, state, inputs)
    if sync:
        state.sync_with_masters()
    return state


@functools.cache
def routed_forward(base: Callable[..., Any]) -> Callable[..., Any]:
    """The forward to bind on instances of the class whose own forward is ``base``."""

    @functools.wraps(base)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        routing = self.__dict__.get(STATE)
        if routing is None or routing.model.dense:
            return base(self, *args, **kwargs)
        traced = in_a_graph()
        if routing.rests:
            compiled = None if traced else routing.compiled
            return base(self, *args, **kwargs) if compiled is None else compiled(self, 0, args, kwargs, None, None)
        if not traced:
            routing.model.find_recomputed(routing.fqn)
            routing.check_entered()
            if routing.model.unproved:
                _prove_loaded(self, routing, args, kwargs)
        if routing.model.learning is not None:
            return routing.model.learning(self, routing, args, kwargs)
        if traced:
            current = routing.model.current
            if current.trajectory is not None and current.row is None:
                raise UnsupportedError(_COMPILED_ALONE)
            recalled = current.recalled  # read by number only where it holds any: Dynamo would guard on the number
            return forward_at(self, routing.ratio(), args, kwargs, recalled.get(routing.index) if recalled else None)
        ratio, recalled, context = prepare(self, routing, args, kwargs)
        if routing.compiled is not None and not routing.model.observers:
            return routing.compiled(self, ratio, args, kwargs, recalled, context)
        return forward_at(self, ratio, args, kwargs, recalled, context)

    # Pickling a bound method stores its name alone; under the name "forward" it would come back as the dense forward.
    forward.__name__ = "diffcr_routed_forward"
    return forward


def _prove_loaded(module: nn.Module, routing: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Have a plan that was loaded proved at the first real forward that routes by it, or learns to. Where hooks around the block's
    parts move its weights, or the weights are sharded, it is taken for proved: nothing can be tried there.

    Raises ArtefactError where it does not hold.
    """
    state = routing.model
    if state.learning is None and not any(routing.ratios):
        return
    program, values = routing.read_call(args, kwargs)
    fake = any(isinstance(value, FakeTensor) or (isinstance(value, Tensor) and value.is_meta) for value in values)
    if program not in state.unproved or fake:
        return
    if not is_sharded(module) and not any("forward" in vars(part) for part in module.modules() if part is not module):
        assert state.prove is not None
        state.prove(module, routing.fqn, program.plan, values)
    state.unproved.discard(program)


def prepare(
    module: nn.Module, routing: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, Recalled | None, ContextGraph | None]:
    """What a forward of this block needs that no compiled graph can make: its ratio, its memory, its rewritten graph."""
    ratio, state = routing.ratio(), routing.model
    trajectory = state.rehearsal or state.current.trajectory
    remembers = trajectory is not None and (trajectory.fills or any(routing.ratios))
    if not remembers and (ratio == 0 or state.config.context == "kept"):
        return ratio, None, None
    bound = bind_arguments(routing.positional, args, kwargs)
    program = routing.program(bound)
    values = program.values(bound, routing.fqn)
    context = None
    if trajectory is not None and not trajectory.first and routing.parts and are_in_place(routing.parts):
        context = routing.context(program.plan, values)
    if context is None:
        context = _write_context(module, routing, program, values)
    if trajectory is None or not remembers:
        return ratio, None, context
    if state.rehearsal is not None:
        return ratio, state.rehearsal.look(routing.index, program.plan, values), context
    return ratio, trajectory.recall(routing.index, program.plan, values, state.config), context


def prepare_context(
    module: nn.Module, routing: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ContextGraph | None:
    """With context from every token: the block's rewritten graph for this call, as its modules now are."""
    if routing.model.config.context == "kept":
        return None
    bound = bind_arguments(routing.positional, args, kwargs)
    program = routing.program(bound)
    return _write_context(module, routing, program, program.values(bound, routing.fqn))


def contexts_are_current(model: nn.Module, state: ModelRouting, row: tuple[int, ...]) -> bool:
    """Whether every block that ``row`` routes by a rewritten graph has the one for its modules as they now are; after the first
    forward of a trajectory, whether none of these has been replaced."""
    trajectory = state.current.trajectory
    if state.config.context == "kept":
        return True
    for block, ratio in zip(state.blocks, row, strict=True):
        rewritten = any(program.plan.context != "kept" for program in block.programs.values())
        if rewritten and (ratio or any(block.ratios)):
            if trajectory is not None and not trajectory.first:
                if not block.parts or not are_in_place(block.parts):
                    return False
                continue
            key = context_key(model.get_submodule(block.fqn))
            if not block.contexts or block.contexts != block.contexts_at(key):
                return False
    return True


def _write_context(
    module: nn.Module, routing: BlockRouting, program: Program, values: list[Any]
) -> ContextGraph | None:
    """The rewritten graph for a call with these leaves of the block as its modules now are, in force from now on; None where it
    takes none."""
    plan = program.plan
    if plan.context == "kept":
        return None
    changed = [name for holder, name, held in routing.parts if holder.get(name) is not held]
    if changed or not routing.parts:
        routing.parts = parts_of(module)
    key, given = context_key(module), open_settings(values)
    known = program.contexts.get((key, given), ())
    context = _of_sizes(known, plan, values)
    if context is None:
        if len(known) >= MOST_GRAPHS:
            raise UnsupportedError(
                f"{routing.fqn} does something else at other sizes ({_broken(known, plan, values)}), and has been looked at for "
                f"{MOST_GRAPHS} of them, and no more are kept. Use fewer sizes, or context='kept'."
            )
        if not known and routing.states >= MOST_STATES:
            raise UnsupportedError(
                f"{routing.fqn} runs by a graph (keys and values from every token) that is written anew for each state of its "
                f"modules, and {MOST_STATES} have been met. What changes from call to call ({', '.join(map(str, changed[:3]))}) "
                "should be a tensor that it is called with; or use context='kept'."
            )
        routing.states += not known
        assert routing.model.rebuild is not None
        broken, proved = _broken(known, plan, values), bool(known) or not program.contexts
        context = routing.model.rebuild(module, routing.fqn, plan, values, broken, proved)
        known = program.contexts[key, given] = (*program.contexts.get((key, given), ()), context)
    routing.contexts = {**routing.contexts_at(key), (plan.signature, given): known}
    return context


def _of_sizes(graphs: Sequence[ContextGraph], plan: BlockPlan, values: Sequence[Any]) -> ContextGraph | None:
    """The first graph that holds for the sizes of a call with these leaves."""
    tensors = plan.tensors(values)
    return next((graph for graph in graphs if graph.guards.hold(tensors)), None)


def _broken(graphs: Sequence[ContextGraph], plan: BlockPlan, values: Sequence[Any]) -> str:
    """What the graphs take for granted and this call does not fulfil, in words."""
    return " or ".join(dict.fromkeys(graph.guards.broken(plan.tensors(values)) for graph in graphs))


def forward_at(
    module: nn.Module,
    ratio: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recalled: Recalled | None = None,
    context: ContextGraph | None = None,
    vector: Tensor | None = None,
) -> Any:
    """The block ``module`` at a ratio in thousandths: the original call at zero, else its program. ``context``: its rewritten graph
    for this call, else the one in force is taken; ``vector``: of its router, where the region is not to be read here."""
    routing: BlockRouting = module.__dict__[STATE]
    memory, empty = recalled or (None, False)
    if ratio == 0 and memory is None and not routing.model.observers:
        return routing.base(module, *args, **kwargs)
    bound = bind_arguments(routing.positional, args, kwargs)
    program = routing.program(bound)
    values = program.values(bound, routing.fqn)
    plan = program.plan
    stream = values[plan.stream]
    num_tokens = stream.shape[plan.token_axis]
    k = capacity(num_tokens, ratio)
    if k == 0 and not plan.can_skip_block:
        k = 1
    if k == num_tokens or empty or stream.shape[plan.batch_axis] == 0:  # nothing to choose from
        k, kept = num_tokens, None
        output = _run_dense(module, routing, program, values, args, kwargs, recalled, context)
    elif k == 0:
        output, kept = program.skip(values, memory), None
    else:
        block = _block(module, routing, program, values, context)
        if memory is None and routing.model.config.skip == "reuse":
            memory = blank(plan, values)
        output, kept = program(block, router_vector(module) if vector is None else vector, k, values, memory)
    if routing.model.observers:
        _observe(routing, plan, values, kept, k)
    return output


def _block(
    module: nn.Module, routing: BlockRouting, program: Program, values: list[Any], context: ContextGraph | None
) -> Callable[..., Any]:
    """What a program calls: the block's own forward, or with context from every token its rewritten graph."""
    if program.plan.context == "kept":
        block: Callable[..., Any] = functools.partial(routing.base, module)
    else:
        block = (context or _context_of(routing, program, values)).bind(module)
    return OneByOne(block) if program.plan.lift == "vmap" and has_quantised_weights(module) else block


def has_quantised_weights(module: nn.Module) -> bool:
    """Whether some parameter is a tensor of a class of its own, whose kernels need not go through ``torch.vmap``: of torchao's,
    float8 products raise there, and int8 ones are wrong where they are compiled.

    By its type, since Dynamo answers no to ``is_traceable_wrapper_subclass`` for every parameter; tensors that only stand in for
    parameters (functional calls, export) are no such class.
    """
    return any(hasattr(type(parameter), "__tensor_flatten__") for parameter in module.parameters())


def _context_of(routing: BlockRouting, program: Program, values: list[Any]) -> ContextGraph:
    """The rewritten graph in force for a call with these leaves."""
    context = routing.context(program.plan, values)
    if context is None:
        raise CaptureError(
            f"{routing.fqn}: its graph for context from every token is written at the first eager forward, and there was none "
            "with such sizes and arguments since the model was transformed or loaded. Run it so before it is compiled or exported."
        )
    return context


def _run_dense(
    module: nn.Module,
    routing: BlockRouting,
    program: Program,
    values: list[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recalled: Recalled | None,
    context: ContextGraph | None,
) -> Any:
    """The original call on the original tensors; where there is a memory, every token's update is remembered."""
    if recalled is None:
        return routing.base(module, *args, **kwargs)
    plan, (memory, empty) = program.plan, recalled
    routed = [index for index, output in enumerate(plan.outputs) if output.routed]
    before = [program.before(index, values) for index in (*routed, *plan.beside)]
    if plan.in_place:
        before = [tensor.clone() for tensor in before]
    if plan.states:
        context = context or _context_of(routing, program, values)
        tensors = list(context.run_dense(module, plan.tensors(values)))
        output = program.output(tensors)
        remember_all_context(memory, tensors[len(plan.outputs) :])
    else:
        output = routing.base(module, *args, **kwargs)
        tensors = [leaf for _, leaf in iterate_leaves(output) if isinstance(leaf, Tensor)]
    updates = [tensors[index] - start for index, start in zip((*routed, *plan.beside), before, strict=True)]
    remember_beside(memory, updates[len(routed) :], first=empty)
    axes = [(plan.outputs[index].dims.index("N"), plan.outputs[index].batch_axis) for index in routed]
    remember_all(memory, updates[: len(routed)], axes, first=empty)
    return output


def router_weight(module: nn.Module) -> Tensor:
    """The router's parameter of a routed block: (D,), or (num_regions, D) where it sees the timestep."""
    router = getattr(module, ROUTER)
    return router.weight


def router_vector(module: nn.Module) -> Tensor:
    """What scores a routed block's tokens in the forward under way: (D,)."""
    weight = router_weight(module)
    return weight if weight.ndim == 1 else weight[module.__dict__[STATE].model.region()]


def _observe(routing: BlockRouting, plan: BlockPlan, values: list[Any], kept: Tensor | None, k: int) -> None:
    """Tell the observers of this model which tokens the call keeps: int64 (B, K); ``kept`` is None where all or none are."""
    tokens = values[plan.stream]
    if kept is None:
        kept = torch.arange(k, device=tokens.device).expand(tokens.shape[plan.batch_axis], k)
    for observer in routing.model.observers:
        observer(routing.fqn, kept)


def bind(module: nn.Module, routing: BlockRouting, router: Router) -> None:
    """Make ``module`` a routed block: its router, its state, its forward on the instance."""
    module.add_module(ROUTER, router.train(module.training))
    module.__dict__[STATE] = routing
    module.forward = types.MethodType(routed_forward(routing.base), module)  # type: ignore[method-assign]


def unbind(module: nn.Module) -> None:
    """Inverse of :func:`bind`. A forward that someone else has since set on the instance stays: the one below it passes."""
    routing = module.__dict__.pop(STATE)
    del module._modules[ROUTER]
    if getattr(module.__dict__.get("forward"), "__func__", None) is routed_forward(routing.base):
        del module.__dict__["forward"]
