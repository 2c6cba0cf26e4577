"""Train the caption DiT for a given time, measure it, and write weights and a record to `weights/`.

    python examples/train_captions.py --minutes 18

The first part of the time goes to windows of 11x11 tokens in a corner of the canvas, each batch in one of the four, which
cost less than half; the rest goes to whole canvases. The number of steps depends on the machine.
"""

import argparse
import json
from typing import Any

import captions
import digits
import torch
from torch import Tensor, nn
from tqdm import tqdm
from train_photos import (
    CANVAS_TOKENS,
    EVALUATION_BATCH,
    LABEL_DROPOUT,
    Loss,
    build_parser,
    describe_run,
    prepare,
    save_half,
    train_model,
    velocity_loss,
)

WINDOW_TOKENS = 11  # a digit of 8 tokens, at most 2.5 tokens from its corner, lies within


def caption_loss(args: argparse.Namespace) -> Loss:
    """The loss on captioned pictures, windows all of one quarter; a tenth of the captions is empty."""

    def loss(model: nn.Module, tokens: int, generator: torch.Generator) -> Tensor:
        quarter = None
        if tokens < CANVAS_TOKENS:
            quarter = int(torch.randint(captions.NUM_QUARTERS, (), generator=generator))
        images, labels, quarters = captions.pictures(args.batch, generator, quarter=quarter)
        text = captions.tokenize(captions.captioned(labels, quarters, generator))
        text = text.masked_fill((torch.rand(args.batch, generator=generator) < LABEL_DROPOUT)[:, None], 0)
        far, side = CANVAS_TOKENS - tokens, tokens * captions.PATCH_SIZE
        origin = (0, 0) if quarter is None else (far * (quarter // 2), far * (quarter % 2))
        top, left = (captions.PATCH_SIZE * place for place in origin)
        windows = images[:, :, top : top + side, left : left + side]
        return velocity_loss(model, windows, {"text": text, "origin": origin}, generator)

    return loss


def measure(model: nn.Module, classifier: digits.DigitClassifier, args: argparse.Namespace) -> dict[str, Any]:
    """Class and quarter accuracy, and Fréchet distance to held-out pictures, of equally many generated and real pictures."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    num = args.num_samples
    held_out, held_out_labels, held_out_quarters = captions.pictures(num, generator, train=False)
    real, _, _ = captions.pictures(num, generator)
    labels = torch.arange(num) % captions.NUM_CLASSES
    quarters = torch.arange(num) // captions.NUM_CLASSES % captions.NUM_QUARTERS
    noise = torch.randn(num, captions.CHANNELS, captions.CANVAS_SIZE, captions.CANVAS_SIZE, generator=generator)
    asked = captions.captioned(labels, quarters)
    with torch.no_grad():
        reference, real_features = classifier.features(held_out), classifier.features(real)
    result: dict[str, Any] = {
        "classifier_held_out_accuracy": round(captions.class_accuracy(held_out, held_out_labels, classifier), 4),
        "held_out_quarter_accuracy": round(captions.quarter_accuracy(held_out, held_out_quarters), 4),
        "frechet_train_to_held_out": round(captions.frechet_distance(real_features, reference), 2),
    }
    for guidance in args.guidance:
        images = torch.cat(
            [
                captions.sample(
                    model,
                    asked[first : first + EVALUATION_BATCH],
                    noise=noise[first : first + EVALUATION_BATCH],
                    guidance=guidance,
                )
                for first in tqdm(range(0, num, EVALUATION_BATCH), desc=f"samples, guidance {guidance}")
            ]
        )
        with torch.no_grad():
            found = classifier.features(images)
        result[f"guidance_{guidance}"] = {
            "class_accuracy": round(captions.class_accuracy(images, labels, classifier), 4),
            "quarter_accuracy": round(captions.quarter_accuracy(images, quarters), 4),
            "frechet_to_held_out": round(captions.frechet_distance(found, reference), 2),
        }
    return result


def main() -> None:
    parser = build_parser(__doc__, captions.WEIGHTS)
    # A window's place already tells the quarter: only whole canvases teach the words of place. Words that start at 0.02 were
    # still ignored after 1439 steps, 232 of them on whole canvases (asked class 0.09, asked quarter 0.27).
    parser.set_defaults(window_share=0.4, embedding_std=1.0)
    args = parser.parse_args()
    prepare(args)
    model_file = args.output / captions.MODEL_FILE.name
    model, training = train_model(captions.build_model(), caption_loss(args), WINDOW_TOKENS, CANVAS_TOKENS, args)
    save_half(model, model_file)
    quality = measure(captions.load_model(model_file), captions.load_classifier(), args)
    record = {**describe_run(args), **training, "quality": quality}
    (args.output / "captions.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
