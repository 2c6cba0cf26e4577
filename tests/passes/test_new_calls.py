"""Kinds of call that a routed model meets later: analysed then, held to the loop over samples, or refused.

The oracle knows nothing of any plan: the original block, run on each sample's kept tokens alone. Axes: B batch, N tokens, D width.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffcr_compile.calibration.examine import examine_routers
from diffcr_compile.passes import new_calls
from models import (
    BlockCall,
    Shape,
    kept_arguments,
    relative_error,
    routed,
    run_routed,
    same_bits,
    same_snapshot,
    snapshot,
    tensors_of,
    tiny_inputs,
)
from torch import Tensor, nn
from torch.nn import functional as F

import diffcr_compile
from diffcr_compile import CalibrationConfig, DiffCRConfig
from diffcr_compile.arguments import bind_arguments
from diffcr_compile.routed import STATE

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

TOLERANCE = 1e-4
"""Of the largest value, in float32: rounding stays below 1e-5, a wrong index is above 1e-2."""

BATCH, TOKENS, WIDTH, HEADS = 3, 12, 16, 2


class Attention(nn.Module):
    """Self-attention over (B, N, D); ``mask``: bool, to be broadcast to (B, 1, N, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """With every kind of input that may be left out. ``extra`` comes first, so that it might be taken for the stream; ``order``: a
    place for each token, made from the length."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(
        self,
        extra: Tensor | None,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        control: Tensor | None = None,
        order: bool = False,
        number: int = 0,
    ) -> Tensor:
        if order:
            x = x + torch.arange(x.shape[1], device=x.device)[:, None] / 10
        if control is not None:
            x = x + self.norm2(control)
        if extra is not None:
            x = extra + x
        x = x + self.attend(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Denoiser(nn.Module):
    """forward(x (B, N, D), timestep (B,), inputs of the blocks) -> (B, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor, extra: Tensor | None = None, **inputs: Any) -> Tensor:
        for block in self.blocks:
            x = block(extra, x, **inputs)
        return x * timestep.view(-1, 1, 1).cos()


class BranchDenoiser(nn.Module):
    """``x = attention(norm(x)) + x``, layer by layer: the attention is a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor | None = None) -> Tensor:
        for norm, attend in zip(self.norms, self.layers, strict=True):
            x = attend(norm(x), mask) + x
        return x * timestep.view(-1, 1, 1).cos()


class TwiceDenoiser(Denoiser):
    """Every block is called without the mask and with it."""

    def forward(self, x: Tensor, timestep: Tensor, extra: Tensor | None = None, **inputs: Any) -> Tensor:
        for block in self.blocks:
            x = block(None, block(None, x), **inputs)
        return x * timestep.view(-1, 1, 1).cos()


@functools.cache
def _build(kind: type[nn.Module], config: DiffCRConfig | None, masked: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = kind().eval()
    given = {"mask": mask_of(BATCH, 1)} if masked else {}
    diffcr_compile.transform(model, config, example_inputs=inputs(**given))
    diffcr_compile.set_ratios(model, 0.5)
    return model


def build(kind: type[nn.Module] = Denoiser, config: DiffCRConfig | None = None, *, masked: bool = False) -> nn.Module:
    """A transformed model at a ratio of one half, analysed on the inputs of :func:`inputs`, and a mask: a new copy at each call."""
    return copy.deepcopy(_build(kind, config, masked))


def inputs(batch: int = BATCH, seed: int = 0, timestep: float = 500.0, **given: Any) -> dict[str, Any]:
    x = torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "timestep": torch.full((batch,), timestep), **given}


def mask_of(*shape: int) -> Tensor:
    """A random mask in which every token sees itself."""
    allowed = torch.rand(*shape, TOKENS, TOKENS, generator=torch.Generator().manual_seed(8)) < 0.6
    return allowed | torch.eye(TOKENS, dtype=torch.bool)


def control_of(batch: int = BATCH) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))


def alone(value: Any, sample: int, kept: list[int]) -> Any:
    """What one sample's kept tokens are given: ``value`` with its batch and its token axes indexed by hand."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool:
        value = value[..., kept, :][..., kept]
        return value[sample : sample + 1] if value.ndim > 2 and value.shape[0] > 1 else value
    return value[sample : sample + 1, kept]


def worst_error(calls: list[BlockCall], model: nn.Module) -> float:
    """Of the kept tokens, against the original block on each sample's kept tokens alone; skipped ones are looked at too."""
    worst = 0.0
    for call in calls:
        block = model.get_submodule(call.fqn)
        x = call.args[1] if isinstance(block, Block) else torch.zeros_like(call.output)
        for sample, row in enumerate(call.kept.tolist()):
            args = [alone(value, sample, row) for value in call.args]
            kwargs = {name: alone(value, sample, row) for name, value in call.kwargs.items()}
            with torch.no_grad():
                expected = type(block).forward(block, *args, **kwargs)
            worst = max(worst, relative_error(call.output[sample, row], expected[0]))
            skipped = [token for token in range(TOKENS) if token not in row]
            assert torch.equal(call.output[sample, skipped], x[sample, skipped])
    return worst


def check(model: nn.Module, given: dict[str, Any], num_calls: int = 3) -> None:
    calls = run_routed(model, given)
    assert len(calls) == num_calls
    batch = len(given["x"])
    assert all(tuple(call.kept.shape) == (batch, TOKENS // 2) for call in calls)
    assert batch == 1 or any(len({tuple(row) for row in call.kept.tolist()}) == batch for call in calls)
    assert worst_error(calls, model) < TOLERANCE


def num_kinds(model: nn.Module) -> list[int]:
    return [len(block.programs) for block in model.__dict__[STATE].blocks]


@pytest.fixture(params=[Denoiser, BranchDenoiser])
def kind(request: pytest.FixtureRequest) -> type[nn.Module]:
    return request.param


@pytest.mark.parametrize("shape", [(BATCH, 1), (1, 1), (BATCH, HEADS), ()], ids=str)
def test_a_mask_given_only_later(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    model = build(kind)
    check(model, inputs(mask=mask_of(*shape)))
    check(model, inputs(seed=1))
    check(model, inputs(seed=2, mask=mask_of(*shape)))
    assert num_kinds(model) == [2, 2, 2]


@pytest.mark.parametrize("shape", ["plain", "rotary", "joint"])
def test_a_mask_given_only_later_beside_rotary_tables_and_text(shape: Any) -> None:
    bare, masked = (Shape(shape, depth=2, masked=masked) for masked in (False, True))
    model = routed(bare)
    diffcr_compile.set_ratios(model, 0.5)
    for call in run_routed(model, tiny_inputs(masked)):
        for sample in range(len(call.kept)):
            block = model.get_submodule(call.fqn)
            with torch.no_grad():
                expected = tensors_of(type(block).forward(block, *kept_arguments(masked, call, sample)))
            found = tensors_of(call.output)
            assert relative_error(found[0][sample, call.kept[sample]], expected[0][0]) < TOLERANCE
            assert all(
                relative_error(a[sample], b[0]) < TOLERANCE for a, b in zip(found[1:], expected[1:], strict=True)
            )


def test_a_control_residual_given_only_later() -> None:
    model = build()
    check(model, inputs(control=control_of()))
    check(model, inputs(control=control_of(), mask=mask_of(BATCH, 1)))
    assert num_kinds(model) == [3, 3, 3]


def test_given_first_and_then_none(kind: type[nn.Module]) -> None:
    model = build(kind, masked=True)
    check(model, inputs(mask=None))
    check(model, inputs(seed=1, mask=mask_of(BATCH, 1)))


def test_both_kinds_in_one_forward() -> None:
    model = build(TwiceDenoiser, masked=True)
    assert num_kinds(model) == [1, 1, 1]
    check(model, inputs(mask=mask_of(BATCH, 1)), num_calls=6)
    assert num_kinds(model) == [2, 2, 2]


def test_what_watches_the_model_is_not_looked_at_again() -> None:
    """A hook that asks for the program of a new kind of call is met by the copy that is looked at."""
    model, given = build(), inputs(mask=mask_of(BATCH, 1))
    block = model.blocks[0].__dict__[STATE]

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        block.program(bind_arguments(block.positional, args, kwargs))

    model.blocks[0].register_forward_pre_hook(ask, with_kwargs=True)
    with pytest.raises(diffcr_compile.UnsupportedError, match="or the block alone"):
        model(**given)


def test_one_sample_is_enough(kind: type[nn.Module]) -> None:
    """A batch of one would hide the batch axis of the input that is new."""
    model = build(kind)
    check(model, inputs(batch=1, mask=mask_of(1, 1)))
    check(model, inputs(mask=mask_of(BATCH, 1)))
    assert num_kinds(model) == [2, 2, 2]


def test_the_model_analysed_with_the_input_gives_the_same(kind: type[nn.Module]) -> None:
    given = inputs(mask=mask_of(BATCH, 1))
    with torch.no_grad():
        assert same_bits(build(kind)(**given), build(kind, masked=True)(**given))


def test_nothing_is_analysed_where_nothing_is_skipped() -> None:
    model = build()
    diffcr_compile.set_ratios(model, 0.0)
    given = inputs(order=True, mask=mask_of(BATCH, 1))
    dense = diffcr_compile.restore(copy.deepcopy(model))
    assert same_bits(model(**given), dense(**given))
    assert num_kinds(model) == [1, 1, 1]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"order": True}, "tokens are not interchangeable"),
        ({"extra": control_of()}, "other tokens would be routed"),
    ],
    ids=["positions", "another stream"],
)
def test_what_can_not_be_routed_is_refused(given: dict[str, Any], reason: str) -> None:
    model = build()
    before, expected = snapshot(model), model(**inputs())
    rng = torch.get_rng_state()
    with pytest.raises(diffcr_compile.UnsupportedError) as raised:
        model(**inputs(**given))
    for text in ("blocks.0 is called in a way it was not analysed for", next(iter(given)), reason, "filter_fn"):
        assert text in str(raised.value)
    assert torch.equal(torch.get_rng_state(), rng)
    assert same_snapshot(snapshot(model), before)
    assert same_bits(model(**inputs()), expected)


