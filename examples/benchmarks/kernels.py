"""What Inductor makes of a routed block on the CPU: kernels, library calls and bytes moved, beside the dense block and the floor.

    python examples/benchmarks/kernels.py   # some minutes; nothing is timed

Counted in the code that Inductor writes for a block of `speed.py`'s stacks, lowered by block, half of the tokens skipped: calls of
fused kernels, and of libraries (matrix products, attention, selection); bytes are what Inductor counts for all of them. *Kept
alone* is the dense block on as many tokens as are kept: what the routed one has beyond it is the price of routing. At least it
must read every token to score it, and copy what skips, a read and a write. With reuse no token is scored; what skips takes its last
two updates, and those of kept tokens are written down: one read, two writes. With full context keys and values of all tokens come
on top, so that there the comparison says nothing. Writes `kernels.md` and `kernels.json` beside it.
"""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from speed import SHAPES, Case, DiT
from timing import format_table, write_record
from torch import nn
from torch._inductor import compile_fx, metrics
from torch._inductor.utils import run_and_get_code
from tqdm import tqdm

import diffcr_compile
from diffcr_compile import DiffCRConfig

RATIO = 0.5
CASES = [Case(shape, 1, 1024, 2, dtype) for shape in ("S", "XL") for dtype in ("float32", "bfloat16")]
BYPASS, REUSE = "bypass", "reuse, kept context"
OPTIONS: dict[str, dict[str, Any]] = {
    BYPASS: {},
    REUSE: {"skip": "reuse", "context": "kept"},
    "reuse (the default: full context)": {"skip": "reuse"},
}
STEPS = (900.0, 700.0)
"""Of a sampling: with reuse the first is dense; the second is compiled and counted."""

FUSED = re.compile(r"\bcpp_fused\w*\(")
LIBRARY = re.compile(r"\b(?:extern_kernels\.\w+|torch\.ops\.\w+\.\w+)[\w.]*\(")


def count(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Of the one graph that a call compiles: calls of fused kernels and of libraries, and megabytes moved."""
    metrics.reset()
    _, codes = run_and_get_code(lambda: model(**inputs))
    (code,) = codes
    body = code[code.index("def call(") : code.index("runner = ")]
    libraries = [name.rstrip("(") for name in LIBRARY.findall(body)]
    return {
        "fused": len(FUSED.findall(body)),
        "libraries": len(libraries),
        "selection": sorted({name.split(".")[3] for name in libraries if "topk" in name or "sort" in name}),
        "megabytes": metrics.num_bytes_accessed / 1e6,
    }


def floor(case: Case, name: str) -> float | None:
    """Megabytes that routing adds at least."""
    tokens = case.batch * case.tokens * SHAPES[case.shape][0] * getattr(torch, case.dtype).itemsize / 1e6
    skipped, kept = RATIO * tokens, (1 - RATIO) * tokens
    return {BYPASS: tokens + 2 * skipped, REUSE: (2 + 2) * skipped + (1 + 2) * kept}.get(name)


@torch.no_grad()
def measure(case: Case) -> list[dict[str, Any]]:
    def build() -> nn.Module:
        torch._dynamo.reset()
        return DiT(*SHAPES[case.shape], 1).eval().to(getattr(torch, case.dtype))

    def lowered(options: dict[str, Any]) -> nn.Module:
        model = diffcr_compile.transform(build(), DiffCRConfig(**options), example_inputs=case.inputs)
        return diffcr_compile.lower(model, scope="regional")

    alone = case.inputs["x"][:, : round(case.tokens * (1 - RATIO))].contiguous()
    rows = [{"what": "dense", **count(lowered({}), case.inputs)}]
    rows.append({"what": "kept alone", **count(lowered({}), {**case.inputs, "x": alone})})
    for name, options in OPTIONS.items():
        model = lowered(options)
        diffcr_compile.set_ratios(model, RATIO)
        steps = [{**case.inputs, "timestep": torch.full((case.batch,), step)} for step in STEPS]
        if options:
            model(**steps[0])  # dense, by another graph
        found = count(model, steps[1])
        extra = found["megabytes"] - rows[1]["megabytes"]
        rows.append({"what": name, **found, "extra": extra, "floor": floor(case, name)})
    return rows


def format_markdown(record: dict[str, Any]) -> str:
    lines = [
        "# What a routed block compiles to",
        "",
        f"`python examples/benchmarks/kernels.py`, CPU, torch {record['torch']}; a block, 1024 tokens, batch 2, half of the tokens "
        "skipped, lowered by block. Fused: calls of kernels that Inductor wrote; libraries: of matrix products, attention and "
        "selection. Moved: bytes as Inductor counts them. Beyond: more than the dense block on the kept tokens alone; floor: what "
        "routing must move at least (every token read to be scored, what skips copied; with reuse, what is remembered read and "
        "written). S: width 384, XL: width 1152.",
        "",
    ]
    rows = []
    for case in record["cases"]:
        for row in case["rows"]:
            beyond = f"{row['extra']:.1f}" if "extra" in row and row["floor"] is not None else ""
            least = f"{row['floor']:.1f}" if row.get("floor") is not None else ""
            calls = f"{row['libraries']}" + (f" ({', '.join(row['selection'])})" if row["selection"] else "")
            rows.append(
                [
                    case["shape"],
                    case["dtype"],
                    row["what"],
                    row["fused"],
                    calls,
                    f"{row['megabytes']:.1f}",
                    beyond,
                    least,
                ]
            )
    header = ["shape", "dtype", "block", "fused", "libraries", "moved, MB", "beyond kept alone", "floor"]
    return "\n".join([*lines, *format_table(header, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case; nothing is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of kernels.md and kernels.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="the routers are untrained")
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # else bytes are not counted
    compile_fx.inductor_metrics_log.propagate = False
    with torch._inductor.config.patch(force_disable_caches=True):  # what comes from a cache is not counted
        cases = [
            {"shape": case.shape, "dtype": case.dtype, "rows": measure(case)}
            for case in tqdm(CASES[:1] if options.quick else CASES, desc="cases")
        ]
    record = {"torch": torch.__version__, "cases": cases}
    text = format_markdown(record)
    if not options.quick:
        write_record(options.out / "kernels.json", record, text)
    print(text)


if __name__ == "__main__":
    main()
