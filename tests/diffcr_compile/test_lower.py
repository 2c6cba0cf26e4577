"""``lower``: the graphs it makes, what it follows, and that it can be taken back."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    Shape,
    TinyDiT,
    original,
    relative_error,
    routed,
    same_bits,
    same_snapshot,
    sinusoids,
    snapshot,
    tiny_inputs,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import diffcr_compile
from diffcr_compile.lower import unlowered
from diffcr_compile.routed import STATE, routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=3, heads=1, head_dim=6)
ROTARY = Shape("rotary", depth=2, heads=1, head_dim=6)
TABLE = [[0.2, 0.2, 0.5], [0.2, 0.2, 0.5], [0.5, 0.0, 0.2], [0.2, 0.5, 1.0]]
"""Three distinct rows; ratios 0.2 and 0.5 beside none and all: capacities 9 and 6 of 11, 11 and 0."""

TOLERANCE = 1e-5
"""Of the largest value, in float32: Inductor fuses and reorders sums."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def eager_backend() -> Any:
    return CompileCounterWithBackend("eager")


def run(model: TinyDiT, step: float = 500.0, shape: Shape = PLAIN, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(shape, timestep=step, **options))


def lowered(table: Any, scope: str) -> tuple[TinyDiT, TinyDiT, Any]:
    """(eager, lowered, counter of graphs) at one table."""
    model, counter = routed(PLAIN), eager_backend()
    diffcr_compile.set_ratios(model, table)
    eager = copy.deepcopy(model)
    assert diffcr_compile.lower(model, scope=scope, backend=counter) is model  # type: ignore[arg-type]
    return eager, model, counter


STEPS = (10.0, 300.0, 600.0, 900.0)


