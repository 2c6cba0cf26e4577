"""Calibrate a trained Diffusion Transformer of handwritten digits at two budgets, compile it, and compare.

    python examples/demo.py            # a few minutes on two CPU cores; pictures and numbers go to out/
    python examples/demo.py --quick    # a minute, to see that everything runs; the numbers mean nothing

Every row of the table starts from the same noise and the same labels, compiled in the same way:

* dense: the model as it was trained; and with fewer sampling steps, the rival that needs no method at all.
* training-free: tokens take turns, the others reuse their last updates, extrapolated; the table is chosen by `calibrate` from one
  dense sampling of other pictures. Nothing is trained.
* DiffCR: routers, ratios and weights learned by `calibrate` under the budget.
* uniform, same weights: that very model, with one ratio in all blocks and regions that costs the same FLOPs.
* uniform, trained alike (with `--alike`, which takes twice the time): one ratio from the start, and as many steps on the same
  batches with the same options, routers and weights only (Mixture of Depths). What the learned table is worth is the
  difference to this row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import digits
import torch
from demo_report import Result, Run, draw_compute, draw_samples, draw_tables, draw_tokens, format_table
from torch import Tensor, nn
from tqdm import tqdm

import diffcr_compile
from diffcr_compile import CalibrationConfig, CalibrationReport, DiffCRConfig

NUM_REFERENCES = 1000  # held-out pictures that the Fréchet distance is taken to
NUM_TRACED = 10  # pictures that are made again to see which tokens were kept
THOUSANDTHS = 1000  # ratios are counted in them

REUSE = DiffCRConfig(skip="reuse")
NUM_RECORDED = 4  # pictures whose sampling is recorded to choose the training-free table

RATIO_TRAVEL = 2.0
"""How far a ratio may move in one calibration, in sum over the steps: enough to skip a whole block, and no faster than needed."""


@dataclass(frozen=True)
class Settings:
    """What the demo runs. Budgets are shares of the dense FLOPs."""

    budgets: tuple[float, ...]
    calibration: CalibrationConfig
    calibration_batch: int
    num_batches: int
    sampling_steps: int
    num_samples: int
    sampling_batch: int
    seed: int
    alike: bool


@dataclass(frozen=True)
class Variant:
    """A row of the table: a lowered model, the ratios it runs with, and the steps it samples in."""

    name: str
    model: nn.Module
    table: Tensor
    steps: int


def calibrate_model(
    budget: float, batches: list[dict[str, Tensor]], config: CalibrationConfig, uniform: bool = False
) -> tuple[nn.Module, CalibrationReport]:
    """The trained DiT, calibrated and lowered; ``uniform``: with one ratio throughout, as Mixture of Depths has it."""
    model = diffcr_compile.transform(digits.load_model(), example_inputs=batches[0])
    if uniform:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the routers are untrained")  # calibrate trains them next
            diffcr_compile.set_ratios(model, uniform_ratio(model, budget))
        config = dataclasses.replace(config, ramp=0.0, settle=1.0)  # learn nothing but routers and weights
    report = diffcr_compile.calibrate(model, batches, budget=budget, config=config)
    return diffcr_compile.lower(model, scope="regional"), report


def choose_tables(settings: Settings, inputs: dict[str, Tensor]) -> tuple[nn.Module, dict[float, CalibrationReport]]:
    """The trained DiT with reuse, lowered, and a table for each budget, chosen from one dense sampling."""
    model = diffcr_compile.transform(digits.load_model(), REUSE, example_inputs=inputs)
    labels = torch.arange(NUM_RECORDED) % digits.NUM_CLASSES
    with diffcr_compile.record(model) as batches:
        digits.sample(
            model, labels, steps=settings.sampling_steps, generator=torch.Generator().manual_seed(settings.seed + 3)
        )
    reports = {budget: diffcr_compile.calibrate(model, batches, budget=budget) for budget in settings.budgets}
    return diffcr_compile.lower(model, scope="regional"), reports


def uniform_ratio(model: nn.Module, budget: float) -> float:
    """The smallest ratio, in thousandths, that costs at most ``budget`` where all blocks and regions have it."""
    before = diffcr_compile.ratios(model)
    low, high = 0, THOUSANDTHS
    while low < high:
        middle = (low + high) // 2
        diffcr_compile.set_ratios(model, middle / THOUSANDTHS)
        low, high = (low, middle) if diffcr_compile.cost(model).share <= budget else (middle + 1, high)
    diffcr_compile.set_ratios(model, before)
    return low / THOUSANDTHS


def build_variants(settings: Settings) -> tuple[list[Variant], dict[float, CalibrationReport]]:
    """Everything that is compared, dense first, and the report of each budget."""
    batches = digits.calibration_batches(settings.num_batches, settings.calibration_batch, settings.seed)
    dense = diffcr_compile.lower(
        diffcr_compile.transform(digits.load_model(), example_inputs=batches[0]), scope="regional"
    )
    nothing = diffcr_compile.ratios(dense)
    variants, reports = [Variant("dense", dense, nothing, settings.sampling_steps)], {}
    reusing, chosen = choose_tables(settings, batches[0])
    for budget in settings.budgets:
        print(f"\n{chosen[budget]}")
        print(f"\ncalibrating for {budget:.0%} of the dense FLOPs")
        model, reports[budget] = calibrate_model(budget, batches, settings.calibration)
        print(reports[budget])
        uniform = torch.full_like(nothing, uniform_ratio(model, budget))
        fewer = round(budget * settings.sampling_steps)
        variants += [
            Variant(f"dense, {fewer} of {settings.sampling_steps} steps", dense, nothing, fewer),
            Variant(f"training-free {budget:.0%}", reusing, chosen[budget].table, settings.sampling_steps),
            Variant(f"DiffCR {budget:.0%}", model, reports[budget].table, settings.sampling_steps),
            Variant(f"uniform {budget:.0%}, same weights", model, uniform, settings.sampling_steps),
        ]
        if settings.alike:
            alike, _ = calibrate_model(budget, batches, settings.calibration, uniform=True)
            variants.append(Variant(f"uniform {budget:.0%}, trained alike", alike, uniform, settings.sampling_steps))
    return variants, reports


def generate(variants: list[Variant], settings: Settings) -> list[Run]:
    """Every variant's pictures from equal noise, with the seconds of each batch; the variants take turns batch by batch."""
    labels = torch.arange(settings.num_samples) % digits.NUM_CLASSES
    generator = torch.Generator().manual_seed(settings.seed + 1)
    noise = torch.randn(len(labels), 1, digits.CANVAS_SIZE, digits.CANVAS_SIZE, generator=generator)
    parts = list(zip(labels.split(settings.sampling_batch), noise.split(settings.sampling_batch), strict=True))
    for variant in tqdm(variants, desc="compiling", leave=False):
        run_variant(dataclasses.replace(variant, steps=2 * variant.table.shape[0]), *parts[0])  # steps in each region
    images: list[list[Tensor]] = [[] for _ in variants]
    seconds: list[list[float]] = [[] for _ in variants]
    for part in tqdm(parts, desc="sampling", leave=False):
        for index, variant in enumerate(variants):
            start = time.perf_counter()
            images[index].append(run_variant(variant, *part))
            seconds[index].append(time.perf_counter() - start)
    return [
        Run(labels, noise, torch.cat(pictures), tuple(times)) for pictures, times in zip(images, seconds, strict=True)
    ]


