"""Inputs made from a configuration: the models take them, on their device; what can't be made is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tensors_of
from torch import Tensor, nn
from zoo import ZOO

from diffcr_compile import CaptureError
from diffcr_compile.example_inputs import example_inputs

NAMES = [
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_takes_the_inputs_made_from_its_configuration(name: str) -> None:
    model = ZOO[name].build().to("meta")
    inputs = example_inputs(model, model.config)
    assert {tensor.device.type for tensor in tensors_of(inputs)} == {"meta"}
    known = ZOO[name].inputs(2)
    for key, value in inputs.items():
        assert value.dim() == known[key].dim()
    sample = inputs["hidden_states"]
    (output,) = model(**inputs, return_dict=False)
    assert output.dim() == sample.dim()
    assert output.shape[0] == sample.shape[0] == 2


def test_they_are_real_on_a_real_device_and_the_same_each_time() -> None:
    torch.manual_seed(0)
    model = ZOO["DiTTransformer2DModel"].build()
    state = torch.get_rng_state()
    inputs = example_inputs(model, model.config)
    assert torch.equal(state, torch.get_rng_state())
    assert {tensor.device.type for tensor in (*tensors_of(inputs), *model.parameters())} == {"cpu"}
    assert inputs["hidden_states"].shape == (2, 4, 10, 10)
    assert inputs["hidden_states"].std() > 0.5
    assert model(**inputs).sample.isfinite().all()
    again = example_inputs(model, model.config)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


class Odd(nn.Module):
    """Takes what no configuration tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(17, 6)

    def forward(self, x: Tensor, timestep: Tensor, weather: Any) -> Tensor:
        return self.layer(x) * timestep[:, None, None] + self.other(weather).mean(dim=-2, keepdim=True)


def test_what_cannot_be_made_is_named() -> None:
    with pytest.raises(CaptureError) as caught:
        example_inputs(Odd(), {"in_channels": 6, "width": 24, "depth": 30})
    message = str(caught.value)
    assert "for Odd" in message
    assert "weather fits (it stopped with RuntimeError" in message
    assert "--inputs FILE.safetensors" in message
    assert "x, timestep, weather" in message


def test_the_same_argument_is_found_where_the_configuration_tells_it() -> None:
    inputs = example_inputs(Odd(), {"in_channels": 6, "weather_dim": 17})
    assert list(inputs) == ["x", "timestep", "weather"]
    assert inputs["x"].shape[2] == 6
    assert inputs["weather"].shape[-1] == 17


def test_a_forward_without_named_arguments_is_refused() -> None:
    class Nameless(nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return values[0]

    with pytest.raises(CaptureError, match="names no arguments"):
        example_inputs(Nameless(), {})
