"""Blocks whose code goes by the sizes of their inputs: a graph rewritten from one holds for the sizes that it was exported for.

The oracle is the dense block: with context from every token, a kept token comes out as from it. Axes: B batch, N tokens, T other
tokens, D width.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffcr_compile.passes.context import Trial
from models import BlockCall, relative_error, run_routed
from torch import Tensor, nn
from torch.nn import functional as F

import diffcr_compile
from diffcr_compile import DiffCRConfig, routed
from diffcr_compile.guards import Guards
from diffcr_compile.routed import STATE

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

BATCH, TOKENS, WIDTH, HEADS, LIMIT = 3, 36, 16, 2, 25
TOLERANCE = 1e-4
"""Of the largest value, in float32: rounding stays below 1e-5, the other branch is above 1e-2."""

ALL = DiffCRConfig(context="all")
STALE = DiffCRConfig(skip="reuse", context="stale", selection="score")
CONFIGS = {"kept": DiffCRConfig(), "all": ALL, "stale": STALE}


class Block(nn.Module):
    """Joint attention over (T + N); beyond ``LIMIT`` other tokens, and for a single one, it does something else with them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.other = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        given, length = self.change(text), text.shape[1]
        tokens = torch.cat([given, x], dim=1)
        if table is not None:
            tokens = tokens * table
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1))
        out = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + out[:, length:], text + out[:, :length]

    def change(self, text: Tensor) -> Tensor:
        if text.shape[1] > LIMIT:
            return self.other(text)
        return text if text.shape[1] > 1 else -2 * text


class Counting(Block):
    """A different thing at each length."""

    def change(self, text: Tensor) -> Tensor:
        return text + sum(1.0 for _ in range(text.shape[1]))