def test_a_model_that_does_not_run_on_the_inputs_says_so() -> None:
    model = build()
    with pytest.raises(diffcr_compile.UnsupportedError, match="could not be run on the inputs"):
        model(**inputs(mask=mask_of(BATCH, 1)[..., :5]))


def test_a_number_that_changes_is_not_followed_for_ever() -> None:
    model = build()
    for number in range(1, new_calls.MOST_KINDS):
        model(**inputs(number=number))
    with pytest.raises(diffcr_compile.UnsupportedError, match="analysed for 8 kinds of call"):
        model(**inputs(number=100))
    check(model, inputs(number=3))


def test_an_export_is_told_what_to_do() -> None:
    model, given = build(), inputs(mask=mask_of(BATCH, 1))
    with pytest.raises(
        diffcr_compile.UnsupportedError, match="call the model so once before, or pass such inputs as example"
    ):
        torch.export.export(model, (), given)
    expected = model(**given)
    assert same_bits(torch.export.export(model, (), given).module()(**given), expected)


def test_a_block_called_alone_is_told_what_to_do() -> None:
    model = build()
    with pytest.raises(diffcr_compile.UnsupportedError, match="or the block alone"):
        model.blocks[1](None, inputs()["x"], mask=mask_of(BATCH, 1))


def test_after_one_eager_call_it_compiles_whole() -> None:
    model, given = build(), inputs(mask=mask_of(BATCH, 1))
    expected = model(**given)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert same_bits(compiled(**given), expected)
    assert same_bits(compiled(**inputs()), model(**inputs()))


