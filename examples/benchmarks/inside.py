"""Inside the block: what skipped tokens give and get, without any training, against the rivals, on the digits DiT.

    python examples/benchmarks/inside.py          # an hour and a half on a core
    python examples/benchmarks/inside.py --quick  # to see that it runs
    python examples/benchmarks/inside.py --model photos --steps 50 20 --samples 4   # another model; needs scikit-image
    python examples/benchmarks/inside.py --methods rivals "reuse, stale context, score"   # some rows anew

Every row starts from the same noise and labels; *moved* is the mean squared distance of its samples from the dense model's own
at the same number of steps, and share its FLOPs, first dense step included, as a share of the dense sampling's. Every combination
of options has one ratio for all blocks and steps (those that score tokens: by routers fitted to one dense sampling); ``ours`` is
what ``calibrate`` (training-free) makes of the default options from one dense sampling of other pictures, and bypass has such a
table too; at few steps its weights are trained as well. Of the rivals, whole blocks are cached and thresholds chosen to meet each
budget, and at intervals; TaylorSeer knows intervals alone. Times are eager seconds over the dense ones, taken right after. Writes
`inside.md` and `inside.json` beside it, or with another model `inside_NAME.md` and `inside_NAME.json`; rows that are there of as
many samples and not made anew are kept. diffusers' caches run where they can be put on a model: FirstBlockCache on the digits DiT
(on the others a few lines here that go by the same rule), TaylorSeer on the photographs' too.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import shlex
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import digits

import diffcr_compile
from diffcr_compile import DiffCRConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "bypass, kept context, score": {},
    "bypass, all context, score": {"context": "all"},
    "reuse, kept context, score": {"skip": "reuse", "context": "kept", "selection": "score", "extrapolation": 0},
    "reuse, kept context, score and turn": {"skip": "reuse", "context": "kept", "selection": "score and turn"},
    "reuse, kept context, turn": {"skip": "reuse", "context": "kept", "selection": "turn", "extrapolation": 0},
    "reuse, all context, score": {"skip": "reuse", "context": "all", "selection": "score", "extrapolation": 0},
    "reuse, all context, score and turn": {"skip": "reuse", "context": "all", "selection": "score and turn"},
    "reuse, all context, turn, order 0": {"skip": "reuse", "context": "all", "selection": "turn", "extrapolation": 0},
    "reuse, all context, turn, order 1": {"skip": "reuse", "context": "all", "selection": "turn", "extrapolation": 1},
    "reuse, stale context, score": {"skip": "reuse", "context": "stale", "selection": "score", "extrapolation": 0},
    "reuse, stale context, score and turn": {"skip": "reuse", "context": "stale", "selection": "score and turn"},
    "reuse, stale context, turn, order 0": {
        "skip": "reuse",
        "context": "stale",
        "selection": "turn",
        "extrapolation": 0,
    },
    "reuse, stale context, turn, order 1": {
        "skip": "reuse",
        "context": "stale",
        "selection": "turn",
        "extrapolation": 1,
    },
    "reuse, all context, turn, order 2": {"skip": "reuse", "context": "all", "selection": "turn", "extrapolation": 2},
}
"""Combinations of what a skipped token takes, what gives keys and values, and which tokens are kept."""


def routers_choose(options: dict[str, Any]) -> bool:
    """Whether routers choose, which are to be fitted then (bypass has a table of its own for that)."""
    return bool(options) and options.get("selection", "score") != "turn"


DEFAULT = "reuse, all context, turn, order 1"
OURS = "ours: calibrated without training"
BYPASS = "bypass, kept context, score"
TRAINED = "ours: bypass, calibrated with training"
FEW = 4
"""Steps up to which bypass is trained too: there reuse has little to go on."""

TRAINING = diffcr_compile.CalibrationConfig(steps=400, settle=1.0, learning_rate=5e-4)
"""Of the weights, at the table that was found without, against the dense outputs of ``SAMPLINGS`` samplings of eight pictures."""

SAMPLINGS = 12
FREE = diffcr_compile.CalibrationConfig(preset="training-free")
SHARES = (0.8, 0.65, 0.5)
THRESHOLDS = 7
SLACK = 0.005
"""Of the FLOPs, by which shares are taken for equal."""
STEPS = (50, 20, 8, 4)


@dataclass(frozen=True)
class Row:
    """One cell of the table. steps: asked for; share: FLOPs, and seconds, over those of the dense sampling; median: of the single
    pictures' squared distances, of which ``moved`` is the mean."""

    method: str
    steps: int
    budget: float
    share: float
    seconds: float
    moved: float
    median: float


