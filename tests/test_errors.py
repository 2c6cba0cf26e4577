"""Bad input: a typed error that says what was expected, what was found, where and what to do; the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import (
    ConvNet,
    MlpMixerless,
    Shape,
    original,
    routed,
    routed_fqns,
    same_bits,
    same_snapshot,
    snapshot,
    tiny_inputs,
)
from torch import nn

import diffcr_compile
from diffcr_compile import CalibrationConfig, DiffCRConfig

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
INPUTS = tiny_inputs(SHAPE)


class Pipeline:
    """What a user has in hands, and no module."""

    def __init__(self) -> None:
        self.transformer = original(SHAPE)


def deferred() -> nn.Module:
    return diffcr_compile.transform(original(SHAPE))


def mlp_inputs() -> dict[str, Any]:
    return {"x": torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))}


def conv_inputs() -> dict[str, Any]:
    return {"x": torch.ones(3, 4, 6, 6), "timestep": torch.tensor([1.0, 2.0, 3.0])}


@dataclass(frozen=True)
class Case:
    """``act`` on ``build()`` raises ``error``, whose message holds every text in ``says``."""

    name: str
    build: Callable[[], nn.Module]
    act: Callable[[nn.Module], Any]
    error: type[Exception]
    says: tuple[str, ...]
    inputs: Callable[[], dict[str, Any]] = lambda: INPUTS


def plain() -> nn.Module:
    return original(SHAPE)


def transformed() -> nn.Module:
    model = routed(SHAPE)
    diffcr_compile.set_ratios(model, 0.3)
    return model


def overridden() -> nn.Module:
    """A block's forward is set on the instance, as offloading hooks do."""
    model = original(SHAPE)
    model.blocks[1].forward = model.blocks[1].forward
    return model


def calibrate(**options: Any) -> Callable[[nn.Module], Any]:
    options = {"batches": [INPUTS], "budget": 0.7, "config": CalibrationConfig(steps=2), **options}
    batches = options.pop("batches")
    return lambda model: diffcr_compile.calibrate(model, batches, **options)


def transform(**options: Any) -> Callable[[nn.Module], Any]:
    options = {"example_inputs": INPUTS, **options}
    return lambda model: diffcr_compile.transform(model, options.pop("config", None), **options)


def not_finite(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).sum() * float("nan")


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in INPUTS.items() if name != key}


