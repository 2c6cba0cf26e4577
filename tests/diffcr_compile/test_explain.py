"""``explain``: data that prints well."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, original, tiny_inputs
from torch import Tensor, nn

import diffcr_compile

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("rotary", depth=2, heads=1, head_dim=6)


@pytest.fixture
def model() -> TinyDiT:
    return diffcr_compile.transform(original(SHAPE), example_inputs=tiny_inputs(SHAPE))  # type: ignore[return-value]


def test_it_is_data(model: TinyDiT) -> None:
    diffcr_compile.set_ratios(model, 0.25)
    explanation = diffcr_compile.explain(model)
    assert explanation.model == "TinyDiT"
    assert not explanation.trained
    assert torch.equal(explanation.table, torch.full((4, 2), 0.25))
    (family,) = explanation.families
    assert family.blocks == ("blocks.0", "blocks.1")
    assert family.flops_share == explanation.routable_share
    assert family.program.startswith("def forward(self, block, router, k, x, cond, rope_0, rope_1):")


def test_it_prints_what_follows_the_tokens(model: TinyDiT) -> None:
    text = str(diffcr_compile.explain(model))
    for line in (
        "TinyDiT: 2 routed blocks in 1 families",
        "routers untrained",
        "timestep input 'timestep', 0..1000; ratio table (4, 2), mean 0.000",
        "Block x 2: blocks.0 ... blocks.1",
        "tokens: x[B, N, 6]",
        "cond[B, 6]: as it is",
        "rope_0[N, 6]: follows the tokens",
        "output 0[B, N, 6]: joined to x, skipped tokens keep their input",
        "take_shared_tokens(rope_0, kept, 0)",
        "called: vmap",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        ({}, "routers untrained"),
        ({"skip": "reuse"}, "tokens are kept in turn, no router is asked"),
        ({"skip": "reuse", "selection": "score"}, "routers untrained"),
        ({"router": "timestep"}, "routers untrained, one vector for each timestep region"),
    ],
    ids=str,
)
def test_it_says_who_chooses_and_what_skipped_tokens_get(options: dict[str, Any], choice: str) -> None:
    config = diffcr_compile.DiffCRConfig(**options)
    text = str(
        diffcr_compile.explain(diffcr_compile.transform(original(SHAPE), config, example_inputs=tiny_inputs(SHAPE)))
    )
    assert text.splitlines()[0].endswith(f" GFLOPs; {choice}")
    added = " plus what their last updates foretell" * (config.skip == "reuse")
    assert f"output 0[B, N, 6]: joined to x, skipped tokens keep their input{added}\n" in text


def test_skipped_tokens_of_a_branch_get_zeros() -> None:
    model = diffcr_compile.transform(Branches(), example_inputs={"x": torch.ones(3, 11, 6)})
    assert "output 0[B, N, 6]: made anew, skipped tokens get zeros\n" in str(diffcr_compile.explain(model))


class Attention(nn.Module):
    """No residual of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)


class Branches(nn.Module):
    """Its blocks' residual is added by their caller."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_copy_explains_itself_alike(model: TinyDiT) -> None:
    assert str(diffcr_compile.explain(copy.deepcopy(model))) == str(diffcr_compile.explain(model))
