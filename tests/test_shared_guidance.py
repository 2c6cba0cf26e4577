"""``guidance="shared"``: both halves of a batch keep the same tokens, chosen by the mean of their scores."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffcr_compile.calibration.sensitivity import measure_suffering
from models import Shape, TinyDiT, original, relative_error, routed_fqns, same_bits, tiny_inputs
from torch import Tensor

import diffcr_compile
from diffcr_compile import CalibrationConfig, DiffCRConfig
from diffcr_compile.config import Estimator
from diffcr_compile.primitives import score_tokens, select_tokens, share_scores
from diffcr_compile.ratios import capacity
from diffcr_compile.routed import routing_of

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

PLAIN = Shape("plain", depth=2, heads=1, head_dim=6)
SHAPES = (PLAIN, Shape("rotary", depth=2, heads=1, head_dim=6), Shape("joint", depth=2, heads=1, head_dim=8))
TOLERANCE = 1e-5
"""Of the largest value, in float32, where a batch is another."""


@functools.cache
def _transformed(shape: Shape, options: tuple[tuple[str, Any], ...]) -> TinyDiT:
    return diffcr_compile.transform(original(shape), DiffCRConfig(**dict(options)), example_inputs=tiny_inputs(shape))


def transformed(shape: Shape = PLAIN, **options: Any) -> TinyDiT:
    options = {"guidance": "shared", **options}
    return copy.deepcopy(_transformed(shape, tuple(sorted(options.items()))))


def inputs(shape: Shape = PLAIN, *, batch: int = 6, timestep: Any = 600.0, **options: Any) -> dict[str, Any]:
    return tiny_inputs(shape, batch=batch, timestep=timestep, **options)


def kept_by(model: TinyDiT, call: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad(), diffcr_compile.trace(model) as seen:
        model(**call)
    return {fqn: calls[0] for fqn, calls in seen.kept.items()}


def test_the_mean_is_of_the_pairs() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 5.0], [3.0, 0.0], [5.0, 1.0]])
    assert share_scores(scores).tolist() == [[2.0, 1.0], [4.0, 3.0]] * 2


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_halves_keep_the_same_and_pairs_their_own(shape: Shape) -> None:
    """Three pairs; in the first block, where a token's score is known, those with the highest mean."""
    model = transformed(shape)
    diffcr_compile.set_ratios(model, 0.5)
    tokens: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    kept = kept_by(model, inputs(shape))
    handle.remove()
    assert list(kept) == routed_fqns(model)
    for positions in kept.values():
        assert torch.equal(positions[:3], positions[3:])
        assert len({tuple(row) for row in positions[:3].tolist()}) > 1
    scores = score_tokens(tokens[0], model.blocks[0].diffcr_router.weight, 1, 0)  # type: ignore[union-attr,arg-type]
    expected = select_tokens((scores[:3] + scores[3:]) / 2, capacity(scores.shape[1], 500))
    assert torch.equal(kept["blocks.0"][:3], expected)
    assert not torch.equal(kept["blocks.0"], select_tokens(scores, expected.shape[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_equal_halves_are_as_separate(shape: Shape) -> None:
    """A pair of equal samples keeps what each alone would."""
    model, separate = transformed(shape), transformed(shape, guidance="separate")
    call = {name: torch.cat([value, value]) if name != "rope" else value for name, value in tiny_inputs(shape).items()}
    for each in (model, separate):
        diffcr_compile.set_ratios(each, 0.5)
    with torch.no_grad():
        assert same_bits(model(**call), separate(**call))


def test_pairs_are_independent_of_each_other_and_of_their_order() -> None:
    """Law 5, of pairs: permuting them, or exchanging the halves, permutes the result."""
    model, call = transformed(), inputs()
    diffcr_compile.set_ratios(model, 0.5)
    with torch.no_grad():
        expected = model(**call)
        for order in ([2, 0, 1, 5, 3, 4], [3, 4, 5, 0, 1, 2], [1, 4]):
            found = model(**{name: value[order] for name, value in call.items()})
            assert relative_error(found, expected[order]) < TOLERANCE


def test_zero_ratio_is_the_original_in_any_batch() -> None:
    call = inputs(batch=3)
    assert same_bits(transformed()(**call), original(PLAIN)(**call))


@pytest.mark.parametrize("scope", ["", "full", "regional"])
def test_an_odd_batch_is_refused(scope: str) -> None:
    torch._dynamo.reset()
    model = transformed()
    diffcr_compile.set_ratios(model, 0.5)
    if scope:
        diffcr_compile.lower(model, scope=scope, backend="eager")  # type: ignore[arg-type]
    with torch.no_grad():
        with pytest.raises(
            diffcr_compile.UnsupportedError, match=r"this batch is odd \(3\)\. Call.*guidance='separate'"
        ):
            model(**inputs(batch=3))
        model(**inputs(batch=2))
    with diffcr_compile.learning(model), pytest.raises(diffcr_compile.UnsupportedError, match="odd"):
        model(**inputs(batch=3))


def test_where_batch_axes_are_unknown_the_block_refuses_an_odd_batch() -> None:
    model = transformed()
    routing_of(model).plan = replace(routing_of(model).plan, input_batch_axes={})
    diffcr_compile.set_ratios(model, 0.5)
    with pytest.raises(diffcr_compile.UnsupportedError, match="odd"):
        model(**inputs(batch=3))


@pytest.mark.parametrize("scope", ["full", "regional"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: shape.kind)
def test_lowered_equals_eager(shape: Shape, scope: str) -> None:
    torch._dynamo.reset()
    model = transformed(shape)
    diffcr_compile.set_ratios(model, [[0.2, 0.5], [0.5, 0.5], [0.5, 0.2], [0.2, 0.8]])
    eager = copy.deepcopy(model)
    diffcr_compile.lower(model, scope=scope, backend="aot_eager")  # type: ignore[arg-type]
    with torch.no_grad():
        for step in (10.0, 600.0, 10.0):
            call = inputs(shape, timestep=step)
            assert relative_error(model(**call), eager(**call)) < TOLERANCE


def test_a_graph_of_ones_own() -> None:
    torch._dynamo.reset()
    model, call = transformed(), inputs()
    diffcr_compile.set_ratios(model, 0.5)
    with torch.no_grad():
        expected = model(**call)
        assert same_bits(torch.compile(model, backend="eager", fullgraph=True)(**call), expected)


def test_halves_are_split_by_region_together_or_not_at_all() -> None:
    model = transformed()
    diffcr_compile.set_ratios(model, [[0.2, 0.2], [0.4, 0.4], [0.6, 0.6], [0.8, 0.8]])
    call = inputs(timestep=torch.tensor([900.0, 10.0, 300.0] * 2))
    with torch.no_grad():
        whole = model(**call)
        for place in range(3):
            pair = [place, place + 3]
            alone = model(**{name: value[pair] for name, value in call.items()})
            assert relative_error(whole[pair], alone) < TOLERANCE
    parted = torch.tensor([900.0, 10.0, 300.0, 900.0, 300.0, 10.0])
    with pytest.raises(diffcr_compile.UnsupportedError, match=r"\[3, 0, 1, 3, 1, 0\].*both halves the same timesteps"):
        model(**inputs(timestep=parted))


@pytest.mark.parametrize("selection", ["score", "score and turn"])
def test_with_reuse_halves_stay_together_all_along_a_trajectory(selection: str) -> None:
    model = transformed(skip="reuse", selection=selection)
    diffcr_compile.set_ratios(model, 0.5)
    with torch.no_grad(), diffcr_compile.trace(model) as seen:
        for step in (990.0, 700.0, 450.0, 200.0, 10.0):
            call = inputs(timestep=step)
            model(**{**call, "x": call["x"] * (1 + step / 1000)})
    for calls in seen.kept.values():
        assert all(torch.equal(kept[:3], kept[3:]) for kept in calls)
        assert len({tuple(row) for kept in calls[1:] for row in kept.tolist()}) >= 3


def gradients(model: TinyDiT, call: dict[str, Any], estimator: Estimator) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    with diffcr_compile.learning(model, estimator=estimator) as learnable:
        learnable.ratios.grad = None
        model(**call).square().sum().backward()
    assert learnable.ratios.grad is not None
    return learnable.ratios.grad, [torch.zeros_like(one) if one.grad is None else one.grad for one in learnable.routers]


@pytest.mark.parametrize("estimator", ["two-bin", "single-pass"])
@pytest.mark.parametrize("ratio", [0.3, 0.34])
def test_equal_halves_learn_as_separate(estimator: Estimator, ratio: float) -> None:
    """In float64: the mean of two equal scores is that score, and so are its gradients."""
    model, separate = transformed().double(), transformed(guidance="separate").double()
    call = {
        name: torch.cat([value, value])
        for name, value in tiny_inputs(PLAIN, num_tokens=17, dtype=torch.float64).items()
    }
    for each in (model, separate):
        diffcr_compile.set_ratios(each, ratio)
    (slopes, routers), (expected, vectors) = (gradients(each, call, estimator) for each in (model, separate))
    assert bool(slopes[2].all())
    assert relative_error(slopes, expected) < TOLERANCE
    for router, vector in zip(routers, vectors, strict=True):
        assert bool(router.any())
        assert relative_error(router, vector) < TOLERANCE  # scores are float32


def test_both_halves_give_the_single_pass_slope() -> None:
    """-<dL/dout, update> over the tokens between the bins, which both halves share, over the bins' width."""
    shape = Shape("plain", depth=1, heads=1, head_dim=6)
    model, call = transformed(shape).double(), inputs(shape, num_tokens=17, dtype=torch.float64)
    diffcr_compile.set_ratios(model, 0.3)
    block, seen = model.blocks[0], []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args))
    slopes, _ = gradients(model, call, "single-pass")
    handle.remove()
    x = seen[0][0].detach()
    scores = score_tokens(x, block.diffcr_router.weight.detach(), 1, 0)  # type: ignore[union-attr,operator]
    between = share_scores(scores).argsort(dim=1, descending=True)[:, capacity(17, 400) : capacity(17, 300)]
    with torch.no_grad():
        output = block(*(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in seen[0]))
    leaf = output.clone().requires_grad_()
    model.head(leaf).square().sum().backward()
    assert leaf.grad is not None
    expected = -float((leaf.grad * (output - x)).sum(-1).gather(1, between).sum()) / 0.1
    assert float(slopes[2, 0]) == pytest.approx(expected, rel=TOLERANCE)  # masters are float32


def test_calibrate_keeps_halves_together(tmp_path: Path) -> None:
    """Batches in several regions are not put together anew, which would part the pairs."""
    model = transformed()
    batches = []
    for seed in range(3):
        half = inputs(batch=3, timestep=torch.tensor([900.0, 10.0, 300.0]), seed=seed)
        batches.append({name: torch.cat([value] * 2) for name, value in half.items()})
        batches[-1]["x"][3:] += 1.0
    calls: list[Any] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True, prepend=True
    )
    report = diffcr_compile.calibrate(model, batches, budget=0.8, config=CalibrationConfig(steps=4))
    handle.remove()
    calls = [call for call in calls if type(call.get("x")) is Tensor]  # fake ones, of counting FLOPs, are taken out
    assert len(calls) > 10
    for call in calls:
        first, second = call["x"].chunk(2)
        assert torch.equal(first + 1.0, second)
        assert torch.equal(*call["timestep"].chunk(2))
    assert report.share <= 0.8
    for positions in kept_by(model, inputs()).values():
        assert torch.equal(positions[:3], positions[3:])
    diffcr_compile.save(model, tmp_path / "routing")
    loaded = diffcr_compile.load(model_of(model), tmp_path / "routing")
    with torch.no_grad():
        assert same_bits(loaded(**inputs()), model(**inputs()))


def model_of(model: TinyDiT) -> TinyDiT:
    """A plain model of the same weights."""
    plain = original(PLAIN)
    plain.load_state_dict(model.state_dict())
    return plain


def test_training_free_measures_the_shared_choice() -> None:
    model, separate = transformed(), transformed(guidance="separate")
    found, expected = (measure_suffering(each, routing_of(each), [inputs()]) for each in (model, separate))
    assert relative_error(found[..., [0, 10]], expected[..., [0, 10]]) < 1e-12  # float64, summed in another order
    assert relative_error(found, expected) > 1e-3


def test_cost_on_an_odd_batch_says_why_not() -> None:
    model = transformed()
    with pytest.raises(diffcr_compile.CaptureError, match="this batch is odd"):
        diffcr_compile.cost(model, inputs(batch=3))
    assert diffcr_compile.cost(model, inputs()).share == 1


def test_explain_shows_the_node() -> None:
    assert "share_scores(" in str(diffcr_compile.explain(transformed()))
    assert "share_scores(" not in str(diffcr_compile.explain(transformed(guidance="separate")))
