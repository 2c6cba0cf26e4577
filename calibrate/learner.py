"""One calibration, stage by stage: warm start, learning, snapping, settling; or, without training, the choice of a table.

All that changes between two steps is in the model, the optimiser, the state of ``BudgetedRatios`` and the fields below ``step``:
what a checkpoint holds. Batches are drawn by step and seed, so that a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import CalibrationConfig
from ..cost import CostModel
from ..defaults import on_cpu
from ..errors import ArtefactError, BudgetError, CalibrationError
from ..latency import latency_to_dict
from ..learning import learnables, learning
from ..lower import Lowered
from ..ratios import SCALE
from ..routed import ModelRouting, router_weight
from ..sharding import is_sharded, like, whole
from ..table import read_table, write_table
from .appraise import UNIFORM, TokenMap, map_tokens, spread_over_timesteps
from .batches import Batch, Batches, by_region, drawn, model_inputs, to_device
from .checkpoint import Checkpoint, digest_weights
from .examine import examine_losses, examine_routers, examine_table
from .objective import dense_outputs, distillation_loss, output_tensors
from .processes import average_gradients, mean_over_processes, num_processes, of_all_processes, rank, wait_for_all
from .ratios import BudgetedRatios
from .rehearsal import find_predecessors, rehearsed
from .report import CalibrationReport, Histograms
from .sampler import Sampler, recover_sampler
from .sensitivity import measure_suffering
from .snap import Rows, choose_table, snap_table
from .trials import Trial, Visited, propose_tables, share_of_table, swap_steps, try_table, visited_regions
from .warm_start import fit_routers

Loss = Callable[[nn.Module, Batch], Tensor]

EXAMINED_BATCHES = 4
"""Batches on which the routers are looked at for the report."""

MEASURED_BATCHES = 24
"""Batches on which blocks are run at each ratio, without training and where skipped tokens bypass."""

DIVERGED = 10.0
"""Squared distance from the dense outputs, as a share of their square, that learning can't come back from."""


@dataclass(frozen=True)
class Task:
    """What is asked for. budgets: the first is the one in force at the end. costs: in the budgets' unit; flops: in FLOPs."""

    budgets: tuple[float, ...]
    costs: CostModel
    flops: CostModel
    loss: Loss | None
    config: CalibrationConfig