def test_full_makes_one_graph_per_distinct_row() -> None:
    eager, model, counter = lowered(TABLE, "full")
    for _ in range(2):
        for step in STEPS:
            assert same_bits(run(model, step), run(eager, step))
    assert counter.frame_count == 3


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_a_call_reads_no_signature(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a forward takes the host longer than all else that a lowered call does before its graph."""
    _, model, _ = lowered(TABLE, scope)
    expected = run(model)
    monkeypatch.setattr("inspect.signature", lambda *_: pytest.fail("a signature was read"))
    assert same_bits(run(model), expected)


def test_a_dense_block_is_compiled_without_its_routing() -> None:
    """So nothing of the routing is checked before its graph is run: another context, memory or region takes the same one."""
    _, model, counter = lowered(0.0, "regional")
    run(model)
    state = model.blocks[0].__dict__[STATE]
    state.context, state.positional = object(), ()
    run(model, 900.0)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_regions_of_equal_rows_share_a_graph() -> None:
    """More regions of one row than Dynamo recompiles one code object."""
    config = diffcr_compile.DiffCRConfig(num_regions=20)
    model = diffcr_compile.transform(original(PLAIN), config, example_inputs=tiny_inputs(PLAIN))
    diffcr_compile.set_ratios(model, [[0.2, 0.2, 0.5]] * 10 + [[0.5, 0.0, 0.2]] * 10)
    eager, counter = copy.deepcopy(model), eager_backend()
    diffcr_compile.lower(model, scope="full", backend=counter)
    for region in range(20):
        assert same_bits(run(model, 50.0 * region + 1), run(eager, 50.0 * region + 1))
    assert counter.frame_count == 2


def test_regional_makes_one_graph_per_capacity() -> None:
    """Shared by all layers: ratios 0, 0.2, 0.5 and 1 of one family, 12 blocks and regions."""
    eager, model, counter = lowered(TABLE, "regional")
    for _ in range(2):
        for step in STEPS:
            assert same_bits(run(model, step), run(eager, step))
    # at ratio one nothing is left to compile: the block returns what came in
    assert counter.frame_count in (3, 4)
    assert counter.op_count > 0


def test_blocks_that_fill_their_memory_share_a_graph() -> None:
    """The first step of a trajectory is dense, whatever the ratios."""
    config = diffcr_compile.DiffCRConfig(skip="reuse", num_regions=1)
    model = diffcr_compile.transform(original(PLAIN), config, example_inputs=tiny_inputs(PLAIN))
    diffcr_compile.set_ratios(model, [[0.2, 0.5, 0.9]])
    eager, counter = copy.deepcopy(model), eager_backend()
    diffcr_compile.lower(model, scope="regional", backend=counter)
    for graphs, step in ((1, 900.0), (4, 800.0), (4, 700.0)):
        assert same_bits(run(model, step), run(eager, step))
        assert counter.frame_count == graphs


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    """Nothing of ours keeps torch's caches from knowing a graph again: names, routers, memory, ``vmap`` (the rotary model)."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", CACHED_PROCESS, str(Path(__file__).parents[1])]
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert finished.returncode == 0, finished.stderr
        found.append(json.loads(finished.stdout.splitlines()[-1]))
    first, second = found
    assert first["graphs"] == second["graphs"] == first["saved"] > 0
    assert first["digest"] == second["digest"]
    assert second["hits"] == second["graphs"]


CACHED_PROCESS = """
import json, hashlib, sys, torch
import diffcr_compile
sys.path.append(sys.argv[1])
from models import Shape, original, tiny_inputs

shape = Shape("rotary", depth=2, heads=1, head_dim=6)
config = diffcr_compile.DiffCRConfig(skip="reuse", router="timestep", selection="score and turn", num_regions=2)
model = diffcr_compile.transform(original(shape), config, example_inputs=tiny_inputs(shape))
diffcr_compile.set_ratios(model, [[0.2, 0.5]] * 2)
diffcr_compile.lower(model, scope="regional")
with torch.no_grad():
    outputs = [model(**tiny_inputs(shape, timestep=step)) for step in (900.0, 800.0)]
counts = torch._dynamo.utils.counters["aot_autograd"]
print(json.dumps({
    "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    "saved": counts["autograd_cache_saved"],
    "hits": counts["autograd_cache_hit"],
    "digest": hashlib.sha256(torch.stack(outputs).numpy().tobytes()).hexdigest(),
}))
"""


@pytest.mark.slow
def test_many_capacities_stay_compiled() -> None:
    """More than Dynamo's limit of 8 recompilations of one code object."""
    model, counter = routed(PLAIN), eager_backend()
    diffcr_compile.lower(model, scope="regional", backend=counter)
    for thousandth in range(0, 1000, 91):
        diffcr_compile.set_ratios(model, thousandth / 1000)
        run(model)
    assert counter.frame_count == len(range(0, 1000, 91))


@pytest.mark.parametrize(
    ("options", "scope"),
    [
        ({}, "regional"),
        ({"mode": "max-autotune-no-cudagraphs"}, "regional"),
        ({"options": {"epilogue_fusion": True}}, "regional"),
        ({"mode": "reduce-overhead"}, "full"),
        ({"options": {"triton.cudagraphs": True}}, "full"),
    ],
    ids=str,
)
def test_where_cuda_graphs_are_recorded_the_whole_model_is_compiled_and_outputs_are_copies(
    options: dict[str, Any], scope: str
) -> None:
    """However they are asked for: a graph's next run writes over its last outputs."""
    importlib.import_module(
        "torch._inductor.cudagraph_trees"
    )  # torch's reset would, and fails as it then adds a backend
    state = routing_of(diffcr_compile.lower(routed(PLAIN), **options))
    assert (state.lowered.scope, state.lowered.clone_outputs) == (scope, scope == "full")


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_many_sizes_stay_compiled(scope: str) -> None:
    """More than Dynamo's limit of 8 recompilations of one code object; a size that was met before compiles nothing."""
    eager, model, counter = lowered(0.5, scope)
    for _ in range(2):
        for num_tokens in range(10, 20):
            assert same_bits(run(model, num_tokens=num_tokens), run(eager, num_tokens=num_tokens))
    assert counter.frame_count == 10


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_a_new_table_is_followed(scope: str) -> None:
    eager, model, counter = lowered(0.2, scope)
    run(model)
    graphs = counter.frame_count
    for one in (eager, model):
        diffcr_compile.set_ratios(one, 0.7)
    assert same_bits(run(model), run(eager))
    assert counter.frame_count > graphs
    for one in (eager, model):
        diffcr_compile.set_ratios(one, 0.2)
    graphs = counter.frame_count
    assert same_bits(run(model), run(eager))
    assert counter.frame_count == graphs, "the graphs of the first table are kept"


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_masters_that_a_trainer_moved_are_followed(scope: str) -> None:
    eager, model, _ = lowered(0.2, scope)
    run(model)
    for one in (eager, model):
        with diffcr_compile.learning(one) as learnable, torch.no_grad():
            learnable.ratios.fill_(0.6)
    assert same_bits(run(model), run(eager))


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_a_batch_in_several_regions(scope: str) -> None:
    eager, model, counter = lowered(TABLE, scope)
    inputs = tiny_inputs(PLAIN, timestep=torch.tensor([10.0, 900.0, 600.0]))
    with torch.no_grad():
        assert same_bits(model(**inputs), eager(**inputs))
    assert counter.frame_count >= 3


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
@pytest.mark.parametrize("scope", ["full", "regional"])
def test_the_timestep_is_read_after_the_same_hooks_as_eagerly(scope: str, first: bool) -> None:
    """A pre-hook moves the last sample to another region: seen where it runs before ours, in a model lowered whole too."""
    eager, model, counter = lowered(TABLE, scope)

    def hook(module: TinyDiT, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "timestep": kwargs["timestep"] * torch.tensor([1.0, 1.0, 30.0])}

    for one in (eager, model):
        one.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
    assert same_bits(run(model, 30.0), run(eager, 30.0))
    assert counter.frame_count > 0


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_hooks_that_no_graph_can_hold(scope: str) -> None:
    eager, model, _ = lowered(TABLE, scope)
    seen: list[float] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["x"].sum().item()), with_kwargs=True
    )
    model.register_forward_hook(lambda module, args, output: seen.append(output.sum().item()))
    assert same_bits(run(model), run(eager))
    assert len(seen) == 2


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_restore_takes_it_back(scope: str) -> None:
    _, model, _ = lowered(TABLE, scope)
    signature = inspect.signature(original(PLAIN).forward)
    assert inspect.signature(model.forward) == signature
    run(model)
    diffcr_compile.restore(model)
    assert same_snapshot(snapshot(model), snapshot(original(PLAIN)))
    assert same_bits(run(model), run(original(PLAIN)))


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_zero_ratio_keeps_the_values(scope: str) -> None:
    _, model, _ = lowered(0.0, scope)
    assert same_bits(run(model), run(original(PLAIN)))


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_trace_and_record_run_eagerly(scope: str) -> None:
    eager, model, counter = lowered(TABLE, scope)
    with diffcr_compile.trace(model) as seen, diffcr_compile.record(model) as batches:
        found = run(model)
    assert counter.frame_count == 0
    with diffcr_compile.trace(eager) as expected:
        assert same_bits(found, run(eager))
    assert all(same_bits(seen.kept[fqn], expected.kept[fqn]) for fqn in expected.kept)
    assert len(batches) == 1
    run(model)
    assert counter.frame_count > 0


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_restore_inside_trace(scope: str) -> None:
    _, model, _ = lowered(TABLE, scope)
    with diffcr_compile.trace(model):
        diffcr_compile.restore(model)
    assert same_snapshot(snapshot(model), snapshot(original(PLAIN)))
    assert same_bits(run(model), run(original(PLAIN)))


