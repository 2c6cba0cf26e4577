"""Train the inpainting DiT from the weights of the digits DiT, measure it, and write weights and a record to `weights/`.

    python examples/train_inpainting.py

The weights of the two new input channels start at zero, so that the first prediction is that of the digits DiT.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import digits
import inpainting
import torch
import torch.nn.functional as F
from diffusers.models import DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm
from train_photos import EVALUATION_BATCH, LABEL_DROPOUT, describe_run, prepare, save_half

WARM_UP = 50  # steps


def widened() -> DiTTransformer2DModel:
    """The digits DiT, blind to the new channels."""
    model, trained = inpainting.build_model(), digits.load_model().state_dict()
    name = "pos_embed.proj.weight"
    filters = trained[name]
    trained[name] = F.pad(filters, (0, 0, 0, 0, 0, inpainting.INPUTS - filters.shape[1]))
    model.load_state_dict(trained)
    return model.eval()  # in training mode a DiT drops labels by draws of its own


def train_model(args: argparse.Namespace) -> tuple[DiTTransformer2DModel, dict[str, Any]]:
    """The DiT with averaged weights, and for the record the steps, the seconds and the running average of the loss."""
    generator = torch.Generator().manual_seed(args.seed)
    model = widened()
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (args.steps - step) / args.steps)
    )
    average, start = 0.2, time.perf_counter()
    progress = tqdm(range(args.steps), desc="DiT", mininterval=5)
    for _ in progress:
        hidden = inpainting.draw(args.batch, generator)
        batch = inpainting.noised(hidden, generator, targets=True)
        dropped = torch.rand(args.batch, generator=generator) < LABEL_DROPOUT
        batch["class_labels"] = batch["class_labels"].masked_fill(dropped, digits.EMPTY_LABEL)
        velocity = batch.pop("velocity")
        loss = F.mse_loss(model(**batch, return_dict=False)[0], velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        ema.step(model.parameters())
        average += 0.02 * (loss.item() - average)
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
    ema.copy_to(model.parameters())
    seconds = round(time.perf_counter() - start)
    return model, {"steps": {"canvas": args.steps}, "model_seconds": seconds, "last_loss": round(average, 4)}


def measure(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Error inside the masks of held-out pictures, class accuracy, and Fréchet distance to as many others; ``empty``: of pictures
    completed by background alone."""
    hidden, labels = inpainting.subjects(args.num_samples)
    classifier = digits.load_classifier()
    others, _ = digits.pictures(args.num_samples, torch.Generator().manual_seed(args.seed + 1), train=False)
    generator = torch.Generator().manual_seed(args.seed + 2)
    parts = [
        inpainting.Hidden(*(part[first : first + EVALUATION_BATCH] for part in hidden))
        for first in range(0, args.num_samples, EVALUATION_BATCH)
    ]
    completed = torch.cat([inpainting.sample(model, part, generator=generator) for part in tqdm(parts, desc="samples")])
    empty = torch.where(hidden.masks.bool(), -1.0, hidden.pictures)
    with torch.no_grad():
        reference = classifier.features(others)
        return {
            name: {
                "error_inside": round(inpainting.errors(images, hidden)[0], 4),
                "class_accuracy": round(inpainting.class_accuracy(images, labels, classifier), 4),
                "frechet_to_held_out": round(inpainting.frechet_distance(classifier.features(images), reference), 2),
            }
            for name, images in (("completed", completed), ("empty", empty), ("real", hidden.pictures))
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=digits.WEIGHTS, help="folder of weights and record")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of AdamW; falls linearly to zero")
    parser.add_argument("--ema-decay", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num-samples", type=int, default=300, help="pictures of each measured set")
    args = parser.parse_args()
    prepare(args)
    model_file = args.output / inpainting.MODEL_FILE.name
    model, training = train_model(args)
    save_half(model, model_file)
    record = {**describe_run(args), **training, "quality": measure(inpainting.load_model(model_file), args)}
    (args.output / "inpainting.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
