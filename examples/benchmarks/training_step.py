"""What a training step costs by each estimator of the ratios' gradients, over one of the dense model, on the digits DiT.

    python examples/benchmarks/training_step.py

Forward and backward of one batch in one timestep region, eagerly and with compiled blocks (of both models), all alternated; medians
of the ratios of each round, quartiles behind them. Writes `training_step.md` beside it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import get_args

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import digits

import diffcr_compile
from diffcr_compile.config import Estimator

RATIOS = (0.0, 0.25, 0.45, 0.65)
TIMESTEP = 600


def step(model: nn.Module, batch: dict[str, torch.Tensor], estimator: Estimator | None) -> float:
    """Seconds of one forward and backward; None: without learning."""
    model.zero_grad()
    start = time.perf_counter()
    if estimator is None:
        model(**batch).sample.square().mean().backward()
    else:
        with diffcr_compile.learning(model, estimator=estimator):
            model(**batch).sample.square().mean().backward()
    return time.perf_counter() - start


def measure(rounds: int, batch_size: int) -> dict[str, dict[float, list[float]]]:
    """Seconds over the dense step's of the same round and kind, by row and ratio."""
    batch = digits.calibration_batches(1, batch_size)[0]
    batch["timestep"] = torch.full_like(batch["timestep"], TIMESTEP)
    kinds = {}
    for kind in ("", ", compiled"):
        dense = digits.load_model()
        model = diffcr_compile.transform(digits.load_model(), example_inputs=batch)
        if kind:
            diffcr_compile.lower(model, scope="regional")
            for block in dense.transformer_blocks:
                block.compile(fullgraph=True, dynamic=False)
        kinds[kind] = dense, model
    shares: dict[str, dict[float, list[float]]] = {
        f"{estimator}{kind}": {ratio: [] for ratio in RATIOS} for kind in kinds for estimator in get_args(Estimator)
    }
    shares["dense, compiled, over eager"] = {0.0: []}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        references = {kind: step(dense, batch, None) for kind, (dense, _) in kinds.items()}
        found = {("dense, compiled, over eager", 0.0): references[", compiled"] / references[""]}
        for (kind, (_, model)), estimator, ratio in itertools.product(kinds.items(), get_args(Estimator), RATIOS):
            diffcr_compile.set_ratios(model, ratio)
            found[f"{estimator}{kind}", ratio] = step(model, batch, estimator) / references[kind]
        for (row, ratio), share in found.items():
            if number:  # the first round warms up
                shares[row][ratio].append(share)
    return shares


def as_markdown(shares: dict[str, dict[float, list[float]]], rounds: int, batch_size: int) -> str:
    lines = [
        "# A training step, over the dense model's",
        "",
        f"`python examples/benchmarks/training_step.py`, torch {torch.__version__}, {torch.get_num_threads()} threads, float32, "
        f"digits DiT (8 blocks, 256 tokens), batch {batch_size}, {rounds} rounds; medians, quartiles in brackets. Ratio: the "
        "same in every block. Compiled: a lowered model, over the dense one with its blocks compiled in place.",
        "",
        "| estimator | " + " | ".join(f"at {ratio:g}" for ratio in RATIOS) + " |",
        "|---|" + "---|" * len(RATIOS),
    ]
    for row, found in shares.items():
        lines.append(f"| {row} | " + " | ".join(_spread(found.get(ratio, [])) for ratio in RATIOS) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}..{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of training_step.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="the routers are untrained")
    text = as_markdown(measure(options.rounds, options.batch), options.rounds, options.batch)
    (options.out / "training_step.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