@pytest.mark.parametrize("watch", [diffcr_compile.trace, diffcr_compile.record])
@pytest.mark.parametrize("scope", ["full", "regional"])
def test_lowering_again_while_it_is_watched(scope: str, watch: Any) -> None:
    """The new lowering is in force afterwards, and it alone."""
    eager, model, before = lowered(TABLE, "regional" if scope == "full" else "full")
    counter = eager_backend()
    with watch(model):
        diffcr_compile.lower(model, scope=scope, backend=counter)  # type: ignore[arg-type]
        assert same_bits(run(model), run(eager))
    assert counter.frame_count == 0
    assert same_bits(run(model), run(eager))
    assert counter.frame_count > 0
    assert before.frame_count == 0
    diffcr_compile.restore(model)
    assert same_snapshot(snapshot(model), snapshot(original(PLAIN)))


@pytest.mark.parametrize(
    ("scope", "estimator", "skip"),
    [("full", "two-bin", "identity"), ("regional", "single-pass", "identity"), ("regional", "single-pass", "reuse")],
)
def test_calibrate_learns_by_graphs_of_the_blocks_and_stays_lowered(scope: str, estimator: str, skip: str) -> None:
    """The same table and weights as eagerly, but for rounding, by a graph for each bin and kind of gradient."""
    batches = [tiny_inputs(PLAIN, timestep=step) for step in (900.0, 700.0, 500.0)]
    config = diffcr_compile.CalibrationConfig(steps=4, ratio_learning_rate=0.1, estimator=estimator)  # type: ignore[arg-type]
    options = diffcr_compile.DiffCRConfig(skip=skip, num_regions=1)  # type: ignore[arg-type]
    counter = CompileCounterWithBackend("aot_eager")
    eager, model = (diffcr_compile.transform(original(PLAIN), options, example_inputs=batches[0]) for _ in range(2))
    diffcr_compile.lower(model, scope=scope, backend=counter)  # type: ignore[arg-type]
    for each in (eager, model):
        diffcr_compile.calibrate(each, batches, budget=0.7, config=config)
    graphs = counter.frame_count
    assert 0 < graphs <= 3 * 11
    assert torch.equal(diffcr_compile.ratios(model), diffcr_compile.ratios(eager))
    for name, tensor in model.state_dict().items():
        assert relative_error(tensor, eager.state_dict()[name]) < 1e-4
    assert relative_error(run(model), run(eager)) < 1e-4
    assert scope == "regional" or counter.frame_count > graphs


