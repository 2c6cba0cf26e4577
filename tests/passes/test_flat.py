"""A denoiser written as one flat forward: its blocks are found between residual adds."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import relative_error, same_bits, same_snapshot, snapshot
from torch import Tensor, nn

import diffcr_compile

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

WIDTH, HEADS, DEPTH, CHANNELS, TOKENS, BATCH = 12, 2, 3, 5, 11, 3


class FlatDiT(nn.Module):
    """forward(x (B, N, C), timestep (B,)) -> (B, N, C); no module below it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"embed": (WIDTH, CHANNELS), "head": (CHANNELS, WIDTH), "time": (WIDTH, WIDTH)}
        for layer in range(DEPTH):
            parts = {"qkv": 3 * WIDTH, "out": WIDTH, "up": 2 * WIDTH, "mod": 2 * WIDTH}
            shapes |= {f"{name}{layer}": (size, WIDTH) for name, size in parts.items()}
            shapes[f"down{layer}"] = (WIDTH, 2 * WIDTH)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) * shape[-1] ** -0.5))

    def forward(self, x: Tensor, timestep: Tensor, scale: float = 1.0) -> Tensor:
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(WIDTH // 2) / (WIDTH // 2))
        angles = timestep.float()[:, None] * frequencies
        cond = F.silu(F.linear(torch.cat([angles.cos(), angles.sin()], dim=-1), self.time))
        x = F.linear(x, self.embed) * scale
        for layer in range(DEPTH):
            x = self.layer(x, cond, layer)
        return F.linear(x, self.head)

    def layer(self, x: Tensor, cond: Tensor, layer: int) -> Tensor:
        qkv, out, up, down, mod = (getattr(self, f"{name}{layer}") for name in ("qkv", "out", "up", "down", "mod"))
        scale1, scale2 = F.linear(cond, mod).unsqueeze(1).chunk(2, dim=-1)
        heads = F.linear(F.layer_norm(x, (WIDTH,)) * (1 + scale1), qkv).unflatten(-1, (3, HEADS, -1))
        attended = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))
        x = x + F.linear(attended.transpose(1, 2).flatten(2), out)
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,)) * (1 + scale2), up)), down)


def inputs(seed: int = 0) -> dict[str, Any]:
    x = torch.randn(BATCH, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "timestep": torch.tensor([5.0, 300.0, 900.0])}


def transformed() -> FlatDiT:
    return diffcr_compile.transform(FlatDiT().eval(), example_inputs=inputs())


@torch.no_grad()
def test_zero_is_the_original_and_restore_is_exact() -> None:
    model = FlatDiT().eval()
    expected, keys = model(**inputs(1)), list(model.state_dict())
    diffcr_compile.transform(model, example_inputs=inputs())
    assert type(model) is FlatDiT
    assert same_bits(model(**inputs(1)), expected)
    assert list(model.state_dict()) == keys
    diffcr_compile.restore(model)
    assert same_bits(model(**inputs(1)), expected)
    assert [name for name, _ in model.named_modules()] == [""]
    assert "forward" not in vars(model)


@torch.no_grad()
def test_the_graph_with_every_token_kept_is_the_original_to_the_bit() -> None:
    model = transformed()
    diffcr_compile.set_ratios(model, 0.001)
    assert same_bits(model(**inputs(1)), FlatDiT().eval()(**inputs(1)))


@torch.no_grad()
def test_a_forward_that_was_wrapped_meanwhile_survives_restore() -> None:
    model = transformed()
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: 2 * forward(*args, **kwargs))  # type: ignore[method-assign]
    diffcr_compile.set_ratios(model, 0.5)
    diffcr_compile.restore(model)
    assert same_bits(model(**inputs(1)), 2 * FlatDiT().eval()(**inputs(1)))


@torch.no_grad()
def test_hooks_of_the_model_run_once() -> None:
    model = FlatDiT().eval()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "x": kwargs["x"] * 2}), with_kwargs=True
    )
    model.register_forward_hook(lambda module, args, output: (output * 3,))
    expected = model(**inputs(1))
    diffcr_compile.transform(model, example_inputs=inputs())
    diffcr_compile.set_ratios(model, 0.001)
    assert same_bits(model(**inputs(1)), expected)


