"""Denoisers outside diffusers, tiny, each written from its paper's structure; at batch three, against a plain loop."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import relative_error, same_bits, same_snapshot, sinusoids, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import diffcr_compile

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

BATCH, TOKENS, CHANNELS, WIDTH, HEADS = 3, 11, 5, 16, 2
TOLERANCE = 1e-5
"""Of the largest value: a sample alone is added up in another order than in the batch (float32)."""


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Packed query, key and value; the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*map(heads_of, self.qkv(x).chunk(3, dim=-1))).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class PackedAttention(Attention):
    """One reshape to (3, B, H, N, d), as in timm and the original ViT."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        attended = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return self.out(attended.transpose(1, 2).reshape(batch, length, width))


class EinsumAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(q.shape[-1] ** -0.5).softmax(dim=-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)


class LinearAttention(Attention):
    """Keys and values are summed first; no softmax (Katharopoulos et al. 2020)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = torch.einsum("bhnd,bhne->bhde", k, v)
        total = torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=2))
        return torch.einsum("bhnd,bhde->bhne", q, context) / total.unsqueeze(-1)


def feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class Block(nn.Module):
    """``x + attention``, ``x + feed-forward``; the condition (B, D) or (B, N, D) is added to the norm's output."""

    attention: type[nn.Module] = Attention

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = self.attention(), feed_forward()
        self.modulation = nn.Linear(WIDTH, WIDTH)

    def modulated(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.norm1(x) + self.modulation(cond).unsqueeze(1)

    def forward(self, x: Tensor, cond: Tensor) -> Any:
        x = x + self.attn(self.modulated(x, cond))
        return x + self.mlp(self.norm2(x))


class EinsumBlock(Block):
    attention = EinsumAttention


class LinearBlock(Block):
    attention = LinearAttention


class PackedBlock(Block):
    attention = PackedAttention


class ParallelBlock(Block):
    """Attention and feed-forward read the same norm, as in ViT-22B."""

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        normed = self.modulated(x, cond)
        return x + self.attn(normed) + self.mlp(normed)


class TupleBlock(Block):
    def forward(self, x: Tensor, cond: Tensor) -> tuple[Tensor, None]:
        return super().forward(x, cond), None


class DictBlock(Block):
    def forward(self, x: Tensor, cond: Tensor) -> dict[str, Tensor]:
        return {"hidden": super().forward(x, cond)}


@dataclass
class Hidden:
    hidden: Tensor


class DataclassBlock(Block):
    def forward(self, x: Tensor, cond: Tensor) -> Hidden:
        return Hidden(super().forward(x, cond))


class Output(OrderedDict):  # type: ignore[type-arg]
    """A dictionary with attributes, as diffusers' ``BaseOutput`` and transformers' ``ModelOutput``; no pytree node."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class OutputBlock(Block):
    def forward(self, x: Tensor, cond: Tensor) -> Output:
        return Output(hidden=super().forward(x, cond))


class KeywordBlock(Block):
    """Nothing may be given by position; two arguments stay None."""

    def forward(  # type: ignore[override]
        self, *, x: Tensor, cond: Tensor | None = None, mask: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        normed = self.norm1(x) if cond is None else self.modulated(x, cond)
        x = x + self.attn(normed if text is None else normed + text.mean(dim=1, keepdim=True))
        x = x + self.mlp(self.norm2(x))
        return x if mask is None else x * mask.unsqueeze(-1)


class Normed(nn.Sequential):
    """A layer behind its norm: ``(x) -> layer(norm(x))``, as a plain sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(nn.LayerNorm(WIDTH), layer)


class WalkingBlock(nn.Sequential):
    """Runs its own children, whichever they are."""

    def __init__(self) -> None:
        super().__init__(Normed(Attention()), Normed(feed_forward()))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        x = x + cond.unsqueeze(1)
        for layer in self.children():
            x = x + layer(x)
        return x


class InPlaceBlock(Block):
    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        x += self.attn(self.modulated(x, cond))
        x += self.mlp(self.norm2(x))
        return x


class SequenceFirstBlock(Block):
    """forward(x (N, B, D), cond (B, D))."""

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        normed = self.norm1(x) + self.modulation(cond).unsqueeze(0)
        x = x + self.attn(normed.transpose(0, 1)).transpose(0, 1)
        return x + self.mlp(self.norm2(x))


class PerTokenBlock(Block):
    """forward(x (B, N, D), cond (B, N, D))."""

    def modulated(self, x: Tensor, cond: Tensor) -> Tensor:
        return self.norm1(x) + self.modulation(cond)


class SkipBlock(Block):
    """U-ViT: time is a token; a long skip is joined to the tokens by a projection inside the block."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * WIDTH, WIDTH) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))  # type: ignore[list-item]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Denoiser(nn.Module):
    """forward(x (B, N, C), timestep (B,)) -> (B, N, C): a stack of ``block``; ``read`` takes the tokens out."""

    def __init__(self, block: Callable[[], nn.Module] | None, read: Callable[[Any], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.read = read
        self.embed, self.head, self.time = (
            nn.Linear(CHANNELS, WIDTH),
            nn.Linear(WIDTH, CHANNELS),
            nn.Linear(WIDTH, WIDTH),
        )
        if block is not None:
            self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.head(self.run(self.embed(x), self.time(sinusoids(timestep, WIDTH))))

    def run(self, x: Tensor, cond: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.read(block(x, cond))
        return x


class KeywordDenoiser(Denoiser):
    def run(self, x: Tensor, cond: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x=x, cond=cond, text=None)
        return x


class SequenceFirstDenoiser(Denoiser):
    def run(self, x: Tensor, cond: Tensor) -> Tensor:
        return super().run(x.transpose(0, 1).contiguous(), cond).transpose(0, 1)


class TorchDenoiser(Denoiser):
    """Torch's own layers, in evaluation one fused operator each, in which no part of theirs is called."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__(
            lambda: nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True, norm_first=norm_first)
        )

    def run(self, x: Tensor, cond: Tensor) -> Tensor:
        x = x + cond[:, None]
        for block in self.blocks:
            x = block(x)
        return x


