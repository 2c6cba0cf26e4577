"""What an untouched routed model (ratio zero) costs over the original: it should be nothing.

    python examples/benchmarks/overhead.py

Each round times one forward of the original, of a copy of it (what is left of that is noise) and of the transformed model, in
changing order, in seconds of this process's one thread, which others on the machine do not lengthen. Ratios are taken within
each round. Writes `overhead.md` beside it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import digits

import diffcr_compile

Prepare = Callable[[nn.Module], nn.Module]


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def compile_blocks(model: nn.Module) -> nn.Module:
    for block in model.transformer_blocks:
        block.compile()
    return model


MODES: dict[str, tuple[Prepare, Prepare]] = {
    "eager": (as_it_is, as_it_is),
    "torch.compile": (torch.compile, torch.compile),
    "lower, full": (torch.compile, partial(diffcr_compile.lower, scope="full")),
    "lower, regional": (compile_blocks, partial(diffcr_compile.lower, scope="regional")),
}
"""What is done to the originals and to the routed model."""

MODELS = ("original", "copy", "transformed")


def build(batch: dict[str, Tensor], prepare_original: Prepare, prepare_routed: Prepare) -> dict[str, nn.Module]:
    torch._dynamo.reset()
    routed = diffcr_compile.transform(digits.load_model(), example_inputs=batch)
    originals = [prepare_original(digits.load_model()) for _ in range(2)]
    return dict(zip(MODELS, (*originals, prepare_routed(routed)), strict=True))


@torch.inference_mode()
def measure(models: dict[str, nn.Module], batch: dict[str, Tensor], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of one forward of each model, one entry for each round."""
    times: dict[str, list[float]] = {name: [] for name in models}
    orders = list(itertools.permutations(models))
    for number in tqdm(range(warmup + rounds), desc="rounds"):
        for name in orders[number % len(orders)]:
            start = time.thread_time()
            models[name](**batch)
            if number >= warmup:
                times[name].append(time.thread_time() - start)
    return times


def as_row(times: dict[str, list[float]], mode: str, batch_size: int) -> str:
    original = times["original"]
    cells = [f"{1000 * statistics.median(original):.1f}"]
    for name in MODELS[1:]:
        ratios = [after / before for before, after in zip(original, times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{middle:.4f} ({low:.3f}..{high:.3f})")
    return f"| {mode} | {batch_size} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=12, help="rounds before them")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="batch sizes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of overhead.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# An untouched routed model, over the original",
        "",
        f"`python examples/benchmarks/overhead.py`, torch {torch.__version__}, 1 thread, float32, digits DiT (8 blocks, 256 "
        f"tokens), {options.rounds} rounds, load {os.getloadavg()[0]:.1f} before; medians of each round's ratio of times, "
        "quartiles in brackets. Copy: a second original, as a measure of noise. `torch.compile`: of both models; `lower`, full: "
        "over the original by `torch.compile`; regional: over the original with its blocks compiled in place.",
        "",
        "| mode | batch | original, ms | copy | transformed, at ratio zero |",
        "|---|---|---|---|---|",
    ]
    for batch_size, (mode, prepares) in itertools.product(options.batches, MODES.items()):
        batch = digits.calibration_batches(1, batch_size)[0]
        lines.append(as_row(measure(build(batch, *prepares), batch, options.rounds, options.warmup), mode, batch_size))
    text = "\n".join(lines) + "\n"
    (options.out / "overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
