"""The plan as data: it survives its dictionary form."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from models import Shape, routed

from diffcr_compile.plan import Refusal, TokenAxis, plan_from_dict
from diffcr_compile.routed import routing_of


@pytest.mark.parametrize("kind", ["plain", "rotary", "joint"])
def test_a_plan_survives_its_dictionary(kind: str) -> None:
    plan = routing_of(routed(Shape(kind, depth=2, heads=1, head_dim=6))).plan  # type: ignore[arg-type]
    assert plan_from_dict(asdict(plan)) == plan


def test_what_no_plan_looks_like() -> None:
    with pytest.raises(KeyError):
        plan_from_dict({})


def test_a_joint_axis_has_others_on_it() -> None:
    assert not TokenAxis(1).joint
    assert TokenAxis(0, before=((1, 1),)).joint
    assert TokenAxis(0, after=((1, 1),)).joint


def test_a_refusal_counts() -> None:
    assert str(Refusal("Head", ("head",), "too flat")) == "head (Head): too flat"
    assert str(Refusal("Block", ("a", "b", "c"), "too round")) == "a and 2 more (Block): too round"
