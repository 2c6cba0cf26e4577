"""Attempts to fool the proof, and what must be refused with its cause.

Whatever the package decides: where a block is routed, then on *new* inputs and weights it must equal the original block
run on each sample's kept tokens alone, and the original block must not care for the order of its tokens. Both are
checked here by plain loops that know nothing of the package's plan.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from models import Shape, TinyDiT, relative_error, sinusoids, tiny_inputs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import diffcr_compile

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

BATCH, TOKENS, CHANNELS, WIDTH, HEADS = 3, 36, 5, 16, 2
TOLERANCE = 1e-4
"""Of the largest value, in float32: rounding stays below 1e-5, a wrong index or a hidden position is above 1e-2."""


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Block(nn.Module):
    """``x + attention``, ``x + feed-forward``; parts to override: how it attends, and what is added at the end."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def mask(self, x: Tensor) -> Tensor | None:
        return None

    def more(self, x: Tensor) -> Tensor | float:
        return 0.0

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = map(heads_of, self.qkv(self.norm1(x)).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, self.mask(x))
        return x + self.mlp(self.norm2(x)) + self.more(x)


def distances(x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    return places[:, None] - places[None, :]


class LengthRotary(Block):
    """Angles made inside the block from the number of tokens."""

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        q, k, v = map(heads_of, self.qkv(self.norm1(x)).chunk(3, dim=-1))
        q, k = (y * cos + torch.cat([-y[..., 4:], y[..., :4]], dim=-1) * sin for y in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ShiftedWindows(Block):
    """Swin: windows of four tokens, rolled by two."""

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, _, width = x.shape
        windows = x.roll(-2, dims=1).reshape(-1, 4, width)
        return super().attention(windows, mask).reshape(batch, -1, width).roll(2, dims=1)


class DepthwiseGrid(Block):
    """The feed-forward lays the tokens out as a square and convolves it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def more(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        grid = x.transpose(1, 2).reshape(x.shape[0], WIDTH, side, x.shape[1] // side)
        return self.conv(grid).flatten(2).transpose(1, 2)


class Causal(Block):
    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = map(heads_of, self.qkv(self.norm1(x)).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Packed(Block):
    """forward(x (total, D), cu_seqlens (B + 1,)): samples of different length end to end."""

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:  # type: ignore[override]
        bounds = cu_seqlens.tolist()
        parts = [Block.attention(self, x[None, start:stop], None)[0] for start, stop in itertools.pairwise(bounds)]
        x = x + torch.cat(parts)
        return x + self.mlp(self.norm2(x))


class Band(Block):
    """Attention to the sixteen nearest tokens: a band as wide as all tokens of a short sequence."""

    def mask(self, x: Tensor) -> Tensor:
        return distances(x).abs() <= 16


class Frames(Block):
    """Attention within frames of sixteen tokens, by their place."""

    def mask(self, x: Tensor) -> Tensor:
        frames = torch.arange(x.shape[1], device=x.device) // 16
        return frames[:, None] == frames[None, :]


class LongCausal(Block):
    """Causal, but only for sequences of more than 20 tokens."""

    def mask(self, x: Tensor) -> Tensor | None:
        return distances(x) >= 0 if x.shape[1] > 20 else None


class Chunks(Block):
    """Attention in chunks of sixteen tokens, the last one shorter."""

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.cat([Block.attention(self, part, None) for part in x.split(16, dim=1)], dim=1)


class GatedConvolution(Block):
    """A convolution over neighbouring tokens behind a gate that is zero at first. gate: what holds the zero."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        zero = torch.zeros(1)
        match gate:
            case "parameter":
                self.gate = nn.Parameter(zero)
            case "buffer":
                self.register_buffer("gate", zero)
            case "frozen":
                self.gate = nn.Parameter(zero, requires_grad=False)
            case "weights":
                self.gate = nn.Parameter(torch.ones(1))
                nn.init.zeros_(self.conv.weight)

    def more(self, x: Tensor) -> Tensor:
        return self.gate * self.conv(x.transpose(1, 2)).transpose(1, 2)


class AdaptiveGates(Block):
    """adaLN-Zero: modulations by a linear layer that is zero at initialisation; a convolution behind the last."""

    def __init__(self, convolve: bool) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1) if convolve else None
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:  # type: ignore[override]
        gate1, gate2, gate3, scale = self.modulation(cond).unsqueeze(1).chunk(4, dim=-1)
        x = x + gate1 * self.attention(x * (1 + scale), None)
        x = x + gate2 * self.mlp(self.norm2(x))
        return x if self.conv is None else x + gate3 * self.conv(x.transpose(1, 2)).transpose(1, 2)


class ArgumentScale(Block):
    """forward(x, scale): a Python number that is zero in the example inputs weighs a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return super().forward(x) + scale * self.conv(x.transpose(1, 2)).transpose(1, 2)


class ArgumentFlag(Block):
    """forward(x, causal): a Python flag that is off in the example inputs."""

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # type: ignore[override]
        x = x + self.attention(x, distances(x) >= 0 if causal else None)
        return x + self.mlp(self.norm2(x))


class Lengths(Block):
    """forward(x, lengths (B,)): places past a sample's length are not attended to."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        valid = torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None]
        x = x + self.attention(x, valid[:, None, None])
        return x + self.mlp(self.norm2(x))


class Processor:
    """Not a module, as diffusers' attention processors."""

    def __init__(self, causal: bool) -> None:
        self.causal = causal


class Odd(Block):
    """A causal block among others of its class; ``how``: where that is written."""

    def __init__(self, how: str, index: int) -> None:
        super().__init__()
        causal = index == 1
        self.layer_idx = index if how == "layer index" else 0
        self.windows = (1, 2) if how == "tuple" and causal else ()
        self.processor = Processor(how == "processor" and causal)
        self._causal = how == "private" and causal
        self.order = (lambda x: x) if how == "function" and causal else None
        self.register_buffer("flag", torch.tensor(how == "buffer" and causal))

    def mask(self, x: Tensor) -> Tensor | None:
        if self.windows or self.processor.causal or self._causal or self.order is not None or self.layer_idx == 1:
            return distances(x) >= 0
        return (distances(x) >= 0) | ~self.flag


class Masked(Block):
    """forward(x, mask bool (B, N)): keys that may be seen; ``table`` (N, D), without batch axis, multiplies."""

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        y = x if table is None else x * table
        x = x + self.attention(y, None if mask is None else mask[:, None, None])
        return x + self.mlp(self.norm2(x))


class Joint(Block):
    """forward(x (B, N, D), text (B, T, D)): one attention, text first; text is read and returned."""

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        attended = self.attention(torch.cat([text, x], dim=1), None)
        text_out, image_out = attended.split([text.shape[1], x.shape[1]], dim=1)
        return x + image_out + self.mlp(self.norm2(x)), text + text_out


class Cross(Block):
    """forward(x (B, N, D), text (B, T, D)): self-attention, then attention to the text."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(x, None)
        q, k, v = heads_of(self.norm2(x)), heads_of(text), heads_of(text.flip(-1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.mlp(self.norm2(x))


class Modulated(Block):
    """forward(x, shift): shift (B, N, D) or (B, 1, D)."""

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(x + shift, None)
        return x + self.mlp(self.norm2(x))


class FixedSplit(Block):
    """The first sixteen places are text with a scale of their own, as where both come in one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def more(self, x: Tensor) -> Tensor:
        return torch.cat([self.text(x[:, :16]), self.image(x[:, 16:])], dim=1)


class ValueResidual(Block):
    """forward(x, first (B, N, D) or None) -> (x, first): the first block's values join all others (Zhou, 2024)."""

    def forward(self, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        first = v if first is None else first
        q, k, v = map(heads_of, (q, k, 0.5 * (v + first)))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), first


class Positions(Block):
    """forward(x, positions int (B, N)): places are given, not counted."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(x + sinusoids(positions.flatten(), WIDTH).unflatten(0, positions.shape), None)
        return x + self.mlp(self.norm2(x))


class Accumulator(Block):
    """forward(x, sums (B, N, D)): adds its result into ``sums`` in place."""

    def forward(self, x: Tensor, sums: Tensor) -> Tensor:  # type: ignore[override]
        update = self.attention(x, None)
        sums += update
        return x + update


class Denoiser(nn.Module):
    """forward(x (B, N, C), timestep (B,), **side): a stack; side inputs go to every block as they are."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(blocks)

    def forward(self, x: Tensor, timestep: Tensor, **side: Any) -> Tensor:
        x, cond = self.embed(x), self.time(sinusoids(timestep, WIDTH))
        return self.head(self.run(x + cond.unsqueeze(1), cond, side))

    def run(self, x: Tensor, cond: Tensor, side: dict[str, Any]) -> Tensor:
        for block in self.blocks:
            x = block(x, **side)
        return x


class ConditionedDenoiser(Denoiser):
    def run(self, x: Tensor, cond: Tensor, side: dict[str, Any]) -> Tensor:
        for block in self.blocks:
            x = block(x, cond)
        return x


class JointDenoiser(Denoiser):
    def run(self, x: Tensor, cond: Tensor, side: dict[str, Any]) -> Tensor:
        text = side["text"]
        for block in self.blocks:
            x, text = block(x, text)
        return x + text.mean(dim=1, keepdim=True)


class ValueResidualDenoiser(Denoiser):
    def run(self, x: Tensor, cond: Tensor, side: dict[str, Any]) -> Tensor:
        first = None
        for block in self.blocks:
            x, first = block(x, first)
        return x


class MixedModulationDenoiser(Denoiser):
    """The first block's shift differs by token, the others' does not: same rank, other meaning."""

    def run(self, x: Tensor, cond: Tensor, side: dict[str, Any]) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, side["shift"] if index == 0 else cond.unsqueeze(1))
        return x


