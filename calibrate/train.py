"""``calibrate``: learn routers and ratios (and weights with them) under a budget."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import iterate_leaves
from ..config import CalibrationConfig
from ..cost import CostModel, measure_costs
from ..defaults import without_autocast_cache
from ..errors import UnsupportedError
from ..latency import latency_from_dict, measure_latency
from ..learning import check_budget, learnables, plain
from ..lower import Lowered, unlowered
from ..routed import ROUTER, ModelRouting, router_weight, settle
from ..sharding import all_weights_reached, local, stay_sharded
from ..table import write_table
from ..unwrap import unwrap
from .adapters import low_rank
from .batches import Batch, model_inputs, read_batches, to_device
from .checkpoint import Checkpoint, digest, digest_weights
from .learner import Learner, Loss, Task
from .processes import num_processes, of_all_processes, of_first_process
from .report import CalibrationReport
from .snap import check_reachable

_RATES = {"learning_rate", "router_learning_rate", "ratio_learning_rate", "weight_decay", "max_grad_norm"}
"""What a calibration that goes on from a checkpoint may be given other values of."""


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    budget: float | Sequence[float],
    loss: Loss | None = None,
    config: CalibrationConfig | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> CalibrationReport:
    """Learn where ``model`` spends its compute: routers and ratios, and its weights with them, under a budget.

    batches: keyword dictionaries of ``model.forward``, copied to the model's device when used; for instance noised training data,
        or what ``record`` saw. A sequence is asked for one at a time, as often as it is drawn (and may read it from disk, as a
        recording with a folder does); anything else, a DataLoader or a generator, is read into memory first, and so must end.
    budget: share of the dense FLOPs (or of what ``config.budget_kind`` says) to keep, in (0, 1], mean over the timestep regions.
        Met within ``config.tolerance`` and never exceeded; by training-free tables for reuse also as a mean over the steps of
        the batches, of which the first is dense. Several: one set of routers and weights serves them all, the report has
        a table for each (``set_ratios`` puts one in force), and the first given is in force.
    loss: ``loss(model, batch) -> ()``; batches may then hold more than the forward takes (targets, say). None: the distance from
        the same model's outputs at ratio zero on the same batch. Where
        weights are trained those outputs are computed before the first step and kept on the CPU, and batches whose samples lie in
        several timestep regions are put together anew, one region each.
    checkpoint: a directory for what is needed to go on, written every ``config.checkpoint_every`` steps. Called again with the
        same arguments after an interruption, a calibration goes on from there and ends as it would have ended. Weights and
        settings must be those that it began with, and so must batches, but for a loss of one's own; rates, weight decay and
        ``max_grad_norm`` may be others, for one that diverged. None: no checkpoints.

    With the preset ``"training-free"``, the default where the model was transformed with ``skip="reuse"``, nothing is learned: the
    batches are run at ratio zero, in their order (with reuse, that of sampling, as ``record`` collects them), what skipping would
    have cost each block in each region is measured, and the table that costs least within the budget is taken. With reuse that
    table is tried on the same batches beside others (one ratio for all; whole steps dense or skipped), each with and without
    extrapolation, and the one whose outputs stay nearest to the dense ones is taken; its first step is dense, as it will be.
    Where the sampler can be told from the batches, steps are then swapped about, ``config.steps`` times, for nearer samples: of
    the best table first, and where few swaps are possible of the others too.

    Any other preset learns on top of reuse too, from batches in that same order: before each is learned from, up to four before it
    in its trajectory are sampled again at the present table, the first of them densely, and a skipped token takes what they
    foretell. Batches that begin a trajectory, whose step is dense in sampling, are not learned from.

    Learning begins at the table in force: at ratio zero, or at what ``set_ratios`` or a calibration without training left before,
    which is worth while for few steps (examples/benchmarks/quality.md).

    The stages of learning are: warm start of the routers; learning, while the budget falls to its target; snapping of the
    ratios to bins under the exact budget; settling at the fixed table. Learning rates of weights and routers fall linearly to zero.
    Training flags and requires_grad are put back. A lowered model learns by compiled graphs of its blocks, one for each bin that is
    met, and stays lowered. ``torch.no_grad`` and ``torch.inference_mode`` around a call do nothing to it.

    In several processes (``torch.distributed``, ``accelerate launch``) each learns on the batches it is given; gradients are
    averaged, and all end with one table. The model may be wrapped by DistributedDataParallel or sharded by FSDP2 (there a batch for
    a loss of one's own must lie in one timestep region: processes that share a model must run it equally often).

    Raises BudgetError (unreachable; the minimum is named), CalibrationError (no batches, one that the model can't be run on, with
    reuse none that follows another, or a loss that is not finite or grows beyond return), ArtefactError (the checkpoint is damaged
    or of other settings), CaptureError, UnsupportedError, NotTransformedError, ValueError, TypeError; what a loss of one's own
    raises passes, with a note of the batch. Batches count from 0. After any error, or an interrupt, the model is as before: table,
    routers and the weights that learn, of which the CPU holds a copy meanwhile (with ``"lora"`` of those below the adapters, while
    they are merged at the end).
    """
    model = unwrap(model)
    _check_types(loss, config)
    budgets = _check_budgets(budget)
    read = read_batches(batches)
    with stay_sharded(model):
        inputs = to_device(model, read[0] if loss is None else model_inputs(model, read[0]))
        state = settle(model, inputs)
        config = config or CalibrationConfig(preset="training-free" if state.config.skip == "reuse" else "default")
        _check_task(budgets, config, loss, checkpoint)
        _check_weights(model, config)
        _warn_of_half_a_paper(state, config, loss)
        flops = of_first_process(measure_costs(model, inputs))
        kept = None
        if checkpoint is not None:
            kept = Checkpoint(checkpoint, _settings(model, state, budgets, config, read, loss is None))
        task = Task(budgets, _costs(model, inputs, flops, config, kept), flops, loss, config)
        for share in budgets:
            check_reachable(task.costs, share)
        learned = _weights_that_learn(model, config)
        with _as_before(model, state, learned) as lowered, _trainable(model, state, config):
            return Learner(model, state, read, task, kept, lowered).execute()


def _check_types(loss: object, config: object) -> None:
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of the model and a batch, found {loss!r}")
    if config is not None and not isinstance(config, CalibrationConfig):
        raise TypeError(f"config must be a CalibrationConfig, found {type(config).__name__}")


def _check_budgets(budget: Any) -> tuple[float, ...]:
    budget = plain(budget)
    several = isinstance(budget, Sequence) and not isinstance(budget, str)
    budgets = tuple(map(check_budget, budget if several else (budget,)))
    if not budgets or len(set(budgets)) < len(budgets):
        raise ValueError(f"expected one budget, or several different ones, found {budget!r}")
    return budgets


def _check_task(budgets: tuple[float, ...], config: CalibrationConfig, loss: Loss | None, checkpoint: Any) -> None:
    """Raises ValueError for what does not go together."""
    for name, given in (("loss", loss), ("checkpoint", checkpoint)):
        if config.preset == "training-free" and given is not None:
            raise ValueError(
                f"preset 'training-free' learns nothing, so {name} has no effect: leave it out, or give a config of another preset "
                "to learn"
            )
    if len(budgets) > 1 and config.settle == 1:
        raise ValueError("with settle=1 the present table stays, which has one cost: give one budget, or lower settle")
    if config.preset != "training-free" and len(budgets) > max(config.num_learning, 1):
        raise ValueError(
            f"{len(budgets)} budgets need as many steps of learning, found {config.num_learning} (steps={config.steps}, "
            f"settle={config.settle}). Expected more steps, a lower settle, or fewer budgets"
        )


def _warn_of_half_a_paper(state: ModelRouting, config: CalibrationConfig, loss: Loss | None) -> None:
    """Of what the preset can't put in place itself."""
    missing = [
        what
        for what, absent in (
            ("the diffusion loss as loss=", loss is None),
            ('transform(model, DiffCRConfig(gate="sigmoid"))', state.config.gate != "sigmoid"),
        )
        if absent
    ]
    if config.preset == "paper" and missing:
        warnings.warn(f"preset 'paper' without what the paper has beside it: {' and '.join(missing)}.", stacklevel=4)


def _check_weights(model: nn.Module, config: CalibrationConfig) -> None:
    """Raises UnsupportedError for weights that can't learn."""
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None and config.preset != "training-free":
        raise UnsupportedError(
            f"{absent} is on the meta device: its values are offloaded between forwards (or were never loaded), and can't learn "
            "there. Call calibrate before offload is enabled, or give CalibrationConfig(preset='training-free')."
        )
    found = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if found is not None and config.preset != "training-free":
        raise UnsupportedError(
            f"{found} was made under torch.inference_mode(), so no gradient passes it. Make or load the model outside of it."
        )


def _costs(
    model: nn.Module, inputs: Batch, flops: CostModel, config: CalibrationConfig, checkpoint: Checkpoint | None
) -> CostModel:
    """The model's costs in the unit of the budget; measured ones are the first process's, and those of a run that goes on."""
    if config.budget_kind == "tokens":
        return flops.in_tokens()
    if config.budget_kind == "latency":
        found = None if checkpoint is None else checkpoint.read()
        if found is not None:
            return latency_from_dict(found[0]["latency"])
        return of_first_process(measure_latency(model, inputs, flops))
    return flops


def _settings(
    model: nn.Module,
    state: ModelRouting,
    budgets: tuple[float, ...],
    config: CalibrationConfig,
    batches: Sequence[Batch],
    distils: bool,
) -> dict[str, Any]:
    """What a checkpoint must agree in with the run that goes on from it.

    Batches must be the same where their dense outputs are kept; for a loss of one's own they may be drawn anew. Weights and table
    must be those that the calibration began with: adapters that were merged once are not merged again, what one model learned is
    not put into another, and the budget's schedule begins at that table's cost.
    """
    trains_all = config.trainable == "all"
    known = (
        ((place, *path), leaf) for place, batch in enumerate(batches) for path, leaf in iterate_leaves(batch) if distils
    )
    return {
        "loss": "distillation" if distils else "own",
        "weights": digest_weights(model),
        "blocks": [block.fqn for block in state.blocks],
        "routing": state.config.to_dict(),
        "budgets": list(budgets),
        "calibration": {name: value for name, value in config.to_dict().items() if name not in _RATES},
        "table": [state.rows, state.degree],
        "batches": of_all_processes([len(batches), digest(known)]),
        "frozen": [name for name, weight in model.named_parameters() if not weight.requires_grad and trains_all],
        "processes": num_processes(),
    }


def _trainable(
    model: nn.Module, state: ModelRouting, config: CalibrationConfig
) -> contextlib.AbstractContextManager[None]:
    if config.trainable == "lora":
        return low_rank(model, state, config.lora_rank, config.seed)
    return contextlib.nullcontext()


def _weights_that_learn(model: nn.Module, config: CalibrationConfig) -> list[Tensor]:
    """Those of the model's own that a calibration moves; routers are told apart by their caller, adapters come later and go."""
    if config.trainable != "all" or config.preset == "training-free":
        return []
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and f"{ROUTER}." not in name
    ]


