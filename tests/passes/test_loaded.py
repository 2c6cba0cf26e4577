"""A loaded plan is proved on the block at hand, once, at the first forward that routes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from diffcr_compile.passes import loaded, route
from models import Block, JointBlock, Shape, TinyDiT, original, routed, same_bits, same_snapshot, snapshot, tiny_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import diffcr_compile
from diffcr_compile import ArtefactError, DiffCRConfig

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPES = {kind: Shape(kind, depth=2, heads=2, head_dim=4) for kind in ("plain", "rotary", "joint")}  # type: ignore[arg-type]
PLAIN = SHAPES["plain"]
BLOCK = Block.forward


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the blocks that a proof was made on."""
    seen: list[str] = []

    def prove(module: Any, fqn: str, *rest: Any) -> None:
        seen.append(fqn)
        loaded.prove_loaded(module, fqn, *rest)

    monkeypatch.setattr(route, "prove_loaded", prove)
    return seen


def saved(folder: Path, shape: Shape, ratio: float = 0.5) -> Path:
    model = routed(shape)
    diffcr_compile.set_ratios(model, ratio)
    diffcr_compile.save(model, folder / "routing")
    return folder / "routing"


def by_place(self: Block, x: Tensor, cond: Tensor, rope: Any = None, mask: Any = None) -> Tensor:
    places = torch.linspace(0, 1, x.shape[1])[:, None]
    return BLOCK(self, x + places, cond, rope, mask)


def over_samples(self: Block, x: Tensor, cond: Tensor, rope: Any = None, mask: Any = None) -> Tensor:
    return BLOCK(self, x, cond - cond.mean(0), rope, mask)


def at_one_length(self: Block, x: Tensor, cond: Tensor, rope: Any = None, mask: Any = None) -> Tensor:
    return BLOCK(self, x + torch.ones(11, 1), cond, rope, mask)


