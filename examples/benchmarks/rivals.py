"""Time of one sampling: ours, alone and beneath caches, against the rivals, all compiled, on a DiT of diffusers on the CPU.

    pip install --no-deps tomesd cache-dit          # what is missing is left out; cache-dit needs transformers too
    python examples/benchmarks/rivals.py            # a quarter of an hour on two idle cores
    python examples/benchmarks/rivals.py --quick    # to see that it runs

Weights are random (``inside.py`` measures quality): what a method computes, and how long that takes. FLOPs are those of the
blocks that ran over those of the dense sampling; efficiency is the speed-up over what these promise. Thresholds of caches, whose
hits depend on weights, are the first of a few at which at most `AT_MOST` of the dense model's blocks run. Writes `rivals.md` and
`rivals.json` beside it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import torchvision_operators
from timing import (
    Rounds,
    format_machine,
    format_spread,
    format_table,
    load,
    machine,
    measure_in_turn,
    quartiles,
    ratio_quartiles,
    write_record,
)
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile.flops import count_flops

_TORCHVISION = torchvision_operators.define()

RATIO = 0.5
AT_MOST = 0.6
THRESHOLDS = (0.1, 0.2, 0.4, 0.8)
DENSE = "dense"


@dataclass(frozen=True)
class Setting:
    """Of DiT-S/2 at 512 x 512 pixels: 1024 tokens."""

    heads: int = 6
    head_dim: int = 64
    depth: int = 12
    latent_size: int = 64
    batch: int = 2
    steps: int = 20


@dataclass
class Method:
    """A model as a method has it. calls: how often its blocks ran since this was last set to 0; share: FLOPs of a block's call over
    those of a dense one; dense_calls: of a sampling's, those that are dense all the same; reset: before each sampling."""

    model: nn.Module
    share: float = 1.0
    dense_calls: int = 0
    calls: int = 0
    reset: Callable[[], object] = field(default=lambda: None)

    def flops(self, dense: int) -> float:
        """Over those of ``dense`` calls of dense blocks, in the last sampling."""
        return (self.dense_calls + (self.calls - self.dense_calls) * self.share) / dense


