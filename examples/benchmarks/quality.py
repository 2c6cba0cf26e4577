"""Quality at equal FLOPs: what calibration learns against its rivals, on the digits DiT or another of the example models.

    python examples/benchmarks/quality.py                      # hours on two cores; goes on where it was interrupted
    python examples/benchmarks/quality.py --shares 0.8 --seeds 0 --training-steps 100
    python examples/benchmarks/quality.py --model photos --methods "training-free (reuse)" "dense, fewer steps"
    python examples/benchmarks/quality.py --model captions --guidance 2     # with classifier-free guidance, in one call
    python examples/benchmarks/quality.py --sampler-steps 50 --record quality_50_steps

Every method starts from the same trained weights; those that train take as many steps on the same batches. *Moved* is the mean
squared distance of the samples from the dense model's, from equal noise; Fréchet distances are to held-out real pictures, in
features of the example's classifier, and compare within one table only; time is that of a sampling with all blocks compiled. Caches
that meet a budget by a threshold have it found on other pictures than those that are measured. Each finished cell is kept in
`quality.json`, of one group of settings (of another model, in `quality_NAME.json`); `quality.md` and `quality.png` are written from
it by `quality_tables.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import digits
from inside import BlockCache, blocks_of, reset_caches, taylorseer, thresholded, within
from quality_tables import Settings, write
from timing import Rounds, measure_in_turn, ratio_quartiles

import diffcr_compile
from diffcr_compile import CalibrationConfig, DiffCRConfig

example: Any = digits
"""The module of examples/ whose model is measured."""

HERE = Path(__file__).parent
NUM_BATCHES = 48
RECORDED, LEARNED = 4, 4
"""Pictures of one recorded sampling, and samplings that reuse is learned on."""

TIMED = Rounds(fewest=3, most=9, seconds=6.0)
THRESHOLDS = 6
"""Halvings of the interval from 0 to 1 in which a cache's threshold is looked for."""

TIMESTEPS = 1000
SHARES = (0.8, 0.65, 0.5)
FEW_REGIONS = 10
"""Records hold no table of more regions: it is read off no picture."""


@dataclass(frozen=True)
class Task:
    """What a method makes a model for: one cell of the table."""

    settings: Settings
    batches: list[dict[str, Tensor]]
    budget: float
    seed: int

    @property
    def inputs(self) -> list[dict[str, Tensor]]:
        """The batches as the model takes them."""
        return without_targets(self.batches)


@dataclass(frozen=True)
class Made:
    """A model ready to sample, how many steps it takes, and the share of the dense sampling's FLOPs that it then has.

    forwards: of a cache, how many forwards of the dense model its blocks have made, which tells the share. compiled: whether the
    blocks are. reset: before each sampling.
    """

    model: nn.Module
    steps: int
    share: float = 0.0
    forwards: Callable[[], float] | None = None
    compiled: bool = False
    reset: Callable[[], object] = lambda: None


