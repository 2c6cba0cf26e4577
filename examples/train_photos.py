"""Train the photograph DiT and its classifier for a given time, measure them, and write weights and a record to `weights/`.

    python examples/train_photos.py --minutes 18

The first part of the time goes to windows of 8x8 tokens, each batch at a random place of the 16x16 ones, which cost about a
fifth; the rest goes to whole pictures. The number of steps depends on the machine.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import photos
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

WINDOW_TOKENS = 8
CANVAS_TOKENS = photos.CANVAS_SIZE // photos.PATCH_SIZE
DECAY_SHARE = 0.3  # of the time, at its end, in which the learning rate falls
EVALUATION_BATCH = 100
LABEL_DROPOUT = 0.1  # share of pictures trained without a label, for guidance

Loss = Callable[[nn.Module, int, torch.Generator], Tensor]
"""Loss of a model on one new batch of pictures so many tokens high and wide."""


def initialise(model: nn.Module, embedding_std: float) -> None:
    """DiT's start: every block is the identity and the prediction is zero (Peebles and Xie 2023, section 3.2)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=embedding_std)
    for name, parameter in model.named_parameters():
        if "modulation" in name or name.startswith("head."):
            nn.init.zeros_(parameter)


def velocity_loss(model: nn.Module, images: Tensor, inputs: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity; the timesteps of a batch are spread evenly over 0..999."""
    num, scheduler = len(images), photos.build_scheduler()
    timesteps = ((torch.arange(num) + torch.rand(num, generator=generator)) / num * 1000).long()
    noise = torch.randn(images.shape, generator=generator)
    noisy = scheduler.add_noise(images, noise, timesteps)  # type: ignore[arg-type]
    target = scheduler.get_velocity(images, noise, timesteps)  # type: ignore[arg-type]
    return F.mse_loss(model(x=noisy, t=timesteps, **inputs), target)


def photo_loss(args: argparse.Namespace) -> Loss:
    """The loss on crops; a tenth of the labels is empty."""

    def loss(model: nn.Module, tokens: int, generator: torch.Generator) -> Tensor:
        num = args.batch
        images, labels = photos.pictures(num, generator, size=tokens * photos.PATCH_SIZE)
        labels = labels.masked_fill(torch.rand(num, generator=generator) < LABEL_DROPOUT, photos.EMPTY_LABEL)
        top, left = torch.randint(CANVAS_TOKENS - tokens + 1, (2,), generator=generator).tolist()
        return velocity_loss(model, images, {"y": labels, "origin": (top, left)}, generator)

    return loss


def learning_rate_share(step: int, spent: float) -> float:
    """Linear warm-up over 50 steps, then constant, at last linear to zero; spent: share of the time."""
    return min((step + 1) / 50, 1.0, max(1 - spent, 0.0) / DECAY_SHARE)


def train_model(
    model: nn.Module, loss_of: Loss, window: int, canvas: int, args: argparse.Namespace
) -> tuple[nn.Module, dict[str, Any]]:
    """Train for `args.minutes`, at least one step on windows and one on whole pictures.

    Returns the model with averaged weights, in evaluation mode, and for the record the steps of both kinds, the seconds, and
    the running average of the loss.
    """
    generator = torch.Generator().manual_seed(args.seed)
    initialise(model.train(), args.embedding_std)
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    steps = {"window": 0, "canvas": 0}
    average, spent, start = 1.0, 0.0, time.perf_counter()
    progress = tqdm(desc="DiT", mininterval=5)
    while spent < 1 or not steps["canvas"]:
        kind = "window" if spent < args.window_share or not steps["window"] else "canvas"
        loss = loss_of(model, window if kind == "window" else canvas, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = args.learning_rate * learning_rate_share(sum(steps.values()), spent)
        optimizer.step()
        model.zero_grad()
        ema.step(model.parameters())
        average += 0.02 * (loss.item() - average)
        steps[kind] += 1
        spent = (time.perf_counter() - start) / (60 * args.minutes)
        progress.set_postfix(kind=kind, loss=f"{average:.4f}", spent=f"{spent:.2f}", refresh=False)
        progress.update()
    ema.copy_to(model.parameters())
    seconds = round(time.perf_counter() - start)
    record = {"minutes": args.minutes, "steps": steps, "model_seconds": seconds, "last_loss": round(average, 4)}
    return model.eval(), record


def train_classifier(args: argparse.Namespace) -> photos.PhotoClassifier:
    """The classifier, trained on slightly noisy crops, in evaluation mode."""
    generator = torch.Generator().manual_seed(args.seed)
    classifier = photos.PhotoClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.classifier_steps)
    for _ in tqdm(range(args.classifier_steps), desc="classifier", mininterval=5):
        images, labels = photos.pictures(64, generator)
        noisy = images + 0.1 * torch.randn(images.shape, generator=generator)
        F.cross_entropy(classifier(noisy), labels).backward()
        optimizer.step()
        schedule.step()
        classifier.zero_grad()
    return classifier.eval()


def save_half(model: nn.Module, path: Path) -> None:
    """Write the weights in half precision."""
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def measure(model: nn.Module, classifier: photos.PhotoClassifier, args: argparse.Namespace) -> dict[str, Any]:
    """Class accuracy, and Fréchet distances of equally many generated, training and held-out pictures."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    num = args.num_samples
    held_out, held_out_labels = photos.pictures(num, generator, train=False)
    references = [photos.features(photos.pictures(num, generator)[0], classifier) for _ in range(2)]
    held_out_features = photos.features(held_out, classifier)
    result: dict[str, Any] = {
        "classifier_held_out_accuracy": round(photos.class_accuracy(held_out, held_out_labels, classifier), 4),
        "frechet_train_to_held_out": round(photos.frechet_distance(references[0], held_out_features), 4),
        "frechet_train_to_train": round(photos.frechet_distance(*references), 4),
    }
    labels = torch.arange(num) % photos.NUM_CLASSES
    noise = torch.randn(num, photos.CHANNELS, photos.CANVAS_SIZE, photos.CANVAS_SIZE, generator=generator)
    for guidance in args.guidance:
        parts = zip(labels.split(EVALUATION_BATCH), noise.split(EVALUATION_BATCH), strict=True)
        bar = tqdm(parts, total=-(-num // EVALUATION_BATCH), desc=f"samples, guidance {guidance}")
        images = torch.cat([photos.sample(model, part, noise=start, guidance=guidance) for part, start in bar])
        found = photos.features(images, classifier)
        result[f"guidance_{guidance}"] = {
            "class_accuracy": round(photos.class_accuracy(images, labels, classifier), 4),
            "frechet_to_held_out": round(photos.frechet_distance(found, held_out_features), 4),
            "frechet_to_train": round(photos.frechet_distance(found, references[0]), 4),
        }
    return result


def build_parser(description: str | None, output: Path) -> argparse.ArgumentParser:
    """The options that both training scripts of this kind have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=output, help="folder of the weights and the record")
    parser.add_argument("--minutes", type=float, default=18.0, help="wall time of the DiT's training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--window-share", type=float, default=0.7, help="of the time, for steps on windows")
    parser.add_argument("--embedding-std", type=float, default=0.02, help="of labels or words at the start")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--ema-decay", type=float, default=0.995)
    parser.add_argument("--num-samples", type=int, default=500, help="pictures of each measured set")
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 2.0], help="guidance scales to measure")
    return parser


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """What a record says of how it was made."""
    return {
        "command": shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "seed": args.seed,
        "threads": args.threads,
        "torch": torch.__version__,
        "num_samples": args.num_samples,
        "sampling_steps": 20,
    }


def prepare(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)


def main() -> None:
    parser = build_parser(__doc__, photos.WEIGHTS)
    parser.add_argument("--classifier-steps", type=int, default=800)
    args = parser.parse_args()
    prepare(args)
    model_file, classifier_file = args.output / photos.MODEL_FILE.name, args.output / photos.CLASSIFIER_FILE.name
    start = time.perf_counter()
    save_half(train_classifier(args), classifier_file)
    classifier_seconds = round(time.perf_counter() - start)
    model, training = train_model(photos.build_model(), photo_loss(args), WINDOW_TOKENS, CANVAS_TOKENS, args)
    save_half(model, model_file)
    training["steps"]["classifier"] = args.classifier_steps
    quality = measure(photos.load_model(model_file), photos.load_classifier(classifier_file), args)
    record = {**describe_run(args), "classifier_seconds": classifier_seconds, **training, "quality": quality}
    (args.output / "photos.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
