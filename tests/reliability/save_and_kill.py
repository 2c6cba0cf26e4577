"""Run as a script by ``test_kill.py``: imports once, then forks a child for every save that is killed.

``python save_and_kill.py FOLDER KILLS SAVES`` prints, as JSON, lists of :class:`Case` by what was done:

    random      children that save two routings in turn were killed at random moments, KILLS of them
    everywhere  a child that saves once was killed at each thing it does to files, in order
    together    several children saved to one place at once, SAVES times each, and none was killed
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffcr_compile  # before the folder of tests, which has a folder of the same name, is on the path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from models import Shape, TinyDiT, original, routed

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
TABLES = {"first": 0.3, "second": 0.7}
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.", "ctypes.")
"""Audit events of Python that a save may cause; a child is killed before the event takes place."""

LONGEST_SAVE = 0.03
"""Seconds: some saves of the loop on a slow machine."""


@dataclass(frozen=True)
class Case:
    """moment: when the child was killed. found: the routing that then lay there, or why there was none. mended: the same after
    the next save, which was of the first."""

    moment: str
    found: str
    mended: str


def make_model(name: str) -> TinyDiT:
    model = routed(SHAPE)
    with torch.no_grad():
        for block in model.blocks:
            block.diffcr_router.weight.fill_(TABLES[name])
    diffcr_compile.set_ratios(model, TABLES[name])
    return model


def examine(folder: Path) -> str:
    """Which routing lies in ``folder``: its name; ``missing``; ``mixed``; or the message of its refusal."""
    if not folder.exists():
        return "missing"
    model = original(SHAPE)
    try:
        diffcr_compile.load(model, folder)
    except diffcr_compile.DiffCRError as error:
        return str(error)
    for name, value in TABLES.items():
        routers = [block.diffcr_router.weight for block in model.blocks]
        if all(bool((weight == torch.tensor(value)).all()) for weight in routers) and torch.equal(
            diffcr_compile.ratios(model), torch.full((4, SHAPE.depth), value)
        ):
            return name
    return "mixed"


def fork(work: Callable[[], None]) -> int:
    """A child that does ``work`` and ends with 0, or with 1 after an error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def kill_at_random(folder: Path, count: int, models: dict[str, TinyDiT]) -> list[Case]:
    def save_in_turn() -> None:
        while True:
            for name in ("second", "first"):
                diffcr_compile.save(models[name], folder)

    generator, found = random.Random(0), []
    for _ in range(count):
        child, moment = fork(save_in_turn), generator.uniform(0, LONGEST_SAVE)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.append(Case(f"{moment:.4f} s", *examine_and_mend(folder, models)))
    return found


def kill_everywhere(folder: Path, models: dict[str, TinyDiT]) -> list[Case]:
    def save_until(number: int, note: int) -> None:
        left = number

        def count(event: str, _: tuple[Any, ...]) -> None:
            nonlocal left
            if not event.startswith(FILE_EVENTS):
                return
            left -= 1
            if left == -1:
                os.write(note, event.encode())
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        diffcr_compile.save(models["second"], folder)

    found: list[Case] = []
    while True:
        reader, writer = os.pipe()
        child = fork(lambda writer=writer: save_until(len(found), writer))
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader) as stream:
            event = stream.read()
        found.append(Case(event, *examine_and_mend(folder, models)))
        if os.WIFEXITED(status):
            return found


def save_together(folder: Path, count: int, models: dict[str, TinyDiT]) -> list[Case]:
    def save_often(name: str) -> None:
        for _ in range(count):
            with contextlib.suppress(OSError):  # the others have moved the target away in the meantime
                diffcr_compile.save(models[name], folder)

    for child in [fork(lambda name=name: save_often(name)) for name in (*TABLES, *TABLES)]:
        os.waitpid(child, 0)
    return [Case("at the end", *examine_and_mend(folder, models))]


def examine_and_mend(folder: Path, models: dict[str, TinyDiT]) -> tuple[str, str]:
    found = examine(folder)
    diffcr_compile.save(models["first"], folder)
    return found, examine(folder)


def main(where: str, kills: str, saves: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, models = Path(where), {name: make_model(name) for name in TABLES}
    diffcr_compile.save(models["first"], folder)
    found = {
        "random": kill_at_random(folder, int(kills), models),
        "everywhere": kill_everywhere(folder, models),
        "together": save_together(folder, int(saves), models),
    }
    print(json.dumps({how: [asdict(case) for case in cases] for how, cases in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
