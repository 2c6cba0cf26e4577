"""Learning as a mode: inside it every block's output depends on its ratio by an estimator, so that ratios learn."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import Estimator, check_choice
from .cost import cost_model
from .errors import UnsupportedError
from .estimators import ESTIMATORS, estimate
from .routed import ModelRouting, router_weight, settle
from .table import read_table
from .unwrap import unwrap


@dataclass(frozen=True)
class Learnable:
    """What an optimiser may move beside the model's own weights.

    ratios: float32 CPU leaf (num_regions, num_blocks), shares of the tokens that skip, in [0, 1], the masters of the table; the
    same tensor each time. routers: one vector (D,) per block, of the model's dtype, in the order of the columns; (num_regions, D)
    where they see the timestep.
    """

    ratios: Tensor
    routers: tuple[nn.Parameter, ...]


@contextlib.contextmanager
def learning(model: nn.Module, *, estimator: Estimator = "two-bin") -> Iterator[Learnable]:
    """Forward *and* backward inside learn routers and ratios (DiffCR, section 3)::

        with diffcr_compile.learning(model) as learnable:
            (loss(model) + 0.3 * diffcr_compile.budget_loss(model, 0.8)).backward()

    A forward at ratio zero has the values of the original model. After an optimiser step on ``learnable.ratios`` the table in
    force, and ``ratios(model)``, are its nearest bins. With ``skip="reuse"`` a trainer of one's own has no memory, and skipped
    tokens bypass their block; ``calibrate`` fills one before each forward.

    estimator: ``"two-bin"`` (the paper, and the default here; ``calibrate``'s is the other): each block runs at both neighbouring
    bins and their outputs are mixed; ``"single-pass"``: it runs at the larger one, and the tokens that the smaller leaves out get a
    share of their update. Raises ValueError for another estimator; UnsupportedError under ``torch.inference_mode``;
    NotTransformedError; CaptureError where the blocks have not been looked for yet.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    model = unwrap(model)
    if torch.is_inference_mode_enabled():
        raise UnsupportedError(
            "learning needs gradients, and torch.inference_mode() is on: enter learning outside of it."
        )
    state = settle(model)
    learnable = learnables(model, state)
    before, state.learning = state.learning, functools.partial(estimate, estimator)
    try:
        yield learnable
    finally:
        state.learning = before


def learnables(model: nn.Module, state: ModelRouting) -> Learnable:
    """The masters, made from the table at the first call, and the routers."""
    if state.masters is None:
        with torch.inference_mode(False):
            state.masters = read_table(state).requires_grad_()
        state.note_masters()
    routers = tuple(router_weight(model.get_submodule(block.fqn)) for block in state.blocks)
    return Learnable(state.masters, routers)  # type: ignore[arg-type]


def budget_loss(model: nn.Module, budget: float | Tensor | np.ndarray | np.generic) -> Tensor:
    """Squared distance of the expected share of the dense FLOPs from ``budget``: differentiable, () float32 on the CPU.

    Between bins the share is mixed as the outputs are. budget: in (0, 1], a number, or a tensor or array of one.
    Raises ValueError, NotTransformedError, CaptureError where the blocks have not been looked for yet.
    """
    target = check_budget(budget)
    model = unwrap(model)
    state = settle(model)
    return (cost_model(model).expected_share(learnables(model, state).ratios) - target).square()


def plain(value: Any) -> Any:
    """Numbers, and lists of them, of tensors and arrays."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def check_budget(budget: Any) -> float:
    """A budget as a plain number. Raises ValueError for one outside (0, 1]."""
    budget = plain(budget)
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise ValueError(f"budget is the share of the dense FLOPs to keep and must lie in (0, 1], found {budget!r}")
    return budget


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Inside, every block of a transformed model is as it was, whatever the table says: a teacher without a copy."""
    state = settle(model)
    before, state.dense = state.dense, True
    try:
        yield
    finally:
        state.dense = before
