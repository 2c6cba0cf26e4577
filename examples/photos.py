"""A small class-conditional Diffusion Transformer of photographs, in plain torch: data, model, sampler and measures.

Each picture is a 32x32 colour crop of one of ten photographs that come with scikit-learn and scikit-image (their licences
are in those packages), made 192 pixels wide; its class is the photograph. The right quarter of every photograph is held out.
`train_photos.py` made the weights in `weights/`.

Shapes: B pictures (B, 3, 32, 32), values in [-1, 1]; labels are 0..9, and 10 is the empty label of guidance.
"""

import math
from functools import cache
from pathlib import Path

import skimage.data
import torch
import torch.nn.functional as F
from digits import build_scheduler as build_scheduler
from digits import distance as distance
from digits import frechet_distance as frechet_distance
from digits import subjects as subjects
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"
MODEL_FILE = WEIGHTS / "photos_dit.safetensors"
CLASSIFIER_FILE = WEIGHTS / "photos_classifier.safetensors"

CANVAS_SIZE = 32  # pixels
CHANNELS = 3
PHOTO_WIDTH = 192  # pixels
HELD_OUT_WIDTH = 48  # pixels, a quarter
PATCH_SIZE = 2  # pixels
NUM_CLASSES = 10
EMPTY_LABEL = NUM_CLASSES
EMPTY = ("y", EMPTY_LABEL)  # the input that guidance empties, and what is there then
NUM_FEATURES = 64


@cache
def photographs() -> tuple[Tensor, ...]:
    """The ten photographs, each (3, H, 192) in [-1, 1], H from 128 to 192."""
    sources = [
        load_sample_image("china.jpg"),
        load_sample_image("flower.jpg"),
        skimage.data.astronaut(),
        skimage.data.chelsea(),
        skimage.data.coffee(),
        skimage.data.rocket(),
        skimage.data.hubble_deep_field(),
        skimage.data.immunohistochemistry(),
        skimage.data.retina(),
        skimage.data.stereo_motorcycle()[0],
    ]
    photos = []
    for source in sources:
        photo = torch.tensor(source).permute(2, 0, 1).float()[None] / 127.5 - 1
        height = round(photo.shape[2] * PHOTO_WIDTH / photo.shape[3])
        small = F.interpolate(photo, (height, PHOTO_WIDTH), mode="bilinear", antialias=True)
        photos.append(small[0].clamp(-1, 1))
    return tuple(photos)


