"""How much of the promised speed-up arrives: DiT-shaped stacks, routed against dense, eager and lowered, on the CPU.

    python examples/benchmarks/speed.py            # DiT-S/2, 1024 tokens, batch 2, float32: three minutes on two idle cores
    python examples/benchmarks/speed.py --grid     # shapes, tokens, batches, dtypes: a quarter of an hour
    python examples/benchmarks/speed.py --scaling  # 256 to 65536 tokens, 2 to 24 blocks, lowered whole: seven minutes

Every round runs the dense model and each uniform ratio once, eager and lowered, in turn, so that whatever else the
machine does falls on all alike; but two threads wait for each other, so only an idle machine gives the true figure (the
load before each case is written down). Speed-up is the median over rounds of (dense time / routed time) in the same mode;
promised is the ratio of their FLOPs; efficiency is the one over the other. Where it is measured, beside it stands the same
efficiency of the dense model on nothing but as many tokens as are kept: what no router, gather or scatter could exceed by much.

Writes `speed.md` and `speed.json` beside it, case by case. A grid or scaling that was interrupted goes on where it was; cases
of the same machine are kept, but for ``--again``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import (
    Call,
    Rounds,
    format_machine,
    format_spread,
    format_table,
    load,
    machine,
    measure_in_turn,
    quartiles,
    ratio_quartiles,
    read_record,
    write_record,
)
from torch import Tensor, nn
from tqdm import tqdm

import diffcr_compile

RATIOS = (0.25, 0.5, 0.75)
MODES = ("eager", "lowered")
FREQUENCIES = 256
AIMS = {256: 0.9, 1024: 0.95}
"""Efficiency aimed at, by number of tokens."""

SHAPES = {"S": (384, 6), "XL": (1152, 16), "narrow": (64, 1)}
"""Width and heads: of DiT-S/2 and DiT-XL/2 (Peebles and Xie 2023), and of one head alone."""


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
        condition = self.embed(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


@dataclass(frozen=True)
class Case:
    """One model on inputs of one size, by the modes and at the ratios that are measured. kept: the dense model on the kept tokens
    alone too."""

    shape: str
    depth: int
    tokens: int
    batch: int
    dtype: str = "float32"
    modes: tuple[str, ...] = MODES
    ratios: tuple[float, ...] = RATIOS
    kept: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.depth} blocks, {self.tokens} tokens, batch {self.batch}, {self.dtype}"

    @property
    def inputs(self) -> dict[str, Tensor]:
        tokens = torch.randn(self.batch, self.tokens, SHAPES[self.shape][0], generator=torch.Generator().manual_seed(0))
        return {"x": tokens.to(getattr(torch, self.dtype)), "timestep": torch.full((self.batch,), 500.0)}


README = [Case("S", 12, 1024, 2, kept=True)]
GRID = [
    Case(shape, depth, tokens, batch, dtype)
    for dtype in ("float32", "bfloat16")
    for shape, depth in (("S", 4), ("XL", 2))
    for tokens in (256, 1024)
    for batch in (1, 2, 8)
]
_half = partial(Case, batch=1, modes=("lowered",), ratios=(0.5,), kept=True)
SCALING = [
    *(_half("S", 2, tokens) for tokens in (256, 1024, 4096)),
    _half("S", 1, 16384),
    *(_half("narrow", 1, tokens) for tokens in (16384, 65536)),
    *(_half("S", depth, 1024) for depth in (4, 8, 24)),
    *(Case("S", 4, 256, 1, dtype, ("lowered", "full"), (0.5, 0.75), kept=True) for dtype in ("float32", "bfloat16")),
]
SECTIONS = {
    "readme": ("DiT-S/2", README, Rounds(15, 15, warmup=2)),
    "grid": ("Shapes, tokens, batches, dtypes", GRID, Rounds(5, 30, 12.0)),
    "scaling": ("Tokens, blocks, scope", SCALING, Rounds(5, 30, 8.0)),
}
"""By name: title, cases, how often each is measured."""


@functools.lru_cache(maxsize=1)
def build_models(shape: str, depth: int, dtype: str) -> dict[str, nn.Module]:
    """The untouched model, the routed one, and the routed one lowered by both scopes."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = DiT(*SHAPES[shape], depth).eval().to(getattr(torch, dtype))
    inputs = Case(shape, depth, 256, 2, dtype).inputs
    eager = diffcr_compile.transform(copy.deepcopy(plain), example_inputs=inputs)
    return {
        "plain": plain,
        "eager": eager,
        "lowered": diffcr_compile.lower(copy.deepcopy(eager), scope="regional"),
        "full": diffcr_compile.lower(copy.deepcopy(eager), scope="full"),
    }


