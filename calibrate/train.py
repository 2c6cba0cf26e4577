"""``calibrate``: learn routers and ratios (and weights with them) under a budget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import map_leaves
from ..config import CalibrationConfig
from ..cost import CostModel, measure_costs
from ..errors import BudgetError, CalibrationError, UnsupportedError
from ..learning import check_budget, learnables, learning
from ..routed import ModelRouting, router_weight, settle
from ..table import read_table, write_table
from .objective import dense_outputs, distillation_loss, output_tensors
from .ratios import BudgetedRatios
from .report import CalibrationReport
from .sensitivity import measure_suffering
from .snap import check_reachable, choose_table, snap_table
from .warm_start import fit_routers

Loss = Callable[[nn.Module, dict[str, Any]], Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    budget: float,
    loss: Loss | None = None,
    config: CalibrationConfig | None = None,
) -> CalibrationReport:
    """Learn where ``model`` spends its compute: routers and ratios, and its weights with them, under a FLOPs budget.

    batches: keyword dictionaries of ``model.forward``, read once and moved to the model's device when used; for instance
        noised training data, or what ``record`` saw.
    budget: share of the dense FLOPs to keep, in (0, 1], mean over the timestep regions. Met within
        ``config.tolerance`` and never exceeded.
    loss: ``loss(model, batch) -> ()``; None: the distance from the same model's outputs at ratio zero on the same batch. Where
        weights are trained those outputs are computed before the first step and kept on the CPU.

    With the preset ``"training-free"``, the default where the model was transformed with ``skip="reuse"``, nothing is learned: the
    batches are run once at ratio zero, in their order (with reuse, that of sampling, as ``record`` collects them), what skipping
    would have cost each block in each region is measured, and the table that costs least within the budget is taken.

    Else the stages are: warm start of the routers; learning, while the budget falls to its target; snapping of the ratios to
    bins under the exact budget; settling at the fixed table. Learning rates fall linearly to zero. Training flags and
    requires_grad are put back. A lowered model learns eagerly and stays lowered.

    Raises BudgetError (unreachable; the minimum is named), CalibrationError (no batches, or a loss that is not finite: table and
    routers are then as before), NotTransformedError, ValueError.
    """
    check_budget(budget)
    batches = list(batches)
    if not batches:
        raise CalibrationError("calibrate was given no batches; expected keyword dictionaries of the model's forward.")
    if not isinstance(batches[0], dict):
        raise TypeError(
            f"batches must be keyword dictionaries of the model's forward, found {type(batches[0]).__name__}"
        )
    state = settle(model, _to_device(model, batches[0]))
    reuses = state.config.skip == "reuse"
    config = config or CalibrationConfig(preset="training-free" if reuses else "default")
    if reuses and config.preset != "training-free":
        raise UnsupportedError(
            "the model was transformed with skip='reuse', which takes steps of one trajectory, and learning takes single steps. "
            "Use CalibrationConfig(preset='training-free') on recorded batches, or transform with skip='identity'."
        )
    costs = measure_costs(model, batches[0])
    check_reachable(costs, budget)
    run = _Calibration(model, state, costs, batches, budget, loss, config)
    with _as_before(model, state):
        return run.execute()


class _Calibration:
    """One run, stage by stage."""

    def __init__(
        self,
        model: nn.Module,
        state: ModelRouting,
        costs: CostModel,
        batches: list[dict[str, Any]],
        budget: float,
        loss: Loss | None,
        config: CalibrationConfig,
    ) -> None:
        self.model, self.state, self.costs, self.batches = model, state, costs, batches
        self.budget, self.loss, self.config = budget, loss, config
        self.history: list[dict[str, Any]] = []
        self.targets: list[list[Tensor]] = []
        self.generator = torch.Generator().manual_seed(config.seed)

    def execute(self) -> CalibrationReport:
        start = time.perf_counter()
        config, state, costs = self.config, self.state, self.costs
        state.costs = costs
        if self.loss is None:
            self.model.eval()
        if config.preset == "training-free":
            return self._choose(start)
        if config.trainable == "all" and self.loss is None:
            described = tqdm(self.batches, desc="dense outputs", leave=False)
            self.targets = [[out.cpu() for out in dense_outputs(self.model, self._batch(batch))] for batch in described]
        self._warm_start()
        optimizer = self._optimizer()
        num_settling = round(config.steps * config.settle)
        if num_settling < config.steps:
            self._learn(optimizer, config.steps - num_settling)
            write_table(state, snap_table(learnables(self.model, state).ratios, costs, self.budget, config.tolerance))
        self._check_table()
        self._settle(optimizer, num_settling)
        return self._report(start)

    def _warm_start(self) -> None:
        if self.config.warm_start and not self.state.trained:
            described = tqdm(self.batches, desc="warm start", leave=False)
            fit_routers(self.model, self.state, (self._batch(batch) for batch in described))

    def _choose(self, start: float) -> CalibrationReport:
        """The table that suffers least, without learning."""
        if self.state.config.selection != "turn":
            self._warm_start()
        described = tqdm(self.batches, desc="dense forwards", leave=False)
        suffering = measure_suffering(self.model, self.state, (self._batch(batch) for batch in described))
        write_table(self.state, choose_table(suffering, self.costs, self.budget, self.config.tolerance))
        return self._report(start)

    def _report(self, start: float) -> CalibrationReport:
        state, costs = self.state, self.costs
        state.trained = True
        rows = list(zip(*(block.ratios for block in state.blocks), strict=True))
        return CalibrationReport(
            history=tuple(self.history),
            table=read_table(state),
            blocks=tuple(block.fqn for block in state.blocks),
            budget=self.budget,
            share=costs.share(rows),
            dense_flops=costs.dense_flops,
            region_flops=tuple(costs.row_flops(row) for row in rows),
            seconds=time.perf_counter() - start,
        )

    def _check_table(self) -> None:
        share = self.costs.share(list(zip(*(block.ratios for block in self.state.blocks), strict=True)))
        if share > self.budget:
            raise BudgetError(
                f"the table costs {share:.4f} of the dense FLOPs, above the budget of {self.budget:g}, and with settle=1 ratios "
                "are not learned. Call set_ratios with a table within the budget, or lower settle."
            )

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        routers = [router_weight(self.model.get_submodule(block.fqn)) for block in self.state.blocks]
        known = {id(router) for router in routers}
        weights = [parameter for parameter in self.model.parameters() if id(parameter) not in known]
        for router in routers:
            router.requires_grad_(True)
        groups: list[dict[str, Any]] = [{"params": routers, "lr": config.router_learning_rate, "weight_decay": 0.0}]
        if config.trainable == "all":
            trained = [weight for weight in weights if weight.requires_grad]
            groups.append({"params": trained, "lr": config.learning_rate, "weight_decay": config.weight_decay})
        else:
            for weight in weights:
                weight.requires_grad_(False)
        for group in groups:
            group["peak_lr"] = group["lr"]
        return torch.optim.AdamW(groups)

    def _learn(self, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        ratios = BudgetedRatios(learnables(self.model, self.state).ratios, self.costs, self.config.ratio_learning_rate)
        start = float(self.costs.expected_share(ratios.masters.detach()))
        ramp = max(round(self.config.steps * self.config.ramp), 1)
        for step, index in self._steps(num_steps, "learning"):
            share = start + (self.budget - start) * min((step + 1) / ramp, 1.0)
            with learning(self.model):
                value = self._loss(index)
                value.backward()
            self._move(optimizer, value)
            ratios.step(share)
            self._note(value, share, "learn")

    def _settle(self, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        rows = list(zip(*(block.ratios for block in self.state.blocks), strict=True))
        for _, index in self._steps(num_steps, "settling"):
            value = self._loss(index)
            value.backward()
            self._move(optimizer, value)
            self._note(value, self.costs.share(rows), "settle")

    def _steps(self, num_steps: int, description: str) -> Iterator[tuple[int, int]]:
        """(step, index of the batch): the batches in a new random order each time round."""
        order: list[int] = []
        with tqdm(total=num_steps, desc=description, leave=False) as bar:
            for step in range(num_steps):
                order = order or torch.randperm(len(self.batches), generator=self.generator).tolist()
                yield step, order.pop()
                bar.update()
                bar.set_postfix(loss=self.history[-1]["loss"], share=self.history[-1]["share"])

    def _loss(self, index: int) -> Tensor:
        batch = self._batch(self.batches[index])
        if self.loss is not None:
            return self.loss(self.model, batch)
        targets = self.targets[index] if self.targets else dense_outputs(self.model, batch)
        return distillation_loss(output_tensors(self.model(**batch)), targets)

    def _move(self, optimizer: torch.optim.Optimizer, value: Tensor) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        remaining = 1 - len(self.history) / self.config.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * remaining
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if not bool(torch.isfinite(value)) or not bool(torch.isfinite(norm)):
            raise CalibrationError(
                f"the loss is {float(value.detach()):g} and its gradient norm {float(norm):g} at step {len(self.history)}. "
                "Expected finite values: lower the learning rates, or look at the batches. Table and routers are as before."
            )
        optimizer.step()
        optimizer.zero_grad()

    def _note(self, value: Tensor, share: float, phase: str) -> None:
        self.history.append({"step": len(self.history), "loss": float(value.detach()), "share": share, "phase": phase})

    def _batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _to_device(self.model, batch)


def _to_device(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return map_leaves(lambda _, leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


@contextlib.contextmanager
def _as_before(model: nn.Module, state: ModelRouting) -> Iterator[None]:
    """Put back training flags, requires_grad, gradients and lowering; after an error also table and routers."""
    training = {module: module.training for module in model.modules()}
    needed = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    routers = [router_weight(model.get_submodule(block.fqn)) for block in state.blocks]
    before = [router.detach().clone() for router in routers]
    rows = [list(row) for row in zip(*(block.ratios for block in state.blocks), strict=True)]
    lowered = state.lowered
    if lowered is not None:
        lowered.remove(model)
    for parameter in needed:
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    except BaseException:
        with torch.no_grad():
            for router, value in zip(routers, before, strict=True):
                router.copy_(value)
        write_table(state, rows)
        raise
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, (flag, gradient) in needed.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        if lowered is not None:
            lowered.install(model)
