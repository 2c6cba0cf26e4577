"""A small class-conditional Diffusion Transformer of handwritten digits: data, model, sampler and measures.

Each picture is one of scikit-learn's 8x8 digits, enlarged to 16x16 and placed at random on a plain 32x32 canvas, so
most of the 256 tokens are background. The digits are from the UCI repository (Alpaydin and Kaynak 1998, CC BY 4.0).
`train_digits.py` made the weights in `weights/`.

Shapes: B pictures, values in [-1, 1], background -1; labels are 0..9, and 10 is the empty label of guidance.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

WEIGHTS = Path(__file__).parent / "weights"
MODEL_FILE = WEIGHTS / "digits_dit.safetensors"
CLASSIFIER_FILE = WEIGHTS / "digits_classifier.safetensors"

CANVAS_SIZE = 32  # pixels
GLYPH_SIZE = 16  # pixels
NUM_CLASSES = 10
EMPTY_LABEL = NUM_CLASSES
EMPTY = ("class_labels", EMPTY_LABEL)  # the input that guidance empties, and what is there then
NUM_HELD_OUT = 360  # of 1797 digits, a fifth
NUM_FEATURES = 64


@cache
def glyphs(train: bool = True) -> tuple[Tensor, Tensor]:
    """The enlarged digits of one split: (M, 1, 16, 16) in [-1, 1], and their labels (M,). The splits share no digit."""
    data, target = load_digits(return_X_y=True)
    small = torch.from_numpy(data).float().view(-1, 1, 8, 8) / 8 - 1
    large = F.interpolate(small, size=GLYPH_SIZE, mode="bicubic").clamp(-1, 1)
    order = torch.randperm(len(large), generator=torch.Generator().manual_seed(0))
    chosen = order[NUM_HELD_OUT:] if train else order[:NUM_HELD_OUT]
    return large[chosen], torch.from_numpy(target)[chosen]


def pictures(
    num: int, generator: torch.Generator, *, train: bool = True, size: int = CANVAS_SIZE
) -> tuple[Tensor, Tensor]:
    """Draw digits, each at a random place of a plain square: (num, 1, size, size), and labels (num,)."""
    images, labels = glyphs(train)
    chosen = torch.randint(len(images), (num,), generator=generator)
    canvas = torch.full((num, 1, size, size), -1.0)
    corners = torch.randint(size - GLYPH_SIZE + 1, (num, 2), generator=generator).tolist()
    for picture, glyph, (top, left) in zip(canvas, images[chosen], corners, strict=True):
        picture[:, top : top + GLYPH_SIZE, left : left + GLYPH_SIZE] = glyph
    return canvas, labels[chosen]


def subjects(number: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """What a sampling is asked for, as `sample` takes it, and the labels (B,): here both are the labels, in turn from the given
    place on."""
    labels = torch.arange(first, first + number) % NUM_CLASSES
    return labels, labels


def build_model() -> DiTTransformer2DModel:
    """An untrained DiT of 1.6 million parameters that predicts the velocity of 32x32 one-channel pictures."""
    return DiTTransformer2DModel(
        sample_size=CANVAS_SIZE,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=8,
        num_attention_heads=6,
        attention_head_dim=16,
        num_embeds_ada_norm=NUM_CLASSES,
        norm_num_groups=1,
    )


def load_model(path: Path = MODEL_FILE) -> DiTTransformer2DModel:
    """The trained DiT, float32, in evaluation mode."""
    model = build_model()
    model.load_state_dict(load_file(path))
    return model.eval()


def build_scheduler() -> DDIMScheduler:
    """The schedule of training and sampling: cosine, velocity prediction, pure noise at the last of 1000 steps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


@torch.no_grad()
def sample(
    model: nn.Module,
    labels: Tensor,
    *,
    steps: int = 20,
    guidance: float = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Generate pictures by deterministic DDIM.

    labels (B,) in 0..9; noise (B, 1, 32, 32), drawn from `generator` if not given. The model is in evaluation mode:
    in training mode a DiT drops labels at random. A guidance other than 1 doubles the batch (classifier-free guidance).
    Returns (B, 1, 32, 32) in [-1, 1].
    """
    if noise is None:
        noise = torch.randn(len(labels), 1, CANVAS_SIZE, CANVAS_SIZE, generator=generator)
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    images = noise.to(labels.device)
    for timestep in scheduler.timesteps:
        velocity = _guided_velocity(model, images, timestep, labels, guidance)
        images = scheduler.step(velocity, timestep, images, return_dict=False)[0]
    return images.clamp(-1, 1)


def _guided_velocity(model: nn.Module, images: Tensor, timestep: Tensor, labels: Tensor, guidance: float) -> Tensor:
    if guidance != 1.0:
        images = torch.cat([images, images])
        labels = torch.cat([labels, torch.full_like(labels, EMPTY_LABEL)])
    timesteps = timestep.to(labels.device).expand(len(labels))
    velocity = model(hidden_states=images, timestep=timesteps, class_labels=labels, return_dict=False)[0]
    if guidance == 1.0:
        return velocity
    labelled, unlabelled = velocity.chunk(2)
    return unlabelled + guidance * (labelled - unlabelled)


def calibration_batches(
    num_batches: int, batch_size: int, seed: int = 0, *, targets: bool = False
) -> list[dict[str, Tensor]]:
    """Keyword arguments of the denoiser's forward: training pictures, noised to uniformly random timesteps.

    Each batch holds hidden_states (B, 1, 32, 32), timestep (B,) in 0..999 and class_labels (B,) in 0..9; with targets also
    the velocity that should be predicted.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = build_scheduler()
    batches = []
    for _ in range(num_batches):
        images, labels = pictures(batch_size, generator)
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        noisy = scheduler.add_noise(images, noise, timesteps)  # type: ignore[arg-type]
        batches.append({"hidden_states": noisy, "timestep": timesteps, "class_labels": labels})
        if targets:
            batches[-1]["velocity"] = scheduler.get_velocity(images, noise, timesteps)  # type: ignore[arg-type]
    return batches


class DigitClassifier(nn.Module):
    """A convnet that names the digit wherever it stands: a maximum over places follows the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, NUM_FEATURES, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """(B, 1, 32, 32) -> (B, 64), non-negative."""
        return self.trunk(images).amax(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 32, 32) -> logits (B, 10)."""
        return self.head(self.features(images))


def load_classifier(path: Path = CLASSIFIER_FILE) -> DigitClassifier:
    """The trained classifier, in evaluation mode."""
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


@torch.no_grad()
def class_accuracy(images: Tensor, labels: Tensor, classifier: DigitClassifier | None = None) -> float:
    """Share of the pictures (B, 1, 32, 32) that the classifier names as labelled (B,), in [0, 1]."""
    classifier = classifier or load_classifier()
    return (classifier(images).argmax(dim=1) == labels).double().mean().item()


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance (Heusel et al. 2017) of two feature sets (M, D) and (N, D) under a normal fit; 0 is equal.

    Comparable only among features of the same `DigitClassifier`, and at equal numbers of pictures.
    """
    extractor = nn.Identity()
    extractor.num_features = features_a.shape[1]  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=extractor, normalize=True)
    metric.update(features_a.double(), real=True)
    metric.update(features_b.double(), real=False)
    return metric.compute().item()


def distance(images_a: Tensor, images_b: Tensor) -> float:
    """Mean squared difference of two equally shaped sets of pictures, in [0, 4]."""
    return F.mse_loss(images_a, images_b).item()
