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
from diffusers.models import DiTTransformer2DModel

import diffcr_compile

Prepare = Callable[[nn.Module], nn.Module]
Batch = dict[str, Tensor]


def small_dit() -> nn.Module:
    """Of DiT-S/2's size, random weights."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, num_layers=12, sample_size=32).eval()


def latents(batch_size: int) -> Batch:
    timesteps = torch.full((batch_size,), 500)
    return {"hidden_states": torch.randn(batch_size, 4, 32, 32), "timestep": timesteps, "class_labels": timesteps}


SIZES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "digits DiT": (digits.load_model, lambda batch_size: digits.calibration_batches(1, batch_size)[0]),
    "DiT-S/2's size": (small_dit, latents),
}
"""Models, and what they are called with at a batch size."""


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


def build(
    make: Callable[[], nn.Module], batch: Batch, prepare_original: Prepare, prepare_routed: Prepare
) -> dict[str, nn.Module]:
    torch._dynamo.reset()
    routed = diffcr_compile.transform(make(), example_inputs=batch)
    originals = [prepare_original(make()) for _ in range(2)]
    return dict(zip(MODELS, (*originals, prepare_routed(routed)), strict=True))


@torch.inference_mode()
def measure(models: dict[str, nn.Module], batch: Batch, rounds: int, warmup: int) -> dict[str, list[float]]:
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


def as_row(times: dict[str, list[float]], size: str, mode: str, batch_size: int) -> str:
    original = times["original"]
    cells = [f"{1000 * statistics.median(original):.1f}"]
    for name in MODELS[1:]:
        ratios = [after / before for before, after in zip(original, times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{middle:.4f} ({low:.3f}..{high:.3f})")
    return f"| {size} | {mode} | {batch_size} | " + " | ".join(cells) + " |"


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
        f"`python examples/benchmarks/overhead.py`, torch {torch.__version__}, 1 thread, float32, digits DiT (8 blocks of "
        f"width 96) and one of DiT-S/2's size (12 of 384), 256 tokens, {options.rounds} rounds, load {os.getloadavg()[0]:.1f} "
        "before; medians of each round's ratio of times, quartiles in brackets. Copy: a second original, as a measure of noise. "
        "`torch.compile`: of both models; `lower`, full: over the original by `torch.compile`; regional: over the original with "
        "its blocks compiled in place.",
        "",
        "| model | mode | batch | original, ms | copy | transformed, at ratio zero |",
        "|---|---|---|---|---|---|",
    ]
    for (size, (make, inputs)), batch_size in itertools.product(SIZES.items(), options.batches):
        for mode, prepares in MODES.items() if size == "digits DiT" or batch_size == min(options.batches) else ():
            batch = inputs(batch_size)
            times = measure(build(make, batch, *prepares), batch, options.rounds, options.warmup)
            lines.append(as_row(times, size, mode, batch_size))
    text = "\n".join(lines) + "\n"
    (options.out / "overhead.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