def run_variant(variant: Variant, labels: Tensor, noise: Tensor) -> Tensor:
    """Pictures (B, 1, 32, 32) of one variant."""
    diffcr_compile.set_ratios(variant.model, variant.table)
    return digits.sample(variant.model, labels, steps=variant.steps, noise=noise)


def measure(variants: list[Variant], runs: list[Run], settings: Settings) -> list[Result]:
    """The numbers of every row. Times are as shares of the dense time in the same round."""
    classifier = digits.load_classifier()
    real, _ = digits.pictures(NUM_REFERENCES, torch.Generator().manual_seed(settings.seed + 2), train=False)
    reference = features(classifier, real)
    dense = runs[0]
    results = []
    for variant, run in zip(variants, runs, strict=True):
        diffcr_compile.set_ratios(variant.model, variant.table)
        share = flops_of(variant) / flops_of(variants[0])
        results.append(
            Result(
                name=variant.name,
                flops_share=share,
                time_shares=tuple(own / other for own, other in zip(run.seconds, dense.seconds, strict=True)),
                frechet=digits.frechet_distance(features(classifier, run.images), reference),
                accuracy=digits.class_accuracy(run.images, run.labels, classifier),
                moved=digits.distance(run.images, dense.images),
                memory=cost_of_a_picture(variant).memory_bytes,
            )
        )
    return results


