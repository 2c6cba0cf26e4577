"""How ratios and routers get gradients: values at bins, slopes by hand, and what must not disturb them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hand import Hand, draw
from models import (
    Shape,
    TinyDiT,
    map_tensors,
    relative_error,
    routed,
    routed_fqns,
    same_bits,
    sinusoids,
    tensors_of,
    tiny_inputs,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import diffcr_compile
from diffcr_compile.config import Estimator
from diffcr_compile.primitives import score_tokens
from diffcr_compile.ratios import capacity

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=2, heads=1, head_dim=6)
JOINT = Shape("joint", depth=2, heads=1, head_dim=8)
BOTH = pytest.mark.parametrize("estimator", ["two-bin", "single-pass"])
DOUBLE = 1e-10
"""Of float64 sums of some thousand terms."""

RATIOS = 1e-5
"""Masters, and so their gradients, are float32: 6e-8 of the largest term of a sum of a few."""


class InPlace(Hand):
    """Writes its updates into the tokens that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.attend(2.0 * x)  # a product with a number: autograd needs no x that is gone
        return x


class OutOfPlace(InPlace):
    """The same, with tensors of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(2.0 * x)


class Branch(Hand):
    """Returns an update that its caller adds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class Layer(nn.Module):
    """Adds a branch, and mixes neighbours, so that it can't be routed whole."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Branch()
        self.mix = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + 0.1 * self.mix(x.transpose(1, 2)).transpose(1, 2)


class Stack(nn.Module):
    """forward(x (B, N, 8), t (B,)) -> (B, N, 8)."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + sinusoids(t, x.shape[-1]).unsqueeze(1).to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return x


class Checkpointed(TinyDiT):
    """A ``TinyDiT`` whose blocks are computed again in backward."""

    reentrant = False

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embed(x)
        cond = self.time(sinusoids(timestep, self.shape.width).to(x.dtype))
        for block in self.blocks:
            x = checkpoint(block, x, cond, None, None, use_reentrant=self.reentrant)
        return self.head(x)


@functools.cache
def _stack(layer: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = Stack(layer).eval()
    return diffcr_compile.transform(plain, example_inputs={"x": draw(3, 11, 8), "t": torch.full((3,), 500.0)})


Subject = tuple[nn.Module, dict[str, Any]]


def subject(kind: str) -> Subject:
    """A routed model in float64 and its inputs: timestep region 2 of 4, 17 tokens (bins keep different numbers of them)."""
    if kind in ("in place", "branch"):
        model = copy.deepcopy(_stack(InPlace if kind == "in place" else Layer)).double()
        return model, {"x": draw(3, 17, 8).double(), "t": torch.full((3,), 600.0)}
    shape = {"plain": PLAIN, "joint": JOINT}[kind]
    return routed(shape, torch.float64), tiny_inputs(shape, num_tokens=17, dtype=torch.float64, timestep=600.0)


KINDS = pytest.mark.parametrize("kind", ["plain", "joint", "in place", "branch"])


def gradients(model: nn.Module, inputs: dict[str, Any], estimator: Estimator) -> tuple[Tensor, list[Tensor], Tensor]:
    """The ratios' gradients, the routers', and the output, for a fixed random weighting of the output."""
    model.zero_grad()
    with diffcr_compile.learning(model, estimator=estimator) as learnable:
        learnable.ratios.grad = None
        output = model(**inputs)
        (output * draw(*output.shape, seed=3).to(output.dtype)).sum().backward()
    assert learnable.ratios.grad is not None
    routers = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in learnable.routers]
    return learnable.ratios.grad, routers, output.detach()


class Seen:
    """Copies of what a block was given, before it could write into it, and its output's gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, tuple[Any, Any]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.handles = []
        for fqn in routed_fqns(model):
            module = model.get_submodule(fqn)
            self.handles.append(module.register_forward_pre_hook(self._before(fqn), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after(fqn)))

    def _before(self, fqn: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls[fqn] = map_tensors(lambda leaf: leaf.detach().clone(), (args, kwargs))

        return hook

    def _after(self, fqn: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            # a view of its own: the next block may write into the tensor itself
            kept = map_tensors(torch.clone, output)
            for leaf in tensors_of(kept):
                leaf.retain_grad()
            self.outputs[fqn] = tensors_of(kept)
            return map_tensors(torch.clone, kept)

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def at(self, model: nn.Module, fqn: str, ratio: float) -> list[Tensor]:
        """The block's outputs at a ratio, on copies of what it was given."""
        args, kwargs = map_tensors(torch.clone, self.calls[fqn])
        diffcr_compile.set_ratios(model, ratio)
        with torch.no_grad():
            return tensors_of(model.get_submodule(fqn)(*args, **kwargs))