@pytest.mark.parametrize("scope", ["regional", "full"])
@pytest.mark.parametrize("config", [DiffCRConfig(), DiffCRConfig(context="all"), DiffCRConfig(skip="reuse")])
def test_a_lowered_model_meets_a_new_kind(scope: Any, config: DiffCRConfig) -> None:
    model = build(config=config)
    eager = copy.deepcopy(model)
    diffcr_compile.lower(model, scope=scope, backend="eager")
    for step, mask in enumerate([None, None, mask_of(BATCH, 1), mask_of(BATCH, 1), None, mask_of(BATCH, 1)]):
        given = inputs(seed=step, timestep=900.0 - 100 * step, mask=mask)
        with torch.no_grad():
            assert relative_error(model(**given), eager(**given)) < TOLERANCE
    with pytest.raises(diffcr_compile.UnsupportedError, match="not interchangeable"):
        model(**inputs(order=True, timestep=300.0))


def contexts() -> Iterator[DiffCRConfig]:
    yield DiffCRConfig(context="all")
    yield DiffCRConfig(skip="reuse")
    yield DiffCRConfig(skip="reuse", selection="score")


@pytest.mark.parametrize("config", list(contexts()), ids=["identity", "in turn", "by score"])
def test_with_full_context_each_kind_has_a_graph_of_its_own(config: DiffCRConfig) -> None:
    """In one trajectory, whatever the order: kept tokens are the dense block's on the tokens that it was given."""
    model = build(config=config)
    for step, mask in enumerate([None, None, mask_of(BATCH, 1), None, mask_of(BATCH, 1)]):
        calls = run_routed(model, inputs(seed=step, timestep=900.0 - 100 * step, mask=mask))
        for call in calls:
            block = model.get_submodule(call.fqn)
            with torch.no_grad():
                dense = type(block).forward(block, *call.args, **call.kwargs)
            rows = call.kept.unsqueeze(-1).expand(-1, -1, WIDTH)
            assert relative_error(call.output.gather(1, rows), dense.gather(1, rows)) < TOLERANCE
    assert num_kinds(model) == [2, 2, 2]


