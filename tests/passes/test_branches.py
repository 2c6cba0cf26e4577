"""Branches that their caller adds: the skip value is zero, so that a skipped token stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand import D, Hand, draw
from models import run_routed, same_bits, sinusoids
from torch import Tensor, nn

import diffcr_compile

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

B, N = 3, 11


class Attention(Hand):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class Layer(nn.Module):
    """Joins its attention to the tokens somehow, and mixes neighbours itself, so that it can't be routed whole."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join, self.attention = join, Attention()
        self.mix = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(x, self.attention(x))
        return x + 0.1 * self.mix(x.transpose(1, 2)).transpose(1, 2)


def add(x: Tensor, out: Tensor) -> Tensor:
    return x + out


def add_gated(x: Tensor, out: Tensor) -> Tensor:
    return x + 0.5 * out.clone()


def add_in_double(x: Tensor, out: Tensor) -> Tensor:
    return (x.double() + out.double() * 0.5).type_as(x)


def norm(x: Tensor, out: Tensor) -> Tensor:
    return x + out.softmax(-1)


def replace(x: Tensor, out: Tensor) -> Tensor:
    return out


def use_twice(x: Tensor, out: Tensor) -> Tensor:
    return x + out * out.sum()


class Trunk(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(join) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + sinusoids(t, D).unsqueeze(1)
        for layer in self.layers:
            x = layer(x)
        return x


def inputs() -> dict[str, Any]:
    return {"x": draw(B, N, D), "t": torch.tensor([1.0, 400.0, 900.0])}


@pytest.fixture(scope="module", params=[add, add_gated, add_in_double])
def pair(request: pytest.FixtureRequest) -> tuple[Trunk, nn.Module]:
    plain = Trunk(request.param).eval()
    return plain, diffcr_compile.transform(copy.deepcopy(plain), example_inputs=inputs())


def test_the_branches_are_routed(pair: tuple[Trunk, nn.Module]) -> None:
    plain, model = pair
    text = str(diffcr_compile.explain(model))
    assert "Attention x 2: layers.0.attention ... layers.1.attention" in text
    diffcr_compile.set_ratios(model, 0.0)
    assert same_bits(model(**inputs()), plain(**inputs()))


def test_skipped_tokens_take_nothing_from_the_branch(pair: tuple[Trunk, nn.Module]) -> None:
    plain, model = pair
    diffcr_compile.set_ratios(model, 0.5)
    calls = run_routed(model, inputs())
    assert len(calls) == 2
    for call in calls:
        (x,), branch = call.args, plain.get_submodule(call.fqn)
        assert len({tuple(row) for row in call.kept.tolist()}) > 1
        for sample in range(B):
            kept = call.kept[sample].tolist()
            skipped = [token for token in range(N) if token not in kept]
            assert not call.output[sample, skipped].any()
            with torch.no_grad():
                alone = branch(x[sample : sample + 1, kept])[0]
            assert torch.allclose(call.output[sample, kept], alone, atol=1e-6)  # float32, another batch size


def test_at_ratio_one_the_branch_is_zero(pair: tuple[Trunk, nn.Module]) -> None:
    _, model = pair
    diffcr_compile.set_ratios(model, 1.0)
    assert all(not call.output.any() for call in run_routed(model, inputs()))


@pytest.mark.parametrize("join", [norm, replace, use_twice])
def test_what_is_not_just_added_is_refused(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(diffcr_compile.BlockNotFoundError, match="Attention"):
        diffcr_compile.transform(Trunk(join).eval(), example_inputs=inputs())


def test_a_branch_that_another_module_holds_too_stays_dense() -> None:
    """The other may do something else with its output than add it."""
    model = Trunk(add).eval()
    model.layers[1].attention, model.layers[1].join = model.layers[0].attention, replace
    with pytest.raises(diffcr_compile.BlockNotFoundError, match="Attention"):
        diffcr_compile.transform(model, example_inputs=inputs())