def test_lowering_again_changes_the_scope() -> None:
    eager, model, first = lowered(TABLE, "full")
    second = eager_backend()
    diffcr_compile.lower(model, scope="regional", backend=second)
    assert same_bits(run(model), run(eager))
    assert first.frame_count == 0
    assert second.frame_count > 0


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_a_copy_compiles_for_itself(scope: str) -> None:
    eager, model, counter = lowered(TABLE, scope)
    other = copy.deepcopy(model)
    diffcr_compile.set_ratios(other, 0.9)
    assert same_bits(run(model), run(eager))
    graphs = counter.frame_count
    diffcr_compile.set_ratios(eager, 0.9)
    assert same_bits(run(other), run(eager))
    assert counter.frame_count > graphs
    diffcr_compile.restore(other)
    assert same_snapshot(snapshot(other), snapshot(original(PLAIN)))
    assert same_bits(run(other), run(original(PLAIN)))


@pytest.mark.parametrize("scope", ["full", "regional"])
def test_a_compilation_of_the_users_own_is_set_aside(scope: str) -> None:
    theirs = eager_backend()
    model = original(PLAIN)
    model.compile(backend=theirs)
    mine = vars(model)["_compiled_call_impl"]
    diffcr_compile.transform(model, example_inputs=tiny_inputs(PLAIN))
    for again in (scope, scope, "regional"):
        diffcr_compile.lower(model, scope=again, backend="eager")  # type: ignore[arg-type]
        assert same_bits(run(model), run(original(PLAIN)))
    assert theirs.frame_count == 0
    diffcr_compile.restore(model)
    assert vars(model)["_compiled_call_impl"] is mine


