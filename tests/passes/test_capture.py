"""Capture: what every module was called with, without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffcr_compile.passes.analysis import ModelAnalysis, TensorInfo
from diffcr_compile.passes.capture import capture_calls
from models import Shape, original, reference_flops, same_snapshot, snapshot, tiny_inputs
from torch import Tensor, nn

from diffcr_compile import CaptureError, DiffCRConfig
from diffcr_compile.arguments import iterate_leaves

SHAPE = Shape("joint", depth=2, heads=1, head_dim=6)


def capture(model: nn.Module, inputs: dict[str, Any]) -> ModelAnalysis:
    return capture_calls(ModelAnalysis(model, DiffCRConfig(), inputs, lambda module, fqn: True))


def test_every_call_is_described() -> None:
    model, inputs = original(SHAPE), tiny_inputs(SHAPE)
    before = snapshot(model)
    analysis = capture(model, inputs)
    assert same_snapshot(snapshot(model), before)
    (call,) = analysis.calls["blocks.0"]
    assert list(call.arguments) == ["x", "text", "cond", "rope", "mask"]
    assert call.arguments["x"] == TensorInfo((3, 11, 6), torch.float32)
    assert call.arguments["rope"] == (TensorInfo((15, 6), torch.float32),) * 2
    assert call.arguments["mask"] is None
    assert call.output == (TensorInfo((3, 11, 6), torch.float32), TensorInfo((3, 4, 6), torch.float32))
    assert analysis.calls["blocks.0"][0].in_order < analysis.calls["blocks.1"][0].in_order
    assert analysis.calls["blocks.0"][0].attends
    assert 0 < analysis.calls["blocks.0"][0].num_operators < analysis.calls[""][0].num_operators


def test_flops_are_torchs() -> None:
    model, inputs = original(SHAPE), tiny_inputs(SHAPE)
    analysis = capture(model, inputs)
    assert analysis.module_flops[""] == reference_flops(lambda: model(**inputs))
    assert 2 * analysis.module_flops["blocks.0"] < analysis.module_flops[""]


def test_batch_axes_are_proved() -> None:
    analysis = capture(original(SHAPE), tiny_inputs(SHAPE))
    assert analysis.input_batch_axes == {("x",): 0, ("timestep",): 0, ("text",): 0}
    assert analysis.output_batch_axes == (0,)


def test_a_single_sample_is_doubled() -> None:
    analysis = capture(original(SHAPE), tiny_inputs(SHAPE, batch=1))
    assert analysis.calls["blocks.0"][0].arguments["x"].shape == (2, 11, 6)


class ReadsValues(nn.Module):
    """Can't run under fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x[:, : int(lengths.max())])


def test_a_model_that_reads_values_runs_for_real() -> None:
    model = ReadsValues()
    analysis = capture(model, {"x": torch.randn(3, 5, 4), "lengths": torch.tensor([2, 4, 3])})
    assert analysis.calls["inner"][0].arguments["input"].shape == (3, 4, 4)
    assert model.calls == 0


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.table(ids) + x


def test_integers_keep_their_values() -> None:
    ids = torch.tensor([[1, 8], [3, 0]])
    analysis = capture(Embeds(), {"ids": ids, "x": torch.randn(2, 2, 4)})
    (leaf,) = (leaf for _, leaf in iterate_leaves(analysis.calls["table"][0].arguments))
    assert torch.equal(leaf.value, ids)


def test_what_the_model_refuses_is_told() -> None:
    inputs = {"x": torch.randn(3, 5, 7), "lengths": torch.tensor([2, 4, 3])}
    with pytest.raises(CaptureError) as raised:
        capture(ReadsValues(), inputs)
    message = str(raised.value)
    for part in (
        "ReadsValues could not be run",
        "x torch.float32 (3, 5, 7)",
        "RuntimeError",
        "model(**example_inputs)",
    ):
        assert part in message


class Shy(nn.Module):
    """Calls its part only where somebody watches, as torch's fused layers do."""

    def __init__(self, hooks: bool) -> None:
        super().__init__()
        self.part, self.hooks = nn.Linear(4, 4), hooks

    def forward(self, x: Tensor) -> Tensor:
        watched = self.part._forward_hooks if self.hooks else torch.overrides.has_torch_function((x,))
        return self.part(x) if watched else nn.functional.linear(x, self.part.weight, self.part.bias)


@pytest.mark.parametrize("hooks", [True, False])
def test_what_is_called_only_where_somebody_watches_is_no_candidate(hooks: bool) -> None:
    assert list(capture(Shy(hooks), {"x": torch.randn(3, 5, 4)}).calls) == [""]


class ShyOfTwo(Shy):
    """Its batch axes can't be proved: it takes two samples alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(2, 5, 4))


def test_nor_where_the_batch_is_fixed() -> None:
    assert list(capture(ShyOfTwo(True), {"x": torch.randn(2, 5, 4)}).calls) == [""]


class Filled:
    """What a forward writes into."""

    values: Tensor | None = None


class Fills(nn.Module):
    def forward(self, x: Tensor, cache: Filled) -> Tensor:
        cache.values = x
        return x


def test_objects_that_a_forward_writes_into_are_left_alone() -> None:
    cache = Filled()
    capture(Fills(), {"x": torch.randn(3, 5, 4), "cache": cache})
    assert cache.values is None