def test_it_learns_with_the_new_input() -> None:
    model = build()
    with diffcr_compile.learning(model):
        model(**inputs(mask=mask_of(BATCH, 1))).square().sum().backward()
    assert num_kinds(model) == [2, 2, 2]
    assert all(block.diffcr_router.weight.grad.abs().sum() > 0 for block in model.blocks)


def test_routers_are_examined_on_batches_of_the_new_kind() -> None:
    model = build()
    examine_routers(model, model.__dict__[STATE], [inputs(mask=mask_of(BATCH, 1))])
    assert num_kinds(model) == [2, 2, 2]


def test_it_is_explained() -> None:
    model = build()
    before = str(diffcr_compile.explain(model))
    model(**inputs(mask=mask_of(BATCH, 1)))
    (family,) = diffcr_compile.explain(model).families
    assert [leaf.name for leaf in family.later[0].leaves if leaf.token_axes] == ["x", "mask"]
    added = "  met later: a call with x (follows the tokens), mask (follows the tokens)"
    assert added in str(family)
    assert "met later" not in before


def test_a_batch_in_several_regions_may_bring_it_later() -> None:
    model = build()
    diffcr_compile.set_ratios(model, [[0.25] * 3, [0.5] * 3, [0.5] * 3, [0.75] * 3])
    given = inputs(mask=mask_of(BATCH, 1))
    mixed = {**given, "timestep": torch.tensor([10.0, 500.0, 990.0])}
    with pytest.raises(diffcr_compile.UnsupportedError, match="inputs it was not analysed with"):
        model(**mixed)
    model(**given)
    with torch.no_grad():
        parts = [model(**{name: value[i : i + 1] for name, value in mixed.items()}) for i in range(BATCH)]
        assert relative_error(model(**mixed), torch.cat(parts)) < TOLERANCE