CASES = (
    Case(
        "no attention",
        MlpMixerless,
        transform(example_inputs=mlp_inputs()),
        diffcr_compile.BlockNotFoundError,
        (
            "MlpMixerless",
            "expected at least one module with attention",
            "Candidates",
            "no module takes and returns tokens",
        ),
        mlp_inputs,
    ),
    Case(
        "no attention, deferred",
        lambda: MlpMixerless(),
        lambda model: diffcr_compile.transform(model)(**mlp_inputs()),
        diffcr_compile.BlockNotFoundError,
        ("MlpMixerless", "expected at least one module with attention"),
        mlp_inputs,
    ),
    Case(
        "a CNN",
        ConvNet,
        transform(example_inputs=conv_inputs()),
        diffcr_compile.BlockNotFoundError,
        ("nothing in ConvNet can be routed", "expected at least one module with attention"),
        conv_inputs,
    ),
    Case(
        "everything filtered out",
        plain,
        transform(filter_fn=lambda module, fqn: False),
        diffcr_compile.BlockNotFoundError,
        ("TinyDiT", "blocks.0 and 1 more (Block): left out by filter_fn", "Change filter_fn"),
    ),
    Case(
        "nothing worth it",
        plain,
        transform(config=DiffCRConfig(min_flops_share=1.0)),
        diffcr_compile.BlockNotFoundError,
        ("blocks.0 and 1 more (Block)", "below min_flops_share = 100.00%"),
    ),
    Case(
        "transformed twice",
        transformed,
        transform(),
        diffcr_compile.AlreadyTransformedError,
        ("TinyDiT is already transformed", "restore(model)"),
    ),
    Case(
        "restore on a plain model",
        plain,
        diffcr_compile.restore,
        diffcr_compile.NotTransformedError,
        ("TinyDiT", "not transformed"),
    ),
    *(
        Case(
            f"{act.__name__} on a plain model",  # type: ignore[attr-defined]
            plain,
            act,
            diffcr_compile.NotTransformedError,
            ("TinyDiT is not transformed", "diffcr_compile.transform(model)"),
        )
        for act in (
            diffcr_compile.ratios,
            diffcr_compile.cost,
            diffcr_compile.explain,
            diffcr_compile.lower,
        )
    ),
    *(
        Case(
            f"{act.__name__} before the search",  # type: ignore[attr-defined]
            deferred,
            act,
            diffcr_compile.CaptureError,
            ("TinyDiT", "have not been looked for yet", "example_inputs"),
        )
        for act in (diffcr_compile.ratios, diffcr_compile.cost, diffcr_compile.explain, diffcr_compile.lower)
    ),
    Case(
        "set_ratios on a plain model",
        plain,
        lambda model: diffcr_compile.set_ratios(model, 0.5),
        diffcr_compile.NotTransformedError,
        ("TinyDiT is not transformed", "transform(model)"),
    ),
    Case(
        "calibrate on a plain model",
        plain,
        calibrate(),
        diffcr_compile.NotTransformedError,
        ("TinyDiT", "transform(model)"),
    ),
    Case(
        "calibrate with a bad first batch on a plain model",
        plain,
        calibrate(batches=[without("x")]),
        diffcr_compile.NotTransformedError,
        ("TinyDiT", "transform(model)"),
    ),
    *(
        Case(
            f"ratio {ratio}",
            transformed,
            lambda model, ratio=ratio: diffcr_compile.set_ratios(model, ratio),  # type: ignore[misc]
            ValueError,
            ("ratios must lie in [0, 1]", f"found {ratio:g}"),
        )
        for ratio in (1.2, -0.1, float("nan"), float("inf"))
    ),
    *(
        Case(
            f"ratios {found!r}",
            transformed,
            lambda model, found=found: diffcr_compile.set_ratios(model, found),  # type: ignore[misc]
            TypeError,
            says,
        )
        for found, says in (
            ("abc", ("expected one ratio, or a table of ratios (timestep regions, blocks)", "found 'abc'")),
            (None, ("expected one ratio", "found None")),
            ({"blocks.0": 0.5}, ("expected one ratio", "found {'blocks.0': 0.5}")),
            ([[0.1], [0.1, 0.2]], ("a list of rows of equal length", "found [[0.1], [0.1, 0.2]]")),
            (True, ("expected ratios as real numbers, found bool", "True")),
            (torch.ones(4, 2, dtype=torch.bool), ("expected ratios as real numbers, found bool",)),
            (torch.tensor(0.5 + 0j), ("expected ratios as real numbers, found complex64",)),
        )
    ),
    Case(
        "a table with a value that is no number",
        transformed,
        lambda model: diffcr_compile.set_ratios(model, [[0.1, float("nan")]] * 4),
        ValueError,
        ("ratios must lie in [0, 1]", "found nan for blocks.1 in timestep region 0"),
    ),
    Case(
        "a table of another shape",
        transformed,
        lambda model: diffcr_compile.set_ratios(model, torch.zeros(2, 2)),
        ValueError,
        ("(4, 2)", "timestep regions, blocks", "found shape (2, 2)"),
    ),
    *(
        Case(
            f"budget {budget!r}",
            transformed,
            calibrate(budget=budget),
            ValueError,
            ("budget", "(0, 1]", f"found {budget!r}"),
        )
        for budget in (0, -0.5, 1.01, float("nan"), True, "half")
    ),
    Case(
        "budget 2 in budget_loss",
        transformed,
        lambda model: diffcr_compile.budget_loss(model, 2),
        ValueError,
        ("budget", "(0, 1]", "found 2"),
    ),
    Case(
        "a budget below the dense remainder",
        transformed,
        calibrate(budget=0.01),
        diffcr_compile.BudgetError,
        ("budget 0.01 can't be reached", "Ask for at least 0.", "min_flops_share"),
    ),
    Case(
        "an input missing",
        plain,
        transform(example_inputs=without("timestep")),
        diffcr_compile.CaptureError,
        ("TinyDiT could not be run", "x torch.float32 (3, 11, 5)", "timestep", "Pass example_inputs"),
    ),
    Case(
        "an input of another shape",
        plain,
        transform(example_inputs={**INPUTS, "x": torch.zeros(3, 11, 9)}),
        diffcr_compile.CaptureError,
        ("TinyDiT could not be run", "x torch.float32 (3, 11, 9)", "It raised", "Pass example_inputs"),
    ),
    Case(
        "example_inputs no dict",
        plain,
        transform(example_inputs=torch.zeros(3)),
        TypeError,
        ("example_inputs must be a dict of keyword arguments of TinyDiT.forward", "found Tensor"),
    ),
    *(
        Case(
            f"inputs of cost no dict, {build.__name__}",
            build,
            lambda model: diffcr_compile.cost(model, (INPUTS["x"], INPUTS["timestep"])),  # type: ignore[arg-type]
            TypeError,
            ("example_inputs must be a dict of keyword arguments of TinyDiT.forward, or (args, kwargs)", "found tuple"),
        )
        for build in (transformed, deferred)
    ),
    Case(
        "filter_fn no function",
        plain,
        transform(filter_fn="blocks"),
        TypeError,
        ("filter_fn must be a function (module, fqn) -> bool", "found str"),
    ),
    Case(
        "config no config",
        plain,
        transform(config={"num_regions": 2}),
        TypeError,
        ("must be a DiffCRConfig", "found dict"),
    ),
    Case(
        "timestep_argument not among the inputs",
        plain,
        transform(config=DiffCRConfig(timestep_argument="sigma")),
        diffcr_compile.CaptureError,
        ("timestep_argument names 'sigma'", "x, timestep"),
    ),
    Case(
        "a forward set on the instance",
        overridden,
        transform(),
        diffcr_compile.UnsupportedError,
        (
            "blocks.1 already has a forward set on the instance",
            "hooks set it: call transform first",
            "If it is your own: make it that of the module's class",
        ),
    ),
    Case(
        "no batches",
        transformed,
        calibrate(batches=[]),
        diffcr_compile.CalibrationError,
        ("no batches", "expected keyword dictionaries"),
    ),
    Case(
        "batches no dictionaries",
        transformed,
        calibrate(batches=[INPUTS["x"]]),
        TypeError,
        ("keyword dictionaries", "found Tensor"),
    ),
    Case(
        "batches the model refuses",
        transformed,
        calibrate(batches=[without("timestep")]),
        diffcr_compile.CaptureError,
        ("TinyDiT could not be run", "timestep"),
    ),
    Case(
        "a loss that is not finite",
        transformed,
        calibrate(loss=not_finite, config=CalibrationConfig(steps=2, trainable="routers")),
        diffcr_compile.CalibrationError,
        ("loss is nan", "step 0", "Expected finite values", "lower the learning rates"),
    ),
    Case(
        "a loss without a gradient",
        transformed,
        calibrate(loss=lambda model, batch: model(**batch).sum().detach(), config=CalibrationConfig(steps=2)),
        diffcr_compile.CalibrationError,
        ("loss of step 0 has no gradient", "from the model's outputs", "look for detach", "weights are as before"),
    ),
    Case(
        "a timestep outside the range",
        lambda: _with_varying_rows(),
        lambda model: model(**{**INPUTS, "timestep": torch.tensor([10.0, 1400.0, 2.0])}),
        ValueError,
        ("'timestep' is 1400", "outside 0..1000", "timestep_range=(low, high)"),
    ),
    Case(
        "no timestep",
        lambda: _with_varying_rows(),
        lambda model: model(INPUTS["x"], None),
        diffcr_compile.UnsupportedError,
        ("timestep input 'timestep'", "found NoneType", "table with equal rows"),
    ),
    Case(
        "an input that was not analysed, in an export",
        transformed,
        lambda model: torch.export.export(model, (), {**INPUTS, "mask": torch.ones(3, 11, 11, dtype=torch.bool)}),
        diffcr_compile.UnsupportedError,
        (
            "blocks.0 is called in a way it was not analysed for",
            "new or of another kind: mask",
            "eagerly",
            "example_inputs",
        ),
    ),
    *(
        Case(
            f"regional with CUDA graphs by {name}",
            transformed,
            lambda model, name=name, value=value: diffcr_compile.lower(model, scope="regional", **{name: value}),  # type: ignore[misc]
            diffcr_compile.LoweringError,
            (f"{name}={value!r} records CUDA graphs", "152887", "scope='full'"),
        )
        for name, value in (
            ("mode", "reduce-overhead"),
            ("backend", "cudagraphs"),
            ("options", {"triton.cudagraphs": True}),
        )
    ),
    *(
        Case(
            f"{what} in lower",
            transformed,
            lambda model, options=options: diffcr_compile.lower(model, **options),  # type: ignore[misc]
            diffcr_compile.LoweringError,
            ("torch.compile does not take these options", *says),
        )
        for what, options, says in (
            ("an unknown backend", {"backend": "nope"}, ("Invalid backend: 'nope'",)),
            ("an unknown option", {"options": {"foo": 1}}, ("Unexpected optimization option foo",)),
            (
                "mode beside options",
                {"mode": "max-autotune-no-cudagraphs", "options": {"epilogue_fusion": True}},
                ("Either mode or options can be specified",),
            ),
        )
    ),
    *(
        Case(
            f"{what} in lower",
            transformed,
            lambda model, options=options: diffcr_compile.lower(model, **options),  # type: ignore[misc]
            diffcr_compile.LoweringError,
            says,
        )
        for what, options, says in (
            ("fullgraph", {"fullgraph": False}, ("whole graphs of static shapes", "leave fullgraph out")),
            ("what would compile nothing", {"disable": True, "foo": 1}, ("leave disable, foo out",)),
            ("a backend that is none", {"backend": 3}, ("backend must be a name", "or a function", "found 3")),
            ("options that are none", {"backend": "eager", "options": 3}, ("options must be a dictionary", "found 3")),
            ("empty options that are none", {"options": []}, ("options must be a dictionary", "found []")),
        )
    ),
    Case(
        "an unknown scope",
        transformed,
        lambda model: diffcr_compile.lower(model, scope="blocks"),  # type: ignore[arg-type]
        ValueError,
        ("scope must be one of 'auto', 'full', 'regional'", "found 'blocks'"),
    ),
    Case(
        "an unknown mode",
        transformed,
        lambda model: diffcr_compile.lower(model, mode="fast"),  # type: ignore[arg-type]
        ValueError,
        ("mode must be one of", "'max-autotune'", "found 'fast'"),
    ),
)