class Wrapper:
    """What offload and cache hooks do: a forward set on the instance, around the one that was there, and taken off again."""

    def __init__(self, model: TinyDiT) -> None:
        self.model, self.inner, self.num_calls = model, model.forward, 0
        model.forward = self  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.num_calls += 1
        return self.inner(*args, **kwargs)

    def take_off(self) -> None:
        self.model.forward = self.inner  # type: ignore[method-assign]


def test_a_forward_that_was_set_after_lower() -> None:
    eager, model, counter = lowered(TABLE, "full")
    wrapper = Wrapper(model)
    for off in (False, True):
        graphs = counter.frame_count
        assert same_bits(run(model, STEPS[2 * off]), run(eager, STEPS[2 * off]))
        assert counter.frame_count > graphs
        state = model.__dict__["_diffcr"]
        state.lowered.remove(model)  # as calibrate does for a time
        graphs = counter.frame_count
        assert same_bits(run(model, 900.0), run(eager, 900.0))
        assert counter.frame_count == graphs
        state.lowered.install(model)
        if not off:
            assert model.forward is wrapper
            wrapper.take_off()
    again = Wrapper(model)
    diffcr_compile.restore(model)
    assert model.forward is again
    again.take_off()  # and ours comes back, which passes
    assert same_bits(run(model), run(original(PLAIN)))


def test_a_forward_that_was_set_before_lower_is_refused() -> None:
    eager, model, _ = lowered(TABLE, "regional")
    wrapper = Wrapper(model)
    with pytest.raises(
        diffcr_compile.LoweringError, match=r"TinyDiT has a forward set on the instance .* Call lower first"
    ):
        diffcr_compile.lower(model, scope="full", backend="eager")
    wrapper.take_off()
    counter = model.__dict__["_diffcr"].lowered.options["backend"]
    assert same_bits(run(model), run(eager))
    assert counter.frame_count > 0, "it stayed as it was"


def test_plain_torch_compile_takes_a_transformed_model_whole() -> None:
    """Where the table has equal rows, without ``lower``."""
    model = routed(PLAIN)
    diffcr_compile.set_ratios(model, [[0.2, 0.5, 0.9]] * 4)
    expected = run(model)
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        sizes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert all(same_bits(compiled(**tiny_inputs(PLAIN)), expected) for _ in range(2))
    # torch compiles a root's forward hook as a frame of its own; ours is then a graph without operators
    assert len([size for size in sizes if size]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["full", "regional"])
@pytest.mark.parametrize("shape", [PLAIN, ROTARY], ids=["plain", "rotary"])
def test_inductor_agrees_with_eager(shape: Shape, scope: str) -> None:
    model = routed(shape)
    diffcr_compile.set_ratios(model, 0.4)
    expected = run(model, shape=shape)
    diffcr_compile.lower(model, scope=scope)  # type: ignore[arg-type]
    assert relative_error(run(model, shape=shape), expected) < TOLERANCE


