"""The timestep input, by dataflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffcr_compile.passes.analysis import ModelAnalysis
from diffcr_compile.passes.capture import capture_calls
from diffcr_compile.passes.timestep import find_timestep
from torch import Tensor, nn

from diffcr_compile import CaptureError, DiffCRConfig
from diffcr_compile.plan import TimestepPlan

FREQUENCIES = torch.tensor([1.0, 0.1, 0.01])


def embed(values: Tensor) -> Tensor:
    angles = values.reshape(values.shape[0], -1)[:, :1].float() * FREQUENCIES
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Embedding(nn.Module):
    def __init__(self, scale: float = 1.0, *, order: str = "mul") -> None:
        super().__init__()
        self.scale, self.order = scale, order

    def forward(self, x: Tensor, guidance: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        if guidance is not None:
            x = x + embed(guidance * 1000)
        if t is None:
            return x
        return x + embed(t.to(torch.float64) * self.scale if self.order == "mul" else t.unsqueeze(-1) / self.scale)


def find(model: nn.Module, config: DiffCRConfig | None = None, **inputs: Any) -> ModelAnalysis:
    inputs = {"x": torch.randn(3, 6), **inputs}
    analysis = ModelAnalysis(model, config or DiffCRConfig(), inputs, lambda module, fqn: True)
    return find_timestep(capture_calls(analysis))


STEPS = torch.tensor([1.0, 20.0, 300.0])


@pytest.mark.parametrize(
    ("model", "steps", "high"),
    [
        (Embedding(), STEPS, 1000.0),
        (Embedding(), STEPS.long(), 1000.0),
        (Embedding(1000.0), STEPS / 1000, 1.0),
        (Embedding(4.0, order="div"), STEPS, 4000.0),
        (Embedding(0.5), STEPS[:, None].expand(3, 7), 2000.0),
    ],
    ids=["as it is", "integers", "times 1000", "divided", "per token"],
)
def test_the_constant_on_the_way_gives_the_range(model: nn.Module, steps: Tensor, high: float) -> None:
    analysis = find(model, t=steps)
    assert analysis.timestep == TimestepPlan("t", 0.0, high)
    assert analysis.timestep_note == f"timestep input 't', 0..{high:g}"


def test_a_telling_name_decides_among_several() -> None:
    assert find(Embedding(), guidance=STEPS / 100, t=STEPS).timestep == TimestepPlan("t", 0.0, 1000.0)


def test_without_one_there_is_one_row() -> None:
    analysis = find(Embedding())
    assert analysis.timestep is None
    assert "no input reaches a sinusoidal embedding" in analysis.timestep_note


class Squared(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + embed(t.exp())


def test_an_unknown_range_must_be_named() -> None:
    analysis = find(Squared(), t=STEPS / 1000)
    assert analysis.timestep is None
    assert "range of timestep input 't' unknown" in analysis.timestep_note
    named = find(Squared(), DiffCRConfig(timestep_range=(0.0, 2.0)), t=STEPS / 1000)
    assert named.timestep == TimestepPlan("t", 0.0, 2.0)


def test_the_config_overrides() -> None:
    config = DiffCRConfig(timestep_argument="guidance", timestep_range=(1.0, 8.0))
    assert find(Embedding(), config, guidance=STEPS, t=STEPS).timestep == TimestepPlan("guidance", 1.0, 8.0)
    with pytest.raises(CaptureError, match=r"names 'sigma', which is not among the inputs .*: x, t"):
        find(Embedding(), DiffCRConfig(timestep_argument="sigma"), t=STEPS)