class Bench:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.thresholds: dict[str, float] = {}
        generator = torch.Generator().manual_seed(0)
        size = setting.latent_size
        self.noise = torch.randn(setting.batch, 4, size, size, generator=generator)
        self.labels = torch.arange(setting.batch)
        self.inputs = {
            "hidden_states": self.noise,
            "timestep": torch.full((setting.batch,), 500),
            "class_labels": self.labels,
        }

    def build(self) -> Any:
        """The dense model; the same weights each time."""
        torch.manual_seed(0)
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=self.setting.heads,
            attention_head_dim=self.setting.head_dim,
            num_layers=self.setting.depth,
            sample_size=self.setting.latent_size,
        ).eval()

    @torch.inference_mode()
    def sample(self, method: Method) -> Tensor:
        scheduler = diffusers.DDIMScheduler()
        scheduler.set_timesteps(self.setting.steps)
        x = self.noise
        for step in scheduler.timesteps:
            predicted = method.model(x, step.expand(len(x)), self.labels, return_dict=False)[0]
            x = scheduler.step(predicted, step, x).prev_sample
        return x

    def prepare(self, method: Method) -> None:
        method.calls = 0
        method.reset()

    def dense(self, run: Callable[..., Any] | None = None, share: float = 1.0) -> Method:
        """Blocks compiled one by one: a graph for all. ``run``: what is compiled in the place of their own forward."""
        model = self.build()
        run = run or type(model.transformer_blocks[0]).forward
        return self._counted(Method(model, share), torch.compile(run, fullgraph=True, dynamic=False))

    def ours(self, **options: Any) -> Method:
        model = diffcr_compile.transform(
            self.build(), diffcr_compile.DiffCRConfig(**options), example_inputs=self.inputs
        )
        diffcr_compile.set_ratios(model, RATIO)
        share = diffcr_compile.cost(model, self.inputs).share
        diffcr_compile.lower(model, scope="regional")
        method = Method(model, share, self.setting.depth if options.get("skip") == "reuse" else 0)
        return self._counted(method)

    def merged(self) -> Method:
        """ToMe: each block on its tokens merged, as many as ours keeps, and its update given to all that were merged."""
        match = importlib.import_module("tomesd.merge").bipartite_soft_matching_random2d
        side = self.setting.latent_size // 2
        base = type(self.build().transformer_blocks[0]).forward

        def run(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            merge, unmerge = match(x, side, side, 2, 2, round(RATIO * side**2), no_rand=True)
            merged = merge(x)
            return x + unmerge(base(block, merged, *args, **kwargs) - merged)

        return self.dense(run, self._flops_of(run) / self._flops_of(None))

    def _flops_of(self, run: Callable[..., Any] | None) -> int:
        """Of one forward of the model."""
        model = self.build()
        if run is not None:
            for block in model.transformer_blocks:
                block.forward = types.MethodType(run, block)
        with count_flops() as counter, torch.no_grad():
            model(**self.inputs)
        return counter.get_total_flops()

    def _counted(self, method: Method, run: Callable[..., Any] | None = None) -> Method:
        """Count the blocks' calls, beneath whatever is put around them later."""
        for block in method.model.transformer_blocks:  # type: ignore[union-attr]
            inner = types.MethodType(run, block) if run else block.forward

            def forward(_: nn.Module, *args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                method.calls += 1
                return inner(*args, **kwargs)

            block.forward = types.MethodType(forward, block)
        return method

    def first_block_cache(self, build: Callable[[], Method]) -> tuple[Method, str]:
        def put(model: nn.Module, threshold: float) -> None:
            diffusers.apply_first_block_cache(model, diffusers.FirstBlockCacheConfig(threshold=threshold))

        return self._cached("FirstBlockCache", build, put, self._reset)

    def cache_dit(self, build: Callable[[], Method]) -> tuple[Method, str]:
        library = importlib.import_module("cache_dit")
        functors = importlib.import_module("cache_dit.caching.patch_functors")

        def put(model: nn.Module, threshold: float) -> None:
            adapter = library.BlockAdapter(
                transformer=model,
                blocks=model.transformer_blocks,
                forward_pattern=library.ForwardPattern.Pattern_3,
                check_forward_pattern=False,
                patch_functor=functors.DiTPatchFunctor(),
            )
            config = library.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                max_warmup_steps=2,
                residual_diff_threshold=threshold,
                num_inference_steps=self.setting.steps,
            )
            library.enable_cache(adapter, cache_config=config)

        def reset(model: nn.Module) -> None:
            library.refresh_context(model, num_inference_steps=self.setting.steps)

        return self._cached("cache-dit", build, put, reset)

    def _cached(
        self,
        name: str,
        build: Callable[[], Method],
        put: Callable[[nn.Module, float], None],
        reset: Callable[[nn.Module], None],
    ) -> tuple[Method, str]:
        """With the first threshold at which few enough blocks of the dense model run."""

        def at(build: Callable[[], Method], threshold: float) -> Method:
            method = build()
            put(method.model, threshold)
            method.reset = functools.partial(reset, method.model)
            return method

        for threshold in THRESHOLDS if name not in self.thresholds else ():
            method = at(self.dense, threshold)
            self.prepare(method)
            self.sample(method)
            self.thresholds[name] = threshold
            if method.calls <= AT_MOST * self.setting.depth * self.setting.steps:
                break
        return at(build, self.thresholds[name]), f", threshold {self.thresholds[name]}"

    def taylorseer(self) -> tuple[Method, str]:
        """Attention and feed-forward each remembered, and each compiled: its hooks lie inside the blocks."""
        model = self.build()
        method = Method(model)
        runs = [torch.compile(type(part).forward, dynamic=False) for part in _parts(model.transformer_blocks[0])]
        for block in model.transformer_blocks:
            for part, run in zip(_parts(block), runs, strict=True):
                part.forward = types.MethodType(run, part)
        for block in model.transformer_blocks:
            inner = block.ff.forward

            def forward(_: nn.Module, *args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                method.calls += 1
                return inner(*args, **kwargs)

            block.ff.forward = types.MethodType(forward, block.ff)
        config = diffusers.TaylorSeerCacheConfig(
            cache_interval=2,
            max_order=1,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
        )
        diffusers.apply_taylorseer_cache(model, config)
        method.reset = lambda: self._reset(model)
        return method, ", one step in 2, order 1"

    @staticmethod
    def _reset(model: nn.Module) -> None:
        diffusers.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
        hooks = importlib.import_module("diffusers.hooks.hooks")
        hooks._set_cache_context(model, hooks.CacheContext("all"))


def _parts(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    return block.attn1, block.ff  # type: ignore[return-value]


def build_methods(bench: Bench) -> tuple[dict[str, Method], dict[str, str]]:
    """By name, and why others are missing."""

    def bypass() -> Method:
        return bench.ours()

    def reuse() -> Method:
        return bench.ours(skip="reuse")

    builders: dict[str, Callable[[], Method | tuple[Method, str]]] = {
        DENSE: bench.dense,
        "ours, bypass": bypass,
        "ours, reuse": reuse,
        "ToMe (tomesd)": bench.merged,
        "FirstBlockCache": lambda: bench.first_block_cache(bench.dense),
        "FirstBlockCache on ours, bypass": lambda: bench.first_block_cache(bypass),
        "FirstBlockCache on ours, reuse": lambda: bench.first_block_cache(reuse),
        "TaylorSeer": bench.taylorseer,
        "cache-dit": lambda: bench.cache_dit(bench.dense),
        "cache-dit on ours, bypass": lambda: bench.cache_dit(bypass),
    }
    methods: dict[str, Method] = {}
    missing: dict[str, str] = {}
    for name, build in builders.items():
        try:
            found = build()
            method, label = found if isinstance(found, tuple) else (found, "")
            bench.prepare(method)
            bench.sample(method)  # compiles
            methods[name + label] = method
        except Exception as error:  # a library that is missing, or can't serve this model, says so in many ways
            if name == DENSE or name.startswith("ours"):
                raise
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        print(name, missing.get(name, "builds"), file=sys.stderr)
    return methods, missing


def measure(bench: Bench, rounds: Rounds) -> dict[str, Any]:
    methods, missing = build_methods(bench)
    calls = {
        name: (lambda method=method: bench.prepare(method), lambda method=method: bench.sample(method))
        for name, method in methods.items()
    }
    times = measure_in_turn(calls, rounds, "samplings")
    dense_calls = bench.setting.depth * bench.setting.steps
    rows = []
    for name, method in methods.items():
        flops, time = method.flops(dense_calls), ratio_quartiles(times[name], times[DENSE])
        rows.append(
            {
                "method": name,
                "flops": flops,
                "seconds": quartiles(times[name]),
                "time": time,
                "efficiency": flops / time[1],
            }
        )
    return {"rows": rows, "missing": missing, "rounds": len(times[DENSE])}


def format_markdown(record: dict[str, Any], setting: Setting) -> str:
    rows = [
        [
            row["method"],
            f"{row['flops']:.2f}",
            format_spread(row["time"]),
            f"{row['efficiency']:.2f}",
            format_spread(row["seconds"]),
        ]
        for row in sorted(record["rows"], key=lambda row: -row["time"][1])
    ]
    lines = [
        "# Time of a sampling, beside the rivals",
        "",
        f"`{record['command']}`, {format_machine(record['machine'])}, load {record['load']} before, {record['rounds']} rounds. "
        f"diffusers' DiTTransformer2DModel of DiT-S/2's size ({setting.depth} blocks, {(setting.latent_size // 2) ** 2} tokens, "
        f"batch {setting.batch}, float32, random weights), {setting.steps} DDIM steps, ours at a ratio of {RATIO}. Medians over "
        "rounds that run all in turn, quartiles in brackets; all with compiled blocks (TaylorSeer: compiled attention and feed-"
        "forward, since its hooks lie between). FLOPs and time: over the dense sampling's. Efficiency: the speed-up over what the "
        "FLOPs promise. Which pictures come out is not looked at here.",
        "",
        *format_table(["method", "FLOPs", "time", "efficiency", "seconds"], rows),
        "",
        "TaylorSeer is not stacked with ours: its hooks inside a block would give kept tokens what others left there.",
        *(f"Not measured: {name}: {reason}." for name, reason in record["missing"].items()),
        "",
        compare(record["rows"]),
    ]
    return "\n".join(lines) + "\n"


def compare(rows: list[dict[str, Any]]) -> str:
    """What is quicker than ours alone, and what turns FLOPs into time better."""
    ours = {row["method"]: row for row in rows if row["method"].startswith("ours")}
    sentences = []
    for name, own in ours.items():
        others = [row for row in rows if row["method"] != DENSE and not row["method"].startswith("ours")]
        quicker = [f"{row['method']} ({row['time'][1]:.2f})" for row in others if row["time"][1] < own["time"][1]]
        better = [
            f"{row['method']} ({row['efficiency']:.2f})" for row in others if row["efficiency"] > own["efficiency"]
        ]
        sentences.append(
            f"* {name} takes {own['time'][1]:.2f} of the dense time; quicker: {', '.join(quicker) or 'none'}; "
            f"more efficient than its {own['efficiency']:.2f}: {', '.join(better) or 'none'}."
        )
    return "\n".join(sentences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and 5 steps; written only with --out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of rivals.md and rivals.json (this one)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="the routers are untrained")
    setting = Setting(2, 16, 2, 16, 2, 5) if options.quick else Setting()
    rounds = Rounds(2, 2) if options.quick else Rounds(options.rounds, options.rounds)
    record: dict[str, Any] = {
        "command": "python examples/benchmarks/rivals.py",
        "machine": machine(),
        "load": load(),
    }
    record |= measure(Bench(setting), rounds)
    text = format_markdown(record, setting)
    folder = options.out or (None if options.quick else Path(__file__).parent)
    if folder is not None:
        write_record(folder / "rivals.json", record, text)
    print(text)


if __name__ == "__main__":
    main()
