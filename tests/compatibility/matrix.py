"""What the cells of the compatibility matrix share: five tiny denoisers, plain and routed, and what each cell must show.

A cell is one test at one model. ``row`` gives a test its place in the table; ``examples/benchmarks/compatibility.py`` collects
the outcomes. Models are copies of one that was built, and of one that was transformed, once for each process.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import reference_flops, relative_error, routed_fqns, tensors_of
from torch import Tensor, nn
from zoo import ZOO
from zoo_base import image_ids

import diffcr_compile

BATCH = 3

ORDER = "transform first"
"""What a refusal of the wrong order must say."""

ROUNDING = 1e-5
"""Of the largest value, float32: where products have another batch size or order of sums."""


@dataclass(frozen=True)
class Tiny:
    """A denoiser of the zoo, shallower. tokens: at its example inputs; first: where the names of its first family begin;
    family: number of blocks in it; targets: linear modules that an adapter takes, a name's end; sizes: other heights and
    widths of its latents (of FLUX: of its tokens)."""

    zoo: str
    smaller: dict[str, Any]
    tokens: int
    first: str
    family: int
    targets: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]


LARGE = ("sd3", "flux", "wan")
"""Models whose compilation, export or transform takes seconds."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TINY = {
    "dit": Tiny("DiTTransformer2DModel", {}, 25, "transformer_blocks.", 3, _ATTENTION, ((12, 12), (14, 14), (16, 16))),
    "pixart": Tiny(
        "PixArtTransformer2DModel", {}, 24, "transformer_blocks.", 3, _ATTENTION, ((12, 16), (12, 20), (16, 20))
    ),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        {"num_layers": 3, "dual_attention_layers": ()},
        24,
        "transformer_blocks.",
        2,
        (*_ATTENTION, "add_q_proj", "add_k_proj"),
        ((12, 16), (12, 14), (10, 16)),
    ),
    "flux": Tiny(
        "FluxTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2},
        24,
        "transformer_blocks.",
        2,
        (*_ATTENTION, "proj_mlp"),
        ((6, 8), (6, 12), (8, 10)),
    ),
    "wan": Tiny(
        "WanTransformer3DModel", {}, 24, "blocks.", 3, (*_ATTENTION, "ffn.net.2"), ((10, 14), (14, 10), (14, 16))
    ),
}


SKIPPED = 1e-3
"""Of the largest value: dense outputs are farther than that from those of a model that skips half of its tokens."""


@dataclass(frozen=True)
class Place:
    """Where a test stands in the table."""

    row: int
    title: str


CELLS: list[tuple[Place, str]] = []
"""Every place and model of the tests that were imported."""


