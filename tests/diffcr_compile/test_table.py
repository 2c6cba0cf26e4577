"""The ratio table: reading, setting, and following the masters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Shape, original, routed, tiny_inputs

import diffcr_compile
from diffcr_compile.routed import routing_of

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)


@pytest.fixture
def model() -> torch.nn.Module:
    return routed(SHAPE)


def test_the_warning_comes_once(model: torch.nn.Module) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diffcr_compile.set_ratios(model, 0.0)
        assert caught == []
        diffcr_compile.set_ratios(model, 0.5)
        diffcr_compile.set_ratios(model, 0.6)
    (warning,) = caught
    assert "untrained" in str(warning.message)
    assert "diffcr_compile.calibrate" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(("selection", "num_warnings"), [("turn", 0), ("score", 1), ("score and turn", 1)])
def test_the_warning_comes_where_a_router_is_asked(selection: Any, num_warnings: int) -> None:
    config = diffcr_compile.DiffCRConfig(skip="reuse", selection=selection)
    model = diffcr_compile.transform(original(SHAPE), config, example_inputs=tiny_inputs(SHAPE))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diffcr_compile.set_ratios(model, 0.5)
    assert ["untrained" in str(warning.message) for warning in caught] == [True] * num_warnings


@pytest.mark.filterwarnings("ignore:the routers are untrained")
class TestTable:
    def test_starts_at_zero(self, model: torch.nn.Module) -> None:
        table = diffcr_compile.ratios(model)
        assert (table.dtype, tuple(table.shape), table.device.type) == (torch.float32, (4, 2), "cpu")
        assert not table.any()

    @pytest.mark.parametrize(
        "values",
        [0.123, 1, [[0.1, 0.2]] * 4, torch.full((4, 2), 0.7), torch.full((4, 2), 0.7, dtype=torch.bfloat16).double()],
        ids=["float", "int", "lists", "tensor", "float64 tensor"],
    )
    def test_is_taken_as_given(self, model: torch.nn.Module, values: object) -> None:
        diffcr_compile.set_ratios(model, values)  # type: ignore[arg-type]
        expected = torch.as_tensor(values, dtype=torch.float64).expand(4, 2)
        assert (diffcr_compile.ratios(model) - expected).abs().max() <= 0.5001e-3  # thousandths, in float32

    @pytest.mark.parametrize("turn", [np.flipud, np.fliplr, np.asfortranarray, lambda table: table.astype(">f4")])
    def test_may_be_an_array_of_any_layout(self, model: torch.nn.Module, turn: Callable[[Any], Any]) -> None:
        table = turn(np.arange(8).reshape(4, 2) / 10)
        diffcr_compile.set_ratios(model, table)
        assert diffcr_compile.ratios(model).numpy() == pytest.approx(table)

    @pytest.mark.parametrize(
        "values",
        [
            torch.zeros(4, 2).to_sparse(),
            torch.zeros(4, 2).to_sparse_csr(),
            torch.nested.nested_tensor([torch.zeros(2)] * 4),
            torch.quantize_per_tensor(torch.zeros(4, 2), 0.1, 0, torch.qint8),
        ],
        ids=["sparse", "csr", "nested", "quantised"],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
    def test_is_a_plain_tensor(self, model: torch.nn.Module, values: torch.Tensor) -> None:
        with pytest.raises(TypeError, match="expected ratios as a plain dense tensor, found"):
            diffcr_compile.set_ratios(model, values)

    def test_is_a_copy(self, model: torch.nn.Module) -> None:
        diffcr_compile.ratios(model).fill_(0.5)
        assert not diffcr_compile.ratios(model).any()

    def test_follows_the_masters_to_the_nearest_bin(self, model: torch.nn.Module) -> None:
        with diffcr_compile.learning(model) as learnable, torch.no_grad():
            learnable.ratios.copy_(torch.tensor([[0.12, 0.18], [0.949, 0.951], [-0.3, 1.7], [0.0, 0.34]]))
        model(**tiny_inputs(SHAPE))
        expected = torch.tensor([[0.1, 0.2], [0.9, 1.0], [0.0, 1.0], [0.0, 0.3]])
        assert torch.equal(diffcr_compile.ratios(model), expected)
        assert learnable.ratios.aminmax() == (0.0, 1.0)

    def test_read_after_a_step_is_that_of_the_masters(self, model: torch.nn.Module) -> None:
        """``learning``: "after an optimiser step the table in force, and ``ratios(model)``, are its nearest bins"."""
        with diffcr_compile.learning(model) as learnable, torch.no_grad():
            learnable.ratios.fill_(0.41)
        assert torch.equal(diffcr_compile.ratios(model), torch.full((4, 2), 0.4))

    def test_setting_moves_the_masters(self, model: torch.nn.Module) -> None:
        with diffcr_compile.learning(model) as learnable:
            diffcr_compile.set_ratios(model, 0.25)
        assert torch.equal(learnable.ratios, torch.full((4, 2), 0.25))
        model(**tiny_inputs(SHAPE))
        assert torch.equal(diffcr_compile.ratios(model), torch.full((4, 2), 0.25))

    def test_syncing_twice_changes_nothing(self, model: torch.nn.Module) -> None:
        state = routing_of(model)
        diffcr_compile.set_ratios(model, 0.123)
        state.sync_with_masters()
        assert torch.equal(diffcr_compile.ratios(model), torch.full((4, 2), 0.123))
