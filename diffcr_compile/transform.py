"""``transform`` and ``restore``: from a model to a routed model and back, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .arguments import ExampleInputs, bind_arguments, bind_inputs
from .config import DiffCRConfig
from .cost import cost_model
from .dry_run import describe_inputs, shadow
from .errors import AlreadyTransformedError, BlockNotFoundError, CaptureError, NotTransformedError, UnsupportedError
from .fingerprint import fingerprint
from .passes.analysis import ModelAnalysis, Refused, run_passes
from .passes.blocks import find_blocks
from .passes.capture import capture_calls
from .passes.flat import BLOCKS, outline_flat
from .passes.new_calls import plan_new_calls
from .passes.outline import outline_blocks
from .passes.route import check_untouched, plan_model, route_blocks
from .passes.timestep import find_timestep
from .passes.weigh import drop_small_families
from .plan import ModelPlan, Refusal
from .plan_check import check_plan
from .region import add_region_hooks, remove_region_hooks
from .routed import STATE, ModelRouting, routing_of, unbind
from .unwrap import unwrap

PASSES = (
    capture_calls,  # run the model once: what is every module called with?
    find_timestep,  # which input reaches a sinusoidal embedding, and in what range?
    find_blocks,  # which modules are blocks? export, attention, stream, side inputs, proof: passes/blocks.py
    drop_small_families,  # which of them are worth it?
)
"""Looking, in order; each takes and returns a ``ModelAnalysis``. ``route_blocks`` then changes the model."""

_IMPOSSIBLE = (BlockNotFoundError, UnsupportedError)
"""What a search says of the model itself: another call of it would find the same."""


def transform(
    model: nn.Module,
    config: DiffCRConfig | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Turn the transformer blocks of ``model`` into router-gated skip blocks, in place; returns the same object.

    At ratio zero, where it starts, the model computes what it did before, bit for bit. Class, signature, hooks, dtype and
    state-dict keys stay; what is added lives inside the blocks (``diffcr_router``) and is left out of state dicts. Hooks on the
    model's modules run in the search, several times and on fake tensors, since they may change what blocks are called with: add
    those that only watch afterwards.

    model: any module whose forward is a denoiser's; of a pipeline, pass ``pipe.transformer``. Of a wrapper (``torch.compile``,
        DistributedDataParallel) the module inside is routed, and returned: wrap that, an old wrapper knows of no routers.
    config: see :class:`DiffCRConfig`.
    example_inputs: keyword arguments of ``model.forward``, or ``(args, kwargs)``. None: the blocks are looked for at the
        first forward, with its inputs; at the next one if the model refuses those.
    filter_fn: ``(module, fqn) -> bool``; which of the found blocks may be routed.

    Raises AlreadyTransformedError, CaptureError (the model refuses the inputs), BlockNotFoundError (nothing can be routed;
    every candidate is listed with the reason), TypeError. The model is then as it was before.
    """
    model = unwrap(model)
    if routing_of(model) is not None:
        raise AlreadyTransformedError(
            f"{type(model).__name__} is already transformed. Use set_ratios or calibrate, or restore(model) first."
        )
    if config is not None and not isinstance(config, DiffCRConfig):
        raise TypeError(f"config must be a DiffCRConfig, found {type(config).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function (module, fqn) -> bool, found {type(filter_fn).__name__}")
    state = ModelRouting(config or DiffCRConfig())
    search = _Search(filter_fn or (lambda module, fqn: True))
    if example_inputs is None:
        state.deferred = search
    else:
        search(model, state, bind_inputs(model, example_inputs))
    model.__dict__[STATE] = state
    add_region_hooks(model)
    if example_inputs is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        cost_model(model)  # counted while the model can be copied, which sharding ends
    return model


