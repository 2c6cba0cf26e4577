"""Calibrate with low-rank adapters, in one process or in several, each on its share of the batches.

    python examples/05_lora_on_several_devices.py [--out FOLDER]
    torchrun --nproc-per-node 2 examples/05_lora_on_several_devices.py
    accelerate launch --num-processes 2 examples/05_lora_on_several_devices.py

Gradients are averaged, and all processes end with one table. Interrupted and called again with the same number of processes, it
goes on from its last checkpoint. FOLDER is out/lora if not given.
"""

import argparse
import os
from pathlib import Path

import digits
import torch
import torch.distributed as distributed
from safetensors.torch import save_file

import diffcr_compile
from diffcr_compile import CalibrationConfig

BUDGET = 0.8


def join() -> tuple[int, int, torch.device]:
    """Number of this process, number of processes, and this one's device."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", "0")), size, device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/lora"))
    out = parser.parse_args().out
    rank, size, device = join()

    batches = digits.calibration_batches(num_batches=4, batch_size=2)
    model = diffcr_compile.transform(digits.load_model().to(device), example_inputs=batches[0])
    report = diffcr_compile.calibrate(
        model,
        batches[rank::size],
        budget=BUDGET,
        config=CalibrationConfig(trainable="lora", lora_rank=4, learning_rate=1e-3, steps=8, checkpoint_every=4),
        checkpoint=out / f"checkpoint_{size}",
    )
    print(
        f"process {rank} of {size} on {device}: share {report.share:.4f} (budget {BUDGET}), table sum {report.table.sum():.3f}"
    )

    if rank == 0:
        diffcr_compile.save(model, out / "routing")
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, out / "weights.safetensors")  # the adapters are merged into them
        print(f"loss {report.history[0]['loss']:.4f} to {report.history[-1]['loss']:.4f}")
        print("wrote", *sorted(path.name for path in out.iterdir()))
    if size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
