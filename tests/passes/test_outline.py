"""Graph modules get their blocks back, route like the model they came from, and are given back their one graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, facebook_dit, facebook_inputs, original, same_bits, tiny_inputs
from torch import fx, nn
from torch.export import Dim, export

import diffcr_compile

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=3, heads=2, head_dim=6)


def exported(model: nn.Module) -> fx.GraphModule:
    inputs = tiny_inputs(PLAIN)
    axes = {"x": {0: Dim.AUTO, 1: Dim.AUTO}, "timestep": {0: Dim.AUTO}}
    others = dict.fromkeys(("text", "rope", "mask"))
    with torch.no_grad():
        return export(model, (), {**inputs, **others}, dynamic_shapes={**axes, **others}, strict=False).module()  # type: ignore[return-value]


def _check_like_its_model(
    graph: fx.GraphModule, call: dict[str, Any], plain: nn.Module, inputs: dict[str, Any]
) -> None:
    keys, code = list(graph.state_dict()), graph.code
    with torch.no_grad():
        expected = graph(**call)
    routed = diffcr_compile.transform(copy.deepcopy(plain), example_inputs=inputs)
    assert diffcr_compile.transform(graph, example_inputs=call) is graph
    sites = diffcr_compile.explain(graph).plan.sites
    assert len(sites) == len(diffcr_compile.explain(routed).plan.sites) > 1
    with torch.no_grad():
        assert same_bits(graph(**call), expected)
        for model in (graph, routed):
            diffcr_compile.set_ratios(model, 0.5)
        assert same_bits(graph(**call), routed(**inputs))
    assert list(graph.state_dict()) == keys
    diffcr_compile.restore(graph)
    assert graph.code == code
    assert list(graph.state_dict()) == keys
    with torch.no_grad():
        assert same_bits(graph(**call), expected)


def test_an_exported_model_routes_like_the_one_it_came_from() -> None:
    plain, inputs = original(PLAIN), tiny_inputs(PLAIN)
    _check_like_its_model(exported(plain), {**inputs, "text": None, "rope": None, "mask": None}, plain, inputs)


def test_a_symbolically_traced_model_routes_like_the_one_it_came_from() -> None:
    plain, inputs = facebook_dit(), facebook_inputs(3)
    _check_like_its_model(fx.symbolic_trace(plain), inputs, plain, inputs)


def test_sizes_that_export_fixed_are_refused_and_the_graph_is_left_alone() -> None:
    """Exported for one number of tokens: nothing may be left out of it."""
    with torch.no_grad():
        graph = export(facebook_dit(), (), facebook_inputs(3), strict=False).module()
    code = graph.code
    with pytest.raises(diffcr_compile.BlockNotFoundError, match="FacebookBlock"):
        diffcr_compile.transform(graph, example_inputs=facebook_inputs(3))
    assert graph.code == code


def test_another_model_is_not_touched() -> None:
    from diffcr_compile.passes.outline import outline_blocks

    model = original(PLAIN)
    outlined = outline_blocks(model)
    assert not outlined.classes
    assert type(model) is TinyDiT


def test_a_failed_transform_gives_the_graph_back() -> None:
    graph = exported(original(PLAIN))
    code, kind = graph.code, type(graph.get_submodule("blocks.0"))
    call = {**tiny_inputs(PLAIN), "text": None, "rope": None, "mask": None}
    with pytest.raises(diffcr_compile.BlockNotFoundError):
        diffcr_compile.transform(graph, example_inputs=call, filter_fn=lambda module, fqn: False)
    assert graph.code == code
    assert type(graph.get_submodule("blocks.0")) is kind


def test_the_routing_of_a_graph_module_is_saved_and_loaded(tmp_path: Path) -> None:
    inputs = facebook_inputs(3)
    first, second = fx.symbolic_trace(facebook_dit()), fx.symbolic_trace(facebook_dit())
    second.load_state_dict(first.state_dict())
    diffcr_compile.transform(first, example_inputs=inputs)
    diffcr_compile.set_ratios(first, torch.tensor([[0.2], [0.4], [0.5], [0.7]]).expand(4, len(_sites(first))))
    diffcr_compile.save(first, tmp_path / "routing")
    diffcr_compile.load(second, tmp_path / "routing")
    with torch.no_grad():
        assert same_bits(second(**inputs), first(**inputs))
    diffcr_compile.restore(second)
    assert same_bits(second(**inputs), fx.symbolic_trace(facebook_dit())(**inputs))


def _sites(model: nn.Module) -> tuple[Any, ...]:
    return diffcr_compile.explain(model).plan.sites


def test_an_exported_model_is_calibrated_like_the_one_it_came_from() -> None:
    plain, config = original(PLAIN), diffcr_compile.CalibrationConfig(steps=6)
    batches = [tiny_inputs(PLAIN, num_tokens=40, seed=seed, timestep=500.0 * seed) for seed in range(3)]
    reports = []
    for model, others in ((exported(copy.deepcopy(plain)), dict.fromkeys(("text", "rope", "mask"))), (plain, {})):
        given = [{**batch, **others} for batch in batches]
        diffcr_compile.transform(model, example_inputs=given[0])
        reports.append(diffcr_compile.calibrate(model, given, budget=0.7, config=config))
    assert torch.equal(reports[0].table, reports[1].table)
    assert reports[0].dense_flops == reports[1].dense_flops
    losses = [[entry["loss"] for entry in report.history] for report in reports]
    assert losses[0][-1] > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_copy_of_a_graph_module_is_routed_for_itself() -> None:
    """torch's copy of one leaves attributes and hooks behind; the region of each forward would not be looked up."""
    given = [{**tiny_inputs(PLAIN, timestep=step), **dict.fromkeys(("text", "rope", "mask"))} for step in (10.0, 900.0)]
    model = exported(original(PLAIN))
    meta, hooks = dict(model.meta), vars(model).get("_deepcopy_hooks")
    diffcr_compile.transform(model, example_inputs=given[0])
    diffcr_compile.set_ratios(model, [[0.2] * 3, [0.4] * 3, [0.5] * 3, [0.7] * 3])
    with torch.no_grad():
        expected = [model(**call) for call in given]
        twin = copy.deepcopy(copy.deepcopy(model))
        assert same_bits([twin(**call) for call in given], expected)
        diffcr_compile.restore(twin)
        assert same_bits(twin(**given[0]), original(PLAIN)(**given[0]))
        assert same_bits([model(**call) for call in given], expected)
    diffcr_compile.restore(model)
    assert model.meta == meta
    assert not vars(model).get("_deepcopy_hooks")
    assert not hooks
