"""``lower``: compile a routed model, so that saved FLOPs become saved time.

Capacities are Python ints, so every graph is static, and each size of the inputs has its own. ``regional``: one graph per
(family, k), shared by all layers and run from the eager model around them. ``full``: one graph of the whole denoiser's forward per
distinct row of the table, and per region where routers see the timestep; the region is looked up on the host, by the pre-hook that
looks it up for the eager model, and other hooks run outside the graph too. Each graph has a code object of its own, since Dynamo
counts recompilations per code object and falls back to eager without a word when the count is full.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .arguments import bind_arguments, iterate_leaves, map_leaves
from .config import Scope, check_choice
from .context import ContextGraph
from .defaults import autocast_dtype
from .eager import in_a_graph
from .errors import LoweringError
from .region import pin_region
from .routed import (
    STATE,
    BlockRouting,
    ModelRouting,
    Recalled,
    contexts_are_current,
    forward_at,
    router_vector,
    routing_of,
    settle,
)
from .settings import setting
from .unwrap import unwrap

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
_NAME = "diffcr_lowered_forward"


def lower(model: nn.Module, *, scope: Scope = "auto", mode: Mode | None = None, **options: Any) -> nn.Module:
    """Compile a transformed model in place with torch.compile; returns the same object. Graphs are made at their first use.

    scope: ``"regional"`` compiles the blocks, ``"full"`` the whole denoiser; ``"auto"``: full where the mode records CUDA
        graphs (regional CUDA graphs are broken in torch, pytorch issue 152887), else regional, which compiles in a time that
        does not grow with depth.
    mode: as in torch.compile. options: ``backend`` and ``options`` of torch.compile; what it refuses is refused here, before
        anything changes.

    A later ``set_ratios`` or ``calibrate`` is followed: new capacities compile when they are first met, and so does every new size
    of the inputs. Outputs equal the eager model's up to Inductor's rounding (1e-5 relative in float32, as for the dense model), as
    long as no two scores tie. A ``model.compile()`` of one's own is set aside until ``restore``.
    Raises LoweringError for a combination that can't work, NotTransformedError, CaptureError. The model is then as it was.
    """
    check_choice("scope", scope, get_args(Scope))
    if mode is not None:
        check_choice("mode", mode, get_args(Mode))
    _check_options(**options)
    recorder = _cuda_graph_option(mode, options)
    if scope == "regional" and recorder:
        raise LoweringError(
            f"{recorder} records CUDA graphs, which several compiled regions of one model overwrite for each other (pytorch "
            "issue 152887). Use scope='full', or mode='max-autotune-no-cudagraphs'."
        )
    compile_options = {"mode": mode, "fullgraph": True, "dynamic": False, **options}
    try:
        _compile(_plain_body, compile_options)  # nothing yet
    except Exception as error:  # torch has no one type for what it does not know
        raise LoweringError(
            f"torch.compile does not take these options: {type(error).__name__}: {error!s:.200}"
        ) from error
    model = unwrap(model)
    state = settle(model)
    chosen = scope if scope != "auto" else ("full" if recorder else "regional")
    lowered = Lowered(chosen, compile_options, clone_outputs=recorder is not None)
    if chosen == "full":
        _own_forward(model)
    if state.lowered is not None:
        state.lowered.remove(model)
    lowered.install(model)
    state.lowered = lowered
    return model


def _check_options(backend: Any = None, options: Any = None, **others: Any) -> None:
    """Raises LoweringError for what torch.compile would take without a look, to fail or compile nothing at the first call."""
    if others:
        raise LoweringError(
            "lower compiles whole graphs of static shapes, each with a recompilation count of its own. Of "
            f"torch.compile's arguments it takes mode, backend and options: leave {', '.join(others)} out."
        )
    if not (backend is None or isinstance(backend, str) or callable(backend)):
        raise LoweringError(
            f"backend must be a name that torch.compile knows, or a function that compiles, found {backend!r}"
        )
    if not (options is None or isinstance(options, dict)):
        raise LoweringError(f"options must be a dictionary of torch.compile's options, found {options!r}")


def _cuda_graph_option(mode: Mode | None, options: dict[str, Any]) -> str | None:
    """The argument of ``lower`` that has CUDA graphs recorded, as one would write it; None where none has."""
    if mode in _CUDA_GRAPH_MODES:
        return f"mode={mode!r}"
    if options.get("backend") == "cudagraphs":
        return "backend='cudagraphs'"
    inductor = options.get("options")
    return f"options={inductor!r}" if isinstance(inductor, dict) and inductor.get("triton.cudagraphs") else None


@dataclass(eq=False)
class Lowered:
    """What ``lower`` put into a model: how it was asked to compile, and the graphs made so far.

    active: whether it is in force. bound: the model has a forward of ours, on the instance or beneath one that others have set
    since. set_aside: what the user's own ``model.compile()`` made. run_eagerly: kinds of forward that were run so once, for what a
    loaded model has to prove.
    """

    scope: str
    options: dict[str, Any]
    clone_outputs: bool
    active: bool = False
    bound: bool = False
    set_aside: Any = None
    graphs: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    run_eagerly: set[Any] = field(default_factory=set)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lowered:
        return Lowered(self.scope, self.options, self.clone_outputs, self.active, self.bound)

    def install(self, model: nn.Module) -> None:
        """Route the model's (or its blocks') calls through the compiled graphs."""
        state: ModelRouting = model.__dict__[STATE]
        if self.scope == "regional":
            for block in state.blocks:
                block.compiled = self.run_block
        elif not self.bound:
            model.forward = types.MethodType(_lowered_forward(_own_forward(model)), model)  # type: ignore[method-assign]
            self.bound = True
        self.set_aside = vars(model).pop("_compiled_call_impl", None)
        self.active = True

    def remove(self, model: nn.Module) -> None:
        """Inverse of :meth:`install`; the graphs are kept for another time. A forward that someone else has since set on the
        instance stays: the one below it passes."""
        state: ModelRouting = model.__dict__[STATE]
        for block in state.blocks:
            block.compiled = None
        if _is_lowered(vars(model).get("forward")):
            base = _own_forward(model)
            del model.__dict__["forward"]
            if base is not type(model).forward:
                model.forward = types.MethodType(base, model)  # type: ignore[method-assign]
            self.bound = False
        if self.set_aside is not None:
            model._compiled_call_impl, self.set_aside = self.set_aside, None
        self.active = False

    @contextlib.contextmanager
    def by_block(self, model: nn.Module) -> Iterator[None]:
        """Inside, the blocks of a model from which this was removed are compiled one by one, whatever the scope; no CUDA graphs."""
        regional = self
        if self.scope != "regional":
            options = {"fullgraph": True, "dynamic": False} if self.clone_outputs else self.options
            regional = Lowered("regional", options, clone_outputs=False)
        regional.install(model)
        try:
            yield
        finally:
            regional.remove(model)

    def run_block(
        self,
        module: nn.Module,
        ratio: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        recalled: Recalled | None,
        context: ContextGraph | None,
    ) -> Any:
        """One block, by the graph of its family at this ratio; whatever that is, it runs dense to fill an empty memory."""
        routing: BlockRouting = module.__dict__[STATE]
        ratio = 0 if recalled is not None and recalled[1] else ratio
        programs, kind = tuple(routing.programs.values()), _kind(args, kwargs)
        if ratio == 0 and recalled is None:
            return self._run((programs, kind), routing, _plain_body, routing.base, module, args, kwargs)
        memory = None if recalled is None else recalled[1]
        key = (programs, ratio, context, memory, kind)
        vector = router_vector(module) if routing.model.config.router == "timestep" else None
        try:
            return self._run(key, routing, forward_at, module, ratio, args, kwargs, recalled, context, vector)
        except torch._dynamo.exc.Unsupported:
            bound = bind_arguments(routing.positional, args, kwargs)
            program = routing.program(bound)  # a new kind of call is analysed eagerly
            if len(routing.programs) == len(programs):
                program.values(bound, routing.fqn)  # says what is wrong with the call, if that is it
                raise
        return self.run_block(module, ratio, args, kwargs, recalled, context)

    def _run(self, key: Any, routing: BlockRouting, body: Callable[..., Any], *given: Any) -> Any:
        """By the graph that the family shares; where Dynamo has made it anew too often, for blocks that differ in what they read of
        themselves (the number of their layer), by one of this block's own."""
        try:
            return self._graph(key, body)(*given)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            own = (key, routing.index)
        try:
            return self._graph(own, body)(*given)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise _compiled_too_often(routing.fqn) from error

    def run_model(
        self, model: nn.Module, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The whole model's forward, by the graph of the row for the region that this call was found to lie in."""
        state: ModelRouting = model.__dict__[STATE]
        region = state.region() if state.needs_region else 0
        row = state.current.row or tuple(block.ratios[region] for block in state.blocks)
        trajectory, kind = state.current.trajectory, _kind(args, kwargs)
        _check_timestep(state, bind_arguments(state.positional, args, kwargs))
        for block in state.blocks:
            block.check_entered()
        recalled: dict[int, Recalled] | None = {}
        remembered = (kind, *_surroundings(model))
        if trajectory is not None:
            recalled = trajectory.recall_all([block.index for block in state.blocks if any(block.ratios)], remembered)
        with pin_region(state, region, row):
            if recalled is None or not contexts_are_current(model, state, row):
                output = base(model, *args, **kwargs)  # eagerly once: memory is made, graphs are rewritten
                if trajectory is not None:
                    trajectory.has_run(remembered)
                return output
            first = trajectory is not None and trajectory.first
            seen = region if state.config.router == "timestep" else None
            key = (row, seen, first, trajectory is None, _contexts(state), kind)
            known = (state.num_programs, _contexts(state))
            if state.unproved and any(row) and key not in self.run_eagerly:
                self.run_eagerly.add(key)
                return base(model, *args, **kwargs)  # what was loaded is proved
            state.current.recalled = recalled
            try:
                output = self._graph(key, _plain_body)(base, model, args, kwargs)
            except torch._dynamo.exc.Unsupported:
                output = base(model, *args, **kwargs)  # a new kind of call is analysed, or a graph rewritten, eagerly
                if (state.num_programs, _contexts(state)) == known:
                    raise
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                raise _compiled_too_often(type(model).__name__) from error
            finally:
                state.current.recalled = {}
        return _clone(output) if self.clone_outputs else output

    def _graph(self, key: Any, body: Callable[..., Any]) -> Callable[..., Any]:
        graph = self.graphs.get(key)
        if graph is None:
            graph = self.graphs[key] = _compile(_own_code(body, len(self.graphs)), self.options)
        return graph


def _compile(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The function compiled at its first call. Each gets a copy of Inductor's options: torch takes out of the dictionary what is
    its own (``guard_filter_fn``), and the next graph would go without."""
    given = options.get("options")
    return torch.compile(function, **{**options, "options": dict(given) if given else given})


def _contexts(state: ModelRouting) -> tuple[ContextGraph, ...]:
    """The rewritten graphs in force."""
    return tuple(context for block in state.blocks for graphs in block.contexts.values() for context in graphs)


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Of a call: the shapes of its tensors, and what it holds beside them, which graphs hold too; quick, since it is asked at each
    call of each block, and what is not given is most of it."""
    return (*map(_kind_of, args), *kwargs, *map(_kind_of, kwargs.values()))


def _kind_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if value is None:
        return None
    return tuple(_kind_of_leaf(leaf) for _, leaf in iterate_leaves(value))


def _kind_of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape
    # of many values torch stops compiling: an error, not a graph each
    return float if type(leaf) is float else setting(leaf)


def _surroundings(model: nn.Module) -> tuple[Any, ...]:
    """What decides the dtype and the place of what blocks remember, beside a call."""
    parameter = next(model.parameters(), None)
    kind = "cpu" if parameter is None else parameter.device.type
    return autocast_dtype(kind), None if parameter is None else (parameter.dtype, parameter.device)


def _check_timestep(state: ModelRouting, bound: dict[str, Any]) -> None:
    """Raises LoweringError for a timestep that is a number: a graph of the whole model would hold it, and serve that step alone."""
    timestep = state.plan.timestep
    if timestep is None or not isinstance(value := bound.get(timestep.argument), int | float):
        return
    raise LoweringError(
        f"with scope='full' the graph holds the numbers of a call, and {timestep.argument!r} is one that differs at every step "
        f"({value!r}). Pass it as a tensor, or use scope='regional'."
    )


def _compiled_too_often(name: str) -> LoweringError:
    return LoweringError(
        f"{name} reads something that differs from call to call (an attribute that changes, say), and torch compiles it anew for "
        "each value until it gives up. Pass what changes as a tensor, or do without lower."
    )


@contextlib.contextmanager
def unlowered(model: nn.Module, state: ModelRouting) -> Iterator[Lowered | None]:
    """Inside, the model runs without what ``lower`` put in place, which is given; afterwards with it again, unless it was restored
    or lowered anew meanwhile."""
    lowered, state.lowered = state.lowered, None
    if lowered is not None:
        lowered.remove(model)
    try:
        yield lowered
    finally:
        if lowered is not None and state.lowered is None and model.__dict__.get(STATE) is state:
            state.lowered = lowered
            lowered.install(model)


def _plain_body(base: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return base(model, *args, **kwargs)


@functools.cache
def _lowered_forward(base: Callable[..., Any]) -> Callable[..., Any]:
    """The forward to bind on a model whose own is ``base``: by graphs where they are in force, and not to be looked into."""

    @functools.wraps(base)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: ModelRouting | None = routing_of(self)
        lowered = None if state is None or in_a_graph() else state.lowered
        if lowered is None or not lowered.active or lowered.scope != "full":
            return base(self, *args, **kwargs)
        if state.learning or state.dense or state.observers:  # type: ignore[union-attr]
            return base(self, *args, **kwargs)
        return lowered.run_model(self, base, args, kwargs)

    forward.__name__ = _NAME  # as in routed_forward
    return forward


def _is_lowered(forward: Any) -> bool:
    return getattr(getattr(forward, "__func__", None), "__name__", None) == _NAME


def _own_forward(model: nn.Module) -> Callable[..., Any]:
    """The function that is the model's forward without ours. Raises LoweringError where others have put theirs around it."""
    forward = vars(model).get("forward", types.MethodType(type(model).forward, model))
    if getattr(forward, "__self__", None) is not model:
        raise LoweringError(
            f"{type(model).__name__} has a forward set on the instance (by offload, casting or cache hooks), which no graph of the "
            "whole model can hold. Call lower first and add them afterwards, or use scope='regional'."
        )
    return forward.__func__.__wrapped__ if _is_lowered(forward) else forward.__func__


def _own_code(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The same function with a code object of its own, and so with a recompilation count of its own."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    return types.FunctionType(code, function.__globals__, code.co_name)


def _clone(output: Any) -> Any:
    """CUDA graphs write every call's output to the same place; two-call guidance needs both."""
    return map_leaves(lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