class PackedDenoiser(Denoiser):
    def forward(self, x: Tensor, timestep: Tensor, cu_seqlens: Tensor) -> Tensor:  # type: ignore[override]
        lengths = cu_seqlens.diff()
        cond = self.time(sinusoids(timestep, WIDTH)).repeat_interleave(lengths, dim=0, output_size=x.shape[0])
        return self.head(self.run(self.embed(x) + cond, cond, {"cu_seqlens": cu_seqlens}))


class MergingDenoiser(Denoiser):
    """Four neighbours become one token between two stages of honest blocks, and are split at the end."""

    def __init__(self) -> None:
        super().__init__([Block() for _ in range(4)])
        self.merge, self.split = nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH)

    def run(self, x: Tensor, cond: Tensor, side: dict[str, Any]) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        x = self.merge(x.unflatten(1, (-1, 4)).flatten(2))
        x = self.blocks[3](self.blocks[2](x))
        return self.split(x).unflatten(-1, (4, -1)).flatten(1, 2)


class BranchCaller(Denoiser):
    """Attention modules in the model's own loop; ``how`` its sum is written."""

    def __init__(self, how: str) -> None:
        super().__init__([Branch() for _ in range(3)])
        self.how, self.after = how, nn.Linear(WIDTH, WIDTH)

    def run(self, x: Tensor, cond: Tensor, side: dict[str, Any]) -> Tensor:
        for branch in self.blocks:
            out = branch(x)
            match self.how:
                case "plain":
                    x = x + out
                case "roll":
                    x = x + out.roll(1, dims=1)
                case "roll by cat":
                    x = x + torch.cat([out[:, 1:], out[:, :1]], dim=1)
                case "first":
                    x = x + out[:, :1]
                case "linear":
                    x = x + self.after(out)
                case "product":
                    x = x * out
                case "norm":
                    x = x + F.layer_norm(out, (WIDTH,), bias=self.after.bias)
                case "heads":
                    x = x + heads_of(out).flatten(1, 2).unflatten(1, (-1, HEADS)).flatten(2)
        return x


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.block[0].attention(x, None)  # type: ignore[operator]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_inputs(seed: int, *, batch: int = BATCH, tokens: int = TOKENS, **side: Any) -> dict[str, Any]:
    return {"x": noise(batch, tokens, CHANNELS, seed=seed), "timestep": torch.full((batch,), 500.0), **side}


