"""A small text-conditioned joint-stream Diffusion Transformer of handwritten digits: data, model, sampler and measures.

A caption such as "a seven, top left" names the digit and the quarter of the canvas that it stands in; the digits and the canvas
are those of `digits.py`. Text and image tokens meet in one attention with a rotary table that has no batch axis, as in FLUX.
`train_captions.py` made the weights in `weights/`.

Shapes: B pictures (B, 1, 32, 32), values in [-1, 1], background -1; captions are (B, 6) words of the vocabulary.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import digits
import torch
import torch.nn.functional as F
from digits import build_scheduler as build_scheduler
from digits import distance as distance
from digits import frechet_distance as frechet_distance
from digits import load_classifier as load_classifier
from photos import grid_positions, modulate, sinusoids
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"
MODEL_FILE = WEIGHTS / "captions_dit.safetensors"

CANVAS_SIZE = digits.CANVAS_SIZE
CHANNELS = 1
PATCH_SIZE = 2  # pixels
NUM_WORDS = 6  # text tokens
NUM_CLASSES = digits.NUM_CLASSES
EMPTY = ("text", 0)  # the input that guidance empties, and what is there then
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROWS = (("top", "upper"), ("bottom", "lower"))
COLUMNS = (("left",), ("right",))
VOCABULARY = ("", *NUMBERS, "a", "the", "digit", "number", ",", "in", *sum(ROWS + COLUMNS, ()))
"""The first word is padding; a caption of padding alone is the empty one."""
TEMPLATES = ("a {number}, {row} {column}", "the digit {number}, {row} {column}", "{row} {column}, a {number}")
NUM_QUARTERS = 4
EDGE = 5  # pixels: a digit's corner is at most so far from the canvas's own, so that no digit spans the middle

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, each (text and image tokens, head width)."""


def caption(label: int, quarter: int, template: int = 0, synonym: int = 0) -> str:
    """A caption of a digit in a quarter: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    row, (column,) = ROWS[quarter // 2], COLUMNS[quarter % 2]
    return TEMPLATES[template].format(number=NUMBERS[label], row=row[synonym], column=column)


def tokenize(captions: Sequence[str]) -> Tensor:
    """Words of each caption (B, 6), padded; ValueError for an unknown word or a caption of more than 6 words."""
    rows = []
    for text in captions:
        words = re.findall(r"[a-z]+|,", text.lower())
        unknown = [word for word in words if word not in VOCABULARY]
        if unknown or len(words) > NUM_WORDS:
            raise ValueError(
                f"a caption has at most {NUM_WORDS} words of {VOCABULARY[1:]}, found {text!r}; unknown: {unknown}"
            )
        rows.append([VOCABULARY.index(word) for word in words] + [0] * (NUM_WORDS - len(words)))
    return torch.tensor(rows)


def captioned(labels: Tensor, quarters: Tensor, generator: torch.Generator | None = None) -> list[str]:
    """Captions of labels (B,) and quarters (B,); of random wording where a generator is given."""
    wording = torch.zeros(len(labels), 2, dtype=torch.long)
    if generator is not None:
        wording[:, 0] = torch.randint(len(TEMPLATES), (len(labels),), generator=generator)
        wording[:, 1] = torch.randint(2, (len(labels),), generator=generator)
    return [
        caption(label, quarter, *words)
        for label, quarter, words in zip(labels.tolist(), quarters.tolist(), wording.tolist(), strict=True)
    ]


def pictures(
    num: int, generator: torch.Generator, *, train: bool = True, quarter: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Digits, each in a random quarter or the given one: (num, 1, 32, 32), labels (num,) and quarters (num,)."""
    glyphs, labels = digits.glyphs(train)
    chosen = torch.randint(len(glyphs), (num,), generator=generator)
    quarters = torch.randint(NUM_QUARTERS, (num,), generator=generator)
    if quarter is not None:
        quarters = torch.full_like(quarters, quarter)
    offsets = torch.randint(EDGE + 1, (num, 2), generator=generator)
    far = CANVAS_SIZE - digits.GLYPH_SIZE
    corners = torch.where(torch.stack([quarters >= 2, quarters % 2 == 1], dim=1), far - offsets, offsets).tolist()
    canvas = torch.full((num, CHANNELS, CANVAS_SIZE, CANVAS_SIZE), -1.0)
    for picture, glyph, (top, left) in zip(canvas, glyphs[chosen], corners, strict=True):
        picture[:, top : top + digits.GLYPH_SIZE, left : left + digits.GLYPH_SIZE] = glyph
    return canvas, labels[chosen], quarters


