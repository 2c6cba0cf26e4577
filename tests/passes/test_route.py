"""Route: all of the blocks or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffcr_compile.passes.analysis import ModelAnalysis, run_passes
from diffcr_compile.passes.blocks import find_blocks
from diffcr_compile.passes.capture import capture_calls
from diffcr_compile.passes.route import plan_model, route_blocks
from models import Shape, original, same_snapshot, snapshot, tiny_inputs

from diffcr_compile import BlockNotFoundError, DiffCRConfig, UnsupportedError
from diffcr_compile.plan import Refusal
from diffcr_compile.routed import ModelRouting

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)


@pytest.fixture(scope="module")
def analysis() -> ModelAnalysis:
    state = ModelAnalysis(original(SHAPE), DiffCRConfig(), tiny_inputs(SHAPE), lambda module, fqn: True)
    return run_passes((capture_calls, find_blocks), state)


def test_the_plan_tells_what_each_family_costs(analysis: ModelAnalysis) -> None:
    plan = plan_model(analysis)
    assert plan.dense_flops == analysis.module_flops[""]
    assert plan.family_flops == (sum(analysis.module_flops[f"blocks.{n}"] for n in range(2)),)
    assert plan.input_paths == {("x",), ("timestep",)}


def test_without_sites_every_candidate_is_listed() -> None:
    refusals = (Refusal("Block", ("blocks.0", "blocks.1"), "too round"), Refusal("Head", ("head",), "too flat"))
    state = ModelAnalysis(original(SHAPE), DiffCRConfig(), {}, lambda module, fqn: True, refusals=refusals)
    with pytest.raises(BlockNotFoundError) as raised:
        plan_model(state)
    assert "  - blocks.0 and 1 more (Block): too round\n  - head (Head): too flat\n" in str(raised.value)


def test_a_timestep_that_was_named_must_have_a_range(analysis: ModelAnalysis) -> None:
    state = replace(analysis, config=DiffCRConfig(timestep_argument="t"), timestep_note="range unknown")
    with pytest.raises(
        UnsupportedError, match=r"timestep_argument='t' needs .*\(range unknown\).* timestep_range=\.\.\."
    ):
        plan_model(state)


def test_blocks_of_a_plan_become_routed(analysis: ModelAnalysis) -> None:
    model, state = original(SHAPE), ModelRouting(DiffCRConfig())
    route_blocks(model, plan_model(analysis), state)
    assert [block.fqn for block in state.blocks] == ["blocks.0", "blocks.1"]
    assert [block.index for block in state.blocks] == [0, 1]
    assert all("forward" in vars(block) and "diffcr_router" in block._modules for block in model.blocks)


def test_where_one_block_can_not_be_bound_none_is(analysis: ModelAnalysis) -> None:
    model, state = original(SHAPE), ModelRouting(DiffCRConfig())
    model.blocks[1].forward = model.blocks[1].forward
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"blocks\.1 already"):
        route_blocks(model, plan_model(analysis), state)
    assert same_snapshot(snapshot(model), before)