class SharedDenoiser(Denoiser):
    """One block, three times (ALBERT)."""

    def __init__(self) -> None:
        super().__init__(None)
        self.block = Block()

    def run(self, x: Tensor, cond: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x, cond)
        return x


class PerTokenDenoiser(Denoiser):
    """forward(x (B, N, C), timestep (B, N)): diffusion forcing."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        cond = self.time(sinusoids(timestep.flatten(), WIDTH).unflatten(0, timestep.shape))
        return self.head(self.run(self.embed(x), cond))


class LucidDenoiser(Denoiser):
    """Pairs of branches in the model's own loop, as lucidrains writes them."""

    def __init__(self) -> None:
        super().__init__(None)
        pair = lambda: nn.ModuleList([PreNorm(Attention()), PreNorm(feed_forward())])  # noqa: E731
        self.layers = nn.ModuleList(pair() for _ in range(3))

    def run(self, x: Tensor, cond: Tensor) -> Tensor:
        x = x + cond.unsqueeze(1)
        for attn, ff in self.layers:  # type: ignore[misc]
            x = attn(x) + x
            x = ff(x) + x
        return x


class PreNorm(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


class UViT(Denoiser):
    def __init__(self) -> None:
        super().__init__(None)
        self.in_blocks, self.mid = nn.ModuleList(SkipBlock(False) for _ in range(2)), SkipBlock(False)
        self.out_blocks = nn.ModuleList(SkipBlock(True) for _ in range(2))

    def run(self, x: Tensor, cond: Tensor) -> Tensor:
        x, skips = torch.cat([cond.unsqueeze(1), x], dim=1), []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return x[:, 1:]


class MaskedDiffusion(Denoiser):
    """MDT at inference: encoder, side-interpolater without masking, decoder with positions of its own."""

    def __init__(self) -> None:
        super().__init__(None)
        self.encoder, self.side = nn.ModuleList(Block() for _ in range(2)), Block()
        self.decoder = nn.ModuleList(Block() for _ in range(2))
        self.positions = nn.Parameter(0.1 * torch.randn(1, TOKENS, WIDTH))

    def run(self, x: Tensor, cond: Tensor) -> Tensor:
        for block in self.encoder:
            x = block(x, cond)
        x = self.side(x + self.positions, cond) + self.positions
        for block in self.decoder:
            x = block(x, cond)
        return x


def vision_transformer() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=WIDTH, depth=3, num_heads=HEADS, num_classes=7, reg_tokens=2
    )