def every(interval: int, steps: int) -> set[int]:
    """The first two steps, and one in ``interval``."""
    return {step for step in range(steps) if step < 2 or step % interval == 0}


def within(budget: float, steps: int) -> set[int]:
    """The first two steps, and as many more, evenly apart, as a budget allows."""
    number = max(int(budget * steps + 1e-9), 2)
    return {0, *(1 + round(place * (steps - 2) / max(number - 2, 1)) for place in range(number - 1))}


class BlockCache:
    """Rival: every block computed in some steps, its last update reused or extrapolated in the others."""

    def __init__(self, model: nn.Module, full: set[int], order: int) -> None:
        self.computed, self.order, self.step = full, order, -1
        self.last_time, self.full_steps = float("inf"), 0
        self.memory: dict[tuple[int, int], list[tuple[float, Tensor]]] = {}
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, block in enumerate(blocks_of(model)):
            block.forward = types.MethodType(self._forward(index, block.forward), block)

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        now = float(kwargs["timestep" if "timestep" in kwargs else "t"].flatten()[0])
        self.step = 0 if now > self.last_time or self.step < 0 else self.step + 1
        self.last_time = now
        if self.step == 0:
            self.memory.clear()
        self.full = self.step in self.computed
        self.full_steps += self.full

    def _forward(self, index: int, base: Callable[..., Any]) -> Callable[..., Any]:
        def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            """The streams come first, and go out in that order."""
            if self.full:
                output = base(*args, **kwargs)
                streams = output if isinstance(output, tuple) else (output,)
                self.streams = len(streams)
                for place, stream in enumerate(streams):
                    past = self.memory.setdefault((index, place), [])
                    past.insert(0, (self.last_time, stream - args[place]))
                    del past[2:]
                return output
            foretold = [args[place] + self._update(self.memory[index, place]) for place in range(self.streams)]
            return tuple(foretold) if self.streams > 1 else foretold[0]

        return forward

    def _update(self, past: list[tuple[float, Tensor]]) -> Tensor:
        (time0, latest), *others = past
        if not self.order or not others:
            return latest
        time1, before = others[0]
        return latest + (self.last_time - time0) / (time0 - time1) * (latest - before)


class FirstBlock:
    """Rival: FirstBlockCache's rule, for models that diffusers' goes past. Where the first block's update is near that of the last
    step that was computed, within ``threshold`` of its mean size, the other blocks' updates of that step are taken again."""

    def __init__(self, model: nn.Module, threshold: float) -> None:
        self.threshold, self.calls, self.blocks = threshold, 0, blocks_of(model)
        self.known: Tensor | None = None
        self.last_time, self.reuses = float("inf"), False
        self.tails: list[Tensor] = []
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, block in enumerate(self.blocks):
            block.forward = types.MethodType(self._forward(index, block.forward), block)

    @property
    def forwards(self) -> float:
        """Blocks computed in one sampling, in forwards of the whole model."""
        return self.calls / len(self.blocks)

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        now = float(kwargs["timestep" if "timestep" in kwargs else "t"].flatten()[0])
        if now > self.last_time:
            self.known = None
        self.last_time = now

    def _forward(self, index: int, base: Callable[..., Any]) -> Callable[..., Any]:
        def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if index and self.reuses:
                streams = list(args[: len(self.tails)])
                if index == len(self.blocks) - 1:
                    streams = [stream + tail for stream, tail in zip(streams, self.tails, strict=True)]
                return tuple(streams) if len(streams) > 1 else streams[0]
            self.calls += 1
            output = base(*args, **kwargs)
            streams = list(output) if isinstance(output, tuple) else [output]
            if index == 0:
                update = streams[0] - args[0]
                known, self.heads = self.known, streams
                near = known is not None and known.shape == update.shape
                self.reuses = near and bool((update - known).abs().mean() < self.threshold * known.abs().mean())  # type: ignore[operator,union-attr]
                if not self.reuses:
                    self.known = update
            elif index == len(self.blocks) - 1:
                self.tails = [stream - head for stream, head in zip(streams, self.heads, strict=True)]
            return output

        return forward


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(getattr(model, "transformer_blocks", None) or model.blocks)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Settings:
    shares: tuple[float, ...]
    steps: tuple[int, ...]
    samples: int
    seed: int
    model: str = "digits"


