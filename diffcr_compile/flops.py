"""Counting FLOPs with torch's own counter, every form of attention included."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_flash_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


ATTENTION_FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash_flops}
"""Attention operators that ``torch.utils.flop_counter`` counts as zero."""


class _NoModules:
    """In the place of the counter's module tracker, which asserts on modules that are given a parameter without gradients."""

    parents = frozenset({"Global"})
    is_bw = False

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, *error: object) -> None:
        """Nothing to take down."""


class _Counter(FlopCounterMode):
    """Torch's counter stops at higher-order operators; this one goes through those that it has a formula for (flex attention)."""

    def __enter__(self) -> _Counter:
        super().__enter__()
        mode: Any = self.mode
        refuse = mode._handle_higher_order_ops

        def count(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
            if func not in self.flop_registry:
                return refuse(func, types, args, kwargs)
            return self._count_flops(func, func(*args, **kwargs), args, kwargs)

        mode._handle_higher_order_ops = count
        return self


def count_flops() -> FlopCounterMode:
    """A quiet FLOP counter (a context manager; ``get_total_flops()``) that knows every form of attention of this torch."""
    counter = _Counter(display=False, custom_mapping=ATTENTION_FLOPS)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


def attention_flops(counter: FlopCounterMode) -> int:
    """FLOPs so far in products of activations with activations: fused attention, and batched matrix products."""
    return sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if _is_attention(str(op)))


def _is_attention(name: str) -> bool:
    return any(part in name for part in ("attention", "bmm", "attn"))