def row(
    number: int,
    title: str,
    *,
    models: Sequence[str] = tuple(TINY),
    without: dict[str, str] | None = None,
    fails: dict[str, str] | None = None,
    slow: Sequence[str] = (),
    variant: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with ``name`` for every model, as the cells of one line of the table.

    models: the columns. without: models to which the line does not apply, with the reason. fails: models at which it is known
    not to hold, with the reason (strictly: a cell that begins to work must be taken out). slow: models at which it takes long (a
    compilation, or a transform of its own): one of them, another from line to line, runs in CI, and the rest every night. variant:
    a line much like another, whose slow columns run every night only.
    """
    without, fails = without or {}, fails or {}
    slow = [name for name in slow if name in models and name not in without]
    daily = slow[zlib.crc32(title.encode()) % len(slow)] if slow and not variant else None

    def place(test: Callable[..., None]) -> Callable[..., None]:
        cells = []
        for name in models:
            marks: list[Any] = []
            if name in without:
                marks.append(pytest.mark.skip(reason=f"not applicable: {without[name]}"))
            if name in fails:
                marks.append(pytest.mark.xfail(strict=True, reason=fails[name]))
            if name in slow:
                marks.append(pytest.mark.slow if name == daily else pytest.mark.nightly)
            cells.append(pytest.param(name, marks=marks))
        test.matrix = Place(number, title)  # type: ignore[attr-defined]
        CELLS.extend((Place(number, title), name) for name in models)
        return pytest.mark.parametrize("name", cells)(test)

    return place


def refused(record: Callable[[str, object], None], call: Callable[..., Any], *args: Any) -> str:
    """The message of the typed error that ``call`` must raise; the cell then says "refused"."""
    with pytest.raises(diffcr_compile.DiffCRError) as caught:
        call(*args)
    record("refused", type(caught.value).__name__)
    return str(caught.value)


@functools.cache
def _plain(name: str) -> nn.Module:
    build = ZOO[TINY[name].zoo].build
    assert isinstance(build, functools.partial)
    kind, arguments = build.args
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build.func(kind, {**arguments, **TINY[name].smaller})


@functools.cache
def _routed(name: str) -> nn.Module:
    return diffcr_compile.transform(plain(name), example_inputs=inputs(name))


def plain(name: str) -> nn.Module:
    """The dense model, a new copy at each call."""
    return copy.deepcopy(_plain(name))


def routed(name: str, ratio: float = 0.5, *, first: bool = False) -> nn.Module:
    """The model transformed, a new copy at each call. first: only the blocks of its first family skip."""
    model = copy.deepcopy(_routed(name))
    table = torch.full_like(diffcr_compile.ratios(model), ratio)
    if first:
        table[:, TINY[name].family :] = 0
    diffcr_compile.set_ratios(model, table)
    return model


@functools.cache
def _reusing(name: str) -> nn.Module:
    config = diffcr_compile.DiffCRConfig(skip="reuse")
    return diffcr_compile.transform(plain(name), config, example_inputs=inputs(name))


def reusing(name: str) -> nn.Module:
    """The model with reuse and full context, half of the tokens skipped from the second step on: a new copy at each call."""
    model = copy.deepcopy(_reusing(name))
    diffcr_compile.set_ratios(model, 0.5)
    return model


STEPS = (0.9, 0.7, 0.5, 0.3)
"""Of a trajectory, as shares of the range of training."""


def follow(model: nn.Module, name: str, dtype: torch.dtype | None = None, device: str = "cpu") -> list[Tensor]:
    """The model's outputs along a trajectory, whose latents are the example inputs' at every step."""
    outputs = []
    for share in STEPS:
        given = at_timestep(name, inputs(name), share)
        given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
        if dtype is not None:
            given = {key: _cast(value, dtype) if key != "timestep" else value for key, value in given.items()}
        outputs.append(run(model, given))
    return outputs


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def transform_first(model: nn.Module, name: str, ratio: float = 0.5) -> nn.Module:
    """Transform a model that was changed before, its first family of blocks only (each family costs an export)."""
    tiny = TINY[name]
    allowed = {f"{tiny.first}{index}" for index in range(tiny.family)}
    model = diffcr_compile.transform(model, example_inputs=inputs(name), filter_fn=lambda _, fqn: fqn in allowed)
    diffcr_compile.set_ratios(model, ratio)
    return model


def table(model: nn.Module) -> Tensor:
    """A table for ``model`` in which regions and layers differ: ratios 0, 0.25, 0.5 and 0.75 in turn."""
    rows, columns = diffcr_compile.ratios(model).shape
    places = torch.arange(rows)[:, None] + torch.arange(columns)[None]
    return (places % 4) / 4


def inputs(name: str, batch: int = BATCH, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Keyword arguments of the model's forward; samples and their timesteps differ. size: another height and width of the
    latents (of the token grid for FLUX)."""
    given = ZOO[TINY[name].zoo].inputs(batch)
    if size is None:
        return given
    latents, generator = given["hidden_states"], torch.Generator().manual_seed(sum(size))
    if name == "flux":
        shape = (batch, size[0] * size[1], latents.shape[2])
        given["img_ids"] = image_ids(*size)
    else:
        shape = (*latents.shape[:-2], *size)
    given["hidden_states"] = torch.randn(shape, generator=generator)
    return given


def at_timestep(name: str, given: dict[str, Any], share: float) -> dict[str, Any]:
    """``given`` with all samples at one timestep, as a share of the range of training."""
    step = given["timestep"]
    value = share if name == "flux" else share * 1000
    return {**given, "timestep": torch.full_like(step, value)}


def one_sample(given: dict[str, Any], sample: int) -> dict[str, Any]:
    """The call for one sample of the batch; what has no batch axis stays."""
    batch = len(given["hidden_states"])
    return {
        key: value[sample : sample + 1] if isinstance(value, Tensor) and len(value) == batch else value
        for key, value in given.items()
    }


def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The model's one output, without gradients."""
    with torch.no_grad():
        (output,) = tensors_of(model(**given))
    return output


def kept(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """The tokens that every block keeps in one forward, (B, K)."""
    with diffcr_compile.trace(model) as seen:
        run(model, given)
    assert all(len(calls) == 1 for calls in seen.kept.values())
    return {fqn: calls[0] for fqn, calls in seen.kept.items()}


def assert_keeps(name: str, model: nn.Module, *, first: bool = False) -> None:
    """At the ratio 0.5 and the example inputs: the routed blocks (first: of the first family) keep half of the tokens, each sample
    its own."""
    chosen = kept(model, inputs(name))
    halves = [indices for indices in chosen.values() if indices.shape[1] < TINY[name].tokens]
    assert len(halves) == (TINY[name].family if first else len(routed_fqns(_routed(name))))
    for indices in halves:
        assert indices.shape[1] == TINY[name].tokens - TINY[name].tokens // 2
        assert len({tuple(sample) for sample in indices.tolist()}) > 1


def assert_routes(name: str, model: nn.Module, *, first: bool = False, cost: diffcr_compile.Cost | None = None) -> None:
    """``assert_keeps``, and torch's counter finds the FLOPs that ``cost`` promised before anything was done to the model."""
    assert_keeps(name, model, first=first)
    cost = cost or _cost(name, first)
    assert reference_flops(lambda: model(**inputs(name))) == cost.routed_flops[0] < cost.dense_flops


@functools.cache
def _cost(name: str, first: bool) -> diffcr_compile.Cost:
    return diffcr_compile.cost(routed(name, first=first))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    assert relative_error(found, expected) < tolerance


def assert_skips(name: str, found: Tensor, given: dict[str, Any]) -> None:
    """An output that a compiled model gave for ``given`` is no dense one: no operator of it can be counted."""
    assert relative_error(found, run(_plain(name), given)) > SKIPPED


def assert_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