def cost_of_a_picture(variant: Variant) -> diffcr_compile.Cost:
    """Of one forward, with the ratios that the model has."""
    return diffcr_compile.cost(variant.model, digits.calibration_batches(1, 1)[0])


def flops_of(variant: Variant) -> int:
    """FLOPs of sampling one picture: each step at what its timestep region costs, the first of a trajectory dense with reuse."""
    cost = cost_of_a_picture(variant)
    scheduler = digits.build_scheduler()
    scheduler.set_timesteps(variant.steps)
    regions = [
        int(step) * len(cost.routed_flops) // scheduler.config.num_train_timesteps for step in scheduler.timesteps
    ]
    flops = [cost.routed_flops[region] for region in regions]
    return sum(flops[1:]) + (cost.dense_flops if cost.memory_bytes else flops[0])


@torch.no_grad()
def features(classifier: digits.DigitClassifier, images: Tensor) -> Tensor:
    """The classifier's features (B, 64) of pictures."""
    return classifier.features(images)


def write_pictures(
    out: Path, variants: list[Variant], runs: list[Run], results: list[Result], reports: dict[float, CalibrationReport]
) -> list[Path]:
    """The pictures, and where they are."""
    paths = [out / "samples.png", out / "ratios.png"]
    draw_samples(paths[0], results, runs)
    draw_tables(paths[1], reports)
    for budget, report in reports.items():
        paths.append(out / f"calibration_{budget:.0%}.png".replace("%", ""))
        report.plot(paths[-1])
    budget = min(reports)
    variant, run = next((v, r) for v, r in zip(variants, runs, strict=True) if v.name == f"DiffCR {budget:.0%}")
    kept = trace_sampling(variant, run)
    paths += [out / "tokens.png", out / "compute.png"]
    draw_tokens(paths[-2], kept, run, title=f"tokens that each block kept, at {budget:.0%} of the FLOPs")
    draw_compute(paths[-1], kept, run, title=f"blocks that each token went through, at {budget:.0%} of the FLOPs")
    return paths


def trace_sampling(variant: Variant, run: Run) -> dict[str, list[Tensor]]:
    """Which tokens each block kept (block -> one (B, K) per step) while the first pictures of a run are made again."""
    diffcr_compile.set_ratios(variant.model, variant.table)
    with diffcr_compile.trace(variant.model) as seen:
        digits.sample(variant.model, run.labels[:NUM_TRACED], steps=variant.steps, noise=run.noise[:NUM_TRACED])
    return seen.kept


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.6], help="shares of the dense FLOPs")
    parser.add_argument("--steps", type=int, default=48, help="calibration steps for each budget")
    parser.add_argument("--samples", type=int, default=40, help="pictures of each row")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--alike", action="store_true", help="also a uniform table trained alike, for each budget")
    parser.add_argument("--quick", action="store_true", help="one budget and little of everything")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the command line asks for."""
    if args.quick:
        return Settings(
            budgets=(0.9,),
            calibration=CalibrationConfig(steps=8, seed=args.seed),
            calibration_batch=4,
            num_batches=4,
            sampling_steps=4,
            num_samples=20,
            sampling_batch=10,
            seed=args.seed,
            alike=False,
        )
    return Settings(
        budgets=tuple(args.budgets),
        calibration=CalibrationConfig(
            steps=args.steps, learning_rate=3e-4, ratio_learning_rate=RATIO_TRAVEL / args.steps, seed=args.seed
        ),
        calibration_batch=8,
        num_batches=min(args.steps, 120),
        sampling_steps=args.sampling_steps,
        num_samples=args.samples,
        sampling_batch=20,
        seed=args.seed,
        alike=args.alike,
    )


def main() -> None:
    start = time.perf_counter()
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = settings_of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    variants, reports = build_variants(settings)
    runs = generate(variants, settings)
    results = measure(variants, runs, settings)
    paths = write_pictures(args.out, variants, runs, results, reports)
    seconds = time.perf_counter() - start
    record = {
        "settings": dataclasses.asdict(settings),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(result) for result in results],
        "tables": {str(budget): report.table.tolist() for budget, report in reports.items()},
        "history": {str(budget): report.history for budget, report in reports.items()},
    }
    (args.out / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    print("\n" + format_table(results))
    print("\n" + "\n".join(f"wrote {path}" for path in [*paths, args.out / "demo.json"]))
    print(f"{seconds:.0f} seconds")


if __name__ == "__main__":
    main()
