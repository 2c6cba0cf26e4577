"""Compiling by torch itself and by ``lower``: rows 1 (whole graphs), 2 (regional, CUDA graphs), 3 (export)."""

from __future__ import annotations

import io

import pytest
import torch
from models import routed_fqns, tensors_of, watch_blocks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffcr_compile
from compatibility.matrix import (
    TINY,
    assert_bits,
    assert_close,
    assert_keeps,
    assert_skips,
    at_timestep,
    follow,
    inputs,
    plain,
    reusing,
    routed,
    row,
    run,
    table,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:the routers are untrained", "ignore:There is a performance drop", "ignore:.*lru_cache"
)

STEPS = (0.9, 0.6, 0.4, 0.1)
"""One in each timestep region, as shares of the range of training."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def layerwise(name: str, *, first: bool = False) -> nn.Module:
    """Routed by a table whose layers differ and whose regions don't."""
    model = routed(name)
    rows = table(model)[1].expand_as(table(model)).clone()
    if first:
        rows[:, TINY[name].family :] = 0
    diffcr_compile.set_ratios(model, rows)
    return model


# Row 1


@row(1, "fullgraph: three resolutions in one graph; other batch sizes", slow=tuple(TINY))
def test_dynamic_shapes(name: str) -> None:
    """Dynamo makes a graph of its own for a size of one, dense too. FLUX' blocks run under torch.vmap, which takes no symbolic
    sizes: such a graph calls them sample by sample, and is one of its batch size."""
    one_by_one = name == "flux"
    assert_same = assert_close if one_by_one else assert_bits
    model, counter = layerwise(name), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    given = [inputs(name, size=size) for size in TINY[name].sizes]
    expected = [run(model, one) for one in given]
    assert_same(run(compiled, given[0]), expected[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for one, output in zip(given[1:], expected[1:], strict=True):
            assert_same(run(compiled, one), output)
            assert_skips(name, output, one)
    for batch in (1, 2, 1):
        one = inputs(name, batch, TINY[name].sizes[0])
        assert_same(run(compiled, one), run(model, one))
    assert counter.frame_count == (3 if one_by_one else 2)


@row(1, "compiled and run dense, then transformed", slow=tuple(TINY))
def test_compiled_before(name: str) -> None:
    """Graphs of the dense model are there, and must not be taken."""
    model, given, counter = plain(name), inputs(name), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    dense = run(compiled, given)
    assert diffcr_compile.transform(compiled, example_inputs=given) is model
    diffcr_compile.set_ratios(model, 0.5)
    assert_bits(run(compiled, given), run(routed(name), given))
    assert_skips(name, run(compiled, given), given)
    assert_keeps(name, model)
    diffcr_compile.restore(model)
    assert_bits(run(compiled, given), dense)


# Row 2


@row(2, "lower: one graph per family, capacity and layout over a loop of four steps", slow=tuple(TINY))
def test_regional(name: str) -> None:
    model, eager, counter = routed(name), routed(name), CompileCounterWithBackend("eager")
    rows = table(model)
    for one in (model, eager):
        diffcr_compile.set_ratios(one, rows)
    diffcr_compile.lower(model, scope="regional", backend=counter)
    _assert_follows(name, model, eager)
    assert counter.frame_count == _graphs(name, eager)


@row(2, "lower whole: one graph per distinct row over a loop of four steps", slow=tuple(TINY))
def test_whole(name: str) -> None:
    """The first and the last region's rows are made the same."""
    model, eager, counter = routed(name), routed(name), CompileCounterWithBackend("eager")
    rows = table(model)
    rows[-1] = rows[0]
    for one in (model, eager):
        diffcr_compile.set_ratios(one, rows)
    diffcr_compile.lower(model, scope="full", backend=counter)
    _assert_follows(name, model, eager)
    assert counter.frame_count == len(rows.unique(dim=0)) == len(STEPS) - 1


def _assert_follows(name: str, model: nn.Module, eager: nn.Module) -> None:
    """The eager routed model's bits, twice through the steps."""
    for _ in range(2):
        for step in STEPS:
            given = at_timestep(name, inputs(name), step)
            found = run(model, given)
            assert_bits(found, run(eager, given))
            assert_skips(name, found, given)


@row(
    2,
    "blocks compiled in place, recompile_limit at the number of these",
    slow=tuple(TINY),
)
def test_blocks_in_place(name: str) -> None:
    """Layers of one capacity share a graph."""
    model, counter = routed(name), CompileCounterWithBackend("eager")
    rows = diffcr_compile.ratios(model)
    rows[:, 0] = 0.25
    diffcr_compile.set_ratios(model, rows)
    given = [at_timestep(name, inputs(name), step) for step in STEPS]
    expected, graphs = [run(model, one) for one in given], _graphs(name, model)
    for fqn in routed_fqns(model):
        model.get_submodule(fqn).compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=graphs):
        for _ in range(2):
            for one, output in zip(given, expected, strict=True):
                assert_bits(run(model, one), output)
                assert_skips(name, output, one)
    assert counter.frame_count == graphs


def _graphs(name: str, model: nn.Module) -> int:
    """Blocks that differ for Dynamo over the four steps: in family, ratio, or layout of an input (the first block's tokens may come
    transposed from the patches)."""
    explanation, rows = diffcr_compile.explain(model), diffcr_compile.ratios(model)
    family = {site.fqn: site.family for site in explanation.plan.sites}
    column = {site.fqn: index for index, site in enumerate(explanation.plan.sites)}
    found = set()
    for region, step in enumerate(reversed(STEPS)):
        with torch.no_grad(), watch_blocks(model, list(family)) as calls:
            model(**at_timestep(name, inputs(name), step))
        for call in calls:
            layouts = tuple(leaf.stride() for leaf in tensors_of((call.args, call.kwargs)))
            found.add((family[call.fqn], float(rows[region, column[call.fqn]]), layouts))
    return len(found)


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@row(2, "lower with CUDA graphs over a loop of four steps")
def test_cuda_graphs(name: str) -> None:
    model, eager = routed(name).cuda(), routed(name).cuda()
    for one in (model, eager):
        diffcr_compile.set_ratios(one, table(model))
    diffcr_compile.lower(model, mode="reduce-overhead")
    for _ in range(2):
        for step in STEPS:
            given = {
                key: value.cuda() if isinstance(value, torch.Tensor) else value
                for key, value in at_timestep(name, inputs(name), step).items()
            }
            assert_close(run(model, given), run(eager, given), 1e-4)


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@row(12, "lower with CUDA graphs over two loops of four steps")
def test_cuda_graphs_with_reuse(name: str) -> None:
    """What blocks remember is written in place: torch skips no graph for it."""
    expected = [*follow(reusing(name).cuda(), name, device="cuda")] * 2
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    model = diffcr_compile.lower(reusing(name).cuda(), mode="reduce-overhead")
    found = [*follow(model, name, device="cuda"), *follow(model, name, device="cuda")]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-4)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped


# Row 3


@row(3, "torch.export, saved and loaded", slow=tuple(TINY))
def test_export(name: str) -> None:
    model, given = layerwise(name), inputs(name)
    program = torch.export.export(model, (), given, strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert_bits(run(loaded, given), run(model, given))
    assert_bits(run(loaded, inputs(name)), run(model, given))
    assert sum("topk" in str(node.target) for node in program.graph.nodes) == sum(
        ratio > 0 for ratio in diffcr_compile.ratios(model)[0].tolist()
    )


@row(3, "AOTInductor, packaged and loaded", slow=tuple(TINY))
def test_ahead_of_time(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, given = layerwise(name), inputs(name)
    package = str(tmp_path_factory.mktemp("package") / "routed.pt2")
    torch._inductor.aoti_compile_and_package(torch.export.export(model, (), given, strict=False), package_path=package)
    found = run(torch._inductor.aoti_load_package(package), given)
    assert_close(found, run(model, given))
    assert_skips(name, found, given)