def diffusion_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared error of the predicted velocity."""
    return F.mse_loss(velocity(model, without_targets([batch])[0]), batch["velocity"])


def velocity(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return output if isinstance(output, Tensor) else output[0]


def without_targets(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value for name, value in batch.items() if name != "velocity"} for batch in batches]


def routed(task: Task, **options: Any) -> nn.Module:
    return diffcr_compile.transform(
        example.load_model(), DiffCRConfig(**options), example_inputs=without_targets(task.batches[:1])[0]
    )


def plain() -> nn.Module:
    """The dense model, its blocks compiled one by one: a graph for all of them."""
    model = example.load_model()
    run = torch.compile(type(blocks_of(model)[0]).forward, dynamic=False)
    for block in blocks_of(model):
        block.forward = types.MethodType(run, block)
    return model


def sampler_share(model: nn.Module, steps: int) -> float:
    """FLOPs over the sampler's timesteps, as a share of the dense ones; with reuse the first step is dense."""
    cost = diffcr_compile.cost(model)
    scheduler = digits.build_scheduler()
    scheduler.set_timesteps(steps)
    rows = len(cost.routed_flops)
    flops = [cost.routed_flops[int(step) * rows // TIMESTEPS] for step in scheduler.timesteps]
    if cost.memory_bytes:
        flops[0] = cost.dense_flops
    return sum(flops) / steps / cost.dense_flops


def made_of(model: nn.Module, task: Task) -> Made:
    """A routed model, sampled in the settings' steps."""
    return Made(model, task.settings.sampler_steps, sampler_share(model, task.settings.sampler_steps))


def learned_table(made: Made) -> list[list[float]] | None:
    """Ratios by timestep region and block, of a routed model with few regions."""
    if made.forwards or made.compiled:
        return None
    table = diffcr_compile.ratios(made.model)
    return [[round(ratio, 3) for ratio in row] for row in table.tolist()] if len(table) <= FEW_REGIONS else None


def set_uniform_ratio(model: nn.Module, budget: float) -> None:
    """The smallest ratio that costs at most ``budget`` where all blocks and regions have it."""
    low, high = 0, 1000
    while low < high:
        middle = (low + high) // 2
        diffcr_compile.set_ratios(model, middle / 1000)
        low, high = (low, middle) if diffcr_compile.cost(model).share <= budget else (middle + 1, high)
    diffcr_compile.set_ratios(model, low / 1000)


def trained(model: nn.Module, task: Task, *, distil: bool = True, budget: float | None = None, **options: Any) -> Made:
    """``model`` after calibration: by distillation, or by the diffusion loss."""
    config = CalibrationConfig(steps=task.settings.training_steps, seed=task.seed, **options)
    batches, loss = (task.inputs, None) if distil else (task.batches, diffusion_loss)
    diffcr_compile.calibrate(model, batches, budget=budget or task.budget, config=config, loss=loss)
    return made_of(model, task)


def control(task: Task) -> Made:
    """The dense model, trained on by the diffusion loss as long as the others."""
    return trained(routed(task), task, budget=1.0, distil=False, ramp=0.0, settle=1.0)


def random_tokens(task: Task) -> Made:
    """One ratio throughout, tokens by routers that know nothing."""
    model = routed(task)
    set_uniform_ratio(model, task.budget)
    return made_of(model, task)


def mixture_of_depths(task: Task) -> Made:
    """One ratio throughout, routers and weights trained at it."""
    model = routed(task)
    set_uniform_ratio(model, task.budget)
    return trained(model, task, ramp=0.0, settle=1.0)


def layer_drop(task: Task) -> Made:
    """Whole blocks left out in all timesteps, those first without which the output changes least; weights trained without them."""
    model = routed(task)
    table = torch.zeros_like(diffcr_compile.ratios(model))
    for block in harms(model, task.inputs[:4]).argsort().tolist():
        if diffcr_compile.cost(model).share <= task.budget:
            break
        table[:, block] = 1.0
        diffcr_compile.set_ratios(model, table)
    return trained(model, task, ramp=0.0, settle=1.0)


@torch.no_grad()
def harms(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean squared change of the output without each of the blocks (num_blocks,)."""
    nothing = torch.zeros_like(diffcr_compile.ratios(model))
    dense = [velocity(model, batch) for batch in batches]
    found = []
    for block in range(nothing.shape[1]):
        table = nothing.clone()
        table[:, block] = 1.0
        diffcr_compile.set_ratios(model, table)
        found.append(
            sum(digits.distance(velocity(model, batch), known) for batch, known in zip(batches, dense, strict=True))
        )
    diffcr_compile.set_ratios(model, nothing)
    return torch.tensor(found)


def layer_wise(task: Task, estimator: str = "two-bin") -> Made:
    """One ratio a layer, else as the default; by the paper's estimator if not by another."""
    return trained(routed(task, num_regions=1), task, estimator=estimator)


def training_free_bypass(task: Task) -> Made:
    """Routers by ridge regression, and the table that suffers least, without training."""
    model = routed(task)
    config = CalibrationConfig(preset="training-free")
    diffcr_compile.calibrate(model, task.inputs, budget=task.budget, config=config)
    return made_of(model, task)


def learned_from_training_free(task: Task) -> Made:
    """The default, begun at that table instead of at ratio zero."""
    return trained(training_free_bypass(task).model, task)


def papers_recipe(task: Task, num_regions: int = 4) -> Made:
    """DiffCR, layer- and timestep-wise, with the paper's gate and loss, no warm start; budget in FLOPs."""
    model = routed(task, gate="sigmoid", num_regions=num_regions)
    return trained(model, task, distil=False, preset="paper", budget_kind="flops")


def ours(task: Task, learning: dict[str, Any] | None = None, *, distil: bool = True, **options: Any) -> Made:
    """The default: layer- and timestep-wise, exact gate, distillation, warm start, single-pass; but for what is given."""
    return trained(routed(task, **options), task, distil=distil, **(learning or {}))


def several_budgets(task: Task) -> Made:
    """The default, all three budgets of the table from one calibration; as many steps as for one."""
    model = routed(task)
    budgets = [task.budget, *(budget for budget in SHARES if budget != task.budget)]
    config = CalibrationConfig(steps=task.settings.training_steps, seed=task.seed)
    diffcr_compile.calibrate(model, task.inputs, budget=budgets, config=config)
    return made_of(model, task)


def budget_of_time(task: Task) -> Made:
    """The default with a budget of the lowered model's time."""
    model = diffcr_compile.lower(routed(task), scope="regional")
    return trained(model, task, budget_kind="latency")


LOW_RANK = {"trainable": "lora", "lora_rank": 16, "learning_rate": 1e-3}


def guided(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The first half of every batch, and the same once more without its labels: what guidance in one call is fed."""
    half = len(next(iter(batches[0].values()))) // 2
    paired = [{name: torch.cat([value[:half]] * 2) for name, value in batch.items()} for batch in batches]
    name, empty = example.EMPTY
    for batch in paired:
        batch[name][half:] = empty
    return paired


def sample(made: Made, number: int, first: int, seed: int, settings: Settings) -> Tensor:
    """So many pictures, of subjects from the given one on."""
    generator = torch.Generator().manual_seed(seed)
    wanted, _ = example.subjects(number, first)
    made.reset()
    return example.sample(made.model.eval(), wanted, steps=made.steps, generator=generator, **settings.sampling)


def samplings(model: nn.Module, number: int, task: Task) -> list[dict[str, Any]]:
    """What the denoiser is fed in so many dense samplings, step by step."""
    made = Made(model, task.settings.sampler_steps)
    with diffcr_compile.record(model) as recorded:
        for place in range(number):
            sample(made, RECORDED, place * RECORDED, task.seed + 1 + 1000 * place, task.settings)
    return list(recorded)


def training_free(task: Task) -> Made:
    """Tokens in turn, updates reused and extrapolated, full context; the table from one dense sampling."""
    model = routed(task, skip="reuse")
    diffcr_compile.calibrate(model, samplings(model, 1, task), budget=task.budget)
    return made_of(model, task)


def learned_on_reuse(task: Task, trainable: str = "all", **options: Any) -> Made:
    """Learning on top of reuse, from a few dense samplings, at the rate of the default. With the weights left alone: as the
    training-free row, but for where the table comes from."""
    model = routed(task, skip="reuse", **{"num_regions": 10, **options})
    batches = samplings(model, LEARNED, task)
    return trained(model, replace(task, batches=batches), trainable=trainable)


def dense(task: Task) -> Made:
    """The model as it is."""
    return Made(plain(), task.settings.sampler_steps, 1.0, compiled=True)


def fewer_steps(task: Task) -> Made:
    """The dense model in fewer sampling steps."""
    steps = task.settings.sampler_steps
    fewer = round(task.budget * steps)
    return Made(plain(), fewer, fewer / steps, compiled=True)


def blocks_cached(task: Task, order: int) -> Made:
    """All blocks computed in as many steps as the budget allows, evenly apart; their last updates reused or extrapolated else."""
    model, steps = plain(), task.settings.sampler_steps
    cache = BlockCache(model, within(task.budget, steps), order)
    return Made(model, steps, forwards=lambda: cache.full_steps, compiled=True)


def first_block_cached(task: Task) -> Made:
    """FirstBlockCache, or its rule, at the lowest threshold that meets the budget on pictures of its own."""
    steps = task.settings.sampler_steps
    ((_, put),) = thresholded(task.settings.model)

    def at(threshold: float) -> Made:
        model = plain()
        forwards = put(model, threshold)
        return Made(model, steps, forwards=forwards, compiled=True, reset=partial(reset_caches, model))

    low, high = 0.0, 1.0
    for _ in range(THRESHOLDS):
        middle = (low + high) / 2
        made = at(middle)
        sample(made, RECORDED, 0, task.seed + 1, task.settings)
        within_budget = made.forwards() <= task.budget * steps + 1e-9  # type: ignore[misc]
        low, high = (low, middle) if within_budget else (middle, high)
    return at(high)


def taylorseer_cached(task: Task) -> Made:
    """TaylorSeer of second order at the shortest interval that meets the budget: two dense steps, then one in so many."""
    steps = task.settings.sampler_steps
    rest = max(task.budget * steps - 2, 1)
    model = example.load_model()
    interval = max(2, -(-(steps - 2) // int(rest)))
    forwards = taylorseer(task.settings.model, model, interval, 2)
    return Made(model, steps, forwards=forwards, reset=partial(reset_caches, model))


METHODS: dict[str, Callable[[Task], Made]] = {
    "dense": dense,
    "dense, trained on": control,
    "training-free (reuse)": training_free,
    "dense, fewer steps": fewer_steps,
    "whole blocks cached": partial(blocks_cached, order=0),
    "whole blocks cached, extrapolated": partial(blocks_cached, order=1),
    "FirstBlockCache": first_block_cached,
    "TaylorSeer": taylorseer_cached,
    "random tokens": random_tokens,
    "ours (default)": ours,
    "ours, two-bin": partial(ours, learning={"estimator": "two-bin"}),
    "uniform MoD": mixture_of_depths,
    "layer drop": layer_drop,
    "DiffCR-L": layer_wise,
    "DiffCR-L, single-pass": partial(layer_wise, estimator="single-pass"),
    "training-free (bypass)": training_free_bypass,
    "training-free (bypass), then learned": learned_from_training_free,
    "DiffCR-LT, paper's recipe": papers_recipe,
    "DiffCR-L, paper's recipe": partial(papers_recipe, num_regions=1),
    "ours, diffusion loss": partial(ours, distil=False),
    "ours, all context": partial(ours, context="all"),
    "ours, LoRA": partial(ours, learning=LOW_RANK),
    "ours, routers see the timestep": partial(ours, router="timestep"),
    "ours, regions apart": partial(ours, learning={"shrink": False}),
    "ours, cold start": partial(ours, learning={"warm_start": False}),
    "ours, not settled": partial(ours, learning={"settle": 0.0}),
    "ours, sigmoid gate": partial(ours, gate="sigmoid"),
    "ours, routers and ratios alone": partial(ours, learning={"trainable": "routers"}),
    "ours, budget of tokens": partial(ours, learning={"budget_kind": "tokens"}),
    "ours, budget of time": budget_of_time,
    "ours, three budgets at once": several_budgets,
    "ours, guidance shared": partial(ours, guidance="shared"),
    "reuse, learned": learned_on_reuse,
    "reuse, learned table": partial(learned_on_reuse, trainable="routers"),
    "reuse, learned table, score and turn": partial(learned_on_reuse, trainable="routers", selection="score and turn"),
}
"""How each row is made."""

WHOLE = {"dense", "dense, trained on"}
"""Rows of all FLOPs."""

CACHES = {"whole blocks cached", "whole blocks cached, extrapolated", "FirstBlockCache", "TaylorSeer"}


class Bench:
    """Makes, samples, measures; keeps each cell as soon as it is there."""

    def __init__(self, settings: Settings, file: Path, command: str, *, timed: bool) -> None:
        self.settings, self.file, self.timed = settings, file, timed
        self.commands, self.cells = [], {}  # type: ignore[var-annotated]
        if file.exists():
            record = json.loads(file.read_text())
            if Settings(**record["settings"]) != settings:
                raise SystemExit(f"{file} holds cells of {record['settings']}, not of {settings}: take --record")
            self.commands, self.cells = record["commands"], record["cells"]
        self.commands += [command] if command not in self.commands else []
        self.classifier = example.load_classifier()
        real = example.pictures(5 * settings.samples, torch.Generator().manual_seed(11), train=False)[0]
        self.real = self.classifier.features(real).detach()
        self.dense = Made(plain(), settings.sampler_steps, compiled=True)
        self.references: dict[int, Tensor] = {}

    def run(self, method: str, budget: float, seed: int) -> None:
        """One cell, unless it is known."""
        key = f"{method} | {budget} | {seed}"
        if key in self.cells:
            return
        start = time.perf_counter()
        try:
            batches = example.calibration_batches(NUM_BATCHES, self.settings.batch, seed, targets=True)
            made = METHODS[method](
                Task(self.settings, guided(batches) if self.settings.guidance != 1 else batches, budget, seed)
            )
        except diffcr_compile.UnsupportedError as error:  # adapters want peft; a cache may not know the model
            print(f"{method}: {type(error).__name__}: {error}", file=sys.stderr)
            return
        seconds = time.perf_counter() - start
        table = learned_table(made)
        number, before = self.settings.samples, made.forwards() if made.forwards else 0.0
        images = sample(made, number, 0, 1000 + seed, self.settings)
        share = (made.forwards() - before) / made.steps if made.forwards else made.share
        if seed not in self.references:
            self.references[seed] = sample(self.dense, number, 0, 1000 + seed, self.settings)
        wanted, labels = example.subjects(number)
        self.cells[key] = {
            "method": method,
            "budget": budget,
            "seed": seed,
            "share": share,
            "time": self._time_share(made) if self.timed else None,
            "moved": digits.distance(images, self.references[seed]),
            "frechet": digits.frechet_distance(self.real, self.classifier.features(images).detach()),
            "accuracy": example.class_accuracy(images, labels, self.classifier),
            "inside": example.errors(images, wanted)[0] if hasattr(example, "errors") else None,
            "seconds": seconds,
            "table": table,
        }
        record = {"torch": torch.__version__, "commands": self.commands, "settings": asdict(self.settings)}
        self.file.write_text(json.dumps({**record, "cells": self.cells}, indent=1) + "\n")

    def _time_share(self, made: Made) -> float | None:
        """Of a sampling of a batch, over the dense one's, the blocks of both compiled: the median of several in turn."""
        if not made.compiled and made.forwards:
            return None  # hooks inside the blocks
        if not made.compiled:
            diffcr_compile.lower(made.model, scope="regional")
        calls = {
            name: (lambda: None, partial(sample, model, self.settings.batch, 0, 0, self.settings))
            for name, model in (("made", made), ("dense", self.dense))
        }
        times = measure_in_turn(calls, TIMED)
        return ratio_quartiles(times["made"], times["dense"])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--sampler-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--two-calls", action="store_true", help="of guidance; takes a sampler that can: captions")
    parser.add_argument(
        "--times", action=argparse.BooleanOptionalAction, default=True, help="compile and time each model"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument(
        "--model", choices=["digits", "photos", "captions", "inpainting"], default="digits", help="module of examples/"
    )
    parser.add_argument("--record", help="name of the files that are written; quality, or quality_MODEL, if not given")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of quality.json and quality.md")
    options = parser.parse_args()
    global example
    example = importlib.import_module(options.model)
    name = options.record or ("quality" if options.model == "digits" else f"quality_{options.model}")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="the routers are untrained")
    if options.two_calls and (options.model != "captions" or CACHES & set(options.methods)):
        parser.error(
            "--two-calls takes --model captions, and --methods without caches: they tell steps by the model's calls"
        )
    settings = Settings(
        options.model,
        options.training_steps,
        options.samples,
        options.sampler_steps,
        options.guidance,
        options.two_calls,
    )
    command = f"python {shlex.join(sys.argv)}"
    bench = Bench(settings, options.out / f"{name}.json", command, timed=options.times)
    cells = [(method, share, seed) for seed in options.seeds for share in options.shares for method in options.methods]
    for method, share, seed in tqdm(cells, desc="cells"):
        bench.run(method, 1.0 if method in WHOLE else share, seed)
        write(bench.file)
    print((options.out / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