def attach(model: nn.Module, state: ModelRouting, plan: ModelPlan) -> None:
    """Route ``model`` by a plan that was made before; nothing is analysed. Each kind of block is proved at the first forward that
    routes it.

    Raises ValueError where it can't be run on this model, UnsupportedError where its blocks were cut out of a call of a flat
    forward. The model is then as it was.
    """
    if any(site.fqn.startswith(BLOCKS) for site in plan.sites):
        raise UnsupportedError(
            f"{type(model).__name__} has no block modules: those of its plan were cut out of its forward, which takes a call. Use "
            "transform(model, example_inputs=...) instead of load."
        )
    check_untouched(model)
    state.fingerprint = fingerprint(model)
    state.outlined = outline_blocks(model)
    try:
        check_plan(plan, model, state.config)
        route_blocks(model, plan, state)
        state.analyse = _plan_new_calls
        programs = {program for block in state.blocks for program in block.programs.values()}
        # a block with another context is proved when its graph is rewritten
        state.unproved = {program for program in programs if program.plan.context == "kept"}
    except BaseException:
        _take_off(model, state)
        raise
    model.__dict__[STATE] = state
    add_region_hooks(model)


class _Search:
    """The search for blocks and their routing: at ``transform``, or owed until the model's first forward."""

    def __init__(self, filter_fn: Callable[[nn.Module, str], bool]) -> None:
        self.filter_fn = filter_fn

    def __call__(self, model: nn.Module, state: ModelRouting, inputs: dict[str, Any]) -> None:
        """Where it fails the model is as it was: the search is owed still, but for what it found to be impossible."""
        owed, state.deferred = state.deferred, None
        try:
            self._find_and_route(model, state, inputs)
        except BaseException as error:
            _take_off(model, state)
            state.deferred = owed
            if owed is not None and isinstance(error, _IMPOSSIBLE):
                restore(model)
            raise

    def _find_and_route(self, model: nn.Module, state: ModelRouting, inputs: dict[str, Any]) -> None:
        check_untouched(model)
        state.fingerprint = fingerprint(model)
        state.outlined = outline_blocks(model)
        start = ModelAnalysis(model, state.config, inputs, self.filter_fn)
        analysis = run_passes(PASSES, start)
        if not analysis.sites and not analysis.refusals:
            analysis = _search_graph(model, state, start, analysis)
        route_blocks(model, plan_model(analysis), state, analysis.context_graphs)
        state.example_inputs, state.analyse = describe_inputs(inputs), _plan_new_calls


def _search_graph(model: nn.Module, state: ModelRouting, start: ModelAnalysis, found: ModelAnalysis) -> ModelAnalysis:
    """The analysis of a model without blocks below it, once those in its graph are modules; or why they can't be."""
    state.outlined.undo()
    try:
        state.outlined = outline_flat(model, found.calls[""][0], found.input_batch_axes)
    except Refused as refused:
        return replace(found, refusals=(Refusal(type(model).__name__, ("the whole model",), str(refused)),))
    return run_passes(PASSES, start)


def restore(model: nn.Module) -> nn.Module:
    """Remove routing, exactly: keys, forward and values are the original's. Weights that were trained stay trained.

    Raises NotTransformedError on a model that is not transformed.
    """
    model = unwrap(model)
    state = routing_of(model)
    if not isinstance(state, ModelRouting):
        raise NotTransformedError(f"{type(model).__name__} is not transformed, so there is nothing to restore.")
    _detach(model, state)
    if state.outlined is not None:
        state.outlined.undo()
    return model


def _detach(model: nn.Module, state: ModelRouting) -> None:
    """Take the routing off; what was outlined stays so."""
    if state.lowered is not None:
        state.lowered.remove(model)
    for block in state.blocks:
        unbind(model.get_submodule(block.fqn))
    remove_region_hooks(model)
    del model.__dict__[STATE]


def _plan_new_calls(
    state: ModelRouting, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, str]:
    """Have the kinds of call planned that this call of the model makes for the first time; reasons for what can't be routed, by
    block. The model is looked at in a shadow without routing, in the middle of its own forward."""
    inputs = bind_arguments(state.positional, args, kwargs)
    try:
        plain = shadow(model)
        _detach(plain, routing_of(plain))
        return plan_new_calls(plain, state, inputs)
    except CaptureError as error:
        return dict.fromkeys((block.fqn for block in state.blocks), str(error))


def _take_off(model: nn.Module, state: ModelRouting) -> None:
    """The blocks as they were, and found by nobody."""
    for block in state.blocks:
        unbind(model.get_submodule(block.fqn))
    if state.outlined is not None:
        state.outlined.undo()
    state.blocks, state.plan, state.outlined = [], None, None  # type: ignore[assignment]