class Bench:
    """Samples, measures and keeps the rows."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.rows = settings, []  # type: ignore[var-annotated]
        self.example = importlib.import_module(settings.model)
        self.subjects, _ = self.example.subjects(settings.samples)
        generator = torch.Generator().manual_seed(settings.seed)
        size, channels = self.example.CANVAS_SIZE, getattr(self.example, "CHANNELS", 1)
        self.noise = torch.randn(settings.samples, channels, size, size, generator=generator)
        self.inputs = self.example.calibration_batches(1, 4)[0]
        self.plain = self.example.load_model()
        self.dense = {steps: self._sample(self.plain, steps)[0] for steps in settings.steps}

    def _sample(self, model: nn.Module, steps: int) -> tuple[Tensor, float]:
        start = time.perf_counter()
        images = self.example.sample(model, self.subjects, noise=self.noise, steps=steps)
        return images, time.perf_counter() - start

    def note(self, method: str, model: nn.Module, steps: int, budget: float, share: float, own_steps: int = 0) -> None:
        """Sample and write a row down."""
        images, seconds = self._sample(model, own_steps or steps)
        _, dense_seconds = self._sample(self.plain, steps)
        moved = (images - self.dense[steps]).square().flatten(1).mean(dim=1)
        self.rows.append(
            Row(method, steps, budget, share, seconds / dense_seconds, float(moved.mean()), float(moved.median()))
        )

    def run_ours(self, method: str, options: dict[str, Any]) -> None:
        model = diffcr_compile.transform(self.example.load_model(), DiffCRConfig(**options), example_inputs=self.inputs)
        if routers_choose(options):
            diffcr_compile.calibrate(model, self._recorded(model, 20, 4), budget=0.9, config=replace(FREE, steps=0))
        for steps in self.settings.steps:
            if method in (DEFAULT, BYPASS):
                self._calibrated(OURS if method == DEFAULT else f"{BYPASS}, calibrated", model, steps)
            if method == BYPASS and steps <= FEW:
                self._trained(steps)
            for budget in self.settings.shares if method != BYPASS else ():
                self._uniform(model, budget, steps)
                self.note(method, model, steps, budget, self._share(model, steps))

    def _calibrated(self, method: str, model: nn.Module, steps: int) -> None:
        batches = self._recorded(model, steps, 4)
        for budget in self.settings.shares:
            try:
                diffcr_compile.calibrate(model, batches, budget=budget, config=FREE)
            except diffcr_compile.BudgetError:
                continue
            self.note(method, model, steps, budget, self._share(model, steps))

    def _trained(self, steps: int) -> None:
        config = DiffCRConfig(num_regions=50)
        for budget in self.settings.shares:
            model = diffcr_compile.transform(self.example.load_model(), config, example_inputs=self.inputs)
            batches = self._recorded(model, steps, 8, SAMPLINGS)
            diffcr_compile.calibrate(model, batches, budget=budget, config=FREE)
            diffcr_compile.calibrate(model, batches, budget=budget, config=TRAINING)
            self.note(TRAINED, model, steps, budget, self._share(model, steps))

    def _recorded(self, model: nn.Module, steps: int, number: int, times: int = 1) -> list[dict[str, Any]]:
        """What the dense model is fed in some samplings of so many pictures, others than those that are measured."""
        with diffcr_compile.record(model) as batches:
            diffcr_compile.set_ratios(model, 0)
            for place in range(times):
                generator = torch.Generator().manual_seed(self.settings.seed + 1 + 1000 * place)
                self.example.sample(model, self.example.subjects(number)[0], steps=steps, generator=generator)
        return list(batches)

    def _uniform(self, model: nn.Module, budget: float, steps: int) -> None:
        """The smallest ratio that costs at most the budget in all blocks and regions, or else the largest there is."""
        low, high = 0, 1000
        while low < high:
            middle = (low + high) // 2
            diffcr_compile.set_ratios(model, middle / 1000)
            low, high = (low, middle) if self._share(model, steps) <= budget else (middle + 1, high)
        diffcr_compile.set_ratios(model, low / 1000)

    def _share(self, model: nn.Module, steps: int) -> float:
        cost = diffcr_compile.cost(model, self.inputs)
        flops = [cost.routed_flops[region] for region in _regions(steps, len(cost.routed_flops))]
        if cost.memory_bytes:
            flops[0] = cost.dense_flops
        return sum(flops) / steps / cost.dense_flops

    def run_rivals(self) -> None:
        for steps in self.settings.steps:
            for budget in self.settings.shares:
                fewer = max(round(budget * steps), 1)
                self.note("fewer dense steps", self.plain, steps, budget, fewer / steps, own_steps=fewer)
            for order in (0, 1):
                for budget in self.settings.shares:
                    self._cache_blocks(
                        f"whole blocks to the budget, order {order}", steps, within(budget, steps), order
                    )
                for interval in (2, 3):
                    self._cache_blocks(
                        f"whole blocks, one step in {interval}, order {order}", steps, every(interval, steps), order
                    )
            for name, apply in thresholded(self.settings.model):
                for budget in self.settings.shares:
                    self._find_threshold(name, apply, steps, budget)
            for name, apply in _diffusers_caches(self.settings.model):
                cached = self.example.load_model()
                try:
                    full = apply(cached)
                    self.note(name, cached, steps, 0, 0)
                except Exception as error:  # a library that can't serve this model says so in many ways
                    print(f"{name} at {steps} steps: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                    continue
                self._count_last(full() / steps)

    def _cache_blocks(self, method: str, steps: int, full: set[int], order: int) -> None:
        cached = self.example.load_model()
        rival = BlockCache(cached, full, order)
        self.note(method, cached, steps, 0, 0)
        self._count_last(rival.full_steps / steps)

    def _find_threshold(
        self, method: str, apply: Callable[[nn.Module, float], Callable[[], float]], steps: int, budget: float
    ) -> None:
        """The row of the smallest threshold, of ``THRESHOLDS`` halvings, whose blocks are within the budget."""
        low, high = 0.0, 1.0
        for _ in range(THRESHOLDS):
            middle = (low + high) / 2
            cached = self.example.load_model()
            full = apply(cached, middle)
            self._sample(cached, steps)
            low, high = (low, middle) if full() / steps <= budget + 1e-9 else (middle, high)
        cached = self.example.load_model()
        full = apply(cached, high)
        self.note(method, cached, steps, 0, 0)
        self._count_last(full() / steps)

    def _count_last(self, share: float) -> None:
        """The last row's share, which its sampling showed."""
        self.rows[-1] = replace(self.rows[-1], budget=share, share=share)


