"""Torch's own encoder layers with padding: routed where their result is defined, else refused with the cause.

In evaluation they run fused, and then a sample whose kept tokens are all padding comes out as NaN; a stack of them makes nested
tensors of padded samples. Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import relative_error, run_routed, same_bits
from torch import Tensor, nn

import diffcr_compile

pytestmark = [
    pytest.mark.filterwarnings("ignore:the routers are untrained"),
    pytest.mark.filterwarnings("ignore:.*nested_tensor"),
    pytest.mark.filterwarnings("ignore:.*nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

BATCH, TOKENS, WIDTH = 3, 12, 16
TOLERANCE = 1e-4
"""Of the largest value, in float32: rounding stays below 1e-5."""


class Layers(nn.Module):
    """forward(x (B, N, D), timestep (B,), padding bool (B, N), true where there is no token) -> (B, N, D)."""

    def __init__(self, *, norm_first: bool = True, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.layers = nn.ModuleList(layer(norm_first, batch_first) for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor, padding: Tensor | None = None) -> Tensor:
        x = x * timestep.cos()[:, None, None]
        x = x if self.batch_first else x.transpose(0, 1)
        for module in self.layers:
            x = module(x, src_key_padding_mask=padding)
        return x if self.batch_first else x.transpose(0, 1)


class Stack(nn.Module):
    """The same through torch's stack of layers, which may nest."""

    def __init__(self, *, norm_first: bool = False, nested: bool = True) -> None:
        super().__init__()
        self.stack = nn.TransformerEncoder(layer(norm_first, True), 3, enable_nested_tensor=nested)

    def forward(self, x: Tensor, timestep: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.stack(x * timestep.cos()[:, None, None], src_key_padding_mask=padding)


def layer(norm_first: bool, batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=batch_first, norm_first=norm_first)


def build(kind: Any, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return kind(**options).eval()


def inputs(*, padded: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    padding = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [TOKENS - 3], [2]])
    given = {"x": torch.randn(BATCH, TOKENS, WIDTH, generator=generator), "timestep": torch.full((BATCH,), 500.0)}
    return {**given, "padding": padding} if padded else given


@pytest.fixture
def unfused() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def check(model: nn.Module, given: dict[str, Any]) -> None:
    """Every layer against itself on each sample's kept tokens alone; one sample keeps more tokens than it has."""
    calls = run_routed(model, given)
    assert len(calls) == 3
    for call in calls:
        module = model.get_submodule(call.fqn)
        batch_axis = 0 if module.self_attn.batch_first else 1
        x, output = (value.transpose(0, batch_axis) for value in (call.args[0], call.output))
        padding = call.kwargs["src_key_padding_mask"]
        for sample, kept in enumerate(call.kept.tolist()):
            alone = x[sample : sample + 1, kept].transpose(0, batch_axis)
            with torch.no_grad():
                expected = type(module).forward(module, alone, src_key_padding_mask=padding[sample : sample + 1, kept])
            assert relative_error(output[sample, kept], expected.transpose(0, batch_axis)[0]) < TOLERANCE
            skipped = [token for token in range(TOKENS) if token not in kept]
            assert torch.equal(output[sample, skipped], x[sample, skipped])
    assert bool(torch.isfinite(calls[-1].output).all())


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: build(Layers), id="layers"),
        pytest.param(lambda: build(Layers, norm_first=False), id="normed last"),
        pytest.param(lambda: build(Stack, nested=False, norm_first=True), id="stack"),
        pytest.param(lambda: build(Stack), id="stack that would nest"),
    ],
)
def test_unfused_layers_take_padding(model: Any) -> None:
    routed = diffcr_compile.transform(model(), example_inputs=inputs())
    diffcr_compile.set_ratios(routed, 0.5)
    check(routed, inputs())


def test_layers_that_are_never_fused_take_padding_later() -> None:
    model = diffcr_compile.transform(build(Layers, batch_first=False), example_inputs=inputs(padded=False))
    diffcr_compile.set_ratios(model, 0.5)
    check(model, inputs())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: build(Layers), r"nothing to attend to makes NaN .*\.set_fastpath_enabled\(False\) before transform"),
        (
            lambda: build(Stack, nested=False),
            r"any mask of numbers .* torch.backends.mha.set_fastpath_enabled\(False\)",
        ),
        (lambda: build(Stack), "called with nested tensors, .* unless it is built with enable_nested_tensor=False"),
    ],
    ids=["layers", "stack", "nesting stack"],
)
@torch.no_grad()
def test_what_would_come_out_undefined_is_refused_with_the_cause(model: Any, reason: str) -> None:
    dense = model()
    with pytest.raises(diffcr_compile.BlockNotFoundError, match=reason):
        diffcr_compile.transform(dense, example_inputs=inputs())
    assert same_bits(dense(**inputs()), model()(**inputs()))


@pytest.mark.parametrize(
    ("model", "reason"), [(lambda: build(Layers), "makes NaN"), (lambda: build(Stack), "called with nested tensors")]
)
@torch.no_grad()
def test_padding_given_only_later_is_refused_with_the_cause(model: Any, reason: str) -> None:
    """What is skipped nowhere goes on as before."""
    routed = diffcr_compile.transform(model(), example_inputs=inputs(padded=False))
    assert same_bits(routed(**inputs()), model()(**inputs()))
    diffcr_compile.set_ratios(routed, 0.5)
    with pytest.raises(diffcr_compile.UnsupportedError, match=reason):
        routed(**inputs())
    routed(**inputs(padded=False))
