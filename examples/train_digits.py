"""Train the digit DiT and its classifier, measure them, and write weights and a record to `weights/`.

    python examples/train_digits.py

Most training steps see only a window of 10x10 tokens around a digit, each token with the position it has on the canvas:
a picture then costs about a third. The last steps see the whole canvas.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import digits
import torch
import torch.nn.functional as F
from diffusers.models import DiTTransformer2DModel
from diffusers.models.embeddings import PatchEmbed
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

WINDOW_TOKENS = 10
CANVAS_TOKENS = 16
PATCH_SIZE = 2  # pixels
# Muon's learning rate over AdamW's. Loss on windows, batch 16, 45 to 50 s of one core: 0.264 after 157 steps with 5,
# 0.266 after 206 steps with 2, 0.272 after 221 steps with AdamW alone.
MUON_FACTOR = 5.0
EVALUATION_BATCH = 100
LABEL_DROPOUT = 0.1  # share of pictures trained without a label, for guidance


@dataclass(frozen=True)
class Example:
    """Pictures (B, 1, S, S), labels (B,), and the position embedding of each token (B, N, D)."""

    images: Tensor
    labels: Tensor
    positions: Tensor


class GivenPositions(nn.Module):
    """Patch embedding whose position embedding is set before each call, so that pictures can be windows of a canvas."""

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        self.embed = embed
        self.canvas = embed.pos_embed.view(CANVAS_TOKENS, CANVAS_TOKENS, -1)
        self.positions = embed.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        return self.embed.proj(images).flatten(2).transpose(1, 2) + self.positions


def draw(num: int, tokens: int, canvas_positions: Tensor, generator: torch.Generator) -> Example:
    """Training pictures of tokens x tokens patches, each at a random place of the canvas, some with the empty label."""
    images, labels = digits.pictures(num, generator, size=tokens * PATCH_SIZE)
    dropped = torch.rand(num, generator=generator) < LABEL_DROPOUT
    labels = labels.masked_fill(dropped, digits.EMPTY_LABEL)
    origins = torch.randint(CANVAS_TOKENS - tokens + 1, (num, 2), generator=generator).tolist()
    windows = [canvas_positions[top : top + tokens, left : left + tokens].flatten(0, 1) for top, left in origins]
    return Example(images, labels, torch.stack(windows))


def initialise(model: DiTTransformer2DModel) -> None:
    """DiT's start: every block is the identity and the prediction is zero (Peebles and Xie 2023, section 3.2)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for name, parameter in model.named_parameters():
        if "norm1.linear" in name or "proj_out" in name:
            nn.init.zeros_(parameter)


def build_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and (".attn1." in name or ".ff." in name)
        (matrices if inner else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=MUON_FACTOR * learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)]