@torch.no_grad()
def test_each_block_equals_each_sample_run_alone() -> None:
    """The oracle is the class's own layer, on one sample and its kept tokens."""
    model, plain = transformed(), FlatDiT().eval()
    blocks = diffcr_compile.explain(model).plan.sites
    assert len(blocks) == DEPTH
    diffcr_compile.set_ratios(model, 0.5)
    calls: list[tuple[Tensor, Tensor]] = []
    conds: list[Tensor] = []
    original_layer = FlatDiT.layer

    def note(self: FlatDiT, x: Tensor, cond: Tensor, layer: int) -> Tensor:
        conds.append(cond)
        return original_layer(self, x, cond, layer)

    for site in blocks:
        stream = diffcr_compile.explain(model).plan.families[site.family].stream
        model.get_submodule(site.fqn).register_forward_hook(
            lambda module, args, output, stream=stream: calls.append((args[stream], output))
        )
    plain.layer = note.__get__(plain)  # type: ignore[method-assign]
    plain(**inputs(2))
    with diffcr_compile.trace(model) as seen:
        model(**inputs(2))
    for layer, (site, (x, output)) in enumerate(zip(blocks, calls, strict=True)):
        kept = seen.kept[site.fqn][0]
        assert len({tuple(row) for row in kept.tolist()}) > 1
        for sample in range(BATCH):
            one = slice(sample, sample + 1)
            alone = original_layer(plain, x[one][:, kept[sample]], conds[0][one], layer)
            assert relative_error(output[one][:, kept[sample]], alone) < 1e-5
            skipped = [token for token in range(TOKENS) if token not in kept[sample].tolist()]
            assert torch.equal(output[one][:, skipped], x[one][:, skipped])


@torch.no_grad()
def test_copies_costs_and_other_calls() -> None:
    model = transformed()
    diffcr_compile.set_ratios(model, 0.5)
    assert diffcr_compile.cost(model, inputs()).share < 0.7
    assert same_bits(copy.deepcopy(model)(**inputs(1)), model(**inputs(1)))
    with pytest.raises(diffcr_compile.UnsupportedError, match="scale"):
        model(**inputs(1), scale=0.5)


class Gained(FlatDiT):
    gain = 1.0

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, timestep, self.gain)


@torch.no_grad()
def test_what_the_graph_holds_of_the_model_may_not_change() -> None:
    model = Gained().eval()
    model.gain = 1.5
    diffcr_compile.transform(model, example_inputs=inputs())
    diffcr_compile.set_ratios(model, 0.5)
    expected = copy.deepcopy(model)(**inputs(1))
    model.gain = 3.0
    with pytest.raises(diffcr_compile.UnsupportedError, match="holds what was set on it"):
        model(**inputs(1))
    model.gain = 1.5
    assert same_bits(model(**inputs(1)), expected)
    narrow = {name: value.bfloat16() for name, value in inputs(1).items()}
    with pytest.raises(diffcr_compile.UnsupportedError, match="and its dtypes"):
        model.to(torch.bfloat16)(**narrow)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_number_that_the_graph_holds_may_not_change(ratio: float) -> None:
    model = diffcr_compile.transform(FlatDiT().eval(), example_inputs={**inputs(), "scale": 1.5})
    diffcr_compile.set_ratios(model, ratio)
    with diffcr_compile.trace(model):
        assert torch.isfinite(model(**inputs(1), scale=1.5)).all()
        with pytest.raises(diffcr_compile.UnsupportedError, match="other values of its flags and numbers"):
            model(**inputs(1), scale=2.0)


class Branching(FlatDiT):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x if x.shape[1] <= 12 else 2 * x, timestep)


class Counting(FlatDiT):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([super(Counting, self).forward(x[i : i + 1], timestep[i : i + 1]) for i in range(len(x))])