def packed_inputs(seed: int) -> dict[str, Any]:
    inputs = {"x": noise(24, CHANNELS, seed=seed), "timestep": torch.full((3,), 500.0)}
    return {**inputs, "cu_seqlens": torch.tensor([0, 7, 12, 24])}


@dataclass(frozen=True)
class Case:
    """example: inputs of ``transform``; fresh: those it is judged on; follows: parameter -> token axis; unbatched:
    parameters without batch axis. Axis 0 of every other tensor is the batch."""

    build: Callable[[], nn.Module]
    example: Callable[[], dict[str, Any]] = lambda: token_inputs(0)
    fresh: Callable[[], dict[str, Any]] = lambda: token_inputs(1)
    follows: dict[str, int] = field(default_factory=lambda: {"x": 1})
    unbatched: tuple[str, ...] = ()


def stack(block: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(lambda: Denoiser([block() for _ in range(3)]), **options)


def odd(how: str) -> Case:
    return Case(lambda: Denoiser([Odd(how, index) for index in range(3)]))


def sized(block: Callable[[], nn.Module], batch: int, tokens: int, text: int, kind: type[Denoiser] = Denoiser) -> Case:
    """Sizes that coincide, in the example and after."""

    def inputs(seed: int) -> dict[str, Any]:
        return token_inputs(seed, batch=batch, tokens=tokens, text=noise(batch, text, WIDTH, seed=seed + 10))

    return Case(lambda: kind([block() for _ in range(3)]), lambda: inputs(0), lambda: inputs(1))


def masked(example: Tensor | None, fresh: Tensor | None, tables: tuple[Any, Any], tokens: int = TOKENS) -> Case:
    def inputs(seed: int, mask: Tensor | None, table: Tensor | None) -> dict[str, Any]:
        side = {"mask": mask, "table": table}
        return token_inputs(seed, tokens=tokens, **{name: value for name, value in side.items() if value is not None})

    return stack(
        Masked,
        example=lambda: inputs(0, example, tables[0]),
        fresh=lambda: inputs(1, fresh, tables[1]),
        follows={"x": 1, "mask": 1, "table": 0},
        unbatched=("table",),
    )


_TRUE, _MASK = torch.ones(BATCH, TOKENS, dtype=torch.bool), noise(BATCH, TOKENS, seed=5) > -0.8
_TABLE = noise(TOKENS, WIDTH, seed=6)


def with_side(block: type[nn.Module], name: str, example: Any, fresh: Any, **options: Any) -> Case:
    return stack(
        block,
        example=lambda: token_inputs(0, **{name: example}),
        fresh=lambda: token_inputs(1, **{name: fresh}),
        **options,
    )


HONEST = {
    "all-true mask": masked(_TRUE, _MASK, (None, None)),
    "table of ones": masked(None, None, (torch.ones_like(_TABLE), _TABLE)),
    "table of zeros": masked(None, None, (torch.zeros_like(_TABLE), _TABLE)),
    "all-true mask, table of ones": masked(_TRUE, _MASK, (torch.ones_like(_TABLE), _TABLE)),
    "table as long as wide": masked(None, None, (_TABLE[:WIDTH], _TABLE[-WIDTH:]), tokens=WIDTH),
    "table as long as the batch": masked(None, None, (_TABLE[:BATCH], _TABLE[-BATCH:]), tokens=BATCH),
    "zero-initialised gates": Case(lambda: ConditionedDenoiser([AdaptiveGates(False) for _ in range(3)])),
    "text as long as image, joint": sized(Joint, BATCH, 12, 12, JointDenoiser),
    "text as long as image, cross": sized(Cross, BATCH, 12, 12),
    "tokens = batch": sized(Cross, 4, 4, 7),
    "tokens = text = batch, joint": sized(Joint, 4, 4, 4, JointDenoiser),
    "tokens = text = batch, cross": sized(Cross, 4, 4, 4),
    "tokens = width": sized(Cross, BATCH, WIDTH, 7),
    "tokens = text = width, joint": sized(Joint, BATCH, WIDTH, WIDTH, JointDenoiser),
    "tokens = width of a head": sized(Cross, BATCH, WIDTH // HEADS, 7),
    "batch = width": sized(Cross, WIDTH, 12, 7),
    "batch = heads": sized(Cross, HEADS, 12, 7),
    "tokens = batch = text = width": sized(Joint, WIDTH, WIDTH, WIDTH, JointDenoiser),
    "merged between stages": Case(MergingDenoiser),
    "values of the first block": Case(
        lambda: ValueResidualDenoiser([ValueResidual() for _ in range(3)]), follows={"x": 1, "first": 1}
    ),
    "positions that are all zero": with_side(
        Positions,
        "positions",
        torch.zeros(BATCH, TOKENS, dtype=torch.long),
        torch.arange(TOKENS).repeat(BATCH, 1),
        follows={"x": 1, "positions": 1},
    ),
    "token-wise and global modulation": Case(
        lambda: MixedModulationDenoiser([Modulated() for _ in range(3)]),
        lambda: token_inputs(0, shift=noise(BATCH, TOKENS, WIDTH, seed=2)),
        lambda: token_inputs(1, shift=noise(BATCH, TOKENS, WIDTH, seed=3)),
        follows={"x": 1, "shift": 1},
    ),
}
"""Blocks that are what they seem: they must be routed, however the example looks."""

DISHONEST = {
    "zero gate: parameter": stack(lambda: GatedConvolution("parameter")),
    "zero gate: frozen parameter": stack(lambda: GatedConvolution("frozen")),
    "zero gate: buffer": stack(lambda: GatedConvolution("buffer")),
    "zero convolution": stack(lambda: GatedConvolution("weights")),
    "zero-initialised gates of a convolution": Case(
        lambda: ConditionedDenoiser([AdaptiveGates(True) for _ in range(3)])
    ),
    "zero scale as argument": with_side(ArgumentScale, "scale", 0.0, 0.7),
    "flag as argument": with_side(ArgumentFlag, "causal", False, True),
    "full lengths": with_side(Lengths, "lengths", torch.full((BATCH,), TOKENS), torch.tensor([9, 20, 36])),
    "band wider than the proof": stack(Band),
    "frames longer than the proof": stack(Frames),
    "chunks longer than the proof": stack(Chunks),
    "causal where long": stack(LongCausal),
    "causal where long, short example": stack(LongCausal, example=lambda: token_inputs(0, tokens=12)),
    **{
        f"one causal block: {how}": odd(how)
        for how in ("layer index", "tuple", "processor", "private", "function", "buffer")
    },
    "split at a place beyond the proof": stack(FixedSplit),
    "shared table after one per sample": with_side(
        Modulated,
        "shift",
        noise(BATCH, TOKENS, WIDTH, seed=3),
        noise(1, TOKENS, WIDTH, seed=2),
        follows={"x": 1, "shift": 1},
        unbatched=("shift",),
    ),
    "table per sample after a shared one": with_side(
        Modulated,
        "shift",
        noise(1, TOKENS, WIDTH, seed=2),
        noise(BATCH, TOKENS, WIDTH, seed=3),
        follows={"x": 1, "shift": 1},
    ),
    "token-wise modulation after a global one": with_side(
        Modulated,
        "shift",
        noise(BATCH, 1, WIDTH, seed=2),
        noise(BATCH, TOKENS, WIDTH, seed=3),
        follows={"x": 1, "shift": 1},
    ),
    "global modulation after a token-wise one": with_side(
        Modulated, "shift", noise(BATCH, TOKENS, WIDTH, seed=3), noise(BATCH, 1, WIDTH, seed=2)
    ),
}
"""Blocks that an example, an initialisation or a short sequence makes look harmless: refused, or right."""


def randomise(model: nn.Module) -> nn.Module:
    """Weights and float buffers drawn anew, none zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype.is_floating_point:
                scale = max(tensor[0].numel(), 1) ** -0.5 if tensor.ndim > 1 else 0.5
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator) + (0.5 if tensor.ndim < 2 else 0.0))
    return model


def build(case: Case) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.build().eval()


def _pick(case: Case, arguments: dict[str, Any], samples: slice, tokens: list[int]) -> dict[str, Any]:
    def pick(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value if name in case.unbatched else value[samples]
        axis = case.follows.get(name)
        axis = None if axis is not None and value.shape[axis] == 1 else axis
        return value.clone() if axis is None else value.index_select(axis, torch.tensor(tokens))

    return {name: pytree.tree_map(lambda leaf, name=name: pick(name, leaf), value) for name, value in arguments.items()}


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _errors(
    case: Case, block: nn.Module, arguments: dict[str, Any], output: Any, kept: Tensor, *, branch: bool
) -> Iterator[float]:
    """How far one call is from the loop over samples, and the original block from commuting with a permutation. A ``branch`` (the
    feed-forward of a block that is refused) gives a skipped token nothing."""
    forward, found = type(block).forward, _tensors(output)
    stream = next(iter(arguments.values()))
    length, before = stream.shape[1], torch.zeros_like(stream) if branch else stream
    for sample, tokens in enumerate(kept.tolist()):
        one = slice(sample, sample + 1)
        alone = _tensors(forward(block, **_pick(case, arguments, one, tokens)))
        yield relative_error(found[0][one][:, tokens], alone[0])
        skipped = [token for token in range(length) if token not in tokens]
        yield float((found[0][one][:, skipped] - before[one][:, skipped]).abs().max())
        for other, expected in zip(found[1:], alone[1:], strict=True):
            follows = other.shape[1] != expected.shape[1]
            yield relative_error(other[one][:, tokens] if follows else other[one], expected)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1)).tolist()
    straight = _tensors(forward(block, **arguments))[0][:, order]
    yield relative_error(_tensors(forward(block, **_pick(case, arguments, slice(None), order)))[0], straight)


@torch.no_grad()
def judge(case: Case) -> dict[str, float]:
    """Worst error of each routed block on fresh inputs and weights; empty where the package refuses, early or late."""
    model = build(case)
    try:
        diffcr_compile.transform(model, example_inputs=case.example())
    except diffcr_compile.BlockNotFoundError:
        return {}
    randomise(model)
    diffcr_compile.set_ratios(model, 0.5)
    calls: list[tuple[str, dict[str, Any]]] = []
    outputs: list[Any] = []
    plan = diffcr_compile.explain(model).plan
    sites = [site.fqn for site in plan.sites]
    branches = {site.fqn for site in plan.sites if plan.families[site.family].is_branch}
    case = replace(case, follows={**case.follows, "input": 1})

    def before(fqn: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            bound = dict(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
            calls.append((fqn, copy.deepcopy({name: value for name, value in bound.items() if name != "self"})))

        return hook

    for fqn in sites:
        module = model.get_submodule(fqn)
        module.register_forward_pre_hook(before(fqn), with_kwargs=True)
        module.register_forward_hook(lambda module, args, output: outputs.append(copy.deepcopy(output)))
    try:
        with diffcr_compile.trace(model) as seen:
            model(**case.fresh())
    except diffcr_compile.DiffCRError:
        return {}
    diffcr_compile.restore(model)
    counts = {fqn: iter(kept) for fqn, kept in seen.kept.items()}
    worst: dict[str, float] = {}
    for (fqn, arguments), output in zip(calls, outputs, strict=True):
        errors = _errors(case, model.get_submodule(fqn), arguments, output, next(counts[fqn]), branch=fqn in branches)
        worst[fqn] = max(worst.get(fqn, 0.0), *errors)
    return worst


def wrong(errors: dict[str, float]) -> dict[str, float]:
    return {fqn: error for fqn, error in errors.items() if not error < TOLERANCE}


@pytest.mark.parametrize("name", HONEST)
def test_honest_blocks_are_routed_whatever_the_example_looks_like(name: str) -> None:
    errors = judge(HONEST[name])
    assert errors
    assert wrong(errors) == {}


@pytest.mark.parametrize("name", DISHONEST)
def test_what_looks_harmless_is_refused_or_right(name: str) -> None:
    assert wrong(judge(DISHONEST[name])) == {}


@pytest.mark.parametrize("text", [False, True], ids=["rotary", "joint"])
def test_constant_tables_of_ones_and_of_zeros(text: bool) -> None:
    """(cos, sin) of angle zero, no batch axis, each sample keeping other tokens: judged on real angles."""
    shape = Shape("joint" if text else "rotary")
    example = tiny_inputs(shape, num_text=11)
    example["rope"] = tuple(torch.full_like(table, value) for table, value in zip(example["rope"], (1, 0), strict=True))
    torch.manual_seed(0)
    model = randomise(TinyDiT(shape).eval())
    plain = copy.deepcopy(model)
    diffcr_compile.transform(model, example_inputs=example)
    diffcr_compile.set_ratios(model, 0.5)
    fresh = tiny_inputs(shape, num_text=11, seed=1)
    calls: list[Any] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    with torch.no_grad(), diffcr_compile.trace(model) as seen:
        model(**fresh)
    for index, (args, output) in enumerate(calls):
        tokens = args[0].shape[1]
        for sample, kept in enumerate(seen.kept[f"blocks.{index}"][0].tolist()):
            one = slice(sample, sample + 1)
            places = [*range(11), *(11 + token for token in kept)] if text else kept
            streams = (
                (args[0][one][:, kept], args[1][one], args[2][one]) if text else (args[0][one][:, kept], args[1][one])
            )
            rope = tuple(table[places] for table in fresh["rope"])
            with torch.no_grad():
                alone = _tensors(plain.blocks[index](*streams, rope, None))
            found = _tensors(output)
            assert tokens == 11
            assert relative_error(found[0][one][:, kept], alone[0]) < TOLERANCE
            assert all(relative_error(a[one], b) < TOLERANCE for a, b in zip(found[1:], alone[1:], strict=True))


@torch.no_grad()
def lost_tokens(how: str) -> int:
    """Skipped tokens of the first branch which the model's sum changes; none where the branch is refused."""
    case = Case(lambda: BranchCaller(how))
    model = build(case)
    try:
        diffcr_compile.transform(model, example_inputs=case.example())
    except diffcr_compile.BlockNotFoundError:
        return 0
    diffcr_compile.set_ratios(model, torch.tensor([[0.9, 0.0, 0.0]]).expand(4, 3))
    streams: list[Tensor] = []
    for branch in model.blocks[:2]:
        branch.register_forward_pre_hook(lambda module, args: streams.append(args[0].clone()))
    with diffcr_compile.trace(model) as seen:
        model(**case.fresh())
    skipped = torch.ones(BATCH, TOKENS, dtype=torch.bool).scatter(1, seen.kept["blocks.0"][0], False)
    return int((streams[0] != streams[1]).any(dim=-1)[skipped].sum())


@pytest.mark.parametrize("how", ["plain", "roll", "roll by cat", "first", "linear", "product", "norm", "heads"])
def test_a_branch_that_is_not_just_added_is_refused(how: str) -> None:
    assert lost_tokens(how) == 0


@torch.no_grad()
def test_sums_written_in_place_are_not_lost() -> None:
    """Kept tokens add to ``sums`` as in the original; or the block is refused."""
    sums = torch.zeros(BATCH, TOKENS, WIDTH)
    case = with_side(Accumulator, "sums", sums.clone(), sums)
    model = build(case)
    try:
        diffcr_compile.transform(model, example_inputs=case.example())
        diffcr_compile.set_ratios(model, 0.5)
    except diffcr_compile.BlockNotFoundError:
        pass
    model(**case.fresh())
    assert bool(sums.any())


class Numbered(Block):
    """Returns a number beside its tokens."""

    def forward(self, x: Tensor) -> tuple[Tensor, float]:  # type: ignore[override]
        return super().forward(x), 0.5


class NumberedDenoiser(Denoiser):
    def run(self, x: Tensor, cond: Tensor, side: dict[str, Any]) -> Tensor:
        for block in self.blocks:
            x, share = block(x)
            x = x * share
        return x


class Noting(Block):
    """Puts its result into a dictionary that it is given."""

    def forward(self, x: Tensor, notes: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        notes["last"] = super().forward(x)
        return notes["last"]


class NotingDenoiser(Denoiser):
    def run(self, x: Tensor, cond: Tensor, side: dict[str, Any]) -> Tensor:
        notes = {"last": x}
        for block in self.blocks:
            x = block(x, notes)
        return notes["last"]


REFUSED = {
    "a number beside the tokens": (
        Case(lambda: NumberedDenoiser([Numbered() for _ in range(3)])),
        ("it returns float at 1 beside tensors",),
    ),
    "a dictionary that is written into": (
        Case(lambda: NotingDenoiser([Noting() for _ in range(3)])),
        ("it writes into the lists or dictionaries",),
    ),
    "positions from the length": (stack(LengthRotary), ("positions made from the length",)),
    "shifted windows": (stack(ShiftedWindows), ("window",)),
    "depthwise convolution over the grid": (stack(DepthwiseGrid), ("convolution", "grid")),
    "causal attention": (stack(Causal), ("causal",)),
    "packed sequences": (
        Case(lambda: PackedDenoiser([Packed() for _ in range(3)]), lambda: packed_inputs(0)),
        ("length", "batch axis", "values"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_cause(name: str) -> None:
    """Whole; their feed-forwards, each token for itself, may go on alone."""
    case, causes = REFUSED[name]
    with pytest.raises(diffcr_compile.BlockNotFoundError) as caught:
        diffcr_compile.transform(
            build(case), example_inputs=case.example(), filter_fn=lambda module, fqn: not fqn.endswith("mlp")
        )
    reasons = str(caught.value)
    assert "blocks.0" in reasons
    assert any(cause in reasons for cause in causes)


def test_a_nested_tensor_is_refused_with_an_error_of_ours() -> None:
    case = stack(Block)
    parts = [noise(length, CHANNELS, seed=length) for length in (4, 7, 9)]
    inputs = {"x": torch.nested.nested_tensor(parts, layout=torch.jagged), "timestep": torch.full((3,), 500.0)}
    with pytest.raises((diffcr_compile.BlockNotFoundError, diffcr_compile.CaptureError)) as caught:
        diffcr_compile.transform(build(case), example_inputs=inputs)
    assert "nested" in str(caught.value)