def _with_varying_rows() -> nn.Module:
    model = routed(SHAPE)
    diffcr_compile.set_ratios(model, [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]])
    return model


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_refused_and_the_model_left_alone(case: Case) -> None:
    model = case.build()
    untouched = copy.deepcopy(model)
    rng = torch.get_rng_state()
    with pytest.raises(case.error) as raised:
        case.act(model)
    assert [text for text in case.says if text not in str(raised.value)] == []
    assert torch.equal(torch.get_rng_state(), rng)
    assert same_snapshot(snapshot(model), snapshot(untouched))
    assert _routers(model) == _routers(untouched)
    with torch.no_grad():
        assert same_bits(model(**case.inputs()), untouched(**case.inputs()))


def _routers(model: nn.Module) -> list[list[float]]:
    return [model.get_submodule(fqn).diffcr_router.weight.tolist() for fqn in routed_fqns(model)]


@pytest.mark.parametrize(
    "error",
    [
        diffcr_compile.CaptureError,
        diffcr_compile.BlockNotFoundError,
        diffcr_compile.UnsupportedError,
        diffcr_compile.AlreadyTransformedError,
        diffcr_compile.NotTransformedError,
        diffcr_compile.BudgetError,
        diffcr_compile.CalibrationError,
        diffcr_compile.ArtefactError,
        diffcr_compile.LoweringError,
    ],
)
def test_every_error_has_one_parent(error: type[Exception]) -> None:
    assert issubclass(error, diffcr_compile.DiffCRError)
    assert issubclass(error, RuntimeError)