class Denoiser(nn.Module):
    """forward(x (B, N, D), text (B, T, D), timestep (B,)) -> (B, N, D). shared: with a table (T + N, D) without batch axis."""

    def __init__(self, kind: type[nn.Module] = Block, *, shared: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.blocks = nn.ModuleList(kind() for _ in range(2))
        self.shared = shared

    def forward(self, x: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep.view(-1, 1, 1).float() / 1000 * torch.exp(-torch.arange(WIDTH // 2))
        x = x + torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype)
        length = text.shape[1] + x.shape[1]
        table = torch.linspace(1, 2, length).unsqueeze(1).expand(length, WIDTH) if self.shared else None
        for block in self.blocks:
            x, text = block(x, text, table)
        return x


def inputs(length: int, batch: int = BATCH, step: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 * step + length)
    x, text = (torch.randn(batch, size, WIDTH, generator=generator) for size in (TOKENS, length))
    return {"x": x, "text": text, "timestep": torch.full((batch,), 900.0 - 100 * step)}


def build(config: DiffCRConfig, length: int, kind: type[nn.Module] = Block, *, shared: bool = False) -> nn.Module:
    """Transformed with so many other tokens, at a ratio of one half."""
    model = Denoiser(kind, shared=shared).eval()
    diffcr_compile.transform(model, config_with_timestep(config), example_inputs=inputs(length))
    (plan,) = diffcr_compile.explain(model).plan.families
    assert (plan.context, plan.context_note) == (config.context, "")
    diffcr_compile.set_ratios(model, 0.5)
    return model


def config_with_timestep(config: DiffCRConfig) -> DiffCRConfig:
    return DiffCRConfig.from_dict(
        {**config.to_dict(), "timestep_argument": "timestep", "timestep_range": [0.0, 1000.0]}
    )


def worst_error(model: nn.Module, calls: list[BlockCall]) -> float:
    """Of the kept tokens and of the text, against the dense block on all tokens."""
    worst = 0.0
    for call in calls:
        block = model.get_submodule(call.fqn)
        with torch.no_grad():
            expected = type(block).forward(block, *call.args, **call.kwargs)
        rows = call.kept.unsqueeze(-1).expand(-1, -1, WIDTH)
        worst = max(worst, relative_error(call.output[0].gather(1, rows), expected[0].gather(1, rows)))
        worst = max(worst, relative_error(call.output[1], expected[1]))
    return worst


def num_graphs(model: nn.Module) -> list[int]:
    return [len(graphs) for block in model.__dict__[STATE].blocks for graphs in block.contexts.values()]


@pytest.mark.parametrize("shared", [False, True], ids=["direct", "vmap"])
@pytest.mark.parametrize("first", [20, 30])
def test_with_all_context_a_kept_token_is_the_dense_blocks_at_every_size(first: int, shared: bool) -> None:
    model = build(ALL, first, shared=shared)
    for length in (20, 30, 24, 31, 1, 20, 25, 26, 1):
        assert worst_error(model, run_routed(model, inputs(length))) < TOLERANCE
    assert num_graphs(model) == [3, 3]


def test_what_differs_is_seen() -> None:
    """The graph of fewer tokens is far from the block at more: what is tested here could fail."""
    model = build(ALL, 20)
    for block in model.__dict__[STATE].blocks:
        for program in block.programs.values():
            for key, (graph,) in program.contexts.items():
                object.__setattr__(graph, "guards", Guards())
                program.contexts[key] = (graph,)
    assert worst_error(model, run_routed(model, inputs(30))) > 1e-2


@pytest.mark.parametrize("first", [20, 30])
def test_stale_context_is_that_of_a_model_analysed_at_those_sizes(first: int) -> None:
    model = build(STALE, first)
    for length in (20, 30, 1):
        diffcr_compile.reset(model)
        other = copy.deepcopy(build(STALE, max(length, 2)))
        for step in range(4):
            with torch.no_grad():
                expected = other(**inputs(length, step=step))
                assert relative_error(model(**inputs(length, step=step)), expected) < TOLERANCE
    assert num_graphs(model) == [3, 3]


@pytest.mark.parametrize("batch", [1, BATCH])
def test_kept_context_runs_the_block_itself(batch: int) -> None:
    model = build(CONFIGS["kept"], 20)
    for length in (20, 30, 1):
        for call in run_routed(model, inputs(length, batch)):
            block = model.get_submodule(call.fqn)
            for sample, kept in enumerate(call.kept.tolist()):
                x, text, *others = (value[sample : sample + 1] for value in call.args if value is not None)
                with torch.no_grad():
                    expected = type(block).forward(block, x[:, kept], text, *others)
                assert relative_error(call.output[0][sample, kept], expected[0][0]) < TOLERANCE


@pytest.mark.parametrize("scope", ["regional", "full"])
@pytest.mark.parametrize("name", ["all", "stale"])
def test_lowered_it_is_the_eager_model_at_every_size(name: str, scope: Any) -> None:
    model = build(CONFIGS[name], 20)
    eager = copy.deepcopy(model)
    diffcr_compile.lower(model, scope=scope, backend="aot_eager")
    for step, length in enumerate((20, 30, 20, 30, 1)):
        with torch.no_grad():
            given = inputs(length, step=step)
            assert relative_error(model(**given), eager(**given)) < TOLERANCE
    assert num_graphs(eager) == num_graphs(model) == [3, 3]


@pytest.mark.parametrize("scope", ["regional", "full"])
def test_lowered_nothing_is_traced_again_at_sizes_that_were_met(scope: Any) -> None:
    model = diffcr_compile.lower(build(ALL, 20), scope=scope, backend="eager")
    with torch.no_grad():
        for length in (20, 30, 20, 30):
            model(**inputs(length))
        torch._dynamo.utils.counters.clear()
        for length in (20, 30, 20, 30):
            model(**inputs(length))
    assert not torch._dynamo.utils.counters["frames"]


def test_a_graph_of_ones_own_says_what_to_do() -> None:
    model = build(ALL, 20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(**inputs(20))
        with pytest.raises(Exception, match=r"with such sizes and arguments since .* Run it so before it is compiled"):
            compiled(**inputs(30))
        expected = model(**inputs(30))
        assert relative_error(compiled(**inputs(30)), expected) < TOLERANCE


def test_a_length_that_is_counted_to_is_not_followed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "MOST_GRAPHS", 3)
    model = build(ALL, 20, Counting)
    for length in (21, 22):
        assert worst_error(model, run_routed(model, inputs(length))) < TOLERANCE
    with pytest.raises(
        diffcr_compile.UnsupportedError, match=r"blocks\.0 does something else at other sizes .*text\.shape\[1\] == 20"
    ):
        model(**inputs(40))
    assert worst_error(model, run_routed(model, inputs(22))) < TOLERANCE


def test_a_graph_that_is_not_proved_at_those_sizes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(ALL, 20)
    monkeypatch.setattr(Trial, "check_context", lambda *_: 1 / 0)
    with pytest.raises(
        diffcr_compile.UnsupportedError, match=r"blocks\.0 is called with sizes .*text\.shape\[1\] <= 25 does not hold"
    ):
        model(**inputs(30))
    assert worst_error(model, run_routed(model, inputs(22))) < TOLERANCE


def test_loaded_for_a_single_sample_it_serves_more(tmp_path: Any) -> None:
    diffcr_compile.save(build(ALL, 20), tmp_path / "routing")
    model = diffcr_compile.load(Denoiser().eval(), tmp_path / "routing")
    for batch in (1, BATCH, 1):
        assert worst_error(model, run_routed(model, inputs(20, batch))) < TOLERANCE
    assert num_graphs(model) == [1, 1]


def test_in_another_dtype_graphs_for_other_sizes_are_proved_too() -> None:
    model = build(ALL, 20).bfloat16()
    for length in (20, 30):
        given = {name: value.bfloat16() for name, value in inputs(length).items()}
        assert worst_error(model, run_routed(model, given)) < 5e-2
    assert num_graphs(model) == [2, 2]


def test_a_loaded_plan_is_proved_at_the_first_forward(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    diffcr_compile.save(build(ALL, 20), tmp_path / "routing")
    model = diffcr_compile.load(Denoiser().eval(), tmp_path / "routing")
    monkeypatch.setattr(Trial, "check_context", lambda *_: 1 / 0)
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"blocks\.0 has changed since it was analysed"):
        model(**inputs(20))


def test_guards_in_words() -> None:
    guards = Guards(("x", "text"), ("tensors[0].size()[1] == tensors[1].size()[1]", "tensors[1].size()[1] <= 25"))
    short, long = torch.zeros(2, 20), torch.zeros(2, 30)
    assert guards.hold([short, short])
    assert guards.broken([short, short]) == ""
    assert guards.broken([short, long]) == "x.shape[1] == text.shape[1]"
    assert guards.broken([long, long]) == "text.shape[1] <= 25"
    assert Guards().hold([short])