def build_calls(case: Case, models: dict[str, nn.Module]) -> dict[tuple[str, str, float], Call]:
    """By mode, tokens (``"all"``; ``"kept"``: those alone, by the dense model) and ratio. Dense is the untouched model in eager,
    and the model lowered at ratio zero."""
    calls: dict[tuple[str, str, float], Call] = {}
    inputs = case.inputs
    for mode in case.modes:
        routed, dense = models[mode], models["plain" if mode == "eager" else mode]
        at_zero = partial(diffcr_compile.set_ratios, routed, 0.0)
        calls[mode, "all", 0.0] = at_zero, partial(dense, **inputs)
        for ratio in case.ratios:
            calls[mode, "all", ratio] = partial(diffcr_compile.set_ratios, routed, ratio), partial(routed, **inputs)
            if case.kept:
                num_tokens = round(case.tokens * (1 - ratio))
                kept = {**inputs, "x": inputs["x"][:, :num_tokens].contiguous()}
                calls[mode, "kept", ratio] = at_zero, partial(dense, **kept)
    return calls


def promised_speedup(model: nn.Module, inputs: dict[str, Tensor], ratio: float) -> float:
    """What the FLOPs promise: those of the dense model over those of the routed one."""
    diffcr_compile.set_ratios(model, ratio)
    costs = diffcr_compile.cost(model, inputs)
    return costs.dense_flops / costs.routed_flops[0]


def measure(case: Case, rounds: Rounds) -> list[dict[str, Any]]:
    """One row per mode and ratio: quartiles (25 %, 50 %, 75 %) of times and of the rounds' speed-ups."""
    models = build_models(case.shape, case.depth, case.dtype)
    times = measure_in_turn(build_calls(case, models), rounds, case.name)
    rows = []
    for mode in case.modes:
        dense = times[mode, "all", 0.0]
        for ratio in case.ratios:
            routed, promised = times[mode, "all", ratio], promised_speedup(models["eager"], case.inputs, ratio)
            speedup = ratio_quartiles(dense, routed)
            row = {
                "mode": mode,
                "ratio": ratio,
                "dense_ms": [1000 * value for value in quartiles(dense)],
                "routed_ms": [1000 * value for value in quartiles(routed)],
                "speedup": speedup,
                "promised": promised,
                "efficiency": speedup[1] / promised,
                "rounds": len(dense),
            }
            if case.kept:
                row["kept_efficiency"] = ratio_quartiles(dense, times[mode, "kept", ratio])[1] / promised
            rows.append(row)
    return rows


def format_markdown(record: dict[str, Any]) -> str:
    """A table for each section that was measured."""
    lines = [
        "# Speed-up against what the FLOPs promise",
        "",
        "Medians over rounds, with the quartiles in brackets. `eager` is against the untouched dense model run eagerly,",
        '`lowered` (`scope="regional"`) and `full` against the same model lowered so at ratio zero; each round runs all in turn.',
        "Speed-up: the median of each round's dense time over its routed time. Ratio: share of tokens that skip a block,",
        "the same in every block. Kept alone: the dense model on as many tokens as are kept, against the same promise.",
        "S: width 384, 6 heads; XL: width 1152, 16 heads; narrow: width 64, one head; all with adaLN-Zero.",
    ]
    for name, (title, _, _) in SECTIONS.items():
        cases = record.get(name)
        if not cases:
            continue
        lines += ["", f"## {title}", "", *format_cases(cases.values()), ""]
        if name == "grid":
            lines += [summarise(cases.values()), ""]
        lines += dict.fromkeys(f"`{case['command']}`: {format_machine(case['machine'])}." for case in cases.values())
        rounds = _span([row["rounds"] for row in _rows(cases.values())])
        lines.append(f"{rounds} rounds a case; load before it {_span([case['load'] for case in cases.values()])}.")
    return "\n".join(lines) + "\n"