def test_no_module_names_the_denoiser_to_pass() -> None:
    with pytest.raises(
        TypeError, match=r"expected a torch.nn.Module, found Pipeline. Pass its denoiser: .transformer."
    ):
        diffcr_compile.transform(Pipeline())  # type: ignore[arg-type]


def test_a_deferred_model_refuses_to_be_compiled() -> None:
    model = deferred()
    with pytest.raises(Exception, match="Pass example_inputs to transform, or run the model once before"):
        torch.compile(model, backend="eager", fullgraph=True)(**INPUTS)


def test_an_unreachable_budget_names_what_is_reachable() -> None:
    model = transformed()
    with pytest.raises(diffcr_compile.BudgetError) as raised:
        calibrate(budget=0.01)(model)
    minimum = float(str(raised.value).partition("Ask for at least ")[2].partition(",")[0])
    diffcr_compile.set_ratios(model, 1.0)
    # the message rounds to four places
    assert diffcr_compile.cost(model).share == pytest.approx(
        minimum, abs=1e-4
    )  # rounded up, so that it can be asked for


def test_refusals_say_where_and_why() -> None:
    """Every candidate is listed with its reason when nothing can be routed."""
    with pytest.raises(diffcr_compile.BlockNotFoundError) as raised:
        diffcr_compile.transform(_Causal(), example_inputs=tiny_inputs(Shape("plain", heads=1, head_dim=6)))
    assert "blocks.0 and 1 more (CausalBlock): its tokens are not interchangeable" in str(raised.value)


class CausalBlock(nn.Module):
    """Order matters: tokens see only those before them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class _Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(CausalBlock() for _ in range(2))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + timestep[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x