def _regions(steps: int, num_regions: int) -> list[int]:
    scheduler = digits.build_scheduler()
    scheduler.set_timesteps(steps)
    return [int(step) * num_regions // scheduler.config.num_train_timesteps for step in scheduler.timesteps]


CACHED = {
    "digits": (r"transformer_blocks\.\d+\.(attn1|ff)", "ff"),
    "inpainting": (r"transformer_blocks\.\d+\.(attn1|ff)", "ff"),
    "photos": (r"blocks\.\d+\.(attention|mlp)", "mlp"),
}
"""What TaylorSeer caches, whose own patterns know the attention of diffusers' classes alone, and one of these. The blocks of the
captions compute their attention in no module of its own."""


def _counted(model: nn.Module, modules: list[nn.Module], put: Callable[[], None]) -> Callable[[], float]:
    """``put`` a cache of diffusers on the model; the answer counts the forwards of the model in which all ``modules`` ran."""
    calls = [0]
    for module in modules:
        inner = module.forward

        def forward(_: nn.Module, *args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            calls[0] += 1
            return inner(*args, **kwargs)

        module.forward = types.MethodType(forward, module)
    put()
    reset_caches(model)
    return lambda: calls[0] / len(modules)


def reset_caches(model: nn.Module) -> None:
    """Have diffusers' caches forget: another sampling begins."""
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
    _set_cache_context(model, CacheContext("all"))


def thresholded(name: str) -> Iterator[tuple[str, Callable[[nn.Module, float], Callable[[], float]]]]:
    """FirstBlockCache at a threshold: diffusers' own where it knows the model's classes, else its rule."""
    if name not in ("digits", "inpainting"):

        def by_rule(model: nn.Module, threshold: float) -> Callable[[], float]:
            rival = FirstBlock(model, threshold)
            return lambda: rival.forwards

        yield "first-block rule to the budget", by_rule
        return
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    def by_diffusers(model: nn.Module, threshold: float) -> Callable[[], float]:
        config = FirstBlockCacheConfig(threshold=threshold)
        return _counted(model, blocks_of(model), lambda: apply_first_block_cache(model, config))

    yield "FirstBlockCache to the budget", by_diffusers


def _diffusers_caches(name: str) -> Iterator[tuple[str, Callable[[nn.Module], Callable[[], float]]]]:
    """TaylorSeer at intervals: (name, how to put it on a model; that returns a count of the forwards that its blocks made)."""
    if name not in CACHED:
        return
    for interval in (2, 3):
        for order in (1, 2):
            put = functools.partial(taylorseer, name, interval=interval, order=order)
            yield f"TaylorSeer, one step in {interval}, order {order}", put


def taylorseer(name: str, model: nn.Module, interval: int, order: int) -> Callable[[], float]:
    """diffusers' TaylorSeer on the model of an example; a count of the forwards that its blocks made. Raises UnsupportedError where
    what it caches lies in no modules of their own."""
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    if name not in CACHED:
        raise diffcr_compile.UnsupportedError(f"TaylorSeer finds nothing to cache in the model of {name}")
    pattern, part = CACHED[name]
    config = TaylorSeerCacheConfig(
        cache_interval=interval, max_order=order, taylor_factors_dtype=torch.float32, cache_identifiers=[pattern]
    )
    parts = [block.get_submodule(part) for block in blocks_of(model)]
    return _counted(model, parts, lambda: apply_taylorseer_cache(model, config))


def is_rival(row: Row) -> bool:
    return not row.method.startswith(("ours", "bypass", "reuse"))


def verdict(rows: list[Row]) -> list[str]:
    """Ours against the rival that moves least among those of no more FLOPs, and of no more time."""
    lines = [
        "",
        "## Against the best rival",
        "",
        "Ratio: ours moved over the rival's, and in brackets that of the medians; below one is ahead. The rival is that of the "
        "lowest mean; those that computed everything are left out. Times are of single eager samplings of small models, and noisy.",
        "",
        "| steps | budget | ours | share | moved | no more FLOPs | moved | ratio | no more time | moved | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rivals = [row for row in rows if is_rival(row) and row.share < 1 - SLACK]
    own = (row for row in rows if row.method in (OURS, TRAINED))
    for ours in sorted(own, key=lambda row: (-row.steps, -row.budget, row.method == TRAINED)):
        cells = []
        for limit, most in (("share", ours.share + SLACK), ("seconds", ours.seconds)):
            others = [row for row in rivals if row.steps == ours.steps and getattr(row, limit) <= most]
            best = min(others, key=lambda row: row.moved, default=None)
            if best is None:
                cells += ["none", "", ""]
                continue
            ratio, medians = ours.moved / max(best.moved, 1e-12), ours.median / max(best.median, 1e-12)
            cells += [best.method, f"{best.moved:.2g}", f"{ratio:.2g} ({medians:.2g})"]
        kind = "bypass, trained" if ours.method == TRAINED else "training-free"
        known = f"{ours.steps} | {ours.budget:.2f} | {kind} | {ours.share:.2f} | {ours.moved:.2g}"
        lines.append(f"| {known} | {' | '.join(cells)} |")
    return lines


def ranking(rows: list[Row]) -> list[str]:
    """Of combinations with one ratio for all: how many times what the best of them moved, the geometric mean over the cells."""
    cells: dict[tuple[int, float], dict[str, float]] = {}
    for row in rows:
        if row.method in OPTIONS and row.method != BYPASS:
            cells.setdefault((row.steps, row.budget), {})[row.method] = row.moved
    times: dict[str, list[float]] = {}
    for cell in cells.values():
        for method, moved in cell.items():
            times.setdefault(method, []).append(moved / min(cell.values()))
    means = {method: statistics.geometric_mean(ratios) for method, ratios in times.items()}
    lines = [
        "",
        "## Which combination",
        "",
        f"One ratio for all blocks and steps; over {len(cells)} cells (steps, budgets) the geometric mean of how many times as "
        "much as the best combination each moved. The default is in bold.",
        "",
        "| combination | times the best |",
        "|---|---|",
    ]
    for method, mean in sorted(means.items(), key=lambda item: item[1]):
        bold = "**" if method == DEFAULT else ""
        lines.append(f"| {bold}{method}{bold} | {mean:.1f} |")
    return lines


def as_markdown(rows: list[Row], settings: Settings, commands: list[str]) -> str:
    """One table for each number of steps."""
    lines = [
        "# Inside the block: quality without training",
        "",
        f"{', '.join(f'`{command}`' for command in commands)}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"float32, {settings.model} DiT, {settings.samples} samples, DDIM, seed {settings.seed}. "
        "Moved: mean squared distance from the dense samples of as many steps, from equal noise; median: of the pictures, since "
        "one that changes its mind outweighs all others in the mean. Share: FLOPs over the dense "
        "sampling's, first dense step included. Time: eager, over a dense sampling taken right after it.",
    ]
    lines += verdict(rows) + ranking(rows)
    for steps in sorted({row.steps for row in rows}, reverse=True):
        lines += [
            "",
            f"## {steps} steps",
            "",
            "| method | budget | share | time | moved | median |",
            "|---|---|---|---|---|---|",
        ]
        for row in sorted((row for row in rows if row.steps == steps), key=lambda row: (-row.budget, row.moved)):
            bold = "**" if row.method in (OURS, TRAINED) else ""
            lines.append(
                f"| {bold}{row.method}{bold} | {row.budget:.2f} | {row.share:.2f} | {row.seconds:.2f} | {row.moved:.2g} | "
                f"{row.median:.2g} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one budget, few steps and samples; nothing is written")
    parser.add_argument(
        "--model", choices=["digits", "photos", "captions"], default="digits", help="module of examples/"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument(
        "--methods", nargs="+", choices=[*OPTIONS, "rivals"], help="rows to make anew; all if not given"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the table and the record")
    options = parser.parse_args()
    settings = Settings(SHARES, tuple(options.steps), options.samples, options.seed, options.model)
    if options.quick:
        settings = Settings((0.65,), (8,), 2, options.seed, options.model)
    warnings.filterwarnings("ignore", message="the routers are untrained")
    bench = Bench(settings)
    for method in tqdm(options.methods or [*OPTIONS, "rivals"], desc="methods"):
        if method == "rivals":
            bench.run_rivals()
        else:
            bench.run_ours(method, OPTIONS[method])
    name = "inside" if settings.model == "digits" else f"inside_{settings.model}"
    given = (
        sys.argv[: sys.argv.index("--out")] + sys.argv[sys.argv.index("--out") + 2 :]
        if "--out" in sys.argv
        else sys.argv
    )
    rows, commands = bench.rows, [f"python {shlex.join(given)}"]
    file = options.out / f"{name}.json"
    if file.exists() and not options.quick:
        known = json.loads(file.read_text())
        if (known["samples"], known["seed"]) == (settings.samples, settings.seed):
            made = {(row.method, row.steps) for row in rows}
            kept = [
                row
                for row in (Row(**row) for row in known["rows"])
                if row.steps not in settings.steps
                or not (
                    (row.method, row.steps) in made
                    or not options.methods
                    or ("rivals" in options.methods and is_rival(row))
                )
            ]
            rows, commands = [*kept, *rows], [*(known["commands"] if kept else ()), *commands]
    text = as_markdown(rows, settings, commands)
    print(text)
    if not options.quick:
        (options.out / f"{name}.md").write_text(text)
        record = {"commands": commands, "torch": torch.__version__, "samples": settings.samples, "seed": settings.seed}
        file.write_text(json.dumps({**record, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
