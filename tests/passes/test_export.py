"""Export: one symbol per dimension, unified by the solver."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
import torch
from diffcr_compile.passes.analysis import Refused
from diffcr_compile.passes.export import LONGEST, export_block
from hand import D, Hand, N, analyse, block_of, draw
from torch import Tensor


def with_table(self: Hand, x: Tensor, table: Tensor, scale: float) -> Tensor:
    return x + self.attend(x * table) * scale


def test_equal_sizes_are_one_symbol_and_fixed_ones_numbers() -> None:
    block = analyse(block_of(with_table), {"x": draw(), "table": draw(N, D), "scale": 0.5}, [export_block])
    x, table, scale = block.leaf_dims
    assert x[1] == table[0]
    assert x[1].is_Symbol
    assert x[0].is_Symbol
    assert x[0] != x[1]
    assert x[2] == table[1] == D
    assert scale == ()
    assert block.dims(block.graph_outputs[0]) == x


def reads_a_value(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x) if float(x.sum()) > 0 else x


def test_what_can_not_be_traced_is_refused_with_its_reason() -> None:
    with pytest.raises(Refused, match=r"torch.export can't trace it \(\w+: .+\)"):
        analyse(block_of(reads_a_value), {"x": draw().abs()}, [export_block])


def test_nothing_is_printed_and_nobody_else_is_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    loggers = [
        logging.getLogger(f"torch.{name}") for name in ("_export.non_strict_utils", "fx.experimental.symbolic_shapes")
    ]
    told, arrived = 0, []

    def other_thread() -> None:
        nonlocal told
        told += 1
        print("printed")
        for logger in loggers:
            logger.warning("warned")

    def forward(self: Hand, x: Tensor) -> Tensor:
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        return reads_a_value(self, x)

    handler = logging.Handler()
    handler.emit = lambda record: arrived.append(record.getMessage())  # type: ignore[method-assign]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        block = analyse(block_of(forward), {"x": draw(1, N, D).abs()}, [])
        with pytest.raises(Refused):
            export_block(block)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    out, err = capfd.readouterr()
    assert out.split() == ["printed"] * told
    assert "def forward" not in err
    assert arrived == ["warned"] * told * len(loggers)
    assert not any(logger.filters for logger in loggers)


def test_exporting_leaves_the_block_alone() -> None:
    block = block_of(with_table).train()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    keys = set(vars(block))
    analyse(block, {"x": draw(), "table": draw(N, D), "scale": 0.5}, [export_block])
    assert block.training
    assert set(vars(block)) == keys
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_long_loops_are_not_exported() -> None:
    block = analyse(block_of(with_table), {"x": draw(), "table": draw(N, D), "scale": 0.5}, [])
    block = replace(block, call=replace(block.call, num_operators=LONGEST + 1))
    with pytest.raises(Refused, match=f"{LONGEST + 1} operators in one call"):
        export_block(block)


def test_the_tensors_it_was_exported_with_are_not_kept() -> None:
    """They are as large as the captured call's, and programs are kept while the search goes on."""
    block = analyse(block_of(with_table), {"x": draw(), "table": draw(N, D), "scale": 0.5}, [export_block])
    assert block.program is not None
    assert block.program.example_inputs is None
