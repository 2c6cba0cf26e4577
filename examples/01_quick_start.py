"""Record one sampling, transform the model, choose a table without training, and compare with the dense pictures.

    python examples/01_quick_start.py

The model is a DiT of handwritten digits; of a pipeline, take its denoiser (02_pipeline.py).
"""

import digits
import torch

import diffcr_compile
from diffcr_compile import DiffCRConfig

STEPS = 20
BUDGET = 0.65


def main() -> None:
    model = digits.load_model()  # any denoiser; of a pipeline: pipe.transformer
    labels = torch.arange(4)
    noise = torch.randn(4, 1, digits.CANVAS_SIZE, digits.CANVAS_SIZE, generator=torch.Generator().manual_seed(0))
    dense = digits.sample(model, labels, steps=STEPS, noise=noise)

    # pictures of its own: the table is not fitted to those compared below
    with diffcr_compile.record(model) as batches:
        digits.sample(model, labels[:2], steps=STEPS, generator=torch.Generator().manual_seed(1))
    # Tokens take turns; the others reuse their last updates, extrapolated. Exact until a table asks for compression.
    diffcr_compile.transform(model, DiffCRConfig(skip="reuse"), example_inputs=batches[0])
    print(f"routed blocks: {diffcr_compile.ratios(model).shape[1]}, recorded calls: {len(batches)}")

    report = diffcr_compile.calibrate(model, batches, budget=BUDGET)
    print(report)
    cost = diffcr_compile.cost(model)
    print(f"share of the dense FLOPs: {cost.share:.4f} (budget {BUDGET}), memory: {cost.memory_bytes / 2**20:.1f} MiB")

    routed = digits.sample(model, labels, steps=STEPS, noise=noise)
    fewer = round(BUDGET * STEPS)
    shorter = digits.sample(diffcr_compile.restore(model), labels, steps=fewer, noise=noise)
    print(f"distance from the dense pictures, routed:   {digits.distance(routed, dense):.6f}")
    print(f"distance from the dense pictures, {fewer} steps: {digits.distance(shorter, dense):.6f}")

    restored = digits.sample(model, labels, steps=STEPS, noise=noise)
    print(f"distance from the dense pictures, restored: {digits.distance(restored, dense):.6f}")


if __name__ == "__main__":
    main()