def subjects(number: int, first: int = 0) -> tuple[list[str], Tensor]:
    """What a sampling is asked for, and the labels (B,): digits in turn from the given one on, in the quarters in turn."""
    labels, _ = digits.subjects(number, first)
    return captioned(labels, labels % 4), labels


def rotary_table(rows: Tensor, columns: Tensor, head_width: int) -> Rope:
    """Angles of text tokens 0..5 followed by an image's patches, at the given rows and columns.

    A third of the head width each turns with the word's number, the row and the column; each frequency fills two
    neighbouring channels.
    """
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    words = torch.arange(NUM_WORDS, device=rows.device)
    places = torch.cat([F.pad(words[:, None], (0, 2)), F.pad(grid, (1, 0))])
    axis_width = head_width // 3
    frequencies = 100.0 ** -(torch.arange(0, axis_width, 2, device=rows.device) / axis_width)
    angles = (places[..., None] * frequencies).flatten(1).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn neighbouring channels of (B, H, N, head width) by the table's angles."""
    cos, sin = rope
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


class Stream(nn.Module):
    """Norms, projections and feed-forward of text or image tokens, modulated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def project(self, x: Tensor, condition: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Queries, keys and values (B, N, 3 D), and what `finish` needs of the modulation."""
        shift, scale, *rest = self.modulation(condition).chunk(6, dim=1)
        return self.qkv(modulate(self.norm1(x), shift, scale)), tuple(rest)

    def finish(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        gate1, shift, scale, gate2 = parts
        x = x + gate1.unsqueeze(1) * self.out(attended)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift, scale))


class JointBlock(nn.Module):
    """Text and image tokens in one attention, text first; each stream has weights of its own."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.image, self.text = Stream(width, hidden), Stream(width, hidden)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, D), text tokens (B, T, D), condition (B, D), table of T + N tokens -> both streams."""
        image_qkv, image_parts = self.image.project(image, condition)
        text_qkv, text_parts = self.text.project(text, condition)
        q, k, v = torch.cat([text_qkv, image_qkv], dim=1).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v).transpose(1, 2).flatten(2)
        text_attended, image_attended = attended.split([text.shape[1], image.shape[1]], dim=1)
        return self.image.finish(image, image_attended, image_parts), self.text.finish(text, text_attended, text_parts)


