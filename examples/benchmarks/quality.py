"""Quality at equal FLOPs: what calibration learns against its rivals, on the digits DiT or another of the example models.

    python examples/benchmarks/quality.py                      # hours on two cores; goes on where it was interrupted
    python examples/benchmarks/quality.py --shares 0.8 --seeds 0 --training-steps 100
    python examples/benchmarks/quality.py --model photos --methods "training-free (reuse)" "dense, fewer steps"

Every method starts from the same trained weights; those that train take as many steps on the same batches. *Moved* is the mean
squared distance of the samples from the dense model's, from equal noise; Fréchet distances are to held-out real pictures, in
features of the example's classifier, and compare within one table only. Each finished cell is kept in `quality.json`; `quality.md`
is written from it; of another model, in `quality_NAME.json` and `quality_NAME.md`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import digits

import diffcr_compile
from diffcr_compile import CalibrationConfig, DiffCRConfig

example: Any = digits
"""The module of examples/ whose model is measured."""

HERE = Path(__file__).parent
BATCH, NUM_BATCHES = 8, 48
SAMPLER_STEPS = 20
GUIDANCE = 3.0
RECORDED, LEARNED = 4, 4
"""Pictures of one recorded sampling, and samplings that reuse is learned on."""

TIMESTEPS = 1000


@dataclass(frozen=True)
class Settings:
    """What all cells of a run share."""

    training_steps: int
    samples: int


@dataclass(frozen=True)
class Made:
    """A model ready to sample, how many steps it takes, the share of the dense sampling's FLOPs that it then has, and the guidance
    that it is sampled with (1: none), in one call or two."""

    model: nn.Module
    steps: int
    share: float
    guidance: float = 1.0
    two_calls: bool = False


def diffusion_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared error of the predicted velocity."""
    return F.mse_loss(velocity(model, without_targets([batch])[0]), batch["velocity"])


def velocity(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return output if isinstance(output, Tensor) else output[0]


def subjects(first: int, number: int) -> Any:
    """What so many pictures are of: labels, or captions."""
    labels = torch.arange(first, first + number) % example.NUM_CLASSES
    return example.captioned(labels, labels % 4) if hasattr(example, "captioned") else labels


def without_targets(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value for name, value in batch.items() if name != "velocity"} for batch in batches]


def routed(batches: list[dict[str, Tensor]], **options: Any) -> nn.Module:
    return diffcr_compile.transform(
        example.load_model(), DiffCRConfig(**options), example_inputs=without_targets(batches[:1])[0]
    )