def sized(batch: int, num_tokens: int) -> dict[str, Any]:
    return {"x": torch.ones(batch, num_tokens, CHANNELS), "timestep": torch.full((batch,), 300.0)}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "fits", "other", "guard"),
    [
        (Branching, sized(2, 12), sized(2, 13), r"x\.shape\[1\] <= 12"),
        (Counting, sized(BATCH, 13), sized(2, TOKENS), rf"x\.shape\[0\] == {BATCH}"),
    ],
)
def test_sizes_for_which_the_forward_does_something_else_are_refused(
    kind: type[FlatDiT], fits: dict[str, Any], other: dict[str, Any], guard: str
) -> None:
    model, plain = diffcr_compile.transform(kind().eval(), example_inputs=inputs()), kind().eval()
    assert same_bits(model(**other), plain(**other)), "the original runs while nothing is skipped"
    diffcr_compile.set_ratios(model, 0.001)
    assert same_bits(model(**fits), plain(**fits))
    with pytest.raises(diffcr_compile.UnsupportedError, match=rf"the graph of {kind.__name__} holds where {guard}"):
        model(**other)


@torch.no_grad()
def test_an_argument_of_none_may_be_left_out() -> None:
    class Biased(FlatDiT):
        def forward(self, x: Tensor, timestep: Tensor, bias: Tensor | None = None) -> Tensor:
            return super().forward(x if bias is None else x + bias, timestep)

    model = diffcr_compile.transform(Biased().eval(), example_inputs={"bias": None, **inputs()})
    diffcr_compile.set_ratios(model, 0.5)
    assert same_bits(model(**inputs(1)), model(**inputs(1), bias=None))


def test_the_signature_stays() -> None:
    assert inspect.signature(transformed().forward) == inspect.signature(FlatDiT().forward)


@torch.no_grad()
def test_a_deferred_model_is_routed_too() -> None:
    model, explicit = diffcr_compile.transform(FlatDiT().eval()), transformed()
    assert same_bits(model(**inputs(1)), FlatDiT().eval()(**inputs(1)))
    for routed in (model, explicit):
        diffcr_compile.set_ratios(routed, 0.5)
    assert same_bits(model(**inputs(1)), explicit(**inputs(1)))


def test_weights_learn_through_the_graph() -> None:
    model = diffcr_compile.transform(FlatDiT().eval())
    config = diffcr_compile.CalibrationConfig(steps=3)
    before = model.qkv0.detach().clone()  # type: ignore[operator]
    report = diffcr_compile.calibrate(model, [inputs(seed) for seed in range(3)], budget=0.8, config=config)
    assert report.share <= 0.8
    assert not torch.equal(model.qkv0, before)  # type: ignore[arg-type]


class Mlp(nn.Module):
    """No attention; what it does in training leaves traces, in a buffer and in the generator."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(CHANNELS, CHANNELS)) for _ in range(2))
        self.norm, self.dropout = nn.BatchNorm1d(TOKENS), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.norm(x) @ self.a)
        return x + self.dropout(F.gelu(x @ self.b))


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Mlp, ".* no repeated residual sum in its graph attends"), (Constant, "its graph holds constants")],
)
def test_what_has_no_repeated_attention_is_refused_and_left_alone(kind: type[nn.Module], reason: str) -> None:
    model = kind()
    before, generator = snapshot(model), torch.get_rng_state()
    with pytest.raises(diffcr_compile.BlockNotFoundError, match=rf"the whole model \({kind.__name__}\): {reason}"):
        diffcr_compile.transform(model, example_inputs={"x": inputs()["x"]})
    assert same_snapshot(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_routing_of_a_flat_forward_says_why_it_is_not_loaded(tmp_path: Path) -> None:
    diffcr_compile.save(transformed(), tmp_path / "routing")
    model = FlatDiT()
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"no block modules.*instead of load"):
        diffcr_compile.load(model, tmp_path / "routing")
    assert not list(model.children())
    assert "forward" not in vars(model)


class Dropping(FlatDiT):
    def layer(self, x: Tensor, cond: Tensor, layer: int) -> Tensor:
        return super().layer(x, F.dropout(cond, 0.5, self.training), layer)


def test_dropout_is_not_lost_without_a_word() -> None:
    """The graph is of evaluation; dense, the forward itself runs."""
    model = diffcr_compile.transform(Dropping().train(), example_inputs=inputs())
    assert not same_bits(model(**inputs()), model(**inputs()))
    diffcr_compile.set_ratios(model, 0.5)
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"exported in evaluation mode.*dropout.*Call eval\(\)"):
        model(**inputs())
    model.eval()(**inputs()).sum().backward()
    assert model.qkv0.grad.any()
