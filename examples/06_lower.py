"""Compile a routed model block by block and whole, and time it against the dense model compiled alike, in turns.

    python examples/06_lower.py [--backend aot_eager]

On a GPU also with CUDA graphs. Inductor needs up to a minute on one core for the graphs of its first run, and finds them in its
cache in the next; aot_eager makes the same graphs at once, and no faster code.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CalibrationConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, LAYERS, TOKENS = (1024, 12, 4096) if DEVICE.type == "cuda" else (64, 2, 512)
BUDGET, WARMUP, ROUNDS = 0.5, 3, 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 32)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def run(model: nn.Module, inputs: dict[str, Tensor], table: Tensor) -> tuple[Tensor, float]:
    """One forward at a table, and its milliseconds. A new table needs no new ``lower``."""
    diffcr_compile.set_ratios(model, table)
    start = time.perf_counter()
    output = model(**inputs)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return output, 1000 * (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    backend = parser.parse_args().backend
    ways = [{"scope": "regional", "backend": backend}, {"scope": "full", "backend": backend}]
    if DEVICE.type == "cuda" and backend == "inductor":
        ways.append({"scope": "full", "mode": "reduce-overhead"})

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).to(DEVICE)
    inputs = {"input": torch.randn(2, TOKENS, WIDTH, device=DEVICE)}
    diffcr_compile.transform(model, example_inputs=inputs)  # no timestep: one region
    report = diffcr_compile.calibrate(model, [inputs], budget=BUDGET, config=CalibrationConfig(preset="training-free"))
    print(f"{LAYERS} layers on {DEVICE}; share of the dense FLOPs: {report.share:.4f} (budget {BUDGET})")
    eager, _ = run(model, inputs, report.table)
    for way in ways:
        diffcr_compile.lower(model, **way)
        rounds = [[run(model, inputs, table)[1] for table in (0 * report.table, report.table)] for _ in range(ROUNDS)]
        dense, routed = (statistics.median(times) for times in zip(*rounds[WARMUP:], strict=True))
        error = float((run(model, inputs, report.table)[0] - eager).abs().max() / eager.abs().max())
        print(f"{', '.join(way.values())}: dense {dense:.2f} ms, routed {routed:.2f} ms,", end=" ")
        print(f"{dense / routed:.2f} times as fast; largest difference from eager {error:.0e}")


if __name__ == "__main__":
    main()