class CaptionDiT(nn.Module):
    """A joint-stream DiT on patches of 2x2 pixels that predicts the velocity; words are learned embeddings."""

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 4, hidden: int = 192) -> None:
        super().__init__()
        self.head_width = width // heads
        self.embed = nn.Conv2d(CHANNELS, width, PATCH_SIZE, stride=PATCH_SIZE)
        self.embed_word = nn.Embedding(len(VOCABULARY), width)
        self.embed_caption = nn.Linear(NUM_WORDS * width, width)
        self.embed_time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("positions", grid_positions(CANVAS_SIZE // PATCH_SIZE, width), persistent=False)
        self.blocks = nn.ModuleList(JointBlock(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, PATCH_SIZE**2 * CHANNELS)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, origin: tuple[int, int] = (0, 0)) -> Tensor:
        """Noisy pictures (B, 1, 32, 32), timesteps (B,) in 0..999 and words (B, 6) -> velocity (B, 1, 32, 32).

        Smaller pictures are windows of a 32x32 one; `origin` is the row and column, in patches, of their first corner.
        """
        image = self.embed(x)
        height, width = image.shape[-2:]
        rows = torch.arange(origin[0], origin[0] + height, device=x.device)
        columns = torch.arange(origin[1], origin[1] + width, device=x.device)
        image = image.flatten(2).transpose(1, 2) + self.positions[rows][:, columns].flatten(0, 1)
        words = self.embed_word(text)
        condition = self.embed_time(sinusoids(t, words.shape[-1]).to(words.dtype)) + self.embed_caption(
            words.flatten(1)
        )
        rope = rotary_table(rows, columns, self.head_width)
        for block in self.blocks:
            image, words = block(image, words, condition, rope)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        pixels = self.head(modulate(self.norm(image), shift, scale))
        pixels = pixels.reshape(-1, height, width, PATCH_SIZE, PATCH_SIZE, CHANNELS)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def build_model() -> CaptionDiT:
    """An untrained joint-stream DiT of 1.7 million parameters that predicts the velocity of 32x32 one-channel pictures."""
    return CaptionDiT()


def load_model(path: Path = MODEL_FILE) -> CaptionDiT:
    """The trained DiT, float32, in evaluation mode."""
    model = build_model()
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def sample(
    model: nn.Module,
    captions: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 2.0,
    two_calls: bool = False,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Generate pictures of B captions by deterministic DDIM.

    noise (B, 1, 32, 32), drawn from `generator` if not given. A guidance other than 1 is classifier-free guidance away from
    the empty caption: in one batch twice as large or, with `two_calls`, in two calls, the captions first.
    Returns (B, 1, 32, 32) in [-1, 1].
    """
    if noise is None:
        noise = torch.randn(len(captions), CHANNELS, CANVAS_SIZE, CANVAS_SIZE, generator=generator)
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    images, text = noise, tokenize(captions).to(noise.device)
    for timestep in scheduler.timesteps:
        velocity = _guided_velocity(model, images, timestep, text, guidance, two_calls)
        images = scheduler.step(velocity, timestep, images, return_dict=False)[0]
    return images.clamp(-1, 1)


def _guided_velocity(
    model: nn.Module, images: Tensor, timestep: Tensor, text: Tensor, guidance: float, two_calls: bool
) -> Tensor:
    timesteps = timestep.to(images.device).expand(len(images))
    if guidance == 1.0:
        return model(x=images, t=timesteps, text=text)
    empty = torch.zeros_like(text)
    if two_calls:
        captioned = model(x=images, t=timesteps, text=text)
        uncaptioned = model(x=images, t=timesteps, text=empty)
    else:
        both = model(x=images.repeat(2, 1, 1, 1), t=timesteps.repeat(2), text=torch.cat([text, empty]))
        captioned, uncaptioned = both.chunk(2)
    return uncaptioned + guidance * (captioned - uncaptioned)


def calibration_batches(
    num_batches: int, batch_size: int, seed: int = 0, *, targets: bool = False
) -> list[dict[str, Tensor]]:
    """Keyword arguments of the denoiser's forward: training pictures, noised to uniformly random timesteps.

    Each batch holds x (B, 1, 32, 32), t (B,) in 0..999 and text (B, 6); with targets also the velocity that should be predicted.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = build_scheduler()
    batches = []
    for _ in range(num_batches):
        images, labels, quarters = pictures(batch_size, generator)
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        noisy = scheduler.add_noise(images, noise, timesteps)  # type: ignore[arg-type]
        text = tokenize(captioned(labels, quarters, generator))
        batches.append({"x": noisy, "t": timesteps, "text": text})
        if targets:
            batches[-1]["velocity"] = scheduler.get_velocity(images, noise, timesteps)  # type: ignore[arg-type]
    return batches


class_accuracy = digits.class_accuracy


def found_quarters(images: Tensor) -> Tensor:
    """The quarter (B,) in which the ink of pictures (B, 1, 32, 32) has its centre; ink is what is above 0."""
    ink = images.clamp(min=0).sum(dim=1) + 1e-9  # a plain background has its centre in the middle
    line = torch.arange(CANVAS_SIZE) - (CANVAS_SIZE - 1) / 2
    down, right = (ink.sum(dim=2) * line).sum(dim=1), (ink.sum(dim=1) * line).sum(dim=1)
    return 2 * (down > 0).long() + (right > 0).long()


def quarter_accuracy(images: Tensor, quarters: Tensor) -> float:
    """Share of the pictures (B, 1, 32, 32) whose digit lies in the asked quarter (B,), in [0, 1]."""
    return (found_quarters(images) == quarters).double().mean().item()