@pytest.mark.slow
def test_a_lowered_model_trains() -> None:
    model = routed(PLAIN)
    diffcr_compile.set_ratios(model, 0.4)
    gradients = []
    for lower in (False, True):
        if lower:
            diffcr_compile.lower(model, backend="aot_eager")
        model.zero_grad()
        model(**tiny_inputs(PLAIN)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 3
    assert all(
        relative_error(found, expected) < TOLERANCE for found, expected in zip(gradients[1], gradients[0], strict=True)
    )


class TestUnlowered:
    @pytest.mark.parametrize("scope", ["full", "regional"])
    def test_runs_eagerly_inside_and_compiled_again_after_an_error(self, scope: str) -> None:
        eager, model, counter = lowered(0.2, scope)
        with contextlib.suppress(ZeroDivisionError), unlowered(model, routing_of(model)):
            assert same_bits(run(model), run(eager))
            with unlowered(model, routing_of(model)):
                assert same_bits(run(model), run(eager))
            assert same_bits(run(model), run(eager))
            assert counter.frame_count == 0
            raise ZeroDivisionError
        assert same_bits(run(model), run(eager))
        assert counter.frame_count > 0

    @pytest.mark.parametrize("scope", ["full", "regional"])
    def test_leaves_a_model_restored_inside_alone(self, scope: str) -> None:
        _, model, counter = lowered(0.2, scope)
        with unlowered(model, routing_of(model)):
            diffcr_compile.restore(model)
        assert same_snapshot(snapshot(model), snapshot(original(PLAIN)))
        assert same_bits(run(model), run(original(PLAIN)))
        assert counter.frame_count == 0

    def test_leaves_a_model_lowered_anew_inside_so(self) -> None:
        eager, model, before = lowered(0.2, "full")
        counter = eager_backend()
        with unlowered(model, routing_of(model)):
            diffcr_compile.lower(model, scope="regional", backend=counter)
        assert same_bits(run(model), run(eager))
        assert (before.frame_count, counter.frame_count) == (0, 1)
        assert routing_of(model).lowered.scope == "regional"

    def test_calibration_inside_trace_leaves_the_trace_eager(self) -> None:
        _, model, counter = lowered(0.0, "full")
        config = diffcr_compile.CalibrationConfig(preset="training-free")
        with diffcr_compile.trace(model) as seen:
            diffcr_compile.calibrate(model, [tiny_inputs(PLAIN, timestep=500.0)], budget=0.9, config=config)
            calls = len(seen.kept["blocks.0"])
            run(model)
        assert len(seen.kept["blocks.0"]) == calls + 1
        assert counter.frame_count == 0
        run(model)
        assert counter.frame_count > 0


def test_a_filter_of_guards_is_asked_for_every_graph() -> None:
    asked: list[int] = []

    def keep_all(guards: Any) -> list[bool]:
        asked.append(len(guards))
        return [True] * len(guards)

    options = {"guard_filter_fn": keep_all}
    model = diffcr_compile.lower(routed(PLAIN), scope="regional", backend="eager", options=options)
    counts = []
    for ratio in (0.0, 0.2, 0.5):
        diffcr_compile.set_ratios(model, ratio)
        run(model)
        counts.append(len(asked))
    assert 0 < counts[0] < counts[1] < counts[2]
    assert options == {"guard_filter_fn": keep_all}


@pytest.mark.parametrize("scope", ["regional", "full"])
def test_more_layers_that_read_their_number_than_torch_compiles_anew(scope: Any) -> None:
    torch._dynamo.reset()
    shape = Shape("plain", depth=11, heads=1, head_dim=4)

    class Numbered(type(original(shape).blocks[0])):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any) -> Tensor:
            return super().forward(x, *args) + 0.01 * self.number

    model = original(shape)
    for number, block in enumerate(model.blocks):
        block.__class__, block.number = Numbered, number
    diffcr_compile.transform(model, example_inputs=tiny_inputs(shape))
    for ratio in (0.0, 0.5):
        diffcr_compile.set_ratios(model, ratio)
        eager = copy.deepcopy(model)
        diffcr_compile.lower(model, scope=scope, backend="eager")
        with torch.no_grad():
            for _ in range(2):
                assert relative_error(model(**tiny_inputs(shape)), eager(**tiny_inputs(shape))) < 1e-5


