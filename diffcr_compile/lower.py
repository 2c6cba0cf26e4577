"""``lower``: compile a routed model, so that saved FLOPs become saved time.

Capacities are Python ints, so every graph is static. ``regional``: one graph per (family, k), shared by all layers and run
from the eager model around them. ``full``: one graph of the whole denoiser per distinct row of the table, and per region where
routers see the timestep; the region is looked up on the host, outside the graph. Each graph has a code object of its own, since
Dynamo counts recompilations per code object and falls back to eager without a word when the count is full.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .arguments import bind_arguments, iterate_leaves, positional_names
from .config import Scope
from .errors import LoweringError
from .region import follow_trajectory, pin_region, resolve_regions
from .routed import STATE, BlockRouting, ModelRouting, Recalled, contexts_are_current, forward_at, router_vector, settle
from .settings import setting
from .unwrap import unwrap

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def lower(model: nn.Module, *, scope: Scope = "auto", mode: Mode | None = None, **options: Any) -> nn.Module:
    """Compile a transformed model in place with torch.compile; returns the same object. Graphs are made at their first use.

    scope: ``"regional"`` compiles the blocks, ``"full"`` the whole denoiser; ``"auto"``: full where the mode records CUDA
        graphs (regional CUDA graphs are broken in torch, pytorch issue 152887), else regional, which compiles in a time that
        does not grow with depth.
    mode: as in torch.compile. options: further arguments of torch.compile (``backend``, ``options``); what it refuses is refused
        here, before anything changes.

    A later ``set_ratios`` or ``calibrate`` is followed: new capacities compile when they are first met. Outputs equal the eager
    model's up to Inductor's rounding (1e-5 relative in float32, as for the dense model), as long as no two scores tie.
    Raises LoweringError for a combination that can't work, NotTransformedError, CaptureError.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {', '.join(map(repr, get_args(Scope)))}, found {scope!r}")
    if mode is not None and mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, found {mode!r}")
    if {"fullgraph", "dynamic"} & set(options):
        raise LoweringError("lower compiles whole graphs of static shapes; leave fullgraph and dynamic out.")
    recorder = _cuda_graph_option(mode, options)
    if scope == "regional" and recorder:
        raise LoweringError(
            f"{recorder} records CUDA graphs, which several compiled regions of one model overwrite for each other (pytorch "
            "issue 152887). Use scope='full', or mode='max-autotune-no-cudagraphs'."
        )
    compile_options = {"mode": mode, "fullgraph": True, "dynamic": False, **options}
    try:
        torch.compile(_model_body, **compile_options)  # compiles nothing yet
    except Exception as error:  # torch has no one type for what it does not know
        raise LoweringError(
            f"torch.compile does not take these options: {type(error).__name__}: {error!s:.200}"
        ) from error
    model = unwrap(model)
    state = settle(model)
    if state.lowered is not None:
        state.lowered.remove(model)
    chosen = scope if scope != "auto" else ("full" if recorder else "regional")
    lowered = Lowered(chosen, compile_options, clone_outputs=recorder is not None)
    lowered.install(model)
    state.lowered = lowered
    return model


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
    """What ``lower`` put into a model: how it was asked to compile, and the graphs made so far."""

    scope: str
    options: dict[str, Any]
    clone_outputs: bool
    graphs: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    given: dict[Any, object] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Lowered:
        return Lowered(self.scope, self.options, self.clone_outputs)

    def install(self, model: nn.Module) -> None:
        """Route the model's (or its blocks') calls through the compiled graphs."""
        state: ModelRouting = model.__dict__[STATE]
        if self.scope == "full":
            model._compiled_call_impl = functools.partial(self.run_model, model)  # type: ignore[assignment]
        else:
            for block in state.blocks:
                block.compiled = self.run_block

    def remove(self, model: nn.Module) -> None:
        """Inverse of :meth:`install`; the graphs are kept for another time."""
        state: ModelRouting = model.__dict__[STATE]
        if self.scope == "full":
            vars(model).pop("_compiled_call_impl", None)
        for block in state.blocks:
            block.compiled = None

    def run_block(
        self, module: nn.Module, ratio: int, args: tuple[Any, ...], kwargs: dict[str, Any], recalled: Recalled | None
    ) -> Any:
        """One block, by the graph of its family at this ratio."""
        routing: BlockRouting = module.__dict__[STATE]
        programs = tuple(id(program) for program in routing.programs.values())
        key = (programs, ratio, id(routing.context), recalled is None, recalled is not None and recalled[1])
        vector = router_vector(module) if routing.model.config.router == "timestep" else None
        return self._graph(key, _block_body)(module, ratio, args, kwargs, recalled, vector)

    def run_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The whole model, by the graph of the row for this timestep; a batch in several regions runs eagerly around them."""
        state: ModelRouting = model.__dict__[STATE]
        if state.learning or state.dense or state.observers:
            return model._call_impl(*args, **kwargs)
        state.sync_with_masters()
        bound = bind_arguments(positional_names(type(model).forward), args, kwargs)
        regions = resolve_regions(model, state, bound)
        if len(set(regions)) > 1:
            return model._call_impl(*args, **kwargs)
        row = tuple(block.ratios[regions[0]] for block in state.blocks)
        follow_trajectory(model, state, bound)
        trajectory = state.current.trajectory
        recalled: dict[int, Recalled] | None = {}
        if trajectory is not None:
            shapes = tuple(tuple(leaf.shape) for _, leaf in iterate_leaves(bound) if isinstance(leaf, torch.Tensor))
            recalled = trajectory.recall_all([block.index for block in state.blocks if any(block.ratios)], shapes)
        with pin_region(state, regions[0], row):
            if recalled is None or not contexts_are_current(model, state, row) or self._is_given_other(state, bound):
                return model._call_impl(*args, **kwargs)  # eagerly once: memory is made, graphs are rewritten
            state.current.recalled = recalled
            first = trajectory is not None and trajectory.first
            region = regions[0] if state.config.router == "timestep" else None
            key = (row, region, first, trajectory is None, tuple(id(block.context) for block in state.blocks))
            output = self._graph(key, _model_body)(model, args, kwargs)
        return _clone(output) if self.clone_outputs else output

    def _is_given_other(self, state: ModelRouting, bound: dict[str, Any]) -> bool:
        """Whether a call holds other values beside its tensors than the last one, which rewritten graphs hold."""
        if state.config.context == "kept":
            return False
        before, self.given = self.given or _settings(state.example_inputs), _settings(bound)
        return before != self.given

    def _graph(self, key: Any, body: Callable[..., Any]) -> Callable[..., Any]:
        graph = self.graphs.get(key)
        if graph is None:
            graph = self.graphs[key] = torch.compile(_own_code(body, len(self.graphs)), **self.options)
        return graph


def _block_body(
    module: nn.Module,
    ratio: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recalled: Recalled | None,
    vector: Tensor | None,
) -> Any:
    return forward_at(module, ratio, args, kwargs, recalled, vector)


def _model_body(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model._call_impl(*args, **kwargs)


def _own_code(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The same function with a code object of its own, and so with a recompilation count of its own."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    return types.FunctionType(code, function.__globals__, code.co_name)


def _settings(inputs: dict[str, Any]) -> dict[Any, object]:
    """What a call holds beside tensors."""
    leaves = iterate_leaves(inputs)
    return {path: setting(leaf) for path, leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)}


def _clone(output: Any) -> Any:
    """CUDA graphs write every call's output to the same place; two-call guidance needs both."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)
