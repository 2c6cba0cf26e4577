"""How much of the promised speed-up arrives: a DiT-S/2 at 1024 tokens, routed against dense, on the CPU.

    python examples/benchmarks/speed.py

Every round runs the dense model and each uniform ratio once, eager and lowered, in turn, so that whatever else the
machine does falls on all alike; but two threads wait for each other, so only an idle machine gives the true figure (the
load before the run is written down). Speed-up is the median over rounds of (dense time / routed time) in the same mode;
promised is the ratio of their FLOPs; efficiency is the one over the other. Beside it stands the same efficiency of the dense
model on nothing but as many tokens as are kept: what no router, gather or scatter could exceed by much. Writes `speed.md` and
`speed.json` beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import diffcr_compile

RATIOS = (0.25, 0.5, 0.75)
MODES = ("eager", "lowered")
FREQUENCIES = 256

Times = dict[tuple[str, str, float], list[float]]
"""Seconds by mode, model (``"routed"``; ``"kept"``: dense, on the kept tokens alone) and ratio, one entry per round."""


class Block(nn.Module):
    """A DiT block (Peebles and Xie 2023): attention and feed-forward under adaLN-Zero."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D), condition (B, D) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class DiT(nn.Module):
    """A stack of blocks over tokens that are already embedded, conditioned on the timestep."""

    def __init__(self, width: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x (B, N, D), timestep (B,) in 0..1000 -> (B, N, D)."""
        rates = torch.exp(-math.log(10_000) * torch.arange(FREQUENCIES // 2, device=x.device) / (FREQUENCIES // 2))
        angles = timestep[:, None].float() * rates
        condition = self.embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


def build_inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(args.batch, args.tokens, args.width, generator=generator)
    return {"x": tokens, "timestep": torch.full((args.batch,), 500.0)}


def build_runs(args: argparse.Namespace, inputs: dict[str, Tensor]) -> dict[tuple[str, str], Callable[[float], Tensor]]:
    """By mode and model, a call at a ratio. Dense is the untouched model in eager, and the model lowered at ratio zero."""
    torch.manual_seed(0)
    plain = DiT(args.width, args.heads, args.depth).eval()
    eager = diffcr_compile.transform(copy.deepcopy(plain), example_inputs=inputs)
    lowered = diffcr_compile.lower(copy.deepcopy(eager), scope="regional")

    def run_eager(ratio: float) -> Tensor:
        diffcr_compile.set_ratios(eager, ratio)
        return (eager if ratio else plain)(**inputs)

    def run_lowered(ratio: float) -> Tensor:
        diffcr_compile.set_ratios(lowered, ratio)
        return lowered(**inputs)

    def kept(ratio: float) -> dict[str, Tensor]:
        num_tokens = round(args.tokens * (1 - ratio))
        return {**inputs, "x": inputs["x"][:, :num_tokens].contiguous()}

    def run_lowered_dense(ratio: float) -> Tensor:
        diffcr_compile.set_ratios(lowered, 0)
        return lowered(**kept(ratio))

    return {
        ("eager", "routed"): run_eager,
        ("eager", "kept"): lambda ratio: plain(**kept(ratio)),
        ("lowered", "routed"): run_lowered,
        ("lowered", "kept"): run_lowered_dense,
    }


def promised_speedups(args: argparse.Namespace, inputs: dict[str, Tensor]) -> dict[float, float]:
    """What the FLOPs promise at each ratio: those of the dense model over those of the routed one."""
    model = diffcr_compile.transform(DiT(args.width, args.heads, args.depth).eval(), example_inputs=inputs)
    promised = {}
    for ratio in RATIOS:
        diffcr_compile.set_ratios(model, ratio)
        costs = diffcr_compile.cost(model, inputs)
        promised[ratio] = costs.dense_flops / costs.routed_flops[0]
    return promised


@torch.inference_mode()
def measure(runs: dict[tuple[str, str], Callable[[float], Tensor]], args: argparse.Namespace) -> Times:
    """Seconds of every mode, model and ratio, all of them in turn in each round; the warm-up rounds are left out."""
    times: Times = {(mode, "routed", 0.0): [] for mode in MODES}
    times |= {(*key, ratio): [] for ratio in RATIOS for key in runs}
    for index in tqdm(range(args.warmup + args.repeats), desc="rounds"):
        for (mode, model, ratio), seconds in times.items():
            start = time.perf_counter()
            runs[mode, model](ratio)
            if index >= args.warmup:
                seconds.append(time.perf_counter() - start)
    return times


def summarise(times: Times, promised: dict[float, float]) -> list[dict[str, Any]]:
    """One row per mode and ratio: medians and quartiles (25 %, 75 %) of times and of the rounds' speed-ups."""
    rows = []
    for mode in MODES:
        dense = times[mode, "routed", 0.0]
        for ratio in RATIOS:
            speedup, bound = (
                quartiles([before / after for before, after in zip(dense, times[mode, model, ratio], strict=True)])
                for model in ("routed", "kept")
            )
            rows.append(
                {
                    "mode": mode,
                    "ratio": ratio,
                    "dense_ms": [1000 * value for value in quartiles(dense)],
                    "routed_ms": [1000 * value for value in quartiles(times[mode, "routed", ratio])],
                    "speedup": speedup,
                    "promised": promised[ratio],
                    "efficiency": speedup[1] / promised[ratio],
                    "efficiency_of_kept_tokens_alone": bound[1] / promised[ratio],
                }
            )
    return rows


def quartiles(values: list[float]) -> list[float]:
    """The quartiles 25 %, 50 %, 75 %."""
    return statistics.quantiles(values, n=4, method="inclusive")


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The setting, without the machine's name."""
    return {
        "command": shlex.join(["python", "examples/benchmarks/speed.py", *sys.argv[1:]]),
        "model": f"DiT, width {args.width}, {args.heads} heads, {args.depth} blocks, adaLN-Zero",
        "tokens": args.tokens,
        "batch": args.batch,
        "dtype": "float32",
        "device": f"CPU, {cpu_model()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "warmup_rounds": args.warmup,
        "rounds": args.repeats,
        "load before": round(os.getloadavg()[0], 2),
    }


def cpu_model() -> str:
    """The processor's name and widest instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def format_markdown(setting: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table, and below it the setting."""
    lines = [
        "# Speed-up against what the FLOPs promise",
        "",
        "| mode | ratio | dense ms | routed ms | speed-up | promised | efficiency | of the kept tokens alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense, routed = (format_spread(row[key], 0) for key in ("dense_ms", "routed_ms"))
        speedup = format_spread(row["speedup"], 2)
        lines.append(
            f"| {row['mode']} | {row['ratio']} | {dense} | {routed} | {speedup} | {row['promised']:.2f} "
            f"| {row['efficiency']:.2f} | {row['efficiency_of_kept_tokens_alone']:.2f} |"
        )
    lines += [
        "",
        "Medians over rounds, with the quartiles in brackets. `eager` is against the untouched dense model run",
    ]
    lines += [
        'eagerly, `lowered` against the same model lowered (`scope="regional"`) at ratio zero; each round runs all in turn.'
    ]
    lines += [
        "Speed-up: the median of each round's dense time over its routed time. Ratio: share of tokens that skip a block,",
        "the same in every block. Last column: the dense model on as many tokens as are kept, against the same promise.",
    ]
    lines += ["", *(f"* {key}: {value}" for key, value in setting.items()), ""]
    return "\n".join(lines)


def format_spread(values: list[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}..{high})"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of speed.md and speed.json")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings(
        "ignore", message="the routers are untrained"
    )  # which tokens are kept does not change a time
    inputs, setting = build_inputs(args), describe(args)
    times = measure(build_runs(args, inputs), args)
    rows = summarise(times, promised_speedups(args, inputs))
    text = format_markdown(setting, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "speed.md").write_text(text)
    (args.out / "speed.json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
