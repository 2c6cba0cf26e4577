"""Small denoisers that the tests share, and the reference for what a routed block must compute.

``TinyDiT`` is generated from a :class:`Shape`: a plain stack, one with a rotary table without batch axis, or one with a joint
text stream. ``FacebookDiT`` is the original DiT on timm's layers. Axes: B batch, N tokens, T text tokens, D width, H heads.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diffcr_compile

Kind = Literal["plain", "rotary", "joint"]

CHANNELS = 5
TOKENS, TEXT_TOKENS, BATCH = 11, 4, 3
"""Sizes of the example inputs; no two of them, nor any width, are equal."""


@dataclass(frozen=True)
class Shape:
    """What a ``TinyDiT`` is made of. ``masked``: attention takes a mask (B, N, N), of T + N where text joins."""

    kind: Kind = "plain"
    depth: int = 2
    heads: int = 2
    head_dim: int = 8
    masked: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, rope: Any, mask: Tensor | None) -> Tensor:
    """Attention over (B, N, D) projections; ``rope``: (cos, sin), each (N, head width); ``mask``: bool (B, 1, N, N)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if rope is not None:
        cos, sin = rope
        q, k = (x * cos + torch.cat([-x[..., 1::2], x[..., ::2]], dim=-1) * sin for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Stream(nn.Module):
    """Norms, projections and feed-forward of one token stream, modulated by a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def project(self, x: Tensor, cond: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        parts = self.modulation(F.silu(cond)).unsqueeze(1).chunk(6, dim=-1)
        return self.qkv(self.norm1(x) * (1 + parts[0]) + parts[1]), parts[2:]

    def finish(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        gate1, scale, shift, gate2 = parts
        x = x + gate1 * self.out(attended)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale) + shift)


class Block(nn.Module):
    """One stream: ``x + attention``, ``x + feed-forward``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.stream = shape.heads, Stream(shape.width)

    def forward(self, x: Tensor, cond: Tensor, rope: Any = None, mask: Tensor | None = None) -> Tensor:
        qkv, parts = self.stream.project(x, cond)
        return self.stream.finish(x, _attend(*qkv.chunk(3, dim=-1), self.heads, rope, mask), parts)


class JointBlock(nn.Module):
    """Image and text tokens in one attention, text first; each with weights of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.image, self.text = Stream(shape.width), Stream(shape.width)

    def forward(
        self, x: Tensor, text: Tensor, cond: Tensor, rope: Any = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        image_qkv, image_parts = self.image.project(x, cond)
        text_qkv, text_parts = self.text.project(text, cond)
        joint = torch.cat([text_qkv, image_qkv], dim=1)
        attended = _attend(*joint.chunk(3, dim=-1), self.heads, rope, mask)
        text_out, image_out = attended.split([text.shape[1], x.shape[1]], dim=1)
        return self.image.finish(x, image_out, image_parts), self.text.finish(text, text_out, text_parts)


class TinyDiT(nn.Module):
    """forward(x (B, N, C), timestep (B,), text (B, T, D), rope ((N, head width), same), mask bool (B, N, N)) -> (B, N, C)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed, self.head = nn.Linear(CHANNELS, shape.width), nn.Linear(shape.width, CHANNELS)
        self.time = nn.Linear(shape.width, shape.width)
        block = JointBlock if shape.kind == "joint" else Block
        self.blocks = nn.ModuleList(block(shape) for _ in range(shape.depth))

    def forward(
        self, x: Tensor, timestep: Tensor, text: Tensor | None = None, rope: Any = None, mask: Tensor | None = None
    ) -> Tensor:
        x = self.embed(x)
        cond = self.time(sinusoids(timestep, self.shape.width).to(x.dtype))
        mask = None if mask is None else mask.unsqueeze(1)
        for block in self.blocks:
            if text is None:
                x = block(x, cond, rope, mask)
            else:
                x, text = block(x, text, cond, rope, mask)
        return self.head(x)


class Looping(Stream):
    """Its feed-forward runs ``loops`` times: a number in the settings that is no place in the stack."""

    loops = 1

    def finish(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        x = super().finish(x, attended, parts)
        for _ in range(self.loops - 1):
            x = super().finish(x, torch.zeros_like(attended), parts)
        return x


def looping(shape: Shape, *loops: int) -> TinyDiT:
    """A plain model whose blocks differ in ``loops``."""
    model = original(shape)
    for block, number in zip(model.blocks, loops, strict=True):
        block.stream.__class__ = Looping
        block.stream.loops = number
    return model


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of (B,) timesteps: float32 (B, width), width even."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=timestep.device) / (width // 2))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@functools.cache
def _original(shape: Shape) -> TinyDiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return TinyDiT(shape).eval()


@functools.cache
def _routed(shape: Shape) -> TinyDiT:
    return diffcr_compile.transform(copy.deepcopy(_original(shape)), example_inputs=tiny_inputs(shape))


def original(shape: Shape, dtype: torch.dtype = torch.float32) -> TinyDiT:
    """A plain model, a new copy at each call."""
    return copy.deepcopy(_original(shape)).to(dtype)


def routed(shape: Shape, dtype: torch.dtype = torch.float32) -> TinyDiT:
    """The same model transformed; a copy at each call of one that was transformed once."""
    return copy.deepcopy(_routed(shape)).to(dtype)


def tiny_inputs(
    shape: Shape,
    *,
    batch: int = BATCH,
    num_tokens: int = TOKENS,
    num_text: int = TEXT_TOKENS,
    dtype: torch.dtype = torch.float32,
    timestep: float | Tensor = 500.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of a ``TinyDiT``; samples differ."""
    generator = torch.Generator().manual_seed(seed)
    joint = shape.kind == "joint"
    length = num_tokens + (num_text if joint else 0)
    inputs: dict[str, Any] = {
        "x": torch.randn(batch, num_tokens, CHANNELS, generator=generator).to(dtype),
        "timestep": timestep.clone() if isinstance(timestep, Tensor) else torch.full((batch,), float(timestep)),
    }
    if joint:
        inputs["text"] = torch.randn(batch, num_text, shape.width, generator=generator).to(dtype)
    if shape.kind != "plain":
        angles = torch.rand(length, shape.head_dim, generator=generator) * 6
        inputs["rope"] = (angles.cos().to(dtype), angles.sin().to(dtype))
    if shape.masked:
        mask = torch.rand(batch, length, length, generator=generator) < 0.7
        inputs["mask"] = mask | torch.eye(
            length, dtype=torch.bool
        )  # every query sees itself, so that no softmax is empty
    return inputs


class FacebookBlock(nn.Module):
    """The block of facebookresearch/DiT (adaLN-Zero) on timm's attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        from timm.layers import Mlp
        from timm.models.vision_transformer import Attention

        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.mlp = Mlp(
            in_features=width, hidden_features=4 * width, act_layer=lambda: nn.GELU(approximate="tanh"), drop=0
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width, bias=True))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(_modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(_modulate(self.norm2(x), shift2, scale2))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class FacebookDiT(nn.Module):
    """forward(x (B, C, height, width), t (B,), y (B,)) -> (B, C, height, width), as in facebookresearch/DiT."""

    def __init__(
        self, size: int = 8, patch: int = 2, channels: int = 3, width: int = 24, depth: int = 3, heads: int = 3
    ):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = nn.Conv2d(channels, width, patch, stride=patch)
        self.t_embedder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(10, width)
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, (size // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList(FacebookBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias=True))
        self.linear = nn.Linear(width, patch * patch * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(sinusoids(t, x.shape[-1])) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = self.linear(_modulate(self.norm(x), shift, scale))
        x = x.reshape(-1, height, width, self.patch, self.patch, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, height * self.patch, width * self.patch)


def facebook_dit() -> FacebookDiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return FacebookDiT().eval()


def facebook_inputs(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "x": torch.randn(batch, 3, 8, 8, generator=generator),
        "t": torch.randint(1, 999, (batch,), generator=generator),
        "y": torch.randint(10, (batch,), generator=generator),
    }


class ConvNet(nn.Module):
    """No attention anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu() * timestep.view(-1, 1, 1, 1)
        return x


class MlpMixerless(nn.Module):
    """A residual stack over tokens (B, N, D) that never mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@dataclass
class BlockCall:
    """One call of one block of a model: what it was given, what it returned, and what it kept (B, K)."""

    fqn: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    kept: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def watch_blocks(model: nn.Module, fqns: list[str]) -> Iterator[list[BlockCall]]:
    """Collect every call of the modules ``fqns`` (not of their copies), with the tensors themselves, not copies."""
    calls: list[BlockCall] = []
    names = {model.get_submodule(fqn): fqn for fqn in fqns}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module in names:
            calls.append(BlockCall(names[module], args, kwargs, output))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def routed_fqns(model: nn.Module) -> list[str]:
    """Names of a transformed model's routed blocks, in order of first execution."""
    return [name for name, module in model.named_modules() if name and hasattr(module, "diffcr_router")]


def run_routed(model: nn.Module, inputs: dict[str, Any]) -> list[BlockCall]:
    """A forward without gradients; every block's call with what it kept."""
    with torch.no_grad(), diffcr_compile.trace(model) as seen, watch_blocks(model, routed_fqns(model)) as calls:
        model(**inputs)
    counts = dict.fromkeys(seen.kept, 0)
    for call in calls:
        call.kept = seen.kept[call.fqn][counts[call.fqn]]
        counts[call.fqn] += 1
    return calls


def kept_arguments(shape: Shape, call: BlockCall, sample: int) -> tuple[Any, ...]:
    """Arguments of a ``Block`` or ``JointBlock`` that hold one sample's kept tokens alone, picked with plain indexing."""
    one = slice(sample, sample + 1)
    kept = call.kept[sample].tolist()
    if shape.kind == "joint":
        x, text, cond, rope, mask = call.args
        positions = [*range(text.shape[1]), *(text.shape[1] + token for token in kept)]
        streams = (x[one][:, kept], text[one])
    else:
        x, cond, rope, mask = call.args
        positions = kept
        streams = (x[one][:, kept],)
    rope = None if rope is None else tuple(table[positions] for table in rope)
    mask = None if mask is None else mask[one][:, :, positions][:, :, :, positions]
    return (*streams, cond[one], rope, mask)


def map_tensors(function: Any, value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def same_bits(left: Any, right: Any) -> bool:
    """Whether two outputs hold equal tensors of equal dtype, in order."""
    lefts, rights = tensors_of(left), tensors_of(right)
    assert lefts
    return len(lefts) == len(rights) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(lefts, rights, strict=True)
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def reference_flops(function: Any) -> int:
    """FLOPs of ``function()`` by torch's counter, with the CPU's flash kernel mapped by a formula of our own:
    two products of (B, H, N, S, d)."""
    from torch.utils.flop_counter import FlopCounterMode

    def flash(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        batch, heads, queries, width = query
        return 2 * batch * heads * queries * key[-2] * (width + value[-1])

    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={operator: flash}) as counter:
        function()
    return counter.get_total_flops()


def snapshot(model: nn.Module) -> Any:
    """Everything that routing might leave behind: attributes, submodules and hooks of every module, and all tensors' bits."""
    modules = {
        name: (
            type(module),
            sorted(vars(module)),
            sorted(module._modules),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    }
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, tensors, flags


def same_snapshot(left: Any, right: Any) -> bool:
    return (
        left[0] == right[0]
        and left[2] == right[2]
        and list(left[1]) == list(right[1])
        and all(torch.equal(value, right[1][name]) for name, value in left[1].items())
    )


class _InPlaceStream(Stream):
    def finish(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        gate1, scale, shift, gate2 = parts
        x.add_(gate1 * self.out(attended))
        return x.add_(gate2 * self.mlp(self.norm2(x) * (1 + scale) + shift))


def written_in_place(shape: Shape) -> TinyDiT:
    """A plain model whose blocks write into their tokens, with the weights of ``original``."""
    model = original(shape)
    for block in model.blocks:
        block.stream.__class__ = _InPlaceStream
    return model