class Learner:
    """Runs a :class:`Task` on a model; ``execute`` does all of it."""

    def __init__(
        self,
        model: nn.Module,
        state: ModelRouting,
        batches: Sequence[Batch],
        task: Task,
        checkpoint: Checkpoint | None,
        lowered: Lowered | None,
    ) -> None:
        self.model, self.state, self.task, self.config = model, state, task, task.config
        self.batches, self.checkpoint, self.lowered = Batches(batches), checkpoint, lowered
        self.targets: list[list[Tensor]] = []
        self.before: list[list[int]] = []
        self.routers = {block.fqn: router_weight(model.get_submodule(block.fqn)) for block in state.blocks}
        masters, rate = learnables(model, state).ratios, self.config.ratio_learning_rate
        self.ratios = BudgetedRatios(masters, task.costs, rate, shrink=self.config.shrink)
        self.start_share = float(task.costs.expected_share(self.ratios.masters.detach()))
        self.masters: dict[str, Tensor] = {}
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.learned: dict[float, Tensor] = {}
        self.tables: dict[float, Rows] = {}
        self.trials: dict[str, float] = {}
        self.sampler: Sampler | None = None

    def execute(self) -> CalibrationReport:
        """All stages; leaves the model at the first budget's table."""
        start = time.perf_counter()
        if self.task.loss is None:
            nn.Module.train(self.model, False)  # exported modules refuse eval()
        with self._named():
            self._put_in_order()
        if self.config.preset == "training-free":
            with self._named():
                self._choose_tables()
        else:
            self._build_optimizer()
            if not self._resume():
                self._prepare()
            with self._compiled():
                self._train()
        report = self._report(start)
        self.state.trained, self.state.report = True, report.to_dict()
        return report

    def _named(self) -> contextlib.AbstractContextManager[None]:
        """Around what runs the model on batches; not a loss of the user's, whose errors are the user's."""
        return self.batches.named(self.model)

    def _put_in_order(self) -> None:
        """Which batches go before which, or, to learn from, batches of one timestep region each."""
        reuses, learns = self.state.config.skip == "reuse", self.config.preset != "training-free"
        if self.task.loss is None and not reuses and learns:
            self.batches = by_region(self.model, self.state, self.batches)
        if is_sharded(self.model):  # processes that share a model must run it equally often
            counts = of_all_processes(len(self.batches))
            if reuses and not learns and len(set(counts)) > 1:
                raise CalibrationError(
                    f"processes that share a model hold {', '.join(map(str, counts))} batches. Expected equally many, of samplings "
                    "of as many steps: tables are tried on whole samplings."
                )
            self.batches = self.batches.repeated(max(counts))
        if reuses:
            inputs = (model_inputs(self.model, each) for each in self.batches)
            self.before = find_predecessors(self.model, self.state, inputs)

    def _choose_tables(self) -> None:
        """The tables that suffer least, without learning."""
        self._warm_start()
        bypasses = self.state.config.skip == "identity"
        measured = self._some(MEASURED_BATCHES, "blocks at each ratio") if bypasses else self._all("dense forwards")
        suffering = measure_suffering(self.model, self.state, measured, self.batches.last)
        if bypasses:
            for budget in self.task.budgets:
                self.tables[budget] = choose_table(suffering, self.task.costs, budget, self.config.tolerance)
        else:
            self._try_tables(suffering)

    def _try_tables(self, suffering: Tensor) -> None:
        """With reuse: the proposed table whose outputs are nearest to the dense ones on the batches, and how far to extrapolate;
        where tables are tried on samplings of their own, with its steps swapped about.

        One extrapolation serves all budgets: the first one's."""
        visited = visited_regions(self.model, self.state, self._all("steps"), self.before)
        proposed = {
            budget: propose_tables(suffering, visited, self.task.costs, budget, self.config.tolerance)
            for budget in self.task.budgets
        }
        self.targets = [[o.cpu() for o in dense_outputs(self.model, batch)] for batch in self._all("dense outputs")]
        self.sampler = recover_sampler(self.model, self.state, self.batches, self.targets)
        if not all(of_all_processes(self.sampler is not None)):
            self.sampler = None
        degrees = [float(degree) for degree in range(self.state.config.extrapolation + 1)]
        for budget in self.task.budgets:
            trials = [
                Trial(name, degree, rows, self._try(name, rows, degree))
                for name, rows in proposed[budget].items()
                for degree in degrees
            ]
            trials.sort(key=lambda trial: trial.error)
            if math.isinf(trials[0].error):
                raise CalibrationError(
                    f"with none of the {len(trials)} tables that were tried for budget {budget:g} are the outputs finite. Look at "
                    "the model's dtype, and at extrapolation=0."
                )
            best = min([trials[0], *self._swap_steps(trials, visited, budget)], key=lambda trial: trial.error)
            self.tables[budget] = best.rows
            if not self.trials:
                self.trials = {str(trial): trial.error for trial in (*trials, best)}
                degrees = [best.degree]
        self.state.degree = degrees[0]

    def _swap_steps(self, trials: list[Trial], visited: Visited, budget: float) -> Iterator[Trial]:
        """The tables with their steps swapped, the best first, as long as calls are left: of few steps there are few to swap."""
        if self.sampler is None:
            return
        left = self.config.steps
        with tqdm(total=left, desc="swapping steps", leave=False, disable=rank() > 0) as bar:

            def error(rows: Rows, degree: float) -> float:
                bar.update()
                return self._try("steps swapped", rows, degree)

            def fits(rows: Rows) -> bool:
                share = share_of_table(rows, visited, self.task.costs)
                return budget * (1 - self.config.tolerance) <= share <= budget

            for trial in trials:
                swapped, left = swap_steps(trial, visited, error, fits, left, self.config.seed)
                yield swapped

    def _try(self, name: str, rows: Rows, degree: float) -> float:
        batches = self._all(f"trying: {name}")
        return mean_over_processes(try_table(self.model, self.state, rows, degree, batches, self.targets, self.sampler))

    def _build_optimizer(self) -> None:
        config, routers = self.config, list(self.routers.values())
        known = {id(router) for router in routers}
        self.weights = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in known and config.trainable != "routers"
        }
        learns = known | {id(weight) for weight in self.weights.values()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in learns)
        if config.trainable == "all" and not self.weights and self.state.config.skip == "identity":
            warnings.warn(
                "no weight of the model requires a gradient: routers and ratios learn alone, which hardly helps where skipped "
                "tokens bypass their blocks. Expected weights that do, peft adapters, or CalibrationConfig(trainable='lora'); "
                "trainable='routers' says that it is meant.",
                stacklevel=5,
            )
        self.masters = {name: _master_of(parameter) for name, parameter in self._parameters().items()}
        masters = list(self.masters.values())
        groups: list[dict[str, Any]] = [
            {"params": masters[: len(routers)], "lr": config.router_learning_rate, "weight_decay": 0.0}
        ]
        if self.weights:
            decay = config.weight_decay
            groups.append({"params": masters[len(routers) :], "lr": config.learning_rate, "weight_decay": decay})
        for group in groups:
            group["peak_lr"] = group["lr"]
        self.optimizer = torch.optim.AdamW(groups)

    def _prepare(self) -> None:
        """What comes before the first step."""
        with self._named():
            if self.weights and self.task.loss is None:
                for batch in self._all("dense outputs"):
                    self.targets.append([output.to("cpu", copy=True) for output in dense_outputs(self.model, batch)])
            self._warm_start()
        if not self.config.num_learning:
            self._take_present_table()
        if self.checkpoint is not None:
            if self.targets:
                self.checkpoint.write_targets(self.targets)
            self._write_checkpoint()

    def _warm_start(self) -> None:
        if self.config.warm_start and not self.state.trained and self.state.config.selection != "turn":
            fit_routers(self.model, self.state, self._all("warm start"), self.batches.last)
            with torch.no_grad():
                for name, master in self.masters.items():
                    master.copy_(self._parameters()[name])

    def _take_present_table(self) -> None:
        """With settle=1: the table as ``set_ratios`` left it."""
        rows = self.state.rows
        (budget,) = self.task.budgets
        if self.task.costs.share(rows) > budget:
            raise BudgetError(
                f"the table costs {self.task.costs.share(rows):.4f} of the dense {self.task.costs.unit}, above the budget of "
                f"{budget:g}, and with settle=1 ratios are not learned. Call set_ratios with a table within the budget, or lower "
                "settle."
            )
        self.tables[budget] = rows

    def _train(self) -> None:
        config = self.config
        described = "learning" if self.config.num_learning else "settling"
        with tqdm(total=config.steps, initial=self.step, desc=described, leave=False, disable=rank() > 0) as bar:
            while self.step < config.steps:
                if self.step < self.config.num_learning:
                    self._learn()
                else:
                    bar.set_description("settling", refresh=False)
                    self._settle()
                self.step += 1
                if self.step == self.config.num_learning:
                    self._snap()
                if self.checkpoint is not None and self.step % config.checkpoint_every == 0:
                    self._write_checkpoint()
                bar.update()
                bar.set_postfix(loss=self.history[-1]["loss"], share=self.history[-1]["share"], refresh=False)
        if self.checkpoint is not None:
            self._write_checkpoint()

    def _compiled(self) -> contextlib.AbstractContextManager[None]:
        """Where the model was lowered, by its blocks; not where those are sharded."""
        if self.lowered is None or is_sharded(self.model):
            return contextlib.nullcontext()
        return self.lowered.by_block(self.model)

    def _learn(self) -> None:
        """One step in which ratios learn too, on the way down to the next budget."""
        share, reached = self._scheduled()
        with learning(self.model, estimator=self.config.estimator):
            value = self._backward()
        average_gradients([self.ratios.masters])
        self._move(value)
        self.ratios.step(share)
        self._note(value, share, "learn")
        if reached is not None:
            self.learned[reached] = self.ratios.masters.detach().clone()

    def _scheduled(self) -> tuple[float, float | None]:
        """The share that this step ends at; and the budget, if it is the last on the way to one.

        Each budget has an equal part of the learning steps, and the share falls to it over the part's first steps.
        """
        budgets = sorted(self.task.budgets, reverse=True)
        part = self.config.num_learning / len(budgets)
        place = self.step * len(budgets) // self.config.num_learning
        before = budgets[place - 1] if place else self.start_share
        ramp = max(round(self.config.steps * self.config.ramp) / len(budgets), 1.0)
        progress = min((self.step + 1 - place * part) / ramp, 1.0)
        last = (self.step + 1) * len(budgets) >= (place + 1) * self.config.num_learning
        if last:
            progress = 1.0
        return before + (budgets[place] - before) * progress, budgets[place] if last else None

    def _snap(self) -> None:
        for budget, masters in self.learned.items():
            self.tables[budget] = snap_table(masters, self.task.costs, budget, self.config.tolerance)

    def _settle(self) -> None:
        """One step at a fixed table; with several budgets their tables take turns."""
        budgets = self.task.budgets
        rows = self.tables[budgets[self.step % len(budgets)]]
        write_table(self.state, rows)
        value = self._backward()
        self._move(value)
        self._note(value, self.task.costs.share(rows), "settle")

    def _backward(self) -> float:
        """Gradients of one step's batches; returns their mean loss."""
        number = self.config.accumulation
        total = 0.0
        for place in range(number):
            index = self._drawn(self.step * number + place)
            with self._rehearsed(index):
                value = self._loss(index) / number
                if value.requires_grad:
                    value.backward()
                else:
                    self._check_constant(self.step * number + place)
            total += float(value.detach())
        return mean_over_processes(total)

    def _check_constant(self, draw: int) -> None:
        """Raises CalibrationError where a loss without a gradient can't be right. While ratios learn, each depends on them; at a
        fixed table some may not (routers alone learn, and none had to choose; what learns is skipped), but not all of a round."""
        last = min(len(self._usable()), self.config.steps * self.config.accumulation) - 1
        begun = bool(self.optimizer.state) or any(each.grad is not None for each in self._parameters().values())
        if self.state.learning is None and (begun or not self.weights or draw < last):
            return
        raise CalibrationError(
            f"the loss of step {self.step} has no gradient, so nothing would be learned. Expected one that torch computes from the "
            f"model's outputs: look for detach, no_grad, item or numpy in it and in the model's forward, and for "
            f"reentrant checkpoints. {self._what_is_left()}"
        )

    def _drawn(self, draw: int) -> int:
        """The batch of a draw; with reuse, of those that follow another in a trajectory."""
        usable = self._usable()
        return usable[drawn(len(usable), draw, self.config.seed + rank())]

    def _usable(self) -> list[int]:
        """Batches to learn from."""
        return [index for index in range(len(self.batches)) if not self.before or self.before[index]]

    @contextlib.contextmanager
    def _rehearsed(self, index: int) -> Iterator[None]:
        """With reuse: what the steps before this batch leave in memory."""

        def read(place: int) -> Batch:
            return self._inputs(self.batches[place])

        with contextlib.ExitStack() as stack:
            if self.before:
                with self._named():
                    stack.enter_context(rehearsed(self.model, self.state, self.before[index], index, read))
            yield

    def _loss(self, index: int) -> Tensor:
        if self.task.loss is not None:
            batch = to_device(self.model, self.batches[index])
            try:
                value: object = self.task.loss(self.model, batch)
            except Exception as error:
                error.add_note(f"in {self.batches.name(index)} of calibrate")
                raise
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
                kind = f" of shape {tuple(value.shape)} in {value.dtype}" if isinstance(value, Tensor) else ""
                raise TypeError(
                    f"loss must return a tensor of one real number, with its gradient, found {type(value).__name__}{kind}"
                )
            return value
        return self._distance(index)

    def _move(self, value: float) -> None:
        """The optimiser's step, after a look at whether it may be taken."""
        average_gradients(self._parameters().values())
        for name, parameter in self._parameters().items():
            if (master := self.masters[name]) is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (1 - self.step / self.config.steps)
        norm = _clip(list(self.masters.values()), self.config.max_grad_norm)
        if (gradient := self.ratios.masters.grad) is not None:
            norm = math.hypot(norm, float(gradient.norm()))
        if not all(map(math.isfinite, (value, norm))):
            raise CalibrationError(
                f"the loss is {value:g} and its gradient norm {norm:g} at step {self.step}. Expected finite values: lower the "
                f"learning rates, or look at the batches. {self._what_is_left()}"
            )
        recent = [entry["loss"] for entry in self.history[-9:]] + [value]
        if self.task.loss is None and len(recent) == 10 and statistics.median(recent) > DIVERGED:
            raise CalibrationError(
                f"learning diverged: at step {self.step} the outputs' squared distance from the dense ones is "
                f"{statistics.median(recent):.3g} times their square. Lower the learning rates. {self._what_is_left()}"
            )
        with on_cpu():  # it counts its steps in tensors of its own
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._follow_masters()

    @torch.no_grad()
    def _follow_masters(self) -> None:
        """Parameters of less than float32 take the values of their masters, rounded."""
        for name, parameter in self._parameters().items():
            if (master := self.masters[name]) is not parameter:
                parameter.copy_(master)

    def _what_is_left(self) -> str:
        kept = (
            "" if self.checkpoint is None else f" calibrate goes on, at other rates too, from {self.checkpoint.path}."
        )
        return f"Table, routers and weights are as before.{kept}"

    def _note(self, value: float, share: float, phase: str) -> None:
        self.history.append({"step": self.step, "loss": value, "share": share, "phase": phase})

    def _resume(self) -> bool:
        """Go on from the checkpoint, if there is one."""
        found = None if self.checkpoint is None else self.checkpoint.read()
        if found is None or self.checkpoint is None:
            return False
        progress, tensors = found
        if progress["targets"]:
            self.targets = self.checkpoint.read_targets()
        self._check_tensors(tensors)
        self.step, self.history, self.start_share = progress["step"], progress["history"], progress["start_share"]
        self.tables = {float(budget): rows for budget, rows in progress["tables"]}
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(like(tensors[name], master))
            self._follow_masters()
            for name, tensor in self.ratios.state.items():
                tensor.copy_(tensors[f"ratios/{name}"])
        self.learned = {budget: tensors[f"learned/{budget}"] for budget in progress["learned"]}
        self._load_optimizer(tensors)
        torch.set_rng_state(tensors[_generator()])  # a loss of one's own may draw noise
        if (state := tensors.get(_generator("cuda"))) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
        return True

    def _check_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Raises ArtefactError where a checkpoint's tensors are not this model's."""
        expected = {name: tuple(master.shape) for name, master in self.masters.items()}
        expected |= {f"ratios/{name}": tuple(tensor.shape) for name, tensor in self.ratios.state.items()}
        wrong = [name for name, shape in expected.items() if name not in tensors or tuple(tensors[name].shape) != shape]
        if wrong or _generator() not in tensors:
            assert self.checkpoint is not None
            raise ArtefactError(
                f"{self.checkpoint.path} is damaged, or of another model: {', '.join(wrong[:3]) or 'generator'} is missing or of "
                "another shape. Delete it to start anew."
            )

    def _write_checkpoint(self) -> None:
        assert self.checkpoint is not None
        tensors = {name: whole(master) for name, master in self.masters.items()}
        for place, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{place}/{name}": whole(torch.as_tensor(value)) for name, value in moments.items()}
        tensors |= {f"learned/{budget}": masters for budget, masters in self.learned.items()}
        tensors |= {f"ratios/{name}": tensor.detach() for name, tensor in self.ratios.state.items()}
        generators = {_generator(): torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            generators[_generator("cuda")] = torch.cuda.get_rng_state()
        for each in of_all_processes(generators):
            tensors |= each
        progress = {
            "step": self.step,
            "history": self.history,
            "learned": list(self.learned),
            "tables": [[budget, rows] for budget, rows in self.tables.items()],
            "targets": bool(self.targets),
            "weights": digest_weights(self.model),
            "start_share": self.start_share,
            "table": [self.tables.get(self.task.budgets[0]), self.state.degree],
        }
        if self.task.costs.unit == "latency":
            progress["latency"] = latency_to_dict(self.task.costs)
        if rank() == 0 or not self.checkpoint.path.exists():
            self.checkpoint.write(progress, tensors)
        wait_for_all()

    def _parameters(self) -> dict[str, Tensor]:
        """What learns beside the ratios, by the name that a checkpoint gives it."""
        routers = {f"router/{fqn}": router for fqn, router in self.routers.items()}
        return {**routers, **{f"weight/{name}": weight for name, weight in self.weights.items()}}

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state = self.optimizer.state_dict()
        masters = [master for group in self.optimizer.param_groups for master in group["params"]]
        for name, tensor in sorted(tensors.items()):  # sharded tensors are put together in one order by all processes
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                place, _, moment = rest.partition("/")
                moments = state["state"].setdefault(int(place), {})
                moments[moment] = like(tensor, masters[int(place)]) if tensor.ndim else tensor
        self.optimizer.load_state_dict(state)

    def _all(self, description: str) -> Iterator[Batch]:
        for batch in tqdm(self.batches, desc=description, leave=False, disable=rank() > 0):
            yield self._inputs(batch)

    def _some(self, count: int, description: str) -> Iterator[Batch]:
        """At most so many of the batches, evenly over the timesteps."""
        places = spread_over_timesteps(self.model, self.state, self.batches, range(len(self.batches)), count)
        for place in tqdm(places, desc=description, leave=False, disable=rank() > 0):
            yield self._inputs(self.batches[place])

    def _inputs(self, batch: Batch) -> Batch:
        """What the model is called with."""
        batch = to_device(self.model, batch)
        return batch if self.task.loss is None else model_inputs(self.model, batch)

    def _report(self, start: float) -> CalibrationReport:
        """What was done. Leaves the first budget's table in force."""
        state, task = self.state, self.task
        budget, rows = task.budgets[0], self.tables[task.budgets[0]]
        write_table(state, rows)
        nn.Module.train(self.model, False)  # exported modules refuse eval()
        table = read_table(state)
        tables = {known: torch.tensor(each, device="cpu").float() / SCALE for known, each in self.tables.items()}
        remarks = [
            f"budget {known:g}: {remark}" if len(tables) > 1 else remark
            for known, each in tables.items()
            for remark in examine_table(each, known)
        ]
        if task.loss is not None:
            remarks += examine_losses([entry["loss"] for entry in self.history])
        scores, found = self._look(remarks, "the routers' scores", self._examine, ((), ()))
        errors, uniform = self._look(remarks, "what saving costs", self._appraise, ({}, {}))
        write_table(state, rows)
        tokens = self._look(remarks, "which tokens are computed", self._map_tokens, ())
        return CalibrationReport(
            history=tuple(self.history),
            table=table,
            blocks=tuple(block.fqn for block in state.blocks),
            budget=budget,
            share=task.costs.share(rows),
            dense_flops=int(task.flops.dense),
            region_flops=tuple(int(task.flops.row_cost(row)) for row in rows),
            seconds=time.perf_counter() - start,
            budget_kind=task.costs.unit,
            tables=tables,
            diagnostics=(*remarks, *found),
            scores=scores,
            timestep=state.plan.timestep,
            trials=self.trials,
            errors=errors,
            uniform=uniform,
            tokens=tokens,
            starts_dense=state.config.skip == "reuse",
        )

    def _look(self, remarks: list[str], what: str, look: Callable[[], Any], nothing: Any) -> Any:
        """What ``look`` finds for the report; where it fails ``nothing``, and a remark: what was learned is worth more. Not where
        others share the work, who would wait for this process."""
        try:
            with self._named():
                return look()
        except Exception as error:  # whatever the user's model or batches raise
            if num_processes() > 1:
                raise
            remarks.append(f"{what} could not be looked at: {type(error).__name__}: {error}")
            return nothing
        finally:
            self.state.current.trajectory = None

    def _examine(self) -> tuple[Histograms, tuple[str, ...]]:
        if self.state.config.selection == "turn":
            return (), ()
        places = range(min(EXAMINED_BATCHES, len(self.batches)))
        return examine_routers(self.model, self.state, (self._inputs(self.batches[place]) for place in places))

    def _appraise(self) -> tuple[dict[float, float], dict[float, float]]:
        """By share, distances from the dense outputs at the budgets' tables, and at ratios that are everywhere the same, on a few
        batches (where tables were tried on whole trajectories, on these)."""
        places = self._appraised()

        def error(rows: Rows) -> float:
            if self.trials:
                return self._try("for the report", rows, self.state.degree)
            write_table(self.state, rows)
            total = 0.0
            for place in places:
                with torch.no_grad(), self._rehearsed(place):
                    total += float(self._distance(place))
            return mean_over_processes(total / len(places))

        def errors(tables: Iterable[Rows]) -> dict[float, float]:
            return {self.task.costs.share(rows): error(rows) for rows in tables}

        present = self.tables[self.task.budgets[0]]
        uniform = errors([[round(ratio * SCALE)] * len(row) for row in present] for ratio in (0.0, *UNIFORM))
        return errors(self.tables[budget] for budget in reversed(self.task.budgets)), uniform

    def _map_tokens(self) -> tuple[TokenMap, ...]:
        """Which tokens are computed on these batches at the present table."""
        maps = (
            map_tokens(self.model, self.state, self._inputs(self.batches[place]), self._rehearsed(place))
            for place in self._appraised()
        )
        return tuple(one for one in maps if one is not None)

    def _appraised(self) -> list[int]:
        return spread_over_timesteps(self.model, self.state, self.batches, self._usable())

    def _distance(self, index: int) -> Tensor:
        """Of this batch's outputs from the dense ones, () float32."""
        with self._named():
            batch = self.batches[index]
            targets = self.targets[index] if self.targets else dense_outputs(self.model, self._inputs(batch))
            return distillation_loss(output_tensors(self.model(**self._inputs(batch))), targets)


def _master_of(parameter: Tensor) -> Tensor:
    """What the optimiser moves: the parameter itself, or in place of one of less than float32 a copy of that, in which a step of
    1e-4 is not lost to rounding."""
    if parameter.dtype not in (torch.bfloat16, torch.float16):
        return parameter
    return parameter.detach().float().requires_grad_()


def _generator(kind: str = "cpu") -> str:
    """The name in a checkpoint of the state of this process's global generator."""
    return f"generator/{kind}/{rank()}"


def _clip(parameters: list[Tensor], largest: float) -> float:
    """Clip the gradients to a common norm, sharded ones with the others; returns the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [whole(gradient.norm()).float().cpu() for gradient in gradients]
    total = float(torch.stack(norms).norm()) if norms else 0.0
    if total > largest:
        for gradient in gradients:
            gradient.mul_(largest / (total + 1e-6))
    return total
