"""What attributes say, comparable between layers and moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffcr_compile.settings import setting, settings_of


class Holder:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, True),
        (0.5, 0.25),
        ("a", "b"),
        (None, 0),
        ([1, 2], (1, 2)),
        ({"default": 1.0}, {"default": 0.5}),
        (Holder(scale=1.0), Holder(scale=2.0)),
        (Holder(inner=Holder(scale=1.0)), Holder(inner=Holder(scale=2.0))),
        (torch.zeros(2), torch.ones(2)),
        (torch.zeros(2), torch.zeros(3)),
        (torch.float16, torch.float32),
        (nn.Identity(), nn.SiLU()),
        (torch.sin, torch.cos),
    ],
)
def test_values_that_differ_say_so(one: Any, other: Any) -> None:
    assert setting(one) != setting(other)


def test_objects_of_equal_values_say_the_same() -> None:
    assert setting(Holder(scale=[1.0, {"a": 2}])) == setting(Holder(scale=[1.0, {"a": 2}]))


def test_positions_and_wrappers_are_left_out_where_asked() -> None:
    module = nn.Linear(2, 2)
    module.scale = 0.5  # type: ignore[assignment]
    module._switch = [True]  # type: ignore[assignment]
    module._hook = Holder(calls=3)  # type: ignore[assignment]
    names = {name for name, _ in settings_of(module)}
    assert names == {"in_features", "out_features", "scale", "_switch", "_hook"}
    assert {name for name, _ in settings_of(module, positions=False)} == names - {"in_features", "out_features"}
    assert {name for name, _ in settings_of(module, wrappers=False)} == names - {"_hook"}