@pytest.mark.parametrize("kind", SHAPES)
def test_it_is_proved_once_for_each_family(kind: str, tmp_path: Path, proofs: list[str]) -> None:
    shape, inputs = SHAPES[kind], tiny_inputs(SHAPES[kind])
    model = diffcr_compile.load(original(shape), saved(tmp_path, shape))
    for _ in range(2):
        found = model(**inputs)
    assert proofs == ["blocks.0"]
    expected = routed(shape)
    diffcr_compile.set_ratios(expected, 0.5)
    assert same_bits(found, expected(**inputs))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (by_place, "not interchangeable"),
        (over_samples, "differs by .* from each sample run alone"),
        (at_one_length, "must match the size"),
    ],
)
def test_code_that_has_changed_under_the_same_names_is_refused(
    forward: Callable[..., Tensor], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, inputs = saved(tmp_path, PLAIN), tiny_inputs(PLAIN)
    monkeypatch.setattr(Block, "forward", forward)
    plain = original(PLAIN)
    model = diffcr_compile.load(original(PLAIN), folder)
    for _ in range(2):
        with pytest.raises(
            ArtefactError, match=rf"does not hold for blocks\.0: .*{reason}.*transform and calibrate it"
        ):
            model(**inputs)
    diffcr_compile.set_ratios(model, 0.0)
    assert same_bits(model(**inputs), plain(**inputs))
    assert same_snapshot(snapshot(diffcr_compile.restore(model)), snapshot(plain))


def test_at_ratio_zero_nothing_is_proved(tmp_path: Path, proofs: list[str]) -> None:
    model = diffcr_compile.load(original(PLAIN), saved(tmp_path, PLAIN, 0.0))
    model(**tiny_inputs(PLAIN))
    assert proofs == []
    diffcr_compile.set_ratios(model, 0.3)
    model(**tiny_inputs(PLAIN))
    assert proofs == ["blocks.0"]


def test_what_is_learned_on_a_loaded_plan_is_proved(tmp_path: Path, proofs: list[str]) -> None:
    model = diffcr_compile.load(original(PLAIN), saved(tmp_path, PLAIN, 0.0))
    with diffcr_compile.learning(model):
        model(**tiny_inputs(PLAIN))
    assert proofs == ["blocks.0"]


@pytest.mark.parametrize("scope", ["regional", "full"])
def test_a_lowered_model_is_proved_before_it_is_compiled(scope: Any, tmp_path: Path, proofs: list[str]) -> None:
    inputs = tiny_inputs(PLAIN)
    model = diffcr_compile.load(original(PLAIN), saved(tmp_path, PLAIN))
    expected = model(**inputs).detach()
    proofs.clear()
    other = diffcr_compile.lower(
        diffcr_compile.load(original(PLAIN), tmp_path / "routing"), scope=scope, backend="eager"
    )
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(other(**inputs), expected)
    assert proofs == ["blocks.0"]


def test_a_count_of_flops_sees_the_forward_alone(tmp_path: Path, proofs: list[str]) -> None:
    model = diffcr_compile.load(original(PLAIN), saved(tmp_path, PLAIN))
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(**tiny_inputs(PLAIN))
        counts.append(counter.get_total_flops())
    assert proofs == ["blocks.0"]
    assert counts[0] == counts[1] > 0


def test_fake_tensors_prove_nothing(tmp_path: Path, proofs: list[str]) -> None:
    model = diffcr_compile.load(original(PLAIN).to("meta"), saved(tmp_path, PLAIN))
    model(**{name: value.to("meta") for name, value in tiny_inputs(PLAIN).items()})
    assert proofs == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits_prove_it_too(dtype: torch.dtype, tmp_path: Path, proofs: list[str]) -> None:
    model = diffcr_compile.load(original(PLAIN).to(dtype), saved(tmp_path, PLAIN))
    model(**tiny_inputs(PLAIN, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        other = diffcr_compile.load(original(PLAIN), tmp_path / "routing")
        other(**tiny_inputs(PLAIN))
    assert proofs == ["blocks.0", "blocks.0"]


def test_blocks_that_go_on_with_their_own_forwards_inside_are_taken_for_proved(
    tmp_path: Path, proofs: list[str]
) -> None:
    model = diffcr_compile.load(original(PLAIN), saved(tmp_path, PLAIN))
    for block in model.blocks:  # as hooks of offload and casting do
        block.stream.out.forward = block.stream.out.forward
    assert bool(model(**tiny_inputs(PLAIN)).isfinite().all())
    assert proofs == []


def test_kinds_of_call_that_were_met_later_are_proved_when_they_are_met(tmp_path: Path, proofs: list[str]) -> None:
    masked = tiny_inputs(Shape("joint", depth=2, heads=2, head_dim=4, masked=True))
    model = routed(SHAPES["joint"])
    diffcr_compile.set_ratios(model, 0.5)
    expected = model(**masked)
    diffcr_compile.save(model, tmp_path / "routing")
    other = diffcr_compile.load(original(SHAPES["joint"]), tmp_path / "routing")
    assert same_bits(other(**masked), expected)
    other(**tiny_inputs(SHAPES["joint"]))
    assert proofs == ["blocks.0", "blocks.0"]


def test_with_reuse_it_is_proved_too(tmp_path: Path, proofs: list[str]) -> None:
    config = DiffCRConfig(skip="reuse", context="kept")
    model = diffcr_compile.transform(original(PLAIN), config, example_inputs=tiny_inputs(PLAIN))
    diffcr_compile.set_ratios(model, 0.5)
    diffcr_compile.save(model, tmp_path / "routing")
    other: TinyDiT = diffcr_compile.load(original(PLAIN), tmp_path / "routing")
    for timestep in (900.0, 800.0, 700.0):
        other(**tiny_inputs(PLAIN, timestep=timestep))
    assert proofs == ["blocks.0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("N", sympy.Symbol("N", integer=True, positive=True)),
        ("t0*4+1", 4 * sympy.Symbol("t0", integer=True, positive=True) + 1),
        ("t1//2", sympy.Symbol("t1", integer=True, positive=True) // 2),
        ("16", sympy.Integer(16)),
        ("Max(1,t0)", sympy.Integer(9)),
        ("__import__('os').abort()", sympy.Integer(9)),
        ("9**9**9**9", sympy.Integer(9)),
        ("(", sympy.Integer(9)),
        ("", sympy.Integer(9)),
        ("True", sympy.Integer(9)),
    ],
)
def test_sizes_are_read_and_never_run(text: str, expected: sympy.Expr) -> None:
    assert loaded._read_size(text, 9) == expected


def test_the_block_of_a_joint_stream_has_another_forward_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = JointBlock.forward

    def forward(self: JointBlock, x: Tensor, text: Tensor, cond: Tensor, rope: Any = None, mask: Any = None) -> Any:
        image, other = before(self, x, text, cond, rope, mask)
        return image + image.flip(1).cumsum(1), other

    folder = saved(tmp_path, SHAPES["joint"])
    monkeypatch.setattr(JointBlock, "forward", forward)
    with pytest.raises(ArtefactError, match=r"blocks\.0"):
        diffcr_compile.load(original(SHAPES["joint"]), folder)(**tiny_inputs(SHAPES["joint"]))
