"""Inside the block: what skipped tokens give and get, without any training, against the rivals, on the digits DiT.

    python examples/benchmarks/inside.py          # about forty minutes on an idle core
    python examples/benchmarks/inside.py --quick  # to see that it runs
    python examples/benchmarks/inside.py --model photos --steps 50 20 --samples 4   # another model; needs scikit-image

Every row starts from the same noise and labels; *moved* is the mean squared distance of its samples from the dense model's own
at the same number of steps, and share its FLOPs, first dense step included, as a share of the dense sampling's. Every combination
of options has one ratio for all blocks and steps; ``ours`` is what ``calibrate`` (training-free) makes of the default options from
one dense sampling of other pictures, and bypass has such a table too; at few steps its weights are trained as well. Times are
eager seconds over the dense ones, taken right after. Writes `inside.md` and `inside.json` beside it, or with another model
`inside_NAME.md` and `inside_NAME.json`; what is there of other numbers of steps, of as many samples, is kept. diffusers' caches run
where they can be put on a model: FirstBlockCache on the digits DiT, TaylorSeer on the photographs' too.
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
    "reuse, kept context, score": {"skip": "reuse", "context": "kept", "selection": "score", "extrapolation": 0},
    "reuse, kept context, turn": {"skip": "reuse", "context": "kept", "selection": "turn", "extrapolation": 0},
    "reuse, all context, score": {"skip": "reuse", "context": "all", "selection": "score", "extrapolation": 0},
    "reuse, all context, score and turn": {"skip": "reuse", "context": "all", "selection": "score and turn"},
    "reuse, all context, turn, order 0": {"skip": "reuse", "context": "all", "selection": "turn", "extrapolation": 0},
    "reuse, all context, turn, order 1": {"skip": "reuse", "context": "all", "selection": "turn", "extrapolation": 1},
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


class BlockCache:
    """Rival: every block computed in one step of ``interval``, its last update reused or extrapolated in the others."""

    def __init__(self, model: nn.Module, interval: int, order: int) -> None:
        self.interval, self.order, self.step = interval, order, -1
        self.last_time, self.full_steps = float("inf"), 0
        self.memory: dict[tuple[int, int], list[tuple[float, Tensor]]] = {}
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, block in enumerate(blocks_of(model)):
            block.forward = types.MethodType(self._forward(index, type(block).forward), block)

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        now = float(kwargs["timestep" if "timestep" in kwargs else "t"].flatten()[0])
        self.step = 0 if now > self.last_time or self.step < 0 else self.step + 1
        self.last_time = now
        if self.step == 0:
            self.memory.clear()
        self.full = self.step < 2 or self.step % self.interval == 0
        self.full_steps += self.full

    def _forward(self, index: int, base: Callable[..., Any]) -> Callable[..., Any]:
        def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            """The streams come first, and go out in that order."""
            if self.full:
                output = base(block, *args, **kwargs)
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
        self.subjects = self._subjects(settings.samples)
        generator = torch.Generator().manual_seed(settings.seed)
        size, channels = self.example.CANVAS_SIZE, getattr(self.example, "CHANNELS", 1)
        self.noise = torch.randn(settings.samples, channels, size, size, generator=generator)
        self.inputs = self.example.calibration_batches(1, 4)[0]
        self.plain = self.example.load_model()
        self.dense = {steps: self._sample(self.plain, steps)[0] for steps in settings.steps}

    def _subjects(self, number: int) -> Any:
        """What pictures are asked for: labels, or captions."""
        labels = torch.arange(number) % self.example.NUM_CLASSES
        return self.example.captioned(labels, labels % 4) if hasattr(self.example, "captioned") else labels

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
                self.example.sample(model, self._subjects(number), steps=steps, generator=generator)
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
            for interval in (2, 3):
                for order in (0, 1):
                    cached = self.example.load_model()
                    rival = BlockCache(cached, interval, order)
                    self.note(f"whole blocks, one step in {interval}, order {order}", cached, steps, 0, 0)
                    self._count_last(rival.full_steps / steps)
            for name, apply in _diffusers_caches(self.settings.model):
                cached = self.example.load_model()
                try:
                    full = apply(cached)
                    self.note(name, cached, steps, 0, 0)
                except Exception as error:  # a library that can't serve this model says so in many ways
                    print(f"{name} at {steps} steps: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                    continue
                self._count_last(full() / steps)

    def _count_last(self, share: float) -> None:
        """The last row's share, which its sampling showed."""
        self.rows[-1] = replace(self.rows[-1], budget=share, share=share)