def _span(values: list[float]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _rows(cases: Any) -> list[dict[str, Any]]:
    """The rows of all cases, each with what its case is."""
    return [{**case["case"], **row} for case in cases for row in case["rows"]]


def format_cases(cases: Any) -> list[str]:
    header = ["shape", "blocks", "tokens", "batch", "dtype", "mode", "ratio", "dense ms", "routed ms"]
    header += ["speed-up", "promised", "efficiency", "kept alone"]
    rows = []
    for row in _rows(cases):
        digits = 0 if row["routed_ms"][1] >= 100 else 1
        cells = [row[key] for key in ("shape", "depth", "tokens", "batch", "dtype", "mode", "ratio")]
        cells += [format_spread(row["dense_ms"], digits), format_spread(row["routed_ms"], digits)]
        cells += [format_spread(row["speedup"]), f"{row['promised']:.2f}", f"{row['efficiency']:.2f}"]
        rows.append([*cells, f"{row['kept_efficiency']:.2f}" if "kept_efficiency" in row else ""])
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return format_table(header, rows)


def summarise(cases: Any) -> str:
    """How many rows come up to the aim, and which do not."""
    rows = [row for row in _rows(cases) if row["tokens"] in AIMS]
    short = [row for row in rows if row["efficiency"] < AIMS[row["tokens"]]]
    aims = " and ".join(f"{aim} at {tokens} tokens" for tokens, aim in AIMS.items())
    counts = []
    for mode in MODES:
        total, missed = (sum(row["mode"] == mode for row in some) for some in (rows, short))
        counts.append(f"{total - missed} of {total} {mode}")
    names = [
        f"{row['shape']} {row['tokens']} tokens, batch {row['batch']}, {row['dtype']}, {row['mode']}, {row['ratio']}: "
        f"{row['efficiency']:.2f}"
        for row in sorted(short, key=lambda row: row["efficiency"])
    ]
    return f"Efficiency of at least {aims}: {', '.join(counts)}. Below it: {'; '.join(names) or 'none'}."


def run(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure a section's cases; yields the record after each."""
    _, cases, rounds = SECTIONS[name]
    if options.quick:
        cases = [
            replace(case, shape="narrow", depth=min(case.depth, 3), tokens=case.tokens // 64, ratios=(0.5,))
            for case in cases[::9]
        ]
        rounds = Rounds(2, 2)
    path = None if options.out is None else options.out / "speed.json"
    record = {} if path is None else read_record(path)
    found, here = record.get(name, {}), machine()
    for case in tqdm(cases, desc=name):
        known = found.get(case.name)
        if known is None or known["machine"] != here or options.again:
            before, command = load(), f"python examples/benchmarks/speed.py{'' if name == 'readme' else f' --{name}'}"
            entry = {"case": asdict(case), "command": command, "machine": here, "load": before}
            found[case.name] = entry | {"rows": measure(case, rounds)}
        record[name] = {case.name: found[case.name] for case in cases if case.name in found}
        yield record


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help="shapes, tokens, batches and dtypes instead")
    parser.add_argument("--scaling", action="store_true", help="tokens, blocks and scopes instead")
    parser.add_argument("--again", action="store_true", help="measure cases anew that were measured")
    parser.add_argument(
        "--quick", action="store_true", help="a few, tiny, to see that it runs; written only with --out"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of speed.md and speed.json (this one)")
    options = parser.parse_args()
    if options.out is None and not options.quick:
        options.out = here
    torch.set_num_threads(options.threads)
    # which tokens are kept does not change a time
    warnings.filterwarnings("ignore", message="the routers are untrained")
    names = [name for name in ("grid", "scaling") if getattr(options, name)]
    options.again |= not names
    text = ""
    for name in names or ["readme"]:
        for record in run(name, options):
            text = format_markdown(record)
            if options.out is not None:
                write_record(options.out / "speed.json", record, text)
    print(text)


if __name__ == "__main__":
    main()