@contextlib.contextmanager
def _as_before(model: nn.Module, state: ModelRouting, weights: list[Tensor]) -> Iterator[Lowered | None]:
    """Take off what ``lower`` put in place, and give it. Afterwards put it, training flags, requires_grad and gradients back; after
    an error also table, routers and ``weights``, of which the CPU holds a copy meanwhile."""
    training = {module: module.training for module in model.modules()}
    needed = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    learned = [*weights, *(router_weight(model.get_submodule(block.fqn)) for block in state.blocks)]
    before = [local(tensor.detach()).to("cpu", copy=True) for tensor in learned]
    rows, degree, learning = state.rows, state.degree, state.learning
    trained, report = state.trained, state.report
    masters = learnables(model, state).ratios
    values, own = masters.detach().clone(), masters.grad
    try:
        for parameter in needed:
            parameter.grad = None
        masters.grad = None
        state.learning = None
        with (
            unlowered(model, state) as lowered,
            torch.enable_grad(),
            without_autocast_cache(),
            all_weights_reached(model),
        ):
            yield lowered
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(learned, before, strict=True):
                local(tensor).copy_(value)
            write_table(state, rows)
            masters.copy_(values)  # which may lie between bins
        state.note_masters()
        state.degree, state.trained, state.report = degree, trained, report
        raise
    finally:
        torch.clear_autocast_cache()  # of the weights as they were
        for module, flag in training.items():
            module.training = flag
        for parameter, (flag, gradient) in needed.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        masters.grad = own
        state.learning = learning
