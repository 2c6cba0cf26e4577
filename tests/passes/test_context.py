"""The graph rewritten for full context: what it is made of, and when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffcr_compile.passes.block import BlockAnalysis
from diffcr_compile.passes.blocks import BLOCK_PASSES
from diffcr_compile.passes.context import prove_context
from diffcr_compile.passes.program import write_program
from hand import D, Hand, N, T, analyse, block_of, draw
from models import relative_error, routed_fqns, watch_blocks
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import DiffCRConfig
from diffcr_compile.memory import allocate, remember_all_context
from diffcr_compile.primitives import take_tokens

OPTIONS = {"all": DiffCRConfig(context="all"), "stale": DiffCRConfig(skip="reuse", context="stale", selection="score")}


def finish(block: Any, context: str = "all", /, **arguments: Any) -> BlockAnalysis:
    """Analysed for context from every token."""
    passes = [step for step in BLOCK_PASSES if step is not prove_context]

    def ask_for_all(state: BlockAnalysis) -> BlockAnalysis:
        return replace(state, config=OPTIONS[context])

    return analyse(block, arguments, [*passes, ask_for_all, prove_context])


def plain(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x)


def written_out(self: Hand, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    return x + self.join((q @ k.transpose(-1, -2) / D**0.5).softmax(-1) @ v)


def linear(self: Hand, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    return x + self.join(q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v))


def joint(self: Hand, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    out = self.attend(torch.cat([text, x], dim=1))
    return x + out[:, text.shape[1] :], text + out[:, : text.shape[1]]


def masked(self: Hand, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    return x + self.join(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]))


def in_place(self: Hand, x: Tensor) -> Tensor:
    y = self.attend(x)
    y += x
    return y


MASK = torch.rand(2, N, N, generator=torch.Generator().manual_seed(1)) < 0.8
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (plain, {"x": draw()}),
    "softmax written out": (written_out, {"x": draw()}),
    "linear attention": (linear, {"x": draw()}),
    "joint": (joint, {"x": draw(), "text": draw(2, T, D)}),
    "masked": (masked, {"x": draw(), "mask": MASK | torch.eye(N, dtype=torch.bool)}),
    "in place": (in_place, {"x": draw()}),
}


@pytest.mark.parametrize("context", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_the_form_is_rewritten_and_proved(name: str, context: str) -> None:
    """The proof is at batch 3 with other tokens for each sample, to a relative error far below its limit."""
    forward, arguments = CASES[name]
    block = finish(block_of(forward), context, **arguments)
    assert block.plan is not None
    assert (block.plan.context, block.plan.context_note) == (context, "")
    assert block.plan.error < 1e-5
    # keys and values; a product over all tokens has none of each token's own
    assert len(block.plan.states) == (2 if context == "stale" and name != "linear attention" else 0)


@pytest.mark.parametrize(("name", "width"), [("plain", D // 2), ("softmax written out", D), ("joint", D // 2)])
def test_stale_keys_and_values_are_those_of_the_step_in_which_a_token_was_last_kept(name: str, width: int) -> None:
    """Against attention written out by hand, over three steps with other tokens kept in each."""
    forward, arguments = CASES[name]
    module = block_of(forward)
    block = finish(module, "stale", **arguments)
    plan = block.plan
    assert plan is not None
    assert block.context_graph is not None
    program = write_program(plan, OPTIONS["stale"])
    module = block.module
    weight = draw(D)
    generator = torch.Generator().manual_seed(0)
    steps = [[torch.randn(value.shape, generator=generator) for value in arguments.values()] for _ in range(3)]
    memory = allocate(plan, steps[0], OPTIONS["stale"], torch.zeros(1))
    with torch.no_grad():
        remember_all_context(memory, block.context_graph.run_dense(module, steps[0])[len(plan.outputs) :])
        latest = seen(module, steps[0])
        for values in steps[1:]:
            output, kept = program(block.context_graph.bind(module), weight, N // 2, values, memory)
            now, length = seen(module, values), 0 if len(values) == 1 else values[1].shape[1]
            for sample, positions in enumerate(kept.tolist()):
                rows = [*range(length), *(length + position for position in positions)]
                for held, fresh in zip(latest[1:], now[1:], strict=True):
                    held[sample, :, rows] = fresh[sample, :, rows]
                q, k, v = now[0][sample : sample + 1], latest[1][sample : sample + 1], latest[2][sample : sample + 1]
                attended = module.join((q @ k.transpose(-1, -2) / width**0.5).softmax(-1) @ v)
                stream = output if isinstance(output, Tensor) else output[0]
                expected = values[0][sample, positions] + attended[0, [length + position for position in positions]]
                torch.testing.assert_close(stream[sample, positions], expected, rtol=1e-4, atol=1e-4)


def seen(module: Any, values: list[Tensor]) -> list[Tensor]:
    """Queries, keys and values of all tokens."""
    return [part.clone() for part in module.heads(torch.cat(values[::-1], dim=1))]


def test_only_what_keys_and_values_need_is_computed_for_all() -> None:
    """Plain attention: one projection on all tokens, queries taken from it, the output projection on the kept ones."""
    block = finish(block_of(plain), x=draw())
    assert block.context_graph is not None
    names = [getattr(node.target, "__name__", str(node.target)) for node in block.context_graph.graph.graph.nodes]
    assert sum("linear" in name for name in names) == 2
    assert names.count("take_tokens") == 1
    assert block.context_graph.attributes == ("qkv.weight", "qkv.bias", "out.weight", "out.bias")


def test_with_stale_context_nothing_is_computed_for_all() -> None:
    block = finish(block_of(plain), "stale", x=draw())
    assert block.context_graph is not None
    names = [getattr(node.target, "__name__", str(node.target)) for node in block.context_graph.graph.graph.nodes]
    assert "take_tokens" not in names
    assert names.count("put_tokens") == 2
    (x,) = (node for node in block.context_graph.graph.graph.nodes if node.name == "x")
    assert all(user.target == "size" for user in x.users)


def test_kept_context_asks_for_nothing() -> None:
    block = analyse(block_of(plain), {"x": draw()}, BLOCK_PASSES)
    assert block.context_graph is None
    assert block.plan is not None
    assert block.plan.context == "kept"


def einsum(self: Hand, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
    return x + self.join(torch.einsum("bhnm,bhmd->bhnd", weights, v))


@pytest.mark.parametrize("context", OPTIONS)
def test_what_does_not_allow_it_says_why_and_keeps_kept_context(context: str) -> None:
    """Products written as einsum are not told apart into queries and keys."""
    block = finish(block_of(einsum), context, x=draw())
    assert block.plan is not None
    assert block.plan.context == "kept"
    assert block.plan.context_note.startswith("keys and values from kept tokens only: ")
    assert block.context_graph is None


class Casts(nn.Module):
    """A block that computes its rotation in float32 and casts back, as many of diffusers do."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = ((part.float() * 2).to(v.dtype) for part in (q, k))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(attended.to(q.dtype))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Casts() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + (timestep[:, None] * 0.01).cos()[..., None].to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("context", ["all", "stale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_of_any_dtype_is_proved_in_float32(dtype: torch.dtype, context: Any) -> None:
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = {"x": x, "timestep": torch.tensor([900.0, 900.0])}
    options = DiffCRConfig(skip="reuse", context=context, timestep_argument="timestep", timestep_range=(0, 1000))
    torch.manual_seed(0)
    model = diffcr_compile.transform(Stack().to(dtype), options, example_inputs=inputs)
    (family,) = diffcr_compile.explain(model).plan.families
    assert (family.context, family.context_note) == (context, "")
    diffcr_compile.set_ratios(model, 0.5)
    for timestep in (900.0, 600.0, 300.0):
        with torch.no_grad(), watch_blocks(model, routed_fqns(model)) as calls, diffcr_compile.trace(model) as seen:
            assert model(x, torch.full((2,), timestep)).dtype == dtype
        for call in calls if context == "all" else ():
            block, kept = model.get_submodule(call.fqn), seen.kept[call.fqn][0]
            dense = Casts.forward(block, *call.args, **call.kwargs)  # type: ignore[arg-type]
            found, expected = (take_tokens(tokens, kept, 1, 0) for tokens in (call.output, dense))
            assert relative_error(found, expected) < 4 * torch.finfo(dtype).eps