def _regions(steps: int, num_regions: int) -> list[int]:
    scheduler = digits.build_scheduler()
    scheduler.set_timesteps(steps)
    return [int(step) * num_regions // scheduler.config.num_train_timesteps for step in scheduler.timesteps]


CACHED = {
    "digits": (r"transformer_blocks\.\d+\.(attn1|ff)", "ff.net.0"),
    "photos": (r"blocks\.\d+\.(attention|mlp)", "mlp.0"),
}
"""What TaylorSeer caches, whose own patterns know the attention of diffusers' classes alone, and a module within it. The blocks of
the captions compute their attention in no module of its own."""


def _diffusers_caches(name: str) -> Iterator[tuple[str, Callable[[nn.Module], Callable[[], float]]]]:
    """diffusers' own caches: (name, how to put it on a model; that returns a count of the forwards that its blocks made).

    FirstBlockCache goes by the names of diffusers' classes and arguments, which the models in plain torch do not have.
    """
    if name not in CACHED:
        return
    pattern, inside = CACHED[name]
    from diffusers.hooks import (
        FirstBlockCacheConfig,
        TaylorSeerCacheConfig,
        apply_first_block_cache,
        apply_taylorseer_cache,
    )
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    def counted(model: nn.Module, put: Callable[[], None]) -> Callable[[], float]:
        calls, blocks = [0], blocks_of(model)
        for block in blocks:
            block.get_submodule(inside).register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        put()
        _set_cache_context(model, CacheContext("all"))
        return lambda: calls[0] / len(blocks)

    for threshold in (0.05, 0.1, 0.2) if name == "digits" else ():
        yield (
            f"FirstBlockCache, threshold {threshold}",
            lambda model, threshold=threshold: counted(  # type: ignore[misc]
                model, lambda: apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))
            ),
        )
    for interval in (2, 3):
        for order in (1, 2):
            config = TaylorSeerCacheConfig(
                cache_interval=interval,
                max_order=order,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=[pattern],
            )
            yield (
                f"TaylorSeer, one step in {interval}, order {order}",
                lambda model, config=config: counted(  # type: ignore[misc]
                    model, lambda: apply_taylorseer_cache(model, config)
                ),
            )


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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the table and the record")
    options = parser.parse_args()
    settings = Settings(SHARES, tuple(options.steps), options.samples, options.seed, options.model)
    if options.quick:
        settings = Settings((0.65,), (8,), 2, options.seed, options.model)
    warnings.filterwarnings("ignore", message="the routers are untrained")
    bench = Bench(settings)
    for method, choice in tqdm(OPTIONS.items(), desc="combinations"):
        bench.run_ours(method, choice)
    bench.run_rivals()
    name = "inside" if settings.model == "digits" else f"inside_{settings.model}"
    rows, commands = bench.rows, [f"python {shlex.join(sys.argv)}"]
    file = options.out / f"{name}.json"
    if file.exists() and not options.quick:
        known = json.loads(file.read_text())
        if (known["samples"], known["seed"]) == (settings.samples, settings.seed):
            kept = [Row(**row) for row in known["rows"] if row["steps"] not in settings.steps]
            rows, commands = [*kept, *rows], [*(known["commands"] if kept else ()), *commands]
    text = as_markdown(rows, settings, commands)
    print(text)
    if not options.quick:
        (options.out / f"{name}.md").write_text(text)
        record = {"commands": commands, "torch": torch.__version__, "samples": settings.samples, "seed": settings.seed}
        file.write_text(json.dumps({**record, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
