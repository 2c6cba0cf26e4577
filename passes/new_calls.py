"""Plan the kinds of call that routed blocks meet later: an optional mask or control input that was not there at first.

The passes that looked at the model look again, at the call that brought the input, and prove what they find just the same. A block
then has one plan for each kind of call; its router, its ratio and what it remembers serve them all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..arguments import iterate_leaves, map_leaves, signature_of
from ..plan import Site
from ..routed import BlockRouting, ModelRouting
from .analysis import Call, ModelAnalysis, run_passes
from .block import as_meta
from .blocks import find_blocks
from .capture import capture_calls
from .program import write_program

MOST_KINDS = 8
"""Kinds of call for which a block is analysed: a number that differs at every step would have it analysed at every step."""


def plan_new_calls(plain: nn.Module, state: ModelRouting, inputs: dict[str, Any]) -> dict[str, str]:
    """Give the routed blocks of ``state`` a program for each kind of call that they have none for and get when the model is called
    with ``inputs``; returns the reasons by name of those that stay without.

    plain: the model without its routing. Raises CaptureError where it can't be run.
    """
    blocks = {block.fqn: block for block in state.blocks}
    start = ModelAnalysis(plain, state.config, inputs, lambda module, fqn: fqn in blocks)
    analysis = run_passes((capture_calls,), start)
    calls = {fqn: _unknown(calls, blocks.get(fqn)) for fqn, calls in analysis.calls.items()}
    analysis = run_passes((find_blocks,), replace(analysis, calls=calls))
    reasons = {fqn: refusal.reason for refusal in analysis.refusals for fqn in refusal.fqns}
    programs = [write_program(family, state.config) for family in analysis.families]
    planned = []
    for site in analysis.sites:
        block, program = blocks[site.fqn], programs[site.family]
        if program.plan.signature in block.programs:
            continue
        if len(block.programs) >= MOST_KINDS:
            reasons[site.fqn] = f"it has been analysed for {MOST_KINDS} kinds of call, and no more are kept"
        elif program.plan.form != next(iter(block.programs.values())).plan.form:
            reasons[site.fqn] = "other tokens would be routed than in the calls that it was analysed for"
        else:
            block.programs = {**block.programs, program.plan.signature: program}
            planned.append(site)
    _note(state, analysis, planned)
    _extend_inputs(state, analysis)
    return reasons


def _unknown(calls: tuple[Call, ...], block: BlockRouting | None) -> tuple[Call, ...]:
    """Of the calls of a routed block those of a new kind, if there are any."""
    known = () if block is None else block.programs
    return tuple(call for call in calls if signature_of(map_leaves(as_meta, call.arguments)) not in known) or calls


def _note(state: ModelRouting, analysis: ModelAnalysis, planned: list[Site]) -> None:
    """The model's plan has these sites' families from now on too."""
    plan, families = state.plan, dict.fromkeys(site.family for site in planned)
    place = {family: len(plan.later_families) + index for index, family in enumerate(families)}
    state.plan = replace(
        plan,
        later_families=(*plan.later_families, *(analysis.families[family] for family in families)),
        later_sites=(*plan.later_sites, *(Site(site.fqn, place[site.family]) for site in planned)),
    )


def _extend_inputs(state: ModelRouting, analysis: ModelAnalysis) -> None:
    """The batch axes that this call has proved are known from now on, so that a batch in several regions can be split."""
    plan, axes = state.plan, analysis.input_batch_axes
    if axes:
        paths = {path for path, _ in iterate_leaves(analysis.inputs)} - plan.input_paths
        new = {path: axis for path, axis in axes.items() if path in paths}
        state.plan = replace(
            plan, input_paths=plan.input_paths | paths, input_batch_axes={**plan.input_batch_axes, **new}
        )
