"""Two processes that learn together, against one that takes the same batches in turn.

``python test_processes.py FOLDER`` imports once and forks two processes for each way to learn; see :data:`WAYS`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffcr_compile  # before the folder of tests, which has a folder of the same name, is on the path

if __name__ == "__main__":
    ROOT = Path(__file__).parents[2]
    sys.path += [str(ROOT / "tests"), str(ROOT / "examples" / "benchmarks")]
    torchvision = importlib.import_module("torchvision_operators").define()  # peft imports torchvision

import pytest
import torch
import torch.distributed as distributed
from diffcr_compile.calibration import learner, processes
from models import Shape, TinyDiT, original, routed, tiny_inputs
from torch import nn

from diffcr_compile import CalibrationConfig
from diffcr_compile.routed import STATE
from diffcr_compile.unwrap import unwrap

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
STEPS = (20.0, 400.0, 600.0, 950.0)
BUDGET = 0.6


def batches(*, spoilt: bool = False) -> list[dict[str, Any]]:
    """One region each; of so many tokens that the budget can be met within 1 %. spoilt: the last one holds what is no number."""
    found = [tiny_inputs(SHAPE, num_tokens=40, seed=seed, timestep=step) for seed, step in enumerate(STEPS)]
    if spoilt:
        found[-1]["x"][0, 0, 0] = torch.nan
    return found


def config(trainable: str) -> CalibrationConfig:
    return CalibrationConfig(
        steps=8,
        trainable=trainable,
        lora_rank=2,
        learning_rate=1e-3,
        checkpoint_every=3,  # type: ignore[arg-type]
    )


def sharded(model: TinyDiT) -> TinyDiT:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    diffcr_compile.cost(model, batches()[0])  # can't be counted afterwards
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def prepared(model: TinyDiT) -> nn.Module:
    """As in a script of the user's under ``accelerate launch``."""
    from accelerate import Accelerator

    number = str(distributed.get_rank())
    os.environ |= {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    return Accelerator(cpu=True).prepare(model)


WAYS: dict[str, tuple[str, Callable[[TinyDiT], nn.Module]]] = {
    "plain": ("all", lambda model: model),
    "routers": ("routers", lambda model: model),
    "wrapped": ("all", nn.parallel.DistributedDataParallel),
    "prepared": ("all", prepared),
    "sharded": ("all", sharded),
    "lora": ("lora", lambda model: model),
}


def outcome(model: nn.Module, report: diffcr_compile.CalibrationReport) -> dict[str, Any]:
    inner = unwrap(model)
    whole = [getattr(one, "full_tensor", lambda one=one: one)().detach() for one in inner.parameters()]
    return {
        "table": report.table.tolist(),
        "share": report.share,
        "losses": [entry["loss"] for entry in report.history],
        "weights": [tensor.flatten().tolist() for tensor in whole],
    }


def learn(way: str, number: int, folder: Path) -> dict[str, Any]:
    """What process ``number`` of two ends with."""
    trainable, wrap = WAYS[way]
    model = wrap(routed(SHAPE))
    half = batches()[number::2]
    report = diffcr_compile.calibrate(model, half, budget=BUDGET, config=config(trainable))
    return outcome(model, report)


def stop_and_go_on(way: str, number: int, folder: Path) -> dict[str, Any]:
    """Both processes are interrupted in the fifth step, and go on in new models."""
    trainable, wrap = WAYS[way]
    note, half, checkpoint = learner.Learner._note, batches()[number::2], folder / f"checkpoint-{way}"

    def stop(self: Any, *args: Any) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        note(self, *args)

    learner.Learner._note = stop  # type: ignore[method-assign]
    try:
        diffcr_compile.calibrate(
            wrap(routed(SHAPE)), half, budget=BUDGET, config=config(trainable), checkpoint=checkpoint
        )
    except KeyboardInterrupt:
        learner.Learner._note = note  # type: ignore[method-assign]
    found = json.loads((checkpoint / "calibration.json").read_text())["progress"]["step"]
    model = wrap(routed(SHAPE))
    report = diffcr_compile.calibrate(model, half, budget=BUDGET, config=config(trainable), checkpoint=checkpoint)
    return {**outcome(model, report), "step": found, "files": sorted(path.name for path in checkpoint.iterdir())}


def draw_noise(way: str, number: int, folder: Path) -> dict[str, Any]:
    """The numbers that a loss of one's own draws in the steps after the last checkpoint: uninterrupted, and going on from it."""
    half, quick = batches()[number::2], config(way)

    def drawn(checkpoint: Path | None, stop: int | None = None) -> list[float]:
        found: list[float] = []

        def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
            if len(found) == stop:
                raise KeyboardInterrupt
            noise = torch.randn(())
            found.append(float(noise))
            return (model(**batch) - noise).square().mean()

        torch.manual_seed(100 + number)
        with contextlib.suppress(KeyboardInterrupt):
            diffcr_compile.calibrate(routed(SHAPE), half, budget=BUDGET, loss=loss, config=quick, checkpoint=checkpoint)
        return found

    whole = drawn(None)
    drawn(folder / "noise", stop=5)
    return {"expected": whole[3:], "found": drawn(folder / "noise")}


def choose_without_training(way: str, number: int, folder: Path) -> dict[str, Any]:
    """From samplings of its own, of as many steps in one process and fewer in the other; ``way``: the option skip."""
    config = diffcr_compile.DiffCRConfig(skip=way)  # type: ignore[arg-type]
    model = diffcr_compile.transform(original(SHAPE), config, example_inputs=tiny_inputs(SHAPE))
    x, sampled = tiny_inputs(SHAPE, num_tokens=40, seed=number)["x"], []
    for step in range(980, 0, -100 - 40 * number):
        inputs = {**tiny_inputs(SHAPE, num_tokens=40, timestep=float(step)), "x": x}
        sampled.append(inputs)
        with torch.no_grad():
            x = 0.97 * x - 0.2 * model(**inputs)
    free = CalibrationConfig(preset="training-free", steps=8)
    report = diffcr_compile.calibrate(model, sampled, budget=BUDGET, config=free)
    return {**outcome(model, report), "degree": model.__dict__[STATE].degree, "trials": report.trials}


def spoil_one(way: str, number: int, folder: Path) -> dict[str, Any]:
    """The last batch, of the second process alone, holds what is no number. ``way``: where it is met first."""
    model, how = routed(SHAPE), replace(config("all"), warm_start=False)
    if way == "measuring":
        how = CalibrationConfig(preset="training-free")
    half = batches(spoilt=True)[number::2]
    try:
        diffcr_compile.calibrate(model, half, budget=BUDGET, config=how)
    except diffcr_compile.CalibrationError as error:
        return {"error": str(error), "table": diffcr_compile.ratios(model).tolist()}
    return {"error": None}


def learn_unevenly(way: str, number: int, folder: Path) -> dict[str, Any]:
    """The samples of the first process lie in more timestep regions, and it has a batch more: parts of the model are shared."""
    half = batches()[number::2]
    if number == 0:
        half[0]["timestep"] = torch.tensor(STEPS[:3])
        half.append(batches()[1])
    model = WAYS[way][1](routed(SHAPE))
    report = diffcr_compile.calibrate(model, half, budget=BUDGET, config=config(WAYS[way][0]))
    return outcome(model, report)


def choose_unevenly(way: str, number: int, folder: Path) -> dict[str, Any]:
    """Without training, from more batches in the first process; parts of the model are shared."""
    model = WAYS[way][1](routed(SHAPE))
    free = CalibrationConfig(preset="training-free")
    report = diffcr_compile.calibrate(model, batches()[: 3 - number], budget=BUDGET, config=free)
    return outcome(model, report)


def go_on_unevenly(way: str, number: int, folder: Path) -> dict[str, Any]:
    """A finished one is called again, with more batches in the first process."""
    some, kept = batches()[: 3 - number], folder / f"unevenly-{way}"
    found = [
        outcome(model, diffcr_compile.calibrate(model, some, budget=BUDGET, config=config(way), checkpoint=kept))
        for model in (routed(SHAPE), routed(SHAPE))
    ]
    return {"first": found[0], "again": found[1]}


def skip_whole_blocks(way: str, number: int, folder: Path) -> dict[str, Any]:
    """At a fixed table by which each process leaves out a block that the other runs."""
    model = WAYS[way][1](routed(SHAPE))
    diffcr_compile.set_ratios(model, [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    half = [batches()[number]] * 2
    report = diffcr_compile.calibrate(
        model, half, budget=0.9, config=replace(config(WAYS[way][0]), settle=1.0, ramp=0.0)
    )
    return outcome(model, report)


Work = Callable[[str, int, Path], dict[str, Any]]
RUNS: dict[str, tuple[Work, str]] = {
    **{way: (learn, way) for way in WAYS},
    "sharded, stopped": (stop_and_go_on, "sharded"),
    "lora, stopped": (stop_and_go_on, "lora"),
    "noise, stopped": (draw_noise, "routers"),
    "sharded, unevenly": (learn_unevenly, "sharded"),
    "sharded, training-free, unevenly": (choose_unevenly, "sharded"),
    "routers, again unevenly": (go_on_unevenly, "routers"),
    "plain, whole blocks": (skip_whole_blocks, "plain"),
    "sharded, whole blocks": (skip_whole_blocks, "sharded"),
    "spoilt, learning": (spoil_one, "learning"),
    "spoilt, measuring": (spoil_one, "measuring"),
    "training-free": (choose_without_training, "identity"),
    "training-free, reuse": (choose_without_training, "reuse"),
}


def fork(name: str, number: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    target = folder / f"{name}-{number}.json"
    try:
        work, way = RUNS[name]
        if number < 2:
            store = distributed.FileStore(str(folder / f"store-{name}"), 2)
            distributed.init_process_group(
                "gloo", store=store, rank=number, world_size=2, timeout=timedelta(seconds=60)
            )
        found = work(way, number, folder) if number < 2 else in_turn(WAYS[way][0])
        target.write_text(json.dumps(found))
    except BaseException:
        target.write_text(json.dumps({"failed": traceback.format_exc()}))
    finally:
        os._exit(0)


def in_turn(trainable: str) -> dict[str, Any]:
    """One process, two batches a step: those that the two processes draw, the first one's first."""
    drawn = learner.drawn

    def draw(num_batches: int, place: int, seed: int) -> int:
        step, number = divmod(place, 2)
        return number * (num_batches // 2) + drawn(num_batches // 2, step, seed + number)

    learner.drawn = draw  # type: ignore[assignment]
    both = [*batches()[0::2], *batches()[1::2]]
    model = routed(SHAPE)
    report = diffcr_compile.calibrate(model, both, budget=BUDGET, config=replace(config(trainable), accumulation=2))
    return outcome(model, report)


def main(folder: Path) -> None:
    for name in ("torch.distributed.fsdp", "peft"):
        importlib.import_module(name)  # once, before the forks
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    routed(SHAPE)
    for name in RUNS:
        children = [fork(name, number, folder) for number in range(2)]
        if name in ("plain", "routers", "lora"):
            children.append(fork(name, 2, folder))
        for child in children:
            os.waitpid(child, 0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """What each process ended with, by run; for some, a third entry: one process alone."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert finished.returncode == 0, finished.stderr

    def read(name: str) -> list[dict[str, Any]]:
        results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-?.json"))]
        assert len(results) >= 2
        assert [result["failed"] for result in results if "failed" in result] == []
        return results

    return read


Found = Callable[[str], list[dict[str, Any]]]
ALONE = {
    "plain": "plain",
    "wrapped": "plain",
    "prepared": "plain",
    "sharded": "plain",
    "lora": "lora",
    "routers": "routers",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WAYS, "sharded, stopped", "lora, stopped", "sharded, unevenly"])
def test_all_processes_end_alike_within_the_budget(found: Found, name: str) -> None:
    first, second = found(name)[:2]
    assert first == second
    assert 0.99 * BUDGET <= first["share"] <= BUDGET
    assert len(first["losses"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_they_learn_what_one_process_would(found: Found, name: str) -> None:
    together, alone = found(name)[0], found(ALONE[name])[2]
    table, expected = torch.tensor(together["table"]), torch.tensor(alone["table"])
    # sums of float32 gradients in another order: what lies on the border of two bins may fall to either side
    assert float((table - expected).abs().max()) <= 0.1 + 1e-6
    # while learning, before tables can differ, the losses are the same sums
    assert together["losses"][:6] == pytest.approx(alone["losses"][:6], rel=1e-3)
    for ours, theirs in zip(together["weights"], alone["weights"], strict=True):
        # eight steps of at most 1e-3 each; Adam turns the sign of a gradient near zero into a whole step
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["sharded", "lora"])
def test_stopped_they_go_on_to_the_same_end(found: Found, way: str) -> None:
    stopped, through = found(f"{way}, stopped")[0], found(way)[0]
    assert stopped.pop("step") == 3
    assert stopped.pop("files") == [
        "calibration.json",
        "step-000008.safetensors",
        "targets-0.safetensors",
        "targets-1.safetensors",
    ]
    assert stopped == through


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training-free", "training-free, reuse", "sharded, training-free, unevenly"])
def test_without_training_all_choose_one_table(found: Found, name: str) -> None:
    first, second = found(name)
    assert first == second
    assert first["share"] <= BUDGET
    assert torch.tensor(first["table"]).any()


@pytest.mark.slow
def test_with_unequal_counts_of_batches_it_goes_on_too(found: Found) -> None:
    first, second = found("routers, again unevenly")
    assert first["first"] == first["again"] == second["again"] == second["first"]


@pytest.mark.slow
def test_each_process_goes_on_with_its_own_noise(found: Found) -> None:
    first, second = found("noise, stopped")
    assert first["found"] == first["expected"] != second["expected"] == second["found"]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "said"), [("learning", "the loss is nan"), ("measuring", "outputs of batch 1 are")])
def test_what_is_no_number_in_one_process_stops_all(found: Found, place: str, said: str) -> None:
    first, second = found(f"spoilt, {place}")
    assert said in first["error"]
    assert first == second
    assert not torch.tensor(first["table"]).any()


def test_alone_nothing_is_summed_or_waited_for() -> None:
    parameter = nn.Parameter(torch.ones(2))
    processes.average_gradients([parameter])
    assert parameter.grad is None
    tensor = torch.ones(2)
    processes.sum_over_processes([tensor])
    processes.wait_for_all()
    assert tensor.tolist() == [1.0, 1.0]
    assert (processes.num_processes(), processes.rank()) == (1, 0)
    assert processes.mean_over_processes(0.1) == 0.1
    marker = object()
    assert processes.of_first_process(marker) is marker


if __name__ == "__main__":
    main(Path(sys.argv[1]))