def sampler_share(model: nn.Module) -> float:
    """FLOPs over the sampler's timesteps, as a share of the dense ones; with reuse the first step is dense."""
    cost = diffcr_compile.cost(model)
    scheduler = digits.build_scheduler()
    scheduler.set_timesteps(SAMPLER_STEPS)
    rows = len(cost.routed_flops)
    flops = [cost.routed_flops[int(step) * rows // TIMESTEPS] for step in scheduler.timesteps]
    if cost.memory_bytes:
        flops[0] = cost.dense_flops
    return sum(flops) / SAMPLER_STEPS / cost.dense_flops


def uniform_ratio(model: nn.Module, budget: float) -> float:
    """The smallest ratio that costs at most ``budget`` where all blocks and regions have it."""
    low, high = 0, 1000
    while low < high:
        middle = (low + high) // 2
        diffcr_compile.set_ratios(model, middle / 1000)
        low, high = (low, middle) if diffcr_compile.cost(model).share <= budget else (middle + 1, high)
    return low / 1000


def trained(model: nn.Module, batches: list[dict[str, Tensor]], budget: float, distil: bool, **options: Any) -> Made:
    """``model`` after calibration: by distillation, or by the diffusion loss."""
    config = CalibrationConfig(**options)
    if distil:
        diffcr_compile.calibrate(model, without_targets(batches), budget=budget, config=config)
    else:
        diffcr_compile.calibrate(model, batches, budget=budget, config=config, loss=diffusion_loss)
    return Made(model, SAMPLER_STEPS, sampler_share(model))


def control(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """The dense model, trained on by the diffusion loss as long as the others."""
    return trained(routed(batches), batches, 1.0, distil=False, steps=steps, seed=seed, ramp=0.0, settle=1.0)


def random_tokens(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """One ratio throughout, tokens by routers that know nothing."""
    model = routed(batches)
    diffcr_compile.set_ratios(model, uniform_ratio(model, budget))
    return Made(model, SAMPLER_STEPS, sampler_share(model))


def mixture_of_depths(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """One ratio throughout, routers and weights trained at it."""
    model = routed(batches)
    diffcr_compile.set_ratios(model, uniform_ratio(model, budget))
    return trained(model, batches, budget, distil=True, steps=steps, seed=seed, ramp=0.0, settle=1.0)


def layer_drop(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """Whole blocks left out in all timesteps, those first without which the output changes least; weights trained without them."""
    model = routed(batches)
    table = torch.zeros_like(diffcr_compile.ratios(model))
    for block in harms(model, without_targets(batches[:4])).argsort().tolist():
        if diffcr_compile.cost(model).share <= budget:
            break
        table[:, block] = 1.0
        diffcr_compile.set_ratios(model, table)
    return trained(model, batches, budget, distil=True, steps=steps, seed=seed, ramp=0.0, settle=1.0)


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


def layer_wise(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """DiffCR with one ratio a layer, by the paper's estimator."""
    model = routed(batches, num_regions=1)
    return trained(model, batches, budget, distil=True, steps=steps, seed=seed, estimator="two-bin")


def papers_recipe(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """DiffCR, layer- and timestep-wise, with the paper's gate and loss, no warm start; budget in FLOPs."""
    model = routed(batches, gate="sigmoid")
    chosen = {"preset": "paper", "steps": steps, "seed": seed, "budget_kind": "flops"}
    return trained(model, batches, budget, distil=False, **chosen)


def ours(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """The default: layer- and timestep-wise, exact gate, distillation, warm start, single-pass."""
    return trained(routed(batches), batches, budget, distil=True, steps=steps, seed=seed)


def ours_two_bin(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """The default with the paper's estimator: as many steps, in more time."""
    return trained(routed(batches), batches, budget, distil=True, steps=steps, seed=seed, estimator="two-bin")


def ours_low_rank(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """The default with adapters of rank 16 in place of the weights."""
    chosen = {"trainable": "lora", "lora_rank": 16, "learning_rate": 1e-3}
    return trained(routed(batches), batches, budget, distil=True, steps=steps, seed=seed, **chosen)


def ours_with_context(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """The default, but all tokens give keys and values."""
    model = routed(batches, context="all")
    return trained(model, batches, budget, distil=True, steps=steps, seed=seed)


def ours_timestep(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """The default with routers that see the timestep."""
    return trained(routed(batches, router="timestep"), batches, budget, distil=True, steps=steps, seed=seed)


def guided(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The first half of every batch, and the same once more without its labels: what guidance in one call is fed."""
    half = BATCH // 2
    paired = [{name: torch.cat([value[:half]] * 2) for name, value in batch.items()} for batch in batches]
    name, empty = example.EMPTY
    for batch in paired:
        batch[name][half:] = empty
    return paired


def with_guidance(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int, **options: Any) -> Made:
    """The default, learned on guidance batches and sampled with guidance."""
    batches = guided(batches)
    made = trained(routed(batches, **options), batches, budget, distil=True, steps=steps, seed=seed)
    return replace(made, guidance=GUIDANCE)


def with_shared_guidance(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """The same, but both halves keep the same tokens."""
    return with_guidance(batches, budget, steps, seed, guidance="shared")


def sampled(made: Made, wanted: Any, generator: torch.Generator) -> Tensor:
    """Pictures of what is wanted."""
    how = {"two_calls": True} if made.two_calls else {}
    return example.sample(
        made.model.eval(), wanted, steps=made.steps, guidance=made.guidance, generator=generator, **how
    )


def samplings(made: Made, number: int, seed: int) -> list[dict[str, Any]]:
    """What the denoiser is fed in so many dense samplings, step by step."""
    with diffcr_compile.record(made.model) as recorded:
        for place in range(number):
            generator = torch.Generator().manual_seed(seed + 1 + 1000 * place)
            sampled(made, subjects(place * RECORDED, RECORDED), generator)
    return list(recorded)


def training_free(
    batches: list[dict[str, Tensor]],
    budget: float,
    steps: int,
    seed: int,
    guidance: float = 1.0,
    two_calls: bool = False,
) -> Made:
    """Tokens in turn, updates reused and extrapolated, full context; the table from one dense sampling."""
    made = Made(routed(batches, skip="reuse"), SAMPLER_STEPS, 1.0, guidance, two_calls)
    diffcr_compile.calibrate(made.model, samplings(made, 1, seed), budget=budget)
    return replace(made, share=sampler_share(made.model))


def learned_on_reuse(
    batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int, trainable: str = "all", **options: Any
) -> Made:
    """Learning on top of reuse, from a few dense samplings, at the rate of the default."""
    model = routed(batches, skip="reuse", **{"num_regions": 10, **options})
    config = CalibrationConfig(steps=steps, seed=seed, trainable=trainable)  # type: ignore[arg-type]
    diffcr_compile.calibrate(
        model, samplings(Made(model, SAMPLER_STEPS, 1.0), LEARNED, seed), budget=budget, config=config
    )
    return Made(model, SAMPLER_STEPS, sampler_share(model))


def learned_table_on_reuse(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """The same with the weights left alone: as the training-free row, but for where the table comes from."""
    return learned_on_reuse(batches, budget, steps, seed, trainable="routers")


def routers_on_reuse(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int) -> Made:
    """The same with tokens by score and age instead of in turn."""
    return learned_on_reuse(batches, budget, steps, seed, trainable="routers", selection="score and turn")


def fewer_steps(batches: list[dict[str, Tensor]], budget: float, steps: int, seed: int, guidance: float = 1.0) -> Made:
    """The dense model in fewer sampling steps."""
    fewer = round(budget * SAMPLER_STEPS)
    return Made(example.load_model(), fewer, fewer / SAMPLER_STEPS, guidance)


METHODS: dict[str, Callable[..., Made]] = {
    "training-free (reuse)": training_free,
    "dense, fewer steps": fewer_steps,
    "random tokens": random_tokens,
    "ours (default)": ours,
    "ours, two-bin": ours_two_bin,
    "uniform MoD": mixture_of_depths,
    "layer drop": layer_drop,
    "DiffCR-L": layer_wise,
    "DiffCR-LT, paper's recipe": papers_recipe,
    "ours, all context": ours_with_context,
    "ours, LoRA": ours_low_rank,
    "ours, routers see the timestep": ours_timestep,
    "reuse, learned": learned_on_reuse,
    "reuse, learned table": learned_table_on_reuse,
    "reuse, learned table, score and turn": routers_on_reuse,
    "ours, guided": with_guidance,
    "ours, guided, shared": with_shared_guidance,
    "training-free (reuse), guided": partial(training_free, guidance=GUIDANCE),
    "training-free (reuse), guided in two calls": partial(training_free, guidance=GUIDANCE, two_calls=True),
    "dense, fewer steps, guided": partial(fewer_steps, guidance=GUIDANCE),
}
"""How each row is made. Guidance in two calls takes a sampler that can: that of the captions."""


class Bench:
    """Makes, samples, measures; keeps each cell as soon as it is there."""

    def __init__(self, settings: Settings, file: Path) -> None:
        self.settings, self.file = settings, file
        self.cells: dict[str, dict[str, Any]] = json.loads(file.read_text())["cells"] if file.exists() else {}
        self.classifier = example.load_classifier()
        real = example.pictures(5 * settings.samples, torch.Generator().manual_seed(11), train=False)[0]
        self.real = self.classifier.features(real).detach()
        self.references: dict[tuple[int, float], Tensor] = {}

    def run(self, method: str, make: Callable[..., Made], budget: float, seed: int) -> None:
        """One cell, unless it is known."""
        key = f"{method} | {budget} | {seed} | {self.settings.training_steps} | {self.settings.samples}"
        if key in self.cells:
            return
        start = time.perf_counter()
        try:
            batches = example.calibration_batches(NUM_BATCHES, BATCH, seed, targets=True)
            made = make(batches, budget, self.settings.training_steps, seed)
        except diffcr_compile.UnsupportedError as error:  # adapters want peft
            print(f"{method}: {error}", file=sys.stderr)
            return
        seconds = time.perf_counter() - start
        labels = torch.arange(self.settings.samples) % example.NUM_CLASSES
        images = self._sample(made, seed)
        self.cells[key] = {
            "method": method,
            "budget": budget,
            "seed": seed,
            "share": made.share,
            "moved": digits.distance(images, self._reference(seed, made.guidance)),
            "frechet": digits.frechet_distance(self.real, self.classifier.features(images).detach()),
            "accuracy": example.class_accuracy(images, labels, self.classifier),
            "seconds": seconds,
        }
        record = {"torch": torch.__version__, "command": f"python {shlex.join(sys.argv)}", "cells": self.cells}
        self.file.write_text(json.dumps(record, indent=1) + "\n")

    def _sample(self, made: Made, seed: int) -> Tensor:
        return sampled(made, subjects(0, self.settings.samples), torch.Generator().manual_seed(1000 + seed))

    def _reference(self, seed: int, guidance: float) -> Tensor:
        if (seed, guidance) not in self.references:
            self.references[seed, guidance] = self._sample(
                Made(example.load_model(), SAMPLER_STEPS, 1.0, guidance), seed
            )
        return self.references[seed, guidance]


def as_markdown(cells: list[dict[str, Any]], settings: Settings, command: str) -> str:
    """One table a share: means over seeds, the spread (half the range) behind ±."""
    lines = [
        "# Quality at equal FLOPs",
        "",
        f"`{command}`, torch {torch.__version__}, CPU, float32, {example.__name__} DiT (256 tokens), "
        f"{settings.training_steps} training steps of batch {BATCH} where anything is trained, {settings.samples} samples, "
        f"{SAMPLER_STEPS} DDIM steps, no guidance (rows named guided: {GUIDANCE:g}, moved from dense samples with it). "
        "Share: FLOPs of the sampling over the dense one's. Moved: mean squared distance "
        "from the dense samples, equal noise. Fréchet: to held-out real pictures, comparable within this page. Accuracy: the asked "
        "class, by a classifier. Seconds: to make the model, search for blocks and dense outputs included; they compare only where "
        "the machine was idle. Means over the seeds given; ± half their range.",
    ]
    for budget in sorted({cell["budget"] for cell in cells}, reverse=True):
        lines += ["", f"## FLOPs share {budget:g}", ""]
        lines += ["| method | seeds | share | moved | Fréchet | accuracy | seconds |", "|---|---|---|---|---|---|---|"]
        here = [cell for cell in cells if cell["budget"] == budget]
        methods = dict.fromkeys(cell["method"] for cell in here)
        groups = [[cell for cell in here if cell["method"] == method] for method in methods]
        for group in sorted(groups, key=lambda group: statistics.mean(cell["moved"] for cell in group)):
            columns = [
                _spread([cell[name] for cell in group], form)
                for name, form in (
                    ("share", ".3f"),
                    ("moved", ".2g"),
                    ("frechet", ".0f"),
                    ("accuracy", ".0%"),
                    ("seconds", ".0f"),
                )
            ]
            lines.append(f"| {group[0]['method']} | {len(group)} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], form: str) -> str:
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):{form}}" + (f" ± {half:{form}}" if half else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "dense, trained on"], default=None)
    parser.add_argument(
        "--model", choices=["digits", "photos", "captions"], default="digits", help="module of examples/"
    )
    parser.add_argument("--record", help="name of the files that are written; quality, or quality_MODEL, if not given")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of quality.json and quality.md")
    options = parser.parse_args()
    global example
    example = importlib.import_module(options.model)
    name = options.record or ("quality" if options.model == "digits" else f"quality_{options.model}")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="the routers are untrained")
    settings = Settings(options.training_steps, options.samples)
    bench = Bench(settings, options.out / f"{name}.json")
    chosen = options.methods or ["dense, trained on", *METHODS]
    cells = [(method, share, seed) for seed in options.seeds for share in options.shares for method in chosen]
    for method, share, seed in tqdm(cells, desc="cells"):
        if method == "dense, trained on":
            bench.run(method, control, 1.0, seed)
        else:
            bench.run(method, METHODS[method], share, seed)
        (options.out / f"{name}.md").write_text(
            as_markdown(list(bench.cells.values()), settings, f"python {shlex.join(sys.argv)}")
        )
    print((options.out / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