def test_a_number_that_differs_at_every_call_is_refused_by_name() -> None:
    """Of the model, where the whole is one graph; by block it is the model's own Python that makes a tensor of it."""
    torch._dynamo.reset()
    shape = Shape("plain", depth=1, heads=1, head_dim=4)

    class Stepwise(TinyDiT):
        def forward(self, x: Tensor, timestep: Any) -> Tensor:  # type: ignore[override]
            steps = timestep if isinstance(timestep, Tensor) else torch.full((len(x),), float(timestep))
            return super().forward(x=x, timestep=steps)

    inputs = {name: tiny_inputs(shape)[name] for name in ("x", "timestep")}
    model = diffcr_compile.transform(Stepwise(shape).eval(), example_inputs=inputs)
    diffcr_compile.set_ratios(model, 0.5)
    eager = copy.deepcopy(model)
    diffcr_compile.lower(model, scope="regional", backend="eager")
    with torch.no_grad():
        for step in range(0, 1000, 90):
            given = {**inputs, "timestep": float(step)}
            assert relative_error(model(**given), eager(**given)) < 1e-5
        diffcr_compile.lower(model, scope="full", backend="eager")
        with pytest.raises(
            diffcr_compile.LoweringError, match=r"'timestep' is one that differs .* Pass it as a tensor"
        ):
            model(**{**inputs, "timestep": 500.0})
        assert relative_error(model(**inputs), eager(**inputs)) < 1e-5


def test_what_changes_from_call_to_call_inside_a_block_is_named() -> None:
    torch._dynamo.reset()
    shape = Shape("plain", depth=1, heads=1, head_dim=4)

    class Counting(type(original(shape).blocks[0])):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any) -> Tensor:
            return super().forward(x, *args) + 0.01 * self.number

    model = original(shape)
    model.blocks[0].__class__, model.blocks[0].number = Counting, 0
    diffcr_compile.transform(model, example_inputs=tiny_inputs(shape))
    diffcr_compile.set_ratios(model, 0.5)
    diffcr_compile.lower(model, scope="regional", backend="eager")

    def count() -> None:
        for number in range(40):
            model.blocks[0].number = number
            model(**tiny_inputs(shape))

    with torch.no_grad(), pytest.raises(diffcr_compile.LoweringError, match=r"blocks\.0 reads something that differs"):
        count()


def test_a_number_that_a_block_is_given_anew_each_time_does_not_compile_without_end() -> None:
    torch._dynamo.reset()
    shape = Shape("plain", depth=1, heads=1, head_dim=4)

    class Weighted(type(original(shape).blocks[0])):  # type: ignore[misc]
        def forward(self, x: Tensor, cond: Tensor, weight: float) -> Tensor:
            return super().forward(x, cond * weight)

    class Model(TinyDiT):
        def forward(self, x: Tensor, timestep: Tensor, weight: float = 1.0) -> Tensor:  # type: ignore[override]
            cond = self.time(sinusoids(timestep, self.shape.width))
            return self.head(self.blocks[0](self.embed(x), cond, weight))

    model = original(shape)
    model.__class__, model.blocks[0].__class__ = Model, Weighted
    diffcr_compile.transform(model, example_inputs={**tiny_inputs(shape), "weight": 1.0})
    diffcr_compile.set_ratios(model, 0.5)
    compiled = CompileCounterWithBackend("eager")
    diffcr_compile.lower(model, scope="regional", backend=compiled)
    with torch.no_grad(), contextlib.suppress(diffcr_compile.LoweringError):
        for place in range(40):
            model(**tiny_inputs(shape), weight=1.0 + place / 100)
    assert compiled.frame_count < 20


@pytest.mark.parametrize("scope", [None, "regional", "full"])
def test_a_table_of_another_length_is_refused_alike(scope: Any) -> None:
    torch._dynamo.reset()
    shape = Shape("rotary", depth=1, heads=1, head_dim=8)
    model = routed(shape)
    diffcr_compile.set_ratios(model, 0.5)
    if scope is not None:
        diffcr_compile.lower(model, scope=scope, backend="eager")
    inputs = tiny_inputs(shape)
    inputs["rope"] = tuple(table[:1] for table in inputs["rope"])
    with torch.no_grad(), pytest.raises(diffcr_compile.UnsupportedError, match="rope"):
        model(**inputs)
