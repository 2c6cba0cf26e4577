"""What ``transform`` costs on models of true size: seconds and memory of the plan, on the meta device and with weights.

    python examples/benchmarks/large.py [NAME ...]

Each model is built from its published configuration, on the meta device unless its name says otherwise, and transformed in a
process of its own, with inputs of a usual size. Writes `large.md` beside it, or the rows of the names given in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(guidance_embeds=True)
    return model, {
        "hidden_states": zeros(2, 4096, 64),
        "encoder_hidden_states": zeros(2, 512, 4096),
        "pooled_projections": zeros(2, 768),
        "timestep": zeros(2),
        "guidance": zeros(2),
        "img_ids": zeros(4096, 3),
        "txt_ids": zeros(512, 3),
    }


def qwen_image() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel()
    return model, {
        "hidden_states": zeros(2, 4096, 64),
        "encoder_hidden_states": zeros(2, 256, 3584),
        "timestep": zeros(2),
        "img_shapes": [[(1, 64, 64)]] * 2,
    }


def wan_14b() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(num_attention_heads=40, num_layers=40, ffn_dim=13824)
    return model, {
        "hidden_states": zeros(2, 16, 21, 60, 104),
        "timestep": zeros(2),
        "encoder_hidden_states": zeros(2, 512, 4096),
    }


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=128, caption_channels=4096, cross_attention_dim=1152, use_additional_conditions=False
    )
    return model, {
        "hidden_states": zeros(2, 4, 128, 128),
        "encoder_hidden_states": zeros(2, 120, 4096),
        "timestep": zeros(2),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


WITH_WEIGHTS = "PixArt-Sigma XL/2, weights in memory"

MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "FLUX.1-dev": flux,
    "Qwen-Image": qwen_image,
    "Wan 2.1 14B": wan_14b,
    WITH_WEIGHTS: pixart,
}


def resident() -> float:
    """GiB that this process holds."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2**20


def measure(name: str) -> dict[str, Any]:
    """Plan one model in this process."""
    import diffcr_compile

    torch.set_num_threads(2)
    with torch.device("cpu" if name == WITH_WEIGHTS else "meta"):
        model, inputs = MODELS[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    diffcr_compile.transform(model, example_inputs=inputs)
    explanation = diffcr_compile.explain(model)
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - start,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gib_before": before / 2**20,
        "gib_after": resident(),
        "families": [
            f"{family.plan.kind} x{len(family.blocks)} ({family.plan.lift})" for family in explanation.families
        ],
        "routable": explanation.routable_share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}; all if none is given")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    rows = []
    for name in options.names or MODELS:
        process = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True)
        if process.returncode:
            print(process.stderr, file=sys.stderr)
            raise SystemExit(f"{name} failed")
        rows.append(json.loads(process.stdout.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
    lines = [
        "# What transform costs at true sizes",
        "",
        f"`python examples/benchmarks/large.py`, torch {torch.__version__}, two CPU threads, batch 2, meta device "
        "unless said otherwise. Memory: the "
        "most that the process held, what it held after transform, and before.",
        "",
        "| model | parameters | families | routable FLOPs | seconds | memory |",
        "|---|---|---|---|---|---|",
    ]
    table = HERE / "large.md"
    known = {line.split(" | ")[0].removeprefix("| "): line for line in table.read_text().splitlines() if " | " in line}
    for row in rows:
        known[row["model"]] = (
            f"| {row['model']} | {row['parameters'] / 1e9:.1f} B | {', '.join(row['families'])} | {row['routable']:.0%} "
            f"| {row['seconds']:.0f} | {row['gib']:.2f} GiB ({row['gib_after']:.2f} after, {row['gib_before']:.2f} before) |"
        )
    table.write_text("\n".join([*lines, *(known[name] for name in MODELS if name in known)]) + "\n")


if __name__ == "__main__":
    main()
