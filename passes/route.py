"""Route: write each family's program and bind it on its blocks. The only pass that changes the model, and the last."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from ..arguments import iterate_leaves, positional_names
from ..config import DiffCRConfig
from ..context import ContextGraph, context_key
from ..errors import ArtefactError, BlockNotFoundError, UnsupportedError
from ..plan import BlockPlan, ModelPlan
from ..routed import BlockRouting, ModelRouting, bind
from ..router import Router
from .analysis import ModelAnalysis, Refused
from .context import rebuild_context
from .loaded import prove_loaded
from .program import write_program


def check_untouched(model: nn.Module) -> None:
    """Raises UnsupportedError where something else has put a forward on a module of the model (not on the model itself).

    An exported graph's submodules have forwards of their own, which nothing calls.
    """
    if not isinstance(model, fx.GraphModule):
        for fqn, module in model.named_modules():
            if fqn:
                _check_forward(module, fqn)


def _check_forward(module: nn.Module, fqn: str) -> None:
    if "forward" in vars(module):
        raise UnsupportedError(
            f"{fqn} already has a forward set on the instance, where the routed one goes. If offload, casting, cache or compile "
            "hooks set it: call transform first and add them afterwards. If it is your own: make it that of the module's class."
        )


def plan_model(analysis: ModelAnalysis) -> ModelPlan:
    """The finished plan. Raises BlockNotFoundError, listing every candidate with its reason, where nothing can be routed;
    UnsupportedError where what was asked for needs a timestep that is not known."""
    if not analysis.sites:
        found = "\n".join(f"  - {refusal}" for refusal in analysis.refusals) or "  - no module takes and returns tokens"
        raise BlockNotFoundError(
            f"nothing in {type(analysis.model).__name__} can be routed; expected at least one module with attention over tokens "
            f"and a residual join. Candidates:\n{found}\nChange filter_fn or min_flops_share if they left blocks out."
        )
    if analysis.timestep is None:
        _check_timestep_free(analysis)
    family_flops = [0] * len(analysis.families)
    for site in analysis.sites:
        family_flops[site.family] += analysis.module_flops.get(site.fqn, 0)
    return ModelPlan(
        families=analysis.families,
        sites=analysis.sites,
        refusals=analysis.refusals,
        timestep=analysis.timestep,
        timestep_note=analysis.timestep_note,
        input_paths=frozenset(path for path, _ in iterate_leaves(analysis.inputs)),
        input_batch_axes=analysis.input_batch_axes,
        output_batch_axes=analysis.output_batch_axes,
        dense_flops=analysis.module_flops.get("", 0),
        family_flops=tuple(family_flops),
    )


def _check_timestep_free(analysis: ModelAnalysis) -> None:
    """Raises UnsupportedError where an option needs a timestep: it would do nothing without, and nobody would be told."""
    config = analysis.config
    options = (
        (config.skip == "reuse", "skip='reuse'", "skip='identity'"),
        (config.router == "timestep", "router='timestep'", "router='token'"),
        (
            config.timestep_argument is not None,
            f"timestep_argument={config.timestep_argument!r}",
            "timestep_argument=None",
        ),
    )
    for asked, option, other in options:
        if asked:
            raise UnsupportedError(
                f"{option} needs to know which input of {type(analysis.model).__name__} is the timestep, and its range "
                f"({analysis.timestep_note}). Name them by DiffCRConfig(timestep_argument=..., timestep_range=...), or use {other}."
            )


def route_blocks(
    model: nn.Module, plan: ModelPlan, state: ModelRouting, context_graphs: Sequence[ContextGraph | None] = ()
) -> None:
    """Bind routers and programs on the blocks of ``plan``; all of them or, where one can't be bound, none.

    context_graphs: of each family, where they are known already; else each is written at its first forward.
    """
    programs = [write_program(family, state.config) for family in plan.families]
    later = [write_program(family, state.config) for family in plan.later_families]
    modules = [model.get_submodule(site.fqn) for site in plan.sites]
    reference = next(model.parameters(), None)
    state.plan, state.positional = plan, positional_names(type(model))
    num_vectors = state.num_regions if state.config.router == "timestep" else None
    routers = [
        _make_router(module, site.fqn, plan.families[site.family].width, reference, num_vectors)
        for site, module in zip(plan.sites, modules, strict=True)
    ]
    state.rebuild, state.prove = functools.partial(_rebuild, state.config), _prove
    for index, (site, module) in enumerate(zip(plan.sites, modules, strict=True)):
        program, base = programs[site.family], type(module).forward
        known = (program, *(later[other.family] for other in plan.later_sites if other.fqn == site.fqn))
        routing = BlockRouting(
            fqn=site.fqn,
            index=index,
            base=base,
            positional=positional_names(type(module)),
            programs={program.plan.signature: program for program in known},
            model=state,
            ratios=(0,) * state.num_regions,
        )
        bind(module, routing, routers[index])
        if context_graphs and not _trains(module) and (graph := context_graphs[site.family]) is not None:
            program.contexts[context_key(module), graph.given] = (graph,)
            routing.contexts[program.plan.signature, graph.given] = (graph,)
        state.blocks.append(routing)


def _trains(module: nn.Module) -> bool:
    """Whether a part is in training mode: the graphs of the analysis are those of evaluation, without dropout."""
    return any(part.training for part in module.modules())


def _rebuild(
    config: DiffCRConfig, module: nn.Module, fqn: str, plan: BlockPlan, values: list[Any], sizes: str, proved: bool
) -> ContextGraph:
    try:
        return rebuild_context(module, fqn, plan, values, config, proved=proved)
    except Refused as refused:
        why = (
            f"is called with sizes at which it may do something else than when it was analysed ({sizes} does not hold)"
            if sizes
            else "has changed since it was analysed (adapters, quantisation, processors, dtype, offload)"
        )
        raise UnsupportedError(
            f"{fqn} {why}, and its graph can't be rewritten for context={config.context!r}: {refused}. Restore the model and "
            "transform it again, or use context='kept'."
        ) from refused


def _prove(module: nn.Module, fqn: str, plan: BlockPlan, values: list[Any]) -> None:
    try:
        prove_loaded(module, fqn, plan, values)
    except Refused as refused:
        raise ArtefactError(
            f"the routing that was loaded does not hold for {fqn}: {refused}. The code of {type(module).__name__} is not what it "
            "was when the routing was made (another version of its library?). Restore the model, transform and calibrate it again."
        ) from refused


def _make_router(
    module: nn.Module, fqn: str, width: int, reference: nn.Parameter | None, num_regions: int | None
) -> Router:
    _check_forward(module, fqn)
    parameter = next(module.parameters(), reference)
    if parameter is None:
        raise UnsupportedError(f"{fqn} has no parameters, so nothing tells a router's dtype and device")
    return Router(width, fqn, dtype=parameter.dtype, device=parameter.device, num_regions=num_regions)
