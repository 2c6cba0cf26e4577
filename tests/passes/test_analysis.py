"""The runner of the passes: order, logging, and the pass that failed."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

import pytest
import torch
from diffcr_compile.passes.analysis import release_memory, run_passes


def add_one(state: int) -> int:
    return state + 1


def double(state: int) -> int:
    return state * 2


def fail(state: int) -> int:
    raise KeyError("here")


def keep(state: int) -> int:
    return state


def test_passes_run_in_order() -> None:
    assert run_passes((add_one, double), 1) == 4
    assert run_passes((double, add_one), 1) == 3
    assert run_passes((), 1) == 1


def test_an_error_names_its_pass() -> None:
    with pytest.raises(KeyError) as raised:
        run_passes((add_one, fail), 1)
    assert raised.value.__notes__ == ["raised by pass 2 of 2, fail"]


def test_the_log_tells_number_name_and_seconds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="diffcr_compile"):
        run_passes((add_one, keep), 1)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.rpartition(":")[0] for message in messages] == ["pass 1/2 add_one", "pass 2/2 keep"]
    assert all(message.endswith(" s") for message in messages)


def test_at_debug_level_what_changed_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="diffcr_compile"):
        run_passes((add_one, keep), 1)
    shown = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert shown == ["before add_one:\n1\nafter:\n2"]


def resident() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_after_a_pass_the_system_has_what_was_freed() -> None:
    """Tensors too small to have pages of their own, below one that stays."""

    def leave_one(state: list[torch.Tensor]) -> list[torch.Tensor]:
        many = [torch.ones(2**14) for _ in range(512)]
        held.append(resident())
        return [many[-1]]

    held: list[int] = []
    left = run_passes((leave_one,), [])
    assert len(left) == 1
    assert held[0] - resident() > 16 * 2**20


def test_another_c_library_keeps_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    release_memory()