def velocity_loss(model: nn.Module, example: Example, scheduler: DDIMScheduler, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity; the timesteps of a batch are spread evenly over 0..999."""
    num = len(example.labels)
    timesteps = ((torch.arange(num) + torch.rand(num, generator=generator)) / num * 1000).long()
    noise = torch.randn(example.images.shape, generator=generator)
    noisy = scheduler.add_noise(example.images, noise, timesteps)  # type: ignore[arg-type]
    target = scheduler.get_velocity(example.images, noise, timesteps)  # type: ignore[arg-type]
    predicted = model(hidden_states=noisy, timestep=timesteps, class_labels=example.labels, return_dict=False)[0]
    return F.mse_loss(predicted, target)


def learning_rate_share(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over 50 steps, constant on windows, linear to zero on whole canvases."""
    remaining = args.window_steps + args.canvas_steps - step
    return min(1.0, (step + 1) / 50, remaining / max(1, args.canvas_steps))


def stages(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Batch size and side in tokens of every step."""
    yield from [(args.window_batch, WINDOW_TOKENS)] * args.window_steps
    yield from [(args.canvas_batch, CANVAS_TOKENS)] * args.canvas_steps


def train_model(args: argparse.Namespace) -> DiTTransformer2DModel:
    """The DiT with averaged weights, in evaluation mode.

    Training runs in evaluation mode too: in training mode every block of diffusers' DiT drops labels by a draw of its
    own, so that almost no picture is without a label in all blocks, and guidance has nothing to guide away from.
    """
    generator = torch.Generator().manual_seed(args.seed)
    model, scheduler = digits.build_model().eval(), digits.build_scheduler()
    initialise(model)
    embed = model.pos_embed
    given = GivenPositions(embed)
    model.set_submodule("pos_embed", given)
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizers = build_optimizers(model, args.learning_rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: learning_rate_share(s, args)) for o in optimizers]
    progress = tqdm(stages(args), total=args.window_steps + args.canvas_steps, desc="DiT", mininterval=5)
    average = 1.0
    for num, tokens in progress:
        example = draw(num, tokens, given.canvas, generator)
        given.positions = example.positions
        loss = velocity_loss(model, example, scheduler, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        ema.step(model.parameters())
        average += 0.02 * (loss.item() - average)
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
    ema.copy_to(model.parameters())
    model.set_submodule("pos_embed", embed)
    return model


def train_classifier(args: argparse.Namespace) -> digits.DigitClassifier:
    """The classifier, trained on slightly noisy pictures, in evaluation mode."""
    generator = torch.Generator().manual_seed(args.seed)
    classifier = digits.DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.classifier_steps)
    for _ in tqdm(range(args.classifier_steps), desc="classifier", mininterval=5):
        images, labels = digits.pictures(64, generator)
        noisy = images + 0.1 * torch.randn(images.shape, generator=generator)
        F.cross_entropy(classifier(noisy), labels).backward()
        optimizer.step()
        schedule.step()
        classifier.zero_grad()
    return classifier.eval()


@torch.no_grad()
def measure(
    model: nn.Module, classifier: digits.DigitClassifier, args: argparse.Namespace
) -> dict[str, float | dict[str, float]]:
    """Class accuracy and Fréchet distance to held-out pictures, of equally many generated and real pictures."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    num = args.num_samples
    held_out, held_out_labels = digits.pictures(num, generator, train=False)
    reference = classifier.features(held_out)
    real, _ = digits.pictures(num, generator)
    labels = torch.arange(num) % digits.NUM_CLASSES
    noise = torch.randn(num, 1, digits.CANVAS_SIZE, digits.CANVAS_SIZE, generator=generator)
    result: dict[str, float | dict[str, float]] = {
        "classifier_held_out_accuracy": digits.class_accuracy(held_out, held_out_labels, classifier),
        "frechet_train_to_held_out": round(digits.frechet_distance(classifier.features(real), reference), 2),
    }
    for guidance in args.guidance:
        parts = zip(labels.split(EVALUATION_BATCH), noise.split(EVALUATION_BATCH), strict=True)
        bar = tqdm(parts, total=-(-num // EVALUATION_BATCH), desc=f"samples, guidance {guidance}")
        images = torch.cat([digits.sample(model, part, noise=start, guidance=guidance) for part, start in bar])
        result[f"guidance_{guidance}"] = {
            "class_accuracy": digits.class_accuracy(images, labels, classifier),
            "frechet_to_held_out": round(digits.frechet_distance(classifier.features(images), reference), 2),
        }
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=digits.WEIGHTS, help="folder of the weights and the record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--window-steps", type=int, default=3000)
    parser.add_argument("--window-batch", type=int, default=8)
    parser.add_argument("--canvas-steps", type=int, default=800)
    parser.add_argument("--canvas-batch", type=int, default=16)
    parser.add_argument("--classifier-steps", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW; Muon's is five times this")
    parser.add_argument("--ema-decay", type=float, default=0.995)
    parser.add_argument("--num-samples", type=int, default=500, help="pictures of each measured set")
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 2.0], help="guidance scales to measure")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    model_file, classifier_file = args.output / digits.MODEL_FILE.name, args.output / digits.CLASSIFIER_FILE.name
    start = time.perf_counter()
    save_file(train_classifier(args).state_dict(), classifier_file)
    classifier_seconds = time.perf_counter() - start
    model = train_model(args)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, model_file)
    record = {
        "command": shlex.join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "seed": args.seed,
        "steps": {"classifier": args.classifier_steps, "window": args.window_steps, "canvas": args.canvas_steps},
        "label_dropout": f"{LABEL_DROPOUT} of the pictures, in all blocks at once",
        "threads": args.threads,
        "classifier_seconds": round(classifier_seconds),
        "model_seconds": round(time.perf_counter() - start - classifier_seconds),
        "torch": torch.__version__,
        "num_samples": args.num_samples,
        "sampling_steps": 20,
        "quality": measure(digits.load_model(model_file), digits.load_classifier(classifier_file), args),
    }
    (args.output / "digits.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