def learn_and_watch(model: nn.Module, inputs: dict[str, Any], estimator: Estimator) -> tuple[Tensor, Seen]:
    seen = Seen(model)
    try:
        found, _, _ = gradients(model, inputs, estimator)
    finally:
        seen.remove()
    return found, seen


# Two forwards.


@KINDS
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.34, 0.95, 1.0])
def test_the_two_bin_slope_is_the_difference_of_the_bins(kind: str, ratio: float) -> None:
    model, inputs = subject(kind)
    diffcr_compile.set_ratios(model, ratio)
    found, seen = learn_and_watch(model, inputs, "two-bin")
    low = min(int(ratio * 10 + 1e-6), 9) / 10
    for column, (fqn, outputs) in enumerate(seen.outputs.items()):
        lowers, uppers = seen.at(model, fqn, low), seen.at(model, fqn, low + 0.1)
        expected = sum(
            float((output.grad * (upper - lower)).sum())
            for output, lower, upper in zip(outputs, lowers, uppers, strict=True)
            if output.grad is not None  # the last block's text goes nowhere
        )
        assert expected != 0
        assert float(found[2, column]) == pytest.approx(expected / 0.1, rel=RATIOS, abs=RATIOS)


@BOTH
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.34, 1.0])
def test_blocks_that_write_into_their_tokens_learn_like_those_that_do_not(estimator: Estimator, ratio: float) -> None:
    model, inputs = subject("in place")
    plain = copy.deepcopy(_stack(OutOfPlace)).double()
    plain.load_state_dict(model.state_dict())
    for one in (model, plain):
        diffcr_compile.set_ratios(one, ratio)
    given = inputs["x"].clone()
    found, expected = gradients(model, inputs, estimator), gradients(plain, inputs, estimator)
    assert torch.equal(inputs["x"], given)
    assert bool(expected[0][2].any())
    assert relative_error(found[2], expected[2]) < DOUBLE
    assert relative_error(found[0], expected[0]) < RATIOS
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)  # float32 scores


# One forward.


@KINDS
def test_single_pass_starts_with_the_originals_bits(kind: str) -> None:
    model, inputs = subject(kind)
    expected = model(**inputs)
    with diffcr_compile.learning(model, estimator="single-pass"):
        assert same_bits(model(**inputs), expected)


@pytest.mark.parametrize(
    ("kind", "ratio"),
    [
        *((kind, ratio) for kind in ("plain", "joint", "in place", "branch") for ratio in (0.1, 0.5, 0.9)),
        *((kind, 1.0) for kind in ("plain", "in place", "branch")),
        pytest.param(
            "joint",
            1.0,
        ),
    ],
)
@torch.no_grad()
def test_single_pass_has_the_bins_values(kind: str, ratio: float) -> None:
    model, inputs = subject(kind)
    diffcr_compile.set_ratios(model, [[ratio, 0.5]] * 4)
    expected = model(**inputs)
    with diffcr_compile.learning(model, estimator="single-pass"):
        found = model(**inputs)
    # the place between two bins is a float32: 1e-6 of an update may remain, or be missing
    assert relative_error(found, expected) < RATIOS


def router_weight_of(model: nn.Module, fqn: str) -> Tensor:
    return model.get_submodule(fqn).diffcr_router.weight  # type: ignore[union-attr,return-value]