@pytest.mark.parametrize("config", [DiffCRConfig(), DiffCRConfig(context="all")], ids=["kept", "all"])
def test_saved_and_loaded_it_is_known(config: DiffCRConfig, tmp_path: Path) -> None:
    model, given = build(config=config), inputs(mask=mask_of(BATCH, 1))
    with torch.no_grad():
        expected = model(**given), model(**inputs())
    diffcr_compile.save(model, tmp_path / "routing")
    other = diffcr_compile.restore(copy.deepcopy(model))
    diffcr_compile.load(other, tmp_path / "routing")
    assert num_kinds(other) == [2, 2, 2]
    with torch.no_grad():
        assert same_bits((other(**given), other(**inputs())), expected)
    other(**inputs(control=control_of()))
    diffcr_compile.save(other, tmp_path / "routing")
    again = diffcr_compile.load(diffcr_compile.restore(copy.deepcopy(model)), tmp_path / "routing")
    assert num_kinds(again) == [3, 3, 3]
    with torch.no_grad():
        assert same_bits(again(**given), expected[0])


def test_copied_and_restored() -> None:
    model, given = build(), inputs(mask=mask_of(BATCH, 1))
    expected = model(**given)
    duplicate = copy.deepcopy(model)
    assert num_kinds(duplicate) == [2, 2, 2]
    assert same_bits(duplicate(**given), expected)
    duplicate(**inputs(control=control_of()))
    assert num_kinds(model) == [2, 2, 2]
    plain = Denoiser().eval()
    plain.load_state_dict(model.state_dict())
    assert same_snapshot(snapshot(diffcr_compile.restore(model)), snapshot(plain))
    assert same_bits(model(**given), plain(**given))


def test_threads_that_meet_it_at_once_look_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build(), inputs(mask=mask_of(BATCH, 1))
    looked, found = [], []
    capture = new_calls.capture_calls

    def counted(analysis: Any) -> Any:
        looked.append(analysis)
        return capture(analysis)

    monkeypatch.setattr(new_calls, "capture_calls", counted)
    barrier = threading.Barrier(3)

    def run() -> None:
        barrier.wait()
        with torch.no_grad():
            found.append(model(**given))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(looked) == 1
    assert len(found) == 3
    with torch.no_grad():
        assert all(same_bits(output, model(**given)) for output in found)


@pytest.mark.parametrize("config", [None, DiffCRConfig(skip="reuse")])
def test_the_cost_of_the_new_kind_is_counted(config: DiffCRConfig | None) -> None:
    model = build(config=config)
    given = inputs(mask=mask_of(BATCH, 1))
    assert diffcr_compile.cost(model, given) == diffcr_compile.cost(build(config=config, masked=True), given)
    assert num_kinds(model) == [2, 2, 2]
    with pytest.raises(diffcr_compile.CaptureError, match=r"not analysed for .*order"):
        diffcr_compile.cost(model, inputs(order=True))


@pytest.mark.parametrize(
    "how",
    [
        CalibrationConfig(steps=2, trainable="routers", budget_kind="flops", warm_start=True),
        CalibrationConfig(preset="training-free", budget_kind="flops"),
    ],
)
@pytest.mark.parametrize("config", [DiffCRConfig(), DiffCRConfig(skip="reuse", num_regions=2)])
def test_calibration_takes_batches_of_the_new_kind(how: CalibrationConfig, config: DiffCRConfig) -> None:
    model = build(config=config)
    masks = [None, *[mask_of(BATCH, 1)] * 5]
    batches = [inputs(seed=step, timestep=900.0 - 100 * step, mask=mask) for step, mask in enumerate(masks)]
    diffcr_compile.calibrate(model, batches, budget=0.7, config=how)
    assert num_kinds(model) == [2, 2, 2]
    assert diffcr_compile.cost(model, batches[0]).share <= 0.7


def test_what_was_called_is_not_held() -> None:
    model = build()
    model(**inputs(mask=mask_of(BATCH, 1)))
    assert model.__dict__[STATE].current.call is None