def pictures(
    num: int, generator: torch.Generator, *, train: bool = True, size: int = CANVAS_SIZE
) -> tuple[Tensor, Tensor]:
    """Crops of random photographs, at random places, half of them mirrored: (num, 3, size, size), and labels (num,).

    Crops for training and held-out ones share no pixel. `size` is at most 48.
    """
    first, last = (0, PHOTO_WIDTH - HELD_OUT_WIDTH) if train else (PHOTO_WIDTH - HELD_OUT_WIDTH, PHOTO_WIDTH)
    labels = torch.randint(NUM_CLASSES, (num,), generator=generator)
    places = torch.rand(num, 2, generator=generator).tolist()
    mirrored = (torch.rand(num, generator=generator) < 0.5).tolist()
    crops = []
    for label, (down, right), mirror in zip(labels.tolist(), places, mirrored, strict=True):
        photo = photographs()[label][:, :, first:last]
        top, left = int(down * (photo.shape[1] - size + 1)), int(right * (photo.shape[2] - size + 1))
        crop = photo[:, top : top + size, left : left + size]
        crops.append(crop.flip(2) if mirror else crop)
    return torch.stack(crops), labels


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of (B,) positions or timesteps: float32 (B, width), width even."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=positions.device) / (width // 2))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(size: int, width: int) -> Tensor:
    """Two-dimensional sinusoidal position embeddings (size, size, width): half the width for rows, half for columns."""
    line = sinusoids(torch.arange(size), width // 2)
    return torch.cat([line[:, None].expand(-1, size, -1), line[None].expand(size, -1, -1)], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens (B, N, D) scaled and shifted by one vector (B, D) each."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Self-attention over tokens (B, N, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward, each normed, shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (B, N, D) and condition (B, D) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PhotoDiT(nn.Module):
    """A DiT (Peebles and Xie 2023) on patches of 2x2 pixels that predicts the velocity."""

    def __init__(self, width: int = 128, depth: int = 8, heads: int = 4, hidden: int = 384) -> None:
        super().__init__()
        self.embed = nn.Conv2d(CHANNELS, width, PATCH_SIZE, stride=PATCH_SIZE)
        self.embed_time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_label = nn.Embedding(NUM_CLASSES + 1, width)
        self.register_buffer("positions", grid_positions(CANVAS_SIZE // PATCH_SIZE, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, PATCH_SIZE**2 * CHANNELS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, origin: tuple[int, int] = (0, 0)) -> Tensor:
        """Noisy pictures (B, 3, 32, 32), timesteps (B,) in 0..999 and labels (B,) in 0..10 -> velocity (B, 3, 32, 32).

        Smaller pictures are windows of a 32x32 one; `origin` is the row and column, in patches, of their first corner.
        """
        tokens = self.embed(x)
        rows, columns = tokens.shape[-2:]
        positions = self.positions[origin[0] : origin[0] + rows, origin[1] : origin[1] + columns]
        tokens = tokens.flatten(2).transpose(1, 2) + positions.flatten(0, 1)
        condition = self.embed_time(sinusoids(t, tokens.shape[-1]).to(tokens.dtype)) + self.embed_label(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        pixels = self.head(modulate(self.norm(tokens), shift, scale))
        pixels = pixels.reshape(-1, rows, columns, PATCH_SIZE, PATCH_SIZE, CHANNELS)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def build_model() -> PhotoDiT:
    """An untrained DiT of 2.2 million parameters that predicts the velocity of 32x32 colour pictures."""
    return PhotoDiT()


def load_model(path: Path = MODEL_FILE) -> PhotoDiT:
    """The trained DiT, float32, in evaluation mode."""
    model = build_model()
    model.load_state_dict(load_file(path))
    return model.eval()


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

    labels (B,) in 0..9; noise (B, 3, 32, 32), drawn from `generator` if not given. A guidance other than 1 doubles the batch
    (classifier-free guidance). Returns (B, 3, 32, 32) in [-1, 1].
    """
    if noise is None:
        noise = torch.randn(len(labels), CHANNELS, CANVAS_SIZE, CANVAS_SIZE, generator=generator)
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
    velocity = model(x=images, t=timestep.to(labels.device).expand(len(labels)), y=labels)
    if guidance == 1.0:
        return velocity
    labelled, unlabelled = velocity.chunk(2)
    return unlabelled + guidance * (labelled - unlabelled)


def calibration_batches(
    num_batches: int, batch_size: int, seed: int = 0, *, targets: bool = False
) -> list[dict[str, Tensor]]:
    """Keyword arguments of the denoiser's forward: training pictures, noised to uniformly random timesteps.

    Each batch holds x (B, 3, 32, 32), t (B,) in 0..999 and y (B,) in 0..9; with targets also the velocity that should be predicted.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = build_scheduler()
    batches = []
    for _ in range(num_batches):
        images, labels = pictures(batch_size, generator)
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        noisy = scheduler.add_noise(images, noise, timesteps)  # type: ignore[arg-type]
        batches.append({"x": noisy, "t": timesteps, "y": labels})
        if targets:
            batches[-1]["velocity"] = scheduler.get_velocity(images, noise, timesteps)  # type: ignore[arg-type]
    return batches


class PhotoClassifier(nn.Module):
    """A convnet that names the photograph that a crop is from, by the mean over places of its last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(CHANNELS, 16, 3, padding=1),
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
        """(B, 3, 32, 32) -> (B, 64), non-negative."""
        return self.trunk(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> logits (B, 10)."""
        return self.head(self.features(images))


def load_classifier(path: Path = CLASSIFIER_FILE) -> PhotoClassifier:
    """The trained classifier, in evaluation mode."""
    classifier = PhotoClassifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


@torch.no_grad()
def features(images: Tensor, classifier: PhotoClassifier | None = None) -> Tensor:
    """What the classifier sees in pictures (B, 3, 32, 32): (B, 64)."""
    return (classifier or load_classifier()).features(images)


@torch.no_grad()
def class_accuracy(images: Tensor, labels: Tensor, classifier: PhotoClassifier | None = None) -> float:
    """Share of the pictures (B, 3, 32, 32) that the classifier names as labelled (B,), in [0, 1]."""
    return ((classifier or load_classifier())(images).argmax(dim=1) == labels).double().mean().item()


def frechet(images: Tensor, classifier: PhotoClassifier | None = None, seed: int = 1) -> float:
    """Fréchet distance of pictures (B, 3, 32, 32) to as many held-out crops; comparable at equal B only."""
    held_out, _ = pictures(len(images), torch.Generator().manual_seed(seed), train=False)
    return frechet_distance(features(images, classifier), features(held_out, classifier))
