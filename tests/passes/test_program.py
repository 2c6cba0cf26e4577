"""The program that is written for a plan: its nodes, its golden text, and its numbers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from diffcr_compile.passes.blocks import BLOCK_PASSES
from diffcr_compile.passes.program import write_program
from hand import D, Hand, N, analyse, block_of, draw
from models import Shape, original, routed, tiny_inputs
from torch import Tensor

import diffcr_compile
from diffcr_compile import DiffCRConfig
from diffcr_compile.plan import BlockPlan

GOLDEN = {
    "plain": Shape("plain", depth=2, heads=2, head_dim=8, masked=True),
    "rotary": Shape("rotary", depth=2, heads=2, head_dim=8),
    "joint": Shape("joint", depth=2, heads=2, head_dim=8),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    """What ``explain`` prints for one small model of each kind; the proof's error varies with the machine."""
    model = original(GOLDEN[name])
    text = str(diffcr_compile.explain(diffcr_compile.transform(model, example_inputs=tiny_inputs(GOLDEN[name]))))
    golden(name, re.sub(r"proof error: \S+", "proof error: *", text) + "\n")


def plain(self: Hand, x: Tensor, temb: Tensor) -> Tensor:
    return x + self.attend(x + temb.unsqueeze(1))


@pytest.fixture(scope="module")
def plan() -> BlockPlan:
    found = analyse(block_of(plain), {"x": draw(), "temb": draw(2, D, seed=1)}, BLOCK_PASSES).plan
    assert found is not None
    return found


def test_the_nodes(plan: BlockPlan) -> None:
    graph = write_program(plan, DiffCRConfig()).graph.graph
    graph.lint()
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == ["block", "router", "k", "x", "temb"]
    calls = [node.target.__name__ for node in graph.nodes if node.op == "call_function"]
    assert calls == [
        "score_tokens",
        "select_tokens",
        "take_tokens",
        "call_block",
        "getitem",
        "take_scores",
        "gate_exact",
        "put_tokens",
    ]


def test_the_gate_is_the_configured_one(plan: BlockPlan) -> None:
    assert "gate_sigmoid(" in write_program(plan, DiffCRConfig(gate="sigmoid")).graph.code


def test_writing_twice_gives_the_same_text(plan: BlockPlan) -> None:
    assert write_program(plan, DiffCRConfig()).graph.code == write_program(plan, DiffCRConfig()).graph.code


@pytest.mark.parametrize("k", [1, 3, N - 1])
def test_the_numbers(plan: BlockPlan, k: int) -> None:
    block, x, temb, router = block_of(plain), draw(seed=2), draw(2, D, seed=3), draw(D, seed=4)
    with torch.no_grad():
        found, _ = write_program(plan, DiffCRConfig())(block, router, k, [x, temb])
        for sample in range(2):
            kept = sorted((x[sample] @ router).topk(k).indices.tolist())
            expected = x[sample].clone()
            expected[kept] = block(x[sample : sample + 1, kept], temb[sample : sample + 1])[0]
            assert torch.allclose(found[sample], expected, atol=1e-6)  # float32, another batch size


def test_skipping_returns_what_came_in(plan: BlockPlan) -> None:
    """In a tensor of its own: the caller may write into it."""
    x = draw()
    skipped = write_program(plan, DiffCRConfig()).skip([x, draw(2, D)])
    assert torch.equal(skipped, x)
    assert skipped.data_ptr() != x.data_ptr()


def test_a_routed_model_shares_one_program_per_family() -> None:
    model = routed(Shape("plain", depth=3, heads=1, head_dim=6))
    programs = {id(program) for block in model.blocks for program in block.__dict__["_diffcr"].programs.values()}
    assert len(programs) == 1
