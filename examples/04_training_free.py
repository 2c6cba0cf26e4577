"""Tables for three budgets from one recorded sampling, without training; any of them is put in force at once.

    python examples/04_training_free.py [--steps 12] [--out FOLDER]

The report (numbers and pictures) goes to FOLDER/report, out/training_free if not given.
"""

import argparse
from pathlib import Path

import digits
import torch

import diffcr_compile
from diffcr_compile import DiffCRConfig

BUDGETS = (0.8, 0.65, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/training_free"))
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    out, steps = options.out, options.steps

    model, labels = digits.load_model(), torch.arange(4)
    with diffcr_compile.record(model) as batches:
        digits.sample(model, labels[:2], steps=steps, generator=torch.Generator().manual_seed(1))
    diffcr_compile.transform(model, DiffCRConfig(skip="reuse"), example_inputs=batches[0])
    report = diffcr_compile.calibrate(model, batches, budget=BUDGETS)  # measured once for all three
    print(report)

    noise = torch.randn(4, 1, digits.CANVAS_SIZE, digits.CANVAS_SIZE, generator=torch.Generator().manual_seed(0))
    diffcr_compile.set_ratios(model, 0.0)
    dense = digits.sample(model, labels, steps=steps, noise=noise)
    scheduler = digits.build_scheduler()
    scheduler.set_timesteps(steps)
    for budget, table in report.tables.items():
        diffcr_compile.set_ratios(model, table)
        pictures = digits.sample(model, labels, steps=steps, noise=noise)
        share = diffcr_compile.cost(model).share
        print(
            f"share {share:.4f} (budget {budget}), distance from the dense pictures {digits.distance(pictures, dense):.6f}"
        )
    print(f"share over these {steps} steps at {report.budget}: {report.sampler_share(scheduler.timesteps):.4f}")

    report.save(out / "report")
    print("wrote", *sorted(path.name for path in (out / "report").iterdir()))


if __name__ == "__main__":
    main()
