"""Options: validated once, and the same after JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcr_compile import CalibrationConfig, DiffCRConfig

CONFIGS = st.one_of(
    st.builds(
        DiffCRConfig,
        num_regions=st.integers(1, 20),
        gate=st.sampled_from(["exact", "sigmoid"]),
        router=st.sampled_from(["token", "timestep"]),
        guidance=st.sampled_from(["separate", "shared"]),
        min_flops_share=st.floats(0, 1),
        timestep_argument=st.none() | st.text(max_size=5),
        timestep_range=st.none()
        | st.tuples(st.floats(-1, 0), st.floats(0.5, 1000))
        | st.tuples(st.integers(-9, 0), st.integers(1, 9)).map(list),
    ),
    st.builds(CalibrationConfig, preset=st.just("training-free"), seed=st.integers(0, 9), warm_start=st.booleans()),
    st.builds(
        CalibrationConfig,
        steps=st.integers(1, 1000),
        ramp=st.floats(0, 0.5),
        settle=st.floats(0, 0.5),
        trainable=st.sampled_from(["all", "routers"]),
        warm_start=st.booleans(),
    ),
)

HUGE = 10**400
"""More than any float."""


@given(config=CONFIGS)
def test_options_survive_json(config: DiffCRConfig | CalibrationConfig) -> None:
    found = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert found == config
    assert hash(found) == hash(config)


def test_options_are_frozen_and_by_keyword() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiffCRConfig().num_regions = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        DiffCRConfig(4)  # type: ignore[misc]


@pytest.mark.parametrize(
    "config",
    [
        DiffCRConfig(),
        DiffCRConfig(skip="reuse"),
        *(CalibrationConfig(preset=preset) for preset in ("default", "paper", "training-free")),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_what_is_given_as_none_is_read_as_a_value(config: DiffCRConfig | CalibrationConfig) -> None:
    later = [name for name, kind in type(config).__annotations__.items() if kind.startswith("OrNone")]
    assert later
    first = {name: getattr(config, name) for name in ("skip", "preset") if hasattr(config, name)}
    assert type(config)(**first, **dict.fromkeys(later)) == config
    assert None not in [getattr(config, name) for name in later]


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        (DiffCRConfig, {"num_regions": 0}, "num_regions must be an integer >= 1, found 0"),
        (DiffCRConfig, {"num_regions": True}, "num_regions must be an integer >= 1, found True"),
        (DiffCRConfig, {"num_regions": 2.0}, "found 2.0"),
        (DiffCRConfig, {"gate": "hard"}, "gate must be one of 'exact', 'sigmoid', found 'hard'"),
        (DiffCRConfig, {"router": "text"}, "router must be one of 'token', 'timestep', found 'text'"),
        (DiffCRConfig, {"guidance": "none"}, "guidance must be one of 'separate', 'shared', found 'none'"),
        (DiffCRConfig, {"skip": "reuse", "router": "timestep"}, "selection='turn' asks no router.*found 'timestep'"),
        (DiffCRConfig, {"skip": "reuse", "guidance": "shared"}, "expected router='token'.*found 'token' and 'shared'"),
        (DiffCRConfig, {"skip": "merge"}, "skip must be one of 'identity', 'reuse', found 'merge'"),
        (DiffCRConfig, {"context": "stale"}, "needs skip='reuse'"),
        (DiffCRConfig, {"context": "none"}, "context must be one of 'kept', 'all', 'stale', found 'none'"),
        (DiffCRConfig, {"min_flops_share": 1.5}, "min_flops_share must lie in \\[0, 1\\], found 1.5"),
        (DiffCRConfig, {"min_flops_share": "a"}, "min_flops_share must lie in \\[0, 1\\], found 'a'"),
        (DiffCRConfig, {"extrapolation": 3}, "extrapolation must be one of 0, 1, 2, found 3"),
        (DiffCRConfig, {"extrapolation": True}, "extrapolation must be an integer >= 0, found True"),
        (DiffCRConfig, {"timestep_argument": 3}, "timestep_argument must be an input's name or None, found 3"),
        *(
            (
                DiffCRConfig,
                {"timestep_range": found},
                f"timestep_range must be \\(lowest, highest\\), two finite numbers, found {re.escape(repr(found))}$",
            )
            for found in (
                (1.0, 1.0),
                5,
                (1, 2, 3),
                ("a", "b"),
                "01",
                (0, float("inf")),
                (0, float("nan")),
                (False, True),
                [1, 0],
            )
        ),
        (CalibrationConfig, {"steps": 0}, "steps must be an integer >= 1, found 0"),
        (CalibrationConfig, {"preset": "training-free", "steps": -1}, "steps must be an integer >= 0, found -1"),
        (CalibrationConfig, {"learning_rate": 0.0}, "learning_rate must be positive, found 0.0"),
        (CalibrationConfig, {"tolerance": -1.0}, "tolerance must be positive"),
        (CalibrationConfig, {"trainable": "none"}, "trainable must be one of"),
        (CalibrationConfig, {"ramp": 0.8, "settle": 0.4}, "ramp \\+ settle must be at most 1"),
        *(
            (
                CalibrationConfig,
                {"preset": "training-free", name: value},
                f"learns nothing: {name} must be .*, found {value!r}",
            )
            for name, value in {
                "trainable": "routers",
                "accumulation": 2,
                "estimator": "two-bin",
                "settle": 0.5,
                "learning_rate": 1e-3,
                "checkpoint_every": 5,
            }.items()
        ),
        (CalibrationConfig, {"learning_rate": "1e-3"}, "learning_rate must be a finite number, found '1e-3'"),
        (
            CalibrationConfig,
            {"router_learning_rate": float("inf")},
            "router_learning_rate must be a finite number, found inf",
        ),
        (CalibrationConfig, {"max_grad_norm": float("nan")}, "max_grad_norm must be a finite number, found nan"),
        (CalibrationConfig, {"weight_decay": -1.0}, "weight_decay must not be negative, found -1.0"),
        (CalibrationConfig, {"seed": 1.5}, "seed must be an integer from 0 to 4294967295, found 1.5"),
        (CalibrationConfig, {"seed": 2**63}, "seed must be an integer from 0 to 4294967295"),
        (CalibrationConfig, {"seed": -1}, "seed must be an integer from 0"),
        (CalibrationConfig, {"warm_start": "no"}, "warm_start must be True or False, found 'no'"),
        (CalibrationConfig, {"shrink": 1}, "shrink must be True or False, found 1"),
        (CalibrationConfig, {"ramp": "long"}, "ramp must lie in \\[0, 1\\], found 'long'"),
        (CalibrationConfig, {"settle": float("nan")}, "settle must lie in"),
        *(
            (cls, {**others, name: found}, f"{name} must (be|lie) .*, found {re.escape(repr(found))}")
            for found in (np.array([1, 2]), [1], {})
            for cls, name, others in (
                *((DiffCRConfig, name, {}) for name in ("skip", "context", "extrapolation", "min_flops_share", "gate")),
                *((CalibrationConfig, name, {}) for name in ("preset", "estimator", "steps", "max_grad_norm", "ramp")),
                (CalibrationConfig, "learning_rate", {"preset": "training-free"}),
            )
        ),
        (DiffCRConfig, {"num_regions": HUGE}, f"num_regions must be an integer from 1 to {2**63 - 1}, found 1000"),
        (DiffCRConfig, {"min_flops_share": HUGE}, "min_flops_share must lie in"),
        (DiffCRConfig, {"timestep_range": (0, HUGE)}, "timestep_range must be .* two finite numbers"),
        (CalibrationConfig, {"steps": HUGE}, "steps must be an integer from 1 to"),
        (CalibrationConfig, {"learning_rate": HUGE}, "learning_rate must be a finite number"),
        (CalibrationConfig, {"max_grad_norm": HUGE}, "max_grad_norm must be a finite number"),
        (CalibrationConfig, {"settle": 0.9, "steps": 3, "ramp": 0.1}, "settle=0.9 leaves none of the 3 steps to learn"),
    ],
)
def test_a_bad_option_is_named(cls: type, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cls(**options)


@pytest.mark.parametrize(
    ("given", "ramp", "settle"),
    [
        ({}, 0.6, 0.25),
        ({"settle": 1}, 0, 1),
        ({"ramp": 1.0}, 1.0, 0),
        ({"settle": 0.5}, 0.5, 0.5),
        ({"preset": "paper", "ramp": 0.1}, 0.1, 0),
    ],
)
def test_ramp_and_settle_make_room_for_one_another(given: dict[str, Any], ramp: float, settle: float) -> None:
    config = CalibrationConfig(**given)
    assert (config.ramp, config.settle) == (ramp, settle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"type": "Other"}, "expected options of type 'DiffCRConfig', found 'Other'"),
        ({"version": 2}, "version 2 is not known here \\(newest known: 1\\)"),
        ({"version": None}, "version None"),
        ({"version": -3}, "version -3 is not known here"),
        ({"version": True}, "version True is not known here"),
        ({"colour": 1}, "no option named 'colour'"),
    ],
)
def test_another_files_options_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DiffCRConfig.from_dict({**DiffCRConfig().to_dict(), **change})


def test_what_is_no_dictionary_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the options of a DiffCRConfig as a dictionary, found list"):
        DiffCRConfig.from_dict([])  # type: ignore[arg-type]