def token_inputs(batch: int = BATCH) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    timestep = torch.full((batch,), 500.0)
    return {"x": torch.randn(batch, TOKENS, CHANNELS, generator=generator), "timestep": timestep}


def per_token_inputs() -> dict[str, Any]:
    inputs = token_inputs()
    steps = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1))
    return {**inputs, "timestep": 500 + 100 * steps}


def image_inputs() -> dict[str, Any]:
    return {"x": torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


@dataclass(frozen=True)
class Structure:
    """A model and what must be routed in it. ``follows``: parameter of the block -> axis that follows the tokens;
    ``batch_axes``: parameter -> batch axis where that is not 0; ``read``: the tokens in the block's output."""

    build: Callable[[], nn.Module]
    routed: tuple[str, ...] = BLOCKS
    follows: dict[str, int] = field(default_factory=lambda: {"x": 1, "input": 1})
    batch_axes: dict[str, int] = field(default_factory=dict)
    read: Callable[[Any], Tensor] = lambda output: output
    inputs: Callable[[], dict[str, Any]] = token_inputs
    branches: tuple[str, ...] = ()
    calls_per_block: int = 1


def _stack(block: type[nn.Module], read: Callable[[Any], Tensor] = lambda output: output) -> Structure:
    return Structure(lambda: Denoiser(block, read), read=read)


_LUCID = tuple(f"layers.{index}.{part}" for index in range(3) for part in range(2))
_WALKED = tuple(f"{block}.{layer}" for block in BLOCKS for layer in range(2))
_UVIT_BRANCHES = ("out_blocks.0.attn", "out_blocks.0.mlp", "out_blocks.1.attn", "out_blocks.1.mlp")

STRUCTURES = {
    "plain": _stack(Block),
    "einsum attention": _stack(EinsumBlock),
    "linear attention": _stack(LinearBlock),
    "packed qkv": _stack(PackedBlock),
    "parallel": _stack(ParallelBlock),
    "tuple": _stack(TupleBlock, lambda output: output[0]),
    "dict": _stack(DictBlock, lambda output: output["hidden"]),
    "dataclass": _stack(DataclassBlock, lambda output: output.hidden),
    "ordered dict subclass": _stack(OutputBlock, lambda output: output.hidden),
    "keyword only": Structure(lambda: KeywordDenoiser(KeywordBlock)),
    "in place": _stack(InPlaceBlock),
    "sequence first": Structure(
        lambda: SequenceFirstDenoiser(SequenceFirstBlock), follows={"x": 0}, batch_axes={"x": 1}
    ),
    "torch's own": Structure(lambda: TorchDenoiser(norm_first=True), follows={"src": 1}),
    "torch's own, normed last": Structure(lambda: TorchDenoiser(norm_first=False), follows={"src": 1}),
    "shared weights": Structure(SharedDenoiser, routed=("block",), calls_per_block=3),
    "per-token timesteps": Structure(
        lambda: PerTokenDenoiser(PerTokenBlock), follows={"x": 1, "cond": 1}, inputs=per_token_inputs
    ),
    "lucidrains": Structure(LucidDenoiser, routed=_LUCID, branches=_LUCID),
    "walks its children": Structure(lambda: Denoiser(WalkingBlock), routed=_WALKED, branches=_WALKED),
    "u-vit": Structure(UViT, routed=("in_blocks.0", "in_blocks.1", "mid", *_UVIT_BRANCHES), branches=_UVIT_BRANCHES),
    "mdt": Structure(MaskedDiffusion, routed=("encoder.0", "encoder.1", "side", "decoder.0", "decoder.1")),
    "timm vit": Structure(vision_transformer, inputs=image_inputs),
}


@dataclass
class Call:
    """One call of one routed block: its bound arguments before it ran, what it returned, and what it kept (B, K)."""

    fqn: str
    arguments: dict[str, Any]
    output: Any = None
    kept: Tensor = field(default_factory=lambda: torch.empty(0))


@functools.cache
def _plain(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return STRUCTURES[name].build().eval()


@functools.cache
def _routed(name: str) -> nn.Module:
    return diffcr_compile.transform(copy.deepcopy(_plain(name)), example_inputs=STRUCTURES[name].inputs())


@pytest.fixture(params=list(STRUCTURES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> nn.Module:
    return copy.deepcopy(_routed(name))


def sites(model: nn.Module) -> list[str]:
    return [site.fqn for site in diffcr_compile.explain(model).plan.sites]


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return model(**copy.deepcopy(inputs))


def watch(name: str, model: nn.Module) -> list[Call]:
    """A forward at the ratios set; every routed block's calls, arguments copied before the block writes into them."""
    calls: list[Call] = []
    handles = []
    for fqn in sites(model):
        module = model.get_submodule(fqn)
        signature = inspect.signature(type(module).forward)

        def before(module: nn.Module, args: Any, kwargs: Any, fqn: str = fqn, signature: Any = signature) -> None:
            bound = dict(signature.bind(module, *args, **kwargs).arguments)
            bound.pop("self")
            calls.append(Call(fqn, copy.deepcopy(bound)))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            calls[-1].output = copy.deepcopy(output)

        handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    with diffcr_compile.trace(model) as seen:
        run(model, STRUCTURES[name].inputs())
    for handle in handles:
        handle.remove()
    remaining = {fqn: iter(kept) for fqn, kept in seen.kept.items()}
    for call in calls:
        call.kept = next(remaining[call.fqn])
    return calls


def one_sample(structure: Structure, call: Call, sample: int, kept: list[int]) -> dict[str, Any]:
    """The call's arguments for one sample, with its kept tokens alone."""

    def slice_(parameter: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.narrow(structure.batch_axes.get(parameter, 0), sample, 1)
        axis = structure.follows.get(parameter)
        return value.clone() if axis is None else value.index_select(axis, torch.tensor(kept))

    return {
        parameter: pytree.tree_map(functools.partial(slice_, parameter), value)
        for parameter, value in call.arguments.items()
    }


def test_what_can_be_routed_is(name: str, model: nn.Module) -> None:
    structure = STRUCTURES[name]
    assert set(sites(model)) == set(structure.routed)
    plan = diffcr_compile.explain(model).plan
    branches = {site.fqn for site in plan.sites if plan.families[site.family].is_branch}
    assert branches == set(structure.branches) & set(sites(model))


def test_zero_ratio_is_the_original(name: str, model: nn.Module) -> None:
    inputs = STRUCTURES[name].inputs()
    assert same_bits(run(model, inputs), run(_plain(name), inputs))


@torch.no_grad()
def test_each_block_equals_each_sample_run_alone(name: str, model: nn.Module) -> None:
    structure = STRUCTURES[name]
    diffcr_compile.set_ratios(model, 0.5)
    calls = watch(name, model)
    assert len(calls) == len(sites(model)) * structure.calls_per_block
    assert all(len({tuple(row) for row in call.kept.tolist()}) > 1 for call in calls)
    for call in calls:
        block, parameter = _plain(name).get_submodule(call.fqn), next(iter(call.arguments))
        axis, batch_axis = structure.follows[parameter], structure.batch_axes.get(parameter, 0)
        branch = call.fqn in structure.branches or call.fqn not in structure.routed
        read = (lambda output: output) if branch else structure.read
        for sample, kept in enumerate(call.kept.tolist()):
            expected = read(type(block).forward(block, **one_sample(structure, call, sample, kept)))
            found = read(call.output).narrow(batch_axis, sample, 1)
            assert relative_error(found.index_select(axis, torch.tensor(kept)), expected) < TOLERANCE
            skipped = torch.tensor([token for token in range(found.shape[axis]) if token not in kept])
            assert abs(len(skipped) - len(kept)) <= 1
            before = call.arguments[parameter].narrow(batch_axis, sample, 1)
            before = torch.zeros_like(before) if branch else before
            assert torch.equal(found.index_select(axis, skipped), before.index_select(axis, skipped))


def test_flops_fall(name: str, model: nn.Module) -> None:
    diffcr_compile.set_ratios(model, 0.5)
    assert diffcr_compile.cost(model, STRUCTURES[name].inputs()).share < 1


def test_restore_is_exact(name: str, model: nn.Module) -> None:
    inputs = STRUCTURES[name].inputs()
    diffcr_compile.set_ratios(model, 0.5)
    run(model, inputs)
    diffcr_compile.restore(model)
    assert same_snapshot(snapshot(model), snapshot(_plain(name)))
    assert same_bits(run(model, inputs), run(_plain(name), inputs))


def test_a_block_that_walks_its_children_takes_no_router_among_them() -> None:
    plan = diffcr_compile.explain(_routed("walks its children")).plan
    refused = {refusal.fqns: refusal.reason for refusal in plan.refusals}
    assert "walks its children" in refused[BLOCKS]


def test_without_a_timestep_ratios_are_per_layer() -> None:
    assert diffcr_compile.ratios(_routed("timm vit")).shape == (1, 3)
    assert diffcr_compile.ratios(_routed("plain")).shape == (4, 3)


def test_per_token_timesteps_take_the_largest() -> None:
    model = copy.deepcopy(_routed("per-token timesteps"))
    diffcr_compile.set_ratios(model, torch.tensor([[0.0], [0.0], [0.0], [0.5]]).expand(4, 3))
    inputs = per_token_inputs()
    inputs["timestep"] = torch.full((BATCH, TOKENS), 100.0)
    inputs["timestep"][1, 4] = 900.0
    with torch.no_grad():
        found, dense = model(**inputs), _plain("per-token timesteps")(**inputs)
    assert relative_error(found[[0, 2]], dense[[0, 2]]) < TOLERANCE
    assert relative_error(found[1], dense[1]) > 1e-3


class NamesBlock(Block):
    """Arguments with the names that routed programs have for their own inputs, and words of Python."""

    def forward(self, x: Tensor, memory: Tensor, k: Tensor, *, kept: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x, memory) + 0.1 * k.unsqueeze(1) + 0.1 * (kept["a-b"] + kept["a_b"]).unsqueeze(1)


class NamesDenoiser(Denoiser):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x, cond = self.embed(x), self.time(sinusoids(timestep, WIDTH))
        for block in self.blocks:
            x = block(x, cond, cond.flip(-1), kept={"a-b": cond.square(), "a_b": cond.sin()})
        return self.head(x)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"context": "all"}, {"skip": "reuse"}], ids=str)
def test_arguments_may_have_any_names(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [NamesDenoiser(NamesBlock).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    inputs = {"x": torch.randn(BATCH, TOKENS, CHANNELS), "timestep": torch.full((BATCH,), 500.0)}
    model = diffcr_compile.transform(models[0], diffcr_compile.DiffCRConfig(**options), example_inputs=inputs)
    assert [site.fqn for site in diffcr_compile.explain(model).plan.sites] == [f"blocks.{layer}" for layer in range(3)]
    diffcr_compile.set_ratios(model, 0.5)
    diffcr_compile.save(model, tmp_path)
    loaded = diffcr_compile.load(models[1], tmp_path)
    for timestep in (900.0, 500.0):
        inputs["timestep"].fill_(timestep)
        assert same_bits(loaded(**inputs), model(**inputs))
