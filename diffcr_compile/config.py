"""Options, as frozen dataclasses that validate once and survive JSON.

Each carries a ``type`` and a ``version`` in its dictionary form, so that a file written by another version is refused
with a reason instead of being half understood.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, Self, TypeGuard, TypeVar, get_args

Gate = Literal["exact", "sigmoid"]
Skip = Literal["identity", "reuse"]
Context = Literal["kept", "all", "stale"]
Selection = Literal["score", "turn", "score and turn"]
MemoryDtype = Literal["float32", "bfloat16", "float16"]
RouterInput = Literal["token", "timestep"]
Guidance = Literal["separate", "shared"]
Estimator = Literal["two-bin", "single-pass"]
BudgetKind = Literal["flops", "tokens", "latency"]
Trainable = Literal["all", "lora", "routers"]
Preset = Literal["default", "paper", "training-free"]
Scope = Literal["auto", "full", "regional"]

Value = TypeVar("Value")


class OrNone(Protocol[Value]):
    """For type checkers: a field that may be given as ``None`` and then holds what the other options make of it, so that who reads
    it finds a value. Nothing at run time, where ``__post_init__`` puts that value in."""

    def __get__(self, options: object, owner: type) -> Value: ...
    def __set__(self, options: object, value: Value | None) -> None: ...


_RESOLVED: Any = None
"""Default of such a field."""


class _Options:
    """Dictionary form of an options dataclass: its fields, plus ``type`` and ``version``."""

    version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary with the keys ``type`` and ``version`` beside the fields."""
        return {"type": type(self).__name__, "version": self.version, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`. Raises ``ValueError`` for another type, an unknown version or unknown keys."""
        if not isinstance(data, dict):
            raise ValueError(f"expected the options of a {cls.__name__} as a dictionary, found {type(data).__name__}")
        data = dict(data)
        kind, version = data.pop("type", None), data.pop("version", None)
        if kind != cls.__name__:
            raise ValueError(f"expected options of type {cls.__name__!r}, found {kind!r}")
        if type(version) is not int or not 1 <= version <= cls.version:
            raise ValueError(f"{cls.__name__} version {version!r} is not known here (newest known: {cls.version})")
        unknown = sorted(set(data) - {field.name for field in fields(cls)})  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"{cls.__name__} has no option named {', '.join(map(repr, unknown))}")
        return cls(**data)


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError for a value that is none of the choices, texts or integers."""
    if not isinstance(value, str | int) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_share(name: str, value: object) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], found {value!r}")


def _check_number(name: str, value: object, *, positive: bool = False, finite: bool = True) -> None:
    if not finite and isinstance(value, float) and value == math.inf:
        return
    if not _is_number(value):
        raise ValueError(f"{name} must be a finite number, found {value!r}")
    if value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must {'be positive' if positive else 'not be negative'}, found {value!r}")


def _check_count(name: str, value: object, least: int = 1, most: int = sys.maxsize) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        too_large = isinstance(value, int) and value > most
        bound = f"from {least} to {most}" if most < sys.maxsize or too_large else f">= {least}"
        raise ValueError(f"{name} must be an integer {bound}, found {value!r}")


def _ordered_pair(name: str, value: Any) -> tuple[float, float]:
    """``value`` as a tuple (lowest, highest), whatever sequence it came as."""
    pair = value if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or not all(map(_is_number, pair)) or not pair[0] < pair[1]:
        raise ValueError(f"{name} must be (lowest, highest), two finite numbers, found {value!r}")
    return float(pair[0]), float(pair[1])


@dataclass(frozen=True, kw_only=True)
class DiffCRConfig(_Options):
    """How blocks are found and routed.

    num_regions: timestep regions of equal width, >= 1. None: 4 (the paper's section 4, for 20 sampling steps); with reuse 50, so
        that single steps of a sampler can be dense and others skipped whole.
    skip: what a skipped token leaves a block with; ``"identity"``: what it came in with (the paper); ``"reuse"``: that plus the
        block's update of it, extrapolated from the last ones (one tensor per routed block, and one more per ``extrapolation``).
    context: which tokens give keys and values; ``"kept"``: the kept ones (the paper); ``"all"``: every token, so that a kept
        token comes out as from the dense block; ``"stale"``: every token, the skipped ones with what they gave when last kept,
        which costs no FLOPs but the memory of a block's keys and values (two or so tensors of the tokens' size), and needs
        ``skip="reuse"``. The last two wherever the block's graph allows it (``explain`` says where not). None: all with reuse,
        else kept.
    selection: which tokens are kept; ``"score"``: those with the highest router scores (the paper); ``"turn"``: those refreshed
        longest ago, interleaved over the picture, without a router; ``"score and turn"``: score plus a point for every step of
        age. The last two need ``skip="reuse"``; every token is then refreshed within a bounded number of steps. None: turn with
        reuse, else score.
    extrapolation: with reuse, the degree in the timestep of the polynomial through a token's last updates: 0, 1 or 2. A
        calibration without training measures how far to follow it.
    memory_dtype: with reuse, of what is remembered: ``"float32"``, ``"bfloat16"`` or ``"float16"``; None: the tokens' own.
    router: what a router sees; ``"token"`` (the paper): one vector a block scores tokens at every timestep; ``"timestep"``: one
        vector for each timestep region, so that which tokens matter may change on the way from noise to picture. Needs a timestep
        input; samples of one batch in different regions then run region by region, with any table.
    guidance: which tokens the two halves of a batch keep where guidance runs in one call, unconditional samples beside
        conditional ones; ``"separate"``: each sample its own; ``"shared"``: samples i and i + B / 2 the same, those with the
        highest mean of both scores, so that guidance subtracts like from like. Samples then depend on each other, on purpose. Every
        routed call must be such a batch: an odd one is refused. Guidance in two calls is not noticed, and an even batch there would
        pair pictures that have nothing to do with each other: leave it separate.
    gate: how the router's score enters a kept token. ``"exact"``: value one, gradient of log-sigmoid. ``"sigmoid"``: the
        paper's, which multiplies the update and so changes a routed block's values from the start.
    min_flops_share: families of blocks with a smaller share of the model's FLOPs stay dense, in [0, 1].
    timestep_argument: name of the model's timestep input; None: found by dataflow.
    timestep_range: (lowest, highest) timestep value of the training process; None: from the constant the model
        multiplies the timestep by before its sinusoidal embedding.

    Raises ValueError, naming the option, for a value outside its range, and for options that don't go together.
    """

    num_regions: OrNone[int] = _RESOLVED
    skip: Skip = "identity"
    context: OrNone[Context] = _RESOLVED
    selection: OrNone[Selection] = _RESOLVED
    router: RouterInput = "token"
    guidance: Guidance = "separate"
    extrapolation: int = 1
    memory_dtype: MemoryDtype | None = None
    gate: Gate = "exact"
    min_flops_share: float = 0.02
    timestep_argument: str | None = None
    timestep_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_choice("skip", self.skip, get_args(Skip))
        reuses = self.skip == "reuse"
        if self.num_regions is None:
            object.__setattr__(self, "num_regions", 50 if reuses else 4)
        _check_count("num_regions", self.num_regions)
        for name, value in (("context", "all" if reuses else "kept"), ("selection", "turn" if reuses else "score")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_choice("context", self.context, get_args(Context))
        if self.context == "stale" and not reuses:
            raise ValueError("context='stale' remembers the skipped tokens' keys and values: it needs skip='reuse'")
        check_choice("selection", self.selection, get_args(Selection))
        _check_count("extrapolation", self.extrapolation, least=0)
        check_choice("extrapolation", self.extrapolation, (0, 1, 2))
        if self.memory_dtype is not None:
            check_choice("memory_dtype", self.memory_dtype, get_args(MemoryDtype))
        if self.selection != "score" and not reuses:
            raise ValueError(
                f"selection={self.selection!r} counts the steps since a token's last update: it needs skip='reuse'"
            )
        check_choice("router", self.router, get_args(RouterInput))
        check_choice("guidance", self.guidance, get_args(Guidance))
        if self.selection == "turn" and (self.router, self.guidance) != ("token", "separate"):
            raise ValueError(
                "selection='turn' asks no router, and all samples keep the same tokens: expected router='token' and "
                f"guidance='separate', found {self.router!r} and {self.guidance!r}"
            )
        check_choice("gate", self.gate, get_args(Gate))
        _check_share("min_flops_share", self.min_flops_share)
        if not isinstance(self.timestep_argument, str | None):
            raise ValueError(f"timestep_argument must be an input's name or None, found {self.timestep_argument!r}")
        if self.timestep_range is not None:
            object.__setattr__(self, "timestep_range", _ordered_pair("timestep_range", self.timestep_range))


_PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "steps": 300,
        "warm_start": True,
        "ramp": 0.6,
        "settle": 0.25,
        "budget_kind": "flops",
        "estimator": "single-pass",
        "shrink": True,
    },
    "paper": {
        "steps": 100_000,
        "warm_start": False,
        "ramp": 0.6,
        "settle": 0.0,
        "budget_kind": "tokens",
        "estimator": "two-bin",
        "shrink": False,
    },
    "training-free": {
        "steps": 60,
        "warm_start": True,
        "ramp": 0.6,
        "settle": 0.0,
        "budget_kind": "flops",
        "estimator": "single-pass",
        "shrink": True,
    },
}

LARGEST_SEED = 2**32 - 1
"""Of a calibration: generators are seeded by multiples of it."""

_MEASURES = {"preset", "budget_kind", "warm_start", "tolerance", "seed", "steps"}
"""Options that mean something where nothing is learned."""


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(_Options):
    """How routers and ratios are learned. What is not given has the preset's value.

    preset: ``"default"``; ``"paper"``: the paper's steps, estimator and budget of tokens, each region with its own gradient,
        without a warm start of the routers or a stage of settling. To follow it all the way give ``calibrate`` the diffusion loss
        as ``loss``, and ``transform`` ``gate="sigmoid"``: else a warning says that they are missing. What stays different: the
        budget is met by projection instead of a weighted term of the loss, ratios move by normalised gradients instead of AdamW,
        and end in bins. ``"training-free"``: no learning; how much each block suffers from skipping in each region is measured on
        dense forwards, and the table that suffers least within the budget is taken. What concerns learning can't be given then.
    trainable: ``"all"``: routers, ratios and the model's weights jointly (the paper), as far as they require gradients (with peft
        adapters of one's own: those); ``"lora"``: low-rank adapters on the linear layers of the routed blocks in place of the
        weights, merged into them at the end (the paper's text-to-image models; needs peft); ``"routers"``: weights frozen. What
        learns in less than float32 does so on a float32 copy.
    lora_rank: of the adapters, >= 1 (the paper: 32).
    estimator: of the ratios' gradients (``diffcr_compile.learning``); ``"two-bin"`` (the paper, and its preset) runs each block
        twice, ``"single-pass"`` (the default) once: a step takes a half to two thirds of the time
        (examples/benchmarks/training_step.md).
    budget_kind: what the budget is a share of: dense ``"flops"``; ``"tokens"`` (the paper): the mean over blocks of the tokens
        kept; ``"latency"``: the dense model's time on the device at hand, measured block by block before learning, compiled
        where the model is lowered.
    steps: optimiser steps, >= 1 (default 300). Training-free: how often at most steps are swapped in search of a better table, each
        time at the price of one sampling, >= 0 (default 60; with reuse, and where the sampler can be told from the batches).
    accumulation: batches whose gradients make one step, >= 1.
    checkpoint_every: steps between two checkpoints, >= 1, where ``calibrate`` is given a place for them.
    learning_rate: of the model's weights (the paper: 1e-4, AdamW), > 0, at the start; it falls linearly to zero.
    router_learning_rate: of the routers, likewise.
    ratio_learning_rate: largest move of a ratio, in shares of the tokens, in one step away from what the budget's schedule asks of
        all, > 0.
    shrink: whether the timestep regions' gradients are drawn towards their mean, as far as they differ by noise (James and Stein
        1961; the default), or each region follows its own alone (the paper, and its preset).
    weight_decay: of the model's weights, >= 0 (the paper: 3e-2).
    ramp: share of the steps (default 0.6, or what ``settle`` leaves) over which the scheduled budget moves from the table's present
        share to the target, in [0, 1].
    settle: share of the steps (default 0.25, or what ``ramp`` leaves), at the end, in which the snapped table is fixed and the rest
        goes on learning, in [0, 1]; at 1 the table stays as ``set_ratios`` left it (a uniform one: Mixture of Depths).
    max_grad_norm: gradients of weights and routers are clipped to this norm, > 0; infinite: not at all.
    warm_start: fit each router by ridge regression on what its block does to each token before learning.
    tolerance: the table's FLOPs, as the mean over the regions, end within this share of the budget (relative, > 0), and never above
        it; with reuse the dense first step of a sampling comes on top where the table is learned.
    seed: of the order of the batches, of the adapters' start and of what is swapped, in [0, 2**32).

    Raises ValueError, naming the option, for a value outside its range.
    """

    preset: Preset = "default"
    trainable: Trainable = "all"
    lora_rank: int = 32
    estimator: OrNone[Estimator] = _RESOLVED
    budget_kind: OrNone[BudgetKind] = _RESOLVED
    steps: OrNone[int] = _RESOLVED
    accumulation: int = 1
    checkpoint_every: int = 25
    learning_rate: float = 1e-4
    router_learning_rate: float = 1e-3
    ratio_learning_rate: float = 2e-2
    shrink: OrNone[bool] = _RESOLVED
    weight_decay: float = 3e-2
    ramp: OrNone[float] = _RESOLVED
    settle: OrNone[float] = _RESOLVED
    max_grad_norm: float = 1.0
    warm_start: OrNone[bool] = _RESOLVED
    tolerance: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, get_args(Preset))
        given = {name for name in ("ramp", "settle") if getattr(self, name) is not None}
        for name, value in _PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.preset == "training-free":
            self._check_nothing_learns()
        for name in ("ramp", "settle"):
            _check_share(name, getattr(self, name))
        for name, other in (("ramp", self.settle), ("settle", self.ramp)):
            if name not in given:  # it makes room for the other, where only that was given
                object.__setattr__(self, name, min(getattr(self, name), 1 - other))
        check_choice("trainable", self.trainable, get_args(Trainable))
        check_choice("estimator", self.estimator, get_args(Estimator))
        check_choice("budget_kind", self.budget_kind, get_args(BudgetKind))
        for name in ("lora_rank", "accumulation", "checkpoint_every"):
            _check_count(name, getattr(self, name))
        _check_count("steps", self.steps, 0 if self.preset == "training-free" else 1)
        for name in ("learning_rate", "router_learning_rate", "ratio_learning_rate", "tolerance"):
            _check_number(name, getattr(self, name), positive=True)
        _check_number("max_grad_norm", self.max_grad_norm, positive=True, finite=False)
        _check_number("weight_decay", self.weight_decay)
        _check_count("seed", self.seed, 0, most=LARGEST_SEED)
        for name in ("warm_start", "shrink"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, found {getattr(self, name)!r}")
        if self.ramp + self.settle > 1:
            raise ValueError(f"ramp + settle must be at most 1, found {self.ramp} + {self.settle}")
        if self.preset != "training-free" and self.settle < 1 and not self.num_learning:
            raise ValueError(
                f"settle={self.settle} leaves none of the {self.steps} steps to learn ratios in. Expected more steps or a lower "
                "settle; or settle=1, and the table stays as set_ratios left it"
            )

    def _check_nothing_learns(self) -> None:
        for field in fields(self):
            expected = _PRESETS[self.preset].get(field.name, field.default)
            found = getattr(self, field.name)
            same = isinstance(found, str | int | float) and found == expected
            if field.name not in _MEASURES and not same:
                raise ValueError(
                    f"preset 'training-free' learns nothing: {field.name} must be {expected!r}, found {found!r}. "
                    "Leave it out, or take another preset"
                )

    @property
    def num_learning(self) -> int:
        """Steps in which ratios learn, the first ones; in those that are left the table is fixed."""
        return self.steps - round(self.steps * self.settle)
