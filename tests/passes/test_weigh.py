"""Families that are too small stay dense."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffcr_compile.passes.analysis import ModelAnalysis, run_passes
from diffcr_compile.passes.blocks import find_blocks
from diffcr_compile.passes.capture import capture_calls
from diffcr_compile.passes.weigh import drop_small_families
from models import Shape, original, tiny_inputs

from diffcr_compile import DiffCRConfig


@pytest.fixture(scope="module")
def found() -> ModelAnalysis:
    """Two families of two blocks each."""
    shape = Shape("plain", depth=4, heads=1, head_dim=6)
    model = original(shape)
    for block in model.blocks[2:]:
        block.note = "another family"
    analysis = ModelAnalysis(model, DiffCRConfig(), tiny_inputs(shape), lambda module, fqn: True)
    return run_passes((capture_calls, find_blocks), analysis)


def test_settings_make_families(found: ModelAnalysis) -> None:
    assert [(site.fqn, site.family) for site in found.sites] == [(f"blocks.{n}", n // 2) for n in range(4)]


def weigh(found: ModelAnalysis, share: float, first: float) -> ModelAnalysis:
    """With a first family whose blocks hold the share ``first`` of all FLOPs."""
    flops = {"": 1000, "blocks.0": int(500 * first), "blocks.1": int(500 * first), "blocks.2": 200, "blocks.3": 200}
    config = DiffCRConfig(min_flops_share=share)
    return drop_small_families(replace(found, module_flops=flops, config=config))


def test_a_small_family_goes_with_its_reason(found: ModelAnalysis) -> None:
    analysis = weigh(found, share=0.1, first=0.02)
    assert [(site.fqn, site.family) for site in analysis.sites] == [("blocks.2", 0), ("blocks.3", 0)]
    assert analysis.families == found.families[1:]
    (refusal,) = analysis.refusals
    assert refusal.fqns == ("blocks.0", "blocks.1")
    assert refusal.reason == "2.00% of the FLOPs, below min_flops_share = 10.00%"


def test_nothing_small_nothing_changes(found: ModelAnalysis) -> None:
    analysis = weigh(found, share=0.1, first=0.1)
    assert (analysis.families, analysis.sites, analysis.refusals) == (found.families, found.sites, ())
