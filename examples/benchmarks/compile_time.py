"""What compiling costs: by scope and number of blocks, in a first process and in a second one that finds the first one's caches.

    python examples/benchmarks/compile_time.py          # eight minutes on two idle cores
    python examples/benchmarks/compile_time.py --quick  # to see that it runs

Every row is two processes, one after the other, with one folder of Inductor's caches (``TORCHINDUCTOR_CACHE_DIR``) that was empty
before. Each builds a DiT, transforms it, sets four ratios in turn over its blocks, lowers it and calls it; the dense model is
compiled whole by ``torch.compile``, or its blocks in place. Writes `compile_time.md` and `compile_time.json` beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from speed import SHAPES, Case, DiT
from timing import format_machine, format_table, load, machine, write_record
from torch import nn
from tqdm import tqdm

import diffcr_compile

KINDS = ("dense, whole", "dense, by block", "lowered, full", "lowered, regional", "lowered, regional, reuse")
RATIOS = (0.0, 0.25, 0.5, 0.75)
DEPTHS = (4, 8, 16)
STEPS = (900.0, 800.0, 700.0)
"""Timesteps of the first call and of two later ones: with reuse the first fills the memory, by graphs of its own."""


def prepare(kind: str, model: DiT, inputs: dict[str, Any]) -> nn.Module:
    """Nothing is compiled yet."""
    if kind == "dense, whole":
        return torch.compile(model, fullgraph=True, dynamic=False)
    if kind == "dense, by block":
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
        return model
    config = diffcr_compile.DiffCRConfig(skip="reuse" if kind.endswith("reuse") else "identity")
    diffcr_compile.transform(model, config, example_inputs=inputs)
    row = [RATIOS[index % len(RATIOS)] for index in range(len(model.blocks))]
    diffcr_compile.set_ratios(model, [row] * len(diffcr_compile.ratios(model)))
    return diffcr_compile.lower(model, scope="full" if kind.endswith("full") else "regional")


def measure(kind: str, case: Case) -> dict[str, Any]:
    """Seconds of one process's work, and what its compilers and caches counted."""
    torch.manual_seed(0)
    model, inputs = DiT(*SHAPES[case.shape], case.depth).eval(), case.inputs
    seconds = {}
    start = time.perf_counter()
    model = prepare(kind, model, inputs)
    seconds["prepare"] = time.perf_counter() - start
    calls = []
    for step in STEPS:
        start = time.perf_counter()
        with torch.inference_mode():
            model(**inputs | {"timestep": torch.full_like(inputs["timestep"], step)})
        calls.append(time.perf_counter() - start)
    seconds |= {"first": calls[0], "second": calls[1], "later": calls[2]}
    counters = torch._dynamo.utils.counters
    counts = {
        f"{cache} {outcome}": counters[group][f"{prefix}_cache_{outcome}"]
        for cache, group, prefix in (("autograd", "aot_autograd", "autograd"), ("inductor", "inductor", "fxgraph"))
        for outcome in ("hit", "miss", "bypass")
    }
    return {"seconds": seconds, "graphs": counters["stats"]["unique_graphs"], "counts": counts}


def run_twice(kind: str, case: Case) -> list[dict[str, Any]]:
    """What a first and a second process measured, with caches between them."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        for _ in range(2):
            start = time.perf_counter()
            command = [sys.executable, __file__, "--measure", kind, case.shape, str(case.depth), str(case.tokens)]
            finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            one = json.loads(finished.stdout.splitlines()[-1])
            one["seconds"]["process"] = time.perf_counter() - start
            found.append(one)
    return found


def format_markdown(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        cold, warm = (process["seconds"] for process in row["processes"])
        counts = row["processes"][1]["counts"]
        found = " + ".join(str(counts[f"{cache} hit"]) for cache in ("autograd", "inductor"))
        lost = sum(counts.values()) - counts["autograd hit"] - counts["inductor hit"]
        cells = [f"{time['first'] + time['second']:.1f}" for time in (cold, warm)]
        cells += [f"{time['process']:.1f}" for time in (cold, warm)]
        rows.append([row["kind"], row["blocks"], row["processes"][0]["graphs"], *cells, found, lost])
    header = ["what", "blocks", "graphs", "compiling calls, s", "in a second process", "whole process, s", "the second"]
    prepared = statistics.median(
        row["processes"][0]["seconds"]["prepare"] for row in record["rows"] if row["kind"].startswith("lowered")
    )
    return "\n".join(
        [
            "# What compiling costs",
            "",
            f"`python examples/benchmarks/compile_time.py`, {format_machine(record['machine'])}, load {record['load']} before; "
            f"{record['model']}. Four ratios in turn over the blocks (0, 0.25, 0.5, 0.75). Compiling calls: the first two of the "
            "model (with reuse the first step has graphs of its own); the second process finds what the first left in Inductor's "
            "folder. Whole process: from its start to its end, imports and what comes before compiling included (building, "
            f"`transform`: {prepared:.1f} s at the median). Found: hits in the second process, of AOTAutograd's cache and of "
            "Inductor's beneath it; not found: misses and bypasses of both.",
            "",
            *format_table([*header, "found", "not found"], rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks, few tokens; written only with --out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of compile_time.md and compile_time.json (this one)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)  # what run_twice starts
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        warnings.filterwarnings("ignore", message="the routers are untrained")
        kind, shape, depth, tokens = options.measure
        print(json.dumps(measure(kind, Case(shape, int(depth), int(tokens), 2))))
        return
    cases = [Case("narrow", 4, 16, 2)] if options.quick else [Case("S", depth, 256, 2) for depth in DEPTHS]
    record: dict[str, Any] = {"machine": machine(), "load": load(), "rows": []}
    record["model"] = f"DiT of width {SHAPES[cases[0].shape][0]}, {cases[0].tokens} tokens, batch 2, float32"
    for kind, case in tqdm(list(itertools.product(KINDS, cases)), desc="processes"):
        record["rows"].append({"kind": kind, "blocks": case.depth, "processes": run_twice(kind, case)})
    text = format_markdown(record)
    folder = options.out or (None if options.quick else Path(__file__).parent)
    if folder is not None:
        write_record(folder / "compile_time.json", record, text)
    print(text)


if __name__ == "__main__":
    main()
