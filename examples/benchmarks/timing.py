"""What the benchmarks of time share: calls measured in turn, quartiles, the machine, records that are gone on with, and tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Key = TypeVar("Key", bound=Hashable)

Call = tuple[Callable[[], object], Callable[[], object]]
"""What is done before, and what is timed."""


@dataclass(frozen=True)
class Rounds:
    """How often: ``warmup`` rounds that do not count, then at least ``fewest`` and at most ``most``, until ``seconds`` are over."""

    fewest: int = 5
    most: int = 30
    seconds: float = 12.0
    warmup: int = 1


@torch.inference_mode()
def measure_in_turn(calls: Mapping[Key, Call], rounds: Rounds, name: str = "rounds") -> dict[Key, list[float]]:
    """Seconds of every call, one entry per round. Each round makes all of them, in turning order, so that whatever else the
    machine does falls on all alike."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    keys = list(calls)
    start = time.perf_counter()
    for index in tqdm(range(rounds.warmup + rounds.most), desc=name, leave=False):
        if index == rounds.warmup:
            start = time.perf_counter()
        if index >= rounds.warmup + rounds.fewest and time.perf_counter() - start > rounds.seconds:
            break
        turn = index % len(keys)
        for key in keys[turn:] + keys[:turn]:
            prepare, call = calls[key]
            prepare()
            before = time.perf_counter()
            call()
            if index >= rounds.warmup:
                times[key].append(time.perf_counter() - before)
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """The quartiles 25 %, 50 %, 75 %."""
    return statistics.quantiles(values, n=4, method="inclusive")


def ratio_quartiles(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Quartiles over rounds of one time over the other of the same round."""
    return quartiles([one / other for one, other in zip(before, after, strict=True)])


def format_spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the outer quartiles in brackets."""
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}..{high})"


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def machine() -> dict[str, Any]:
    """What measured, without its name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": f"CPU, {names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def format_machine(found: dict[str, Any]) -> str:
    return f"{found['device']}, {found['threads']} threads, torch {found['torch']}"


def load() -> float:
    """How many others want the processors: the mean over the last minute."""
    return round(os.getloadavg()[0], 2)


def read_record(path: Path) -> dict[str, Any]:
    """What was written to ``path`` before; nothing where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(path: Path, record: dict[str, Any], text: str) -> None:
    """Write ``record`` to ``path``, and ``text`` to the markdown file of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