@KINDS
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.34, 0.85])
def test_the_single_pass_slope_is_the_update_of_the_tokens_between(kind: str, ratio: float) -> None:
    """-<dL/dout, update> over the tokens that the larger bin keeps and the smaller does not, over the width."""
    model, inputs = subject(kind)
    diffcr_compile.set_ratios(model, ratio)
    found, seen = learn_and_watch(model, inputs, "single-pass")
    low = int(ratio * 10 + 1e-6) * 100
    for column, fqn in enumerate(seen.outputs):
        tokens = seen.calls[fqn][0][0]
        ranked = score_tokens(tokens, router_weight_of(model, fqn), 1, 0).argsort(dim=1, descending=True)
        most, least = capacity(17, low), capacity(17, low + 100)
        assert most > least
        output = seen.at(model, fqn, low / 1000)[0]
        start = torch.zeros_like(tokens) if kind == "branch" else tokens
        gradient = seen.outputs[fqn][0].grad
        assert gradient is not None
        products = (gradient * (output - start)).sum(-1)
        expected = -float(products.gather(1, ranked[:, least:most]).sum())
        # seen.outputs is faded, the gradient that arrives there is the same; 2e-6 of the slope are float32's
        assert float(found[2, column]) == pytest.approx(expected / 0.1, rel=RATIOS, abs=RATIOS)


@KINDS
def test_between_bins_single_pass_fades_the_tokens_between(kind: str) -> None:
    model, inputs = subject(kind)
    diffcr_compile.set_ratios(model, 0.34)
    _, seen = learn_and_watch(model, inputs, "single-pass")
    fqn = routed_fqns(model)[0]
    tokens = seen.calls[fqn][0][0]
    ranked = score_tokens(tokens, router_weight_of(model, fqn), 1, 0).argsort(dim=1, descending=True)
    output = seen.at(model, fqn, 0.3)[0]
    start = torch.zeros_like(tokens) if kind == "branch" else tokens
    share = torch.ones(tokens.shape[:2], dtype=tokens.dtype)
    share.scatter_(1, ranked[:, capacity(17, 400) : capacity(17, 300)], 0.6)
    found = seen.outputs[fqn][0].detach()
    assert relative_error(found, start + share.unsqueeze(-1) * (output - start)) < RATIOS


def test_single_pass_leaves_the_text_as_the_larger_bin_has_it() -> None:
    model, inputs = subject("joint")
    diffcr_compile.set_ratios(model, 0.34)
    _, seen = learn_and_watch(model, inputs, "single-pass")
    fqn = routed_fqns(model)[0]
    expected = seen.at(model, fqn, 0.3)[1]
    assert same_bits(seen.outputs[fqn][1].detach(), expected)


@KINDS
def test_routers_learn_at_ratio_zero_by_single_pass(kind: str) -> None:
    """As if every token's update were scaled by the sigmoid of its score, divided by itself."""
    model, inputs = subject(kind)
    seen = Seen(model)
    _, routers, _ = gradients(model, inputs, "single-pass")
    seen.remove()
    for fqn, router in zip(seen.outputs, routers, strict=True):
        tokens = seen.calls[fqn][0][0]
        scores = score_tokens(tokens, router_weight_of(model, fqn), 1, 0).detach()
        output = seen.at(model, fqn, 0.0)[0]
        start = torch.zeros_like(tokens) if kind == "branch" else tokens
        gradient = seen.outputs[fqn][0].grad
        assert gradient is not None
        slope = (gradient * (output - start)).sum(-1) * (1 - scores.double().sigmoid())
        expected = (slope.unsqueeze(-1) * tokens).sum((0, 1))
        assert bool(expected.any())
        assert relative_error(router, expected) < RATIOS  # scores are float32


@BOTH
@pytest.mark.parametrize("ratio", [0.2, 0.34])
def test_routers_learn_elsewhere(estimator: Estimator, ratio: float) -> None:
    model, inputs = subject("plain")
    diffcr_compile.set_ratios(model, ratio)
    _, routers, _ = gradients(model, inputs, estimator)
    assert all(bool(router.any()) for router in routers)


def test_single_pass_runs_each_block_once() -> None:
    model, inputs = subject("plain")
    diffcr_compile.set_ratios(model, 0.34)
    counts = {"two-bin": 0, "single-pass": 0}
    for estimator in counts:

        def count(module: nn.Module, args: Any, output: Any, name: str = estimator) -> None:
            counts[name] += 1

        handle = model.blocks[0].stream.qkv.register_forward_hook(count)  # type: ignore[union-attr,index]
        gradients(model, inputs, estimator)  # type: ignore[arg-type]
        handle.remove()
    assert counts == {"two-bin": 2, "single-pass": 1}


# Around the blocks.


REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


@functools.cache
def _checkpointed() -> TinyDiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Checkpointed(PLAIN).eval()
    return diffcr_compile.transform(model, example_inputs=tiny_inputs(PLAIN))


