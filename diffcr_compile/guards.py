"""What an exported graph takes for granted of the sizes that it is called with: other sizes may go another way in the code that it
was exported from, and the graph would not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

_WORDS = {**SYMPY_INTERP, "math": math, "inf": math.inf}
"""What torch writes guards in, beside sizes."""

_SIZE = re.compile(r"tensors\[(\d+)\]\.size\(\)")


@dataclass(frozen=True)
class Guards:
    """names: of the tensors of a call, in order. conditions: Python expressions in ``tensors[0].size()[1]`` and the like."""

    names: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    _all: Callable[[Sequence[Tensor]], bool] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        every = " and ".join(f"({condition})" for condition in self.conditions)
        object.__setattr__(self, "_all", _function(every or "True"))

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a call with these tensors has the sizes that the graph is of."""
        return bool(self._all(tensors))

    def broken(self, tensors: Sequence[Tensor]) -> str:
        """The first condition that does not hold, in words; empty where all do."""
        broken = (condition for condition in self.conditions if not _function(condition)(tensors))
        return _SIZE.sub(lambda found: f"{self.names[int(found[1])]}.shape", next(broken, ""))


def _function(condition: str) -> Callable[[Sequence[Tensor]], bool]:
    return eval(f"lambda tensors: {condition}", dict(_WORDS))  # type: ignore[no-any-return]