def with_and_without_checkpoints(reentrant: bool) -> tuple[nn.Module, nn.Module]:
    recomputing = copy.deepcopy(_checkpointed()).double()
    recomputing.reentrant = reentrant
    plain = routed(PLAIN, torch.float64)
    plain.load_state_dict(recomputing.state_dict())
    return recomputing, plain


@BOTH
@REENTRANT
@pytest.mark.parametrize("ratio", [0.0, 0.34])
def test_gradient_checkpointing_changes_nothing(estimator: Estimator, reentrant: bool, ratio: float) -> None:
    inputs = tiny_inputs(PLAIN, num_tokens=17, dtype=torch.float64, timestep=600.0)
    results = []
    for model in with_and_without_checkpoints(reentrant):
        diffcr_compile.set_ratios(model, ratio)
        found = gradients(model, inputs, estimator)
        results.append((found, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]))
    assert bool(results[1][0][0][2].any())
    # reentrant, the gradients of a block that runs at two bins are summed in another order
    tolerance = 1e-6 if reentrant else 0.0
    for found, expected in zip(*map(tensors_of, results), strict=True):
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


@BOTH
@REENTRANT
def test_gradient_checkpointing_of_a_batch_in_several_regions(estimator: Estimator, reentrant: bool) -> None:
    """Blocks are computed again in backward, and of which region's forward they are is unknown then: refused."""
    timestep = torch.tensor([990.0, 10.0, 600.0])
    inputs = tiny_inputs(PLAIN, num_tokens=17, dtype=torch.float64, timestep=timestep)
    checkpointed, without = with_and_without_checkpoints(reentrant)
    for model in (without, checkpointed):
        diffcr_compile.set_ratios(model, [[0.31, 0.32], [0.33, 0.34], [0.35, 0.36], [0.37, 0.38]])
    slopes, _, _ = gradients(without, inputs, estimator)
    assert [bool(row.any()) for row in slopes] == [True, False, True, True]
    with pytest.raises(
        diffcr_compile.UnsupportedError, match=r"regions \[0, 2, 3\].*Let each backward follow forwards of"
    ):
        gradients(checkpointed, inputs, estimator)


@BOTH
@REENTRANT
def test_gradient_checkpointing_of_two_forwards_before_one_backward(estimator: Estimator, reentrant: bool) -> None:
    """Refused for two regions; each with its own backward they are right, one after the other."""
    results = []
    checkpointed, without = with_and_without_checkpoints(reentrant)
    for model in (checkpointed, without):
        diffcr_compile.set_ratios(model, [[0.31, 0.32], [0.33, 0.34], [0.35, 0.36], [0.37, 0.38]])
        calls = [tiny_inputs(PLAIN, num_tokens=17, dtype=torch.float64, timestep=step) for step in (10.0, 900.0)]
        with diffcr_compile.learning(model, estimator=estimator) as learnable:
            for call in calls:
                model(**call).square().sum().backward()
        results.append(learnable.ratios.grad)
    assert results[1] is not None
    assert [bool(row.any()) for row in results[1]] == [True, False, False, True]
    assert same_bits(results[0], results[1])
    with (
        diffcr_compile.learning(checkpointed, estimator=estimator),
        pytest.raises(diffcr_compile.UnsupportedError, match=r"regions \[0, 3\]"),
    ):
        sum(checkpointed(**call).square().sum() for call in calls).backward()


@BOTH
@KINDS
def test_under_autocast_the_slopes_stay(kind: str, estimator: Estimator) -> None:
    model, inputs = subject(kind)
    diffcr_compile.set_ratios(model, 0.34)
    expected, _, exact = gradients(model, inputs, estimator)
    model.float()
    single = map_tensors(Tensor.float, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, routers, output = gradients(model, single, estimator)
    assert bool(torch.isfinite(found).all())
    assert all(bool(torch.isfinite(router).all()) and bool(router.any()) for router in routers)
    # bfloat16 keeps 8 bits: 0.4 % a product, some products in a row; a router may then swap tokens of nearly equal score
    assert relative_error(output, exact) < 0.1
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert float(cosine) > 0.9


def test_another_estimator_is_refused() -> None:
    model, _ = subject("plain")
    message = "estimator must be one of 'two-bin', 'single-pass', found 'three-bin'"
    with pytest.raises(ValueError, match=message), diffcr_compile.learning(model, estimator="three-bin"):  # type: ignore[arg-type]
        pass
