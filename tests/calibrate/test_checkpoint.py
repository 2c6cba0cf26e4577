"""Interrupted, killed and damaged: a calibration that goes on ends as it would have ended, or says why it can't.

``python test_checkpoint.py FOLDER KILLS`` imports once and forks a child for every run that is killed; see :func:`kill_at_random`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffcr_compile  # before the folder of tests, which has a folder of the same name, is on the path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

import pytest
import torch
from diffcr_compile.calibration import checkpoint, learner, train
from diffcr_compile.calibration.checkpoint import Checkpoint, digest, digest_weights, record_checksum
from models import Shape, TinyDiT, original, routed, same_bits, same_snapshot, snapshot, tiny_inputs
from torch import Tensor, nn

from diffcr_compile import ArtefactError, CalibrationConfig, CalibrationReport
from diffcr_compile.arguments import iterate_leaves
from diffcr_compile.latency import BlockTime

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("plain", depth=2, heads=1, head_dim=6)
STEPS = torch.tensor([20.0, 400.0, 950.0])
BATCHES = [tiny_inputs(SHAPE, num_tokens=20, seed=seed, timestep=STEPS.roll(seed)) for seed in range(3)]
CONFIGS = {
    trainable: CalibrationConfig(
        steps=8, trainable=trainable, lora_rank=2, checkpoint_every=3, learning_rate=1e-3, accumulation=2
    )
    for trainable in ("all", "lora", "routers")
}
"""Six steps of learning, two of settling, two batches a step; checkpoints before steps 0, 3 and 6, and at the end."""

BUDGETS = (0.7, 0.5)
Outcome = tuple[CalibrationReport, list[Tensor]]


def run(model: TinyDiT, trainable: str, folder: Path | None, **options: Any) -> Outcome:
    config = replace(CONFIGS[trainable], **options.pop("config", {}))
    report = diffcr_compile.calibrate(
        model, BATCHES, **{"budget": BUDGETS, **options}, config=config, checkpoint=folder
    )
    return report, [parameter.detach().clone() for parameter in model.parameters()]


def same_outcome(found: Outcome, expected: Outcome) -> bool:
    """To the bit, but for the seconds."""
    ours, theirs = (replace(report, seconds=0.0).to_dict() for report in (found[0], expected[0]))
    return ours == theirs and same_bits(found[1], expected[1])


def fresh(shape: Shape = SHAPE) -> TinyDiT:
    return routed(shape)


@pytest.fixture(scope="module", autouse=True)
def count_once() -> Iterator[None]:
    """Counting a model's FLOPs takes longer than all that is tested here."""
    measure, known = train.measure_costs, {}

    def count(model: Any, inputs: Any) -> Any:
        depth = len(model.blocks)
        if depth not in known:
            known[depth] = measure(model, inputs)
        return known[depth]

    train.measure_costs = count  # type: ignore[assignment]
    yield
    train.measure_costs = measure


@pytest.fixture(scope="module")
def uninterrupted(count_once: None) -> dict[str, Outcome]:
    return {trainable: run(fresh(), trainable, None) for trainable in CONFIGS}


@contextlib.contextmanager
def stopped_at(place: str, number: int) -> Iterator[None]:
    """Inside, the ``number``th call of ``place`` is a KeyboardInterrupt."""
    calls = 0
    owner: Any = learner if "." not in place else getattr(learner, place.split(".")[0])
    name = place.split(".")[-1]
    original = getattr(owner, name)

    def stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    setattr(owner, name, stop)
    try:
        yield
    finally:
        setattr(owner, name, original)


def interrupt(model: TinyDiT, trainable: str, folder: Path, place: str, number: int, **options: Any) -> None:
    with stopped_at(place, number), pytest.raises(KeyboardInterrupt):
        run(model, trainable, folder, **options)


PLACES = {
    "dense outputs": ("dense_outputs", 2),
    "first checkpoint": ("Checkpoint.write", 1),
    "a step's second batch": ("distillation_loss", 8),
    "learning": ("Learner._note", 5),
    "before a ratio's step": ("Learner._move", 5),
    "a checkpoint in learning": ("Checkpoint.write", 2),
    "before snapping": ("Learner._snap", 1),
    "snapping": ("snap_table", 2),
    "settling": ("Learner._settle", 2),
    "last checkpoint": ("Checkpoint.write", 4),
    "report": ("examine_routers", 1),
}
IN_BACKWARD = ("a step's second batch", "before a ratio's step")
"""Places between a backward that reaches the masters and their step."""


@pytest.mark.parametrize("place", PLACES)
def test_a_fresh_model_goes_on_to_the_same_end(place: str, uninterrupted: dict[str, Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    interrupt(fresh(), "all", folder, *PLACES[place])
    assert same_outcome(run(fresh(), "all", folder), uninterrupted["all"])


@pytest.mark.parametrize(
    "place",
    [
        *("dense outputs", "learning", "before snapping", "settling", "report"),
        *(pytest.param(place) for place in IN_BACKWARD),
    ],
)
def test_the_same_model_goes_on_to_the_same_end(place: str, uninterrupted: dict[str, Outcome], tmp_path: Path) -> None:
    model, folder = fresh(), tmp_path / "checkpoint"
    interrupt(model, "all", folder, *PLACES[place])
    assert not diffcr_compile.ratios(model).any()
    assert same_outcome(run(model, "all", folder), uninterrupted["all"])


@pytest.mark.parametrize(
    ("trainable", "again", "place"),
    [
        ("lora", False, "before snapping"),
        ("lora", True, "learning"),
        ("lora", False, "settling"),
        ("routers", False, "learning"),
        ("routers", True, "settling"),
    ],
)
def test_adapters_and_routers_go_on_too(
    trainable: str, again: bool, place: str, uninterrupted: dict[str, Outcome], tmp_path: Path
) -> None:
    model, folder = fresh(), tmp_path / "checkpoint"
    before = snapshot(model)
    interrupt(model, trainable, folder, *PLACES[place])
    assert same_snapshot(snapshot(model), before)
    assert same_outcome(run(model if again else fresh(), trainable, folder), uninterrupted[trainable])


def test_interrupted_again_and_again(uninterrupted: dict[str, Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    steps = []
    for _ in range(2):
        interrupt(fresh(), "all", folder, "Checkpoint.write", 3 - len(steps))
        steps.append(json.loads((folder / "calibration.json").read_text())["progress"]["step"])
    assert steps == [3, 6]
    assert same_outcome(run(fresh(), "all", folder), uninterrupted["all"])


@pytest.mark.parametrize("trainable", CONFIGS)
def test_checkpoints_change_nothing_and_a_finished_one_gives_the_same_again(
    trainable: str, uninterrupted: dict[str, Outcome], tmp_path: Path
) -> None:
    folder = tmp_path / "made" / "on the way"
    assert same_outcome(run(fresh(), trainable, folder), uninterrupted[trainable])
    names = sorted(entry.name for entry in folder.iterdir())
    targets = [] if trainable == "routers" else ["targets-0.safetensors"]
    assert names == ["calibration.json", "step-000008.safetensors", *targets]
    with stopped_at("Learner._backward", 1):  # no step is taken
        assert same_outcome(run(fresh(), trainable, folder), uninterrupted[trainable])


@pytest.mark.parametrize(
    "trainable",
    [
        "all",
        "routers",
    ],
)
def test_a_finished_one_gives_the_same_again_in_the_model_it_was_learned_in(
    trainable: str, uninterrupted: dict[str, Outcome], tmp_path: Path
) -> None:
    model = fresh()
    run(model, trainable, tmp_path)
    assert same_outcome(run(model, trainable, tmp_path), uninterrupted[trainable])


def test_adapters_that_were_merged_are_not_merged_again(tmp_path: Path) -> None:
    model = fresh()
    run(model, "lora", tmp_path)
    before = snapshot(model)
    with pytest.raises(ArtefactError, match=r"other settings \(weights\)"):
        run(model, "lora", tmp_path)
    assert same_snapshot(snapshot(model), before)


def test_a_loss_of_ones_own_goes_on(tmp_path: Path) -> None:
    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        return model(**batch).square().mean()

    options: dict[str, Any] = {"loss": loss, "config": {"estimator": "single-pass"}}
    expected = run(fresh(), "all", None, **options)
    interrupt(fresh(), "all", tmp_path, "Learner._note", 6, **options)
    assert not list(tmp_path.glob("targets-*"))
    assert same_outcome(run(fresh(), "all", tmp_path, **options), expected)


def test_a_loss_that_draws_noise_goes_on(tmp_path: Path) -> None:
    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        return (model(**batch) - torch.randn(batch["x"].shape)).square().mean()

    torch.manual_seed(0)
    expected = run(fresh(), "all", None, loss=loss)
    torch.manual_seed(0)
    interrupt(fresh(), "all", tmp_path, "Learner._note", 6, loss=loss)
    torch.manual_seed(0)
    assert same_outcome(run(fresh(), "all", tmp_path, loss=loss), expected)


def test_killed_before_the_first_record_it_begins_anew(
    uninterrupted: dict[str, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no dense outputs are kept, its tensors are all that lies there."""

    def stop(record: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "record_checksum", stop)
        with pytest.raises(KeyboardInterrupt):
            run(fresh(), "routers", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["step-000000.safetensors"]
    assert same_outcome(run(fresh(), "routers", tmp_path), uninterrupted["routers"])


def test_it_goes_on_at_other_rates(tmp_path: Path) -> None:
    """As after learning that diverged: from the last checkpoint, and from there on at the new rates."""
    interrupt(fresh(), "all", tmp_path, "Learner._note", 5)
    halved = {"learning_rate": 5e-4, "router_learning_rate": 5e-4, "max_grad_norm": 0.1}
    report, weights = run(fresh(), "all", tmp_path, config=halved)
    expected, others = run(fresh(), "all", None, config=halved)
    assert [entry["step"] for entry in report.history] == list(range(8))
    assert [entry["loss"] for entry in report.history[:3]] != [entry["loss"] for entry in expected.history[:3]]
    assert not same_bits(weights, others)
    with pytest.raises(ArtefactError, match=r"other settings \(calibration\)"):
        run(fresh(), "all", tmp_path, config={"ramp": 0.4})


def test_what_was_frozen_meanwhile_is_another_setting(tmp_path: Path) -> None:
    interrupt(fresh(), "all", tmp_path, "Learner._note", 5)
    model = fresh()
    model.embed.requires_grad_(False)
    with pytest.raises(ArtefactError, match=r"other settings \(frozen\)"):
        run(model, "all", tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_go_on_from_those_of_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    def half(folder: Path | None) -> Outcome:
        batches = [{**batch, "x": batch["x"].to(dtype)} for batch in BATCHES]
        model = routed(SHAPE, dtype)
        report = diffcr_compile.calibrate(model, batches, budget=BUDGETS, config=CONFIGS["all"], checkpoint=folder)
        return report, [parameter.detach().clone() for parameter in model.parameters()]

    with stopped_at("Learner._note", 5), pytest.raises(KeyboardInterrupt):
        half(tmp_path)
    assert same_outcome(half(tmp_path), half(None))


def test_measured_latencies_are_those_of_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = 1.0

    def measure(model: Any, inputs: Any, costs: Any) -> Any:
        """The second measurement finds the skipped tokens less rewarding."""
        times = tuple(1 - place / 10 * scale for place in range(11))
        blocks = tuple(BlockTime(20, times) for _ in costs.blocks)
        return type(costs)(2.0, blocks, "latency")

    monkeypatch.setattr(train, "measure_latency", measure)
    options: dict[str, Any] = {"config": {"budget_kind": "latency"}}
    expected = run(fresh(), "all", None, **options)
    interrupt(fresh(), "all", tmp_path, "Learner._settle", 2, **options)
    scale = 0.8
    found = run(fresh(), "all", tmp_path, **options)
    assert found[0].share <= found[0].budget
    assert same_outcome(found, expected)


# Refusals.


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint from the middle of settling."""
    folder = tmp_path_factory.mktemp("checkpoint")
    interrupt(fresh(), "all", folder, "Learner._note", 8)
    return folder


def refused(folder: Path, match: str, **options: Any) -> None:
    """Calibration from ``folder`` is refused, and leaves the model as it was."""
    model = fresh()
    before = snapshot(model)
    with pytest.raises(ArtefactError, match=match):
        run(model, "all", folder, **options)
    assert same_snapshot(snapshot(model), before)
    assert not diffcr_compile.ratios(model).any()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": 0.6}, "budgets"),
        ({"config": {"seed": 1}}, "calibration"),
        ({"config": {"steps": 9}}, "calibration"),
        ({"config": {"trainable": "routers"}, "budget": (0.5, 0.7)}, "budgets, calibration"),
        pytest.param(
            {"loss": lambda model, batch: model(**batch).square().mean()},
            "batches, loss",
        ),
    ],
)
def test_other_settings_are_refused_by_name(copied: Path, options: dict[str, Any], named: str) -> None:
    refused(copied, rf"other settings \({named}\)", **options)


def test_a_table_that_it_did_not_begin_with_is_refused(tmp_path: Path) -> None:
    """The budget's schedule begins at its cost, and with settle=1 it is all there is."""
    settled: dict[str, Any] = {"budget": 0.9, "config": {"settle": 1.0, "ramp": 0.0, "steps": 4}}
    for begun, options in ((0.5, settled), (0.2, {})):
        folder = tmp_path / f"from-{begun}"
        model = fresh()
        diffcr_compile.set_ratios(model, begun)
        through = run(model, "routers", folder, **options)
        for other in (0.0, 0.3):
            model = fresh()
            diffcr_compile.set_ratios(model, other)
            with pytest.raises(ArtefactError, match=r"other settings \(table\)"):
                run(model, "routers", folder, **options)
            assert bool((diffcr_compile.ratios(model) == torch.tensor(other)).all())
        model = fresh()
        diffcr_compile.set_ratios(model, begun)
        assert same_outcome(run(model, "routers", folder, **options), through)


def test_outputs_that_share_memory_are_kept(tmp_path: Path) -> None:
    class Twice(TinyDiT):
        def forward(self, **inputs: Any) -> dict[str, Tensor]:  # type: ignore[override]
            output = super().forward(**inputs)
            return {"sample": output, "again": output}

    model = original(SHAPE)
    model.__class__ = Twice
    diffcr_compile.transform(model, example_inputs=BATCHES[0])
    run(model, "all", tmp_path / "kept")
    assert (tmp_path / "kept" / "targets-0.safetensors").is_file()


def test_another_number_of_batches_and_another_model_are_refused_by_name(halfway: Path) -> None:
    config = CONFIGS["all"]
    with pytest.raises(ArtefactError, match=r"other settings \(batches\)"):
        diffcr_compile.calibrate(fresh(), BATCHES[:2], budget=BUDGETS, config=config, checkpoint=halfway)
    other = Shape("plain", depth=3, heads=1, head_dim=6)
    with pytest.raises(ArtefactError, match=r"other settings \(blocks, table, weights\)"):
        diffcr_compile.calibrate(fresh(other), BATCHES, budget=BUDGETS, config=config, checkpoint=halfway)


@pytest.mark.parametrize("trainable", CONFIGS)
def test_weights_of_another_model_are_refused_and_not_overwritten(trainable: str, tmp_path: Path) -> None:
    run(fresh(), trainable, tmp_path)
    other = fresh()
    with torch.no_grad():
        other.head.bias[-1] += 1
    before = snapshot(other)
    with pytest.raises(ArtefactError, match=r"other settings \(weights\). Give .* or delete it to start anew"):
        run(other, trainable, tmp_path)
    assert same_snapshot(snapshot(other), before)


def test_as_many_other_batches_are_refused_where_their_dense_outputs_are_kept(halfway: Path) -> None:
    others = [*BATCHES[:2], {**BATCHES[2], "x": BATCHES[2]["x"] * 1.001}]
    with pytest.raises(ArtefactError, match=r"other settings \(batches\)"):
        diffcr_compile.calibrate(fresh(), others, budget=BUDGETS, config=CONFIGS["all"], checkpoint=halfway)


def test_a_loss_of_ones_own_goes_on_with_batches_drawn_anew(tmp_path: Path) -> None:
    def loss(model: Any, batch: dict[str, Any]) -> Tensor:
        return model(**batch).square().mean()

    interrupt(fresh(), "all", tmp_path, "Learner._note", 6, loss=loss)
    noised = [{**batch, "x": batch["x"] + 1} for batch in BATCHES]
    report = diffcr_compile.calibrate(
        fresh(), noised, budget=BUDGETS, config=CONFIGS["all"], checkpoint=tmp_path, loss=loss
    )
    assert len(report.history) == 8


def test_a_digest_tells_names_shapes_types_and_values() -> None:
    x = torch.arange(5000.0)
    later, swapped = (
        x.index_copy(0, torch.tensor([4994, 4997]), torch.tensor(values)) for values in ((1.0, 2.0), (4997.0, 4994.0))
    )
    signs = x.index_copy(0, torch.tensor([1235, 1238]), torch.tensor([-1235.0, -1238.0]))
    trees = [
        {"a": x},
        {"b": x},
        {"a": x.view(2, -1)},
        {"a": x.double()},
        {"a": later},
        {"a": swapped},
        {"a": signs},
        {"a": x, "b": 1},
        {"a": x, "b": 1.0},
    ]
    digests = [digest(iterate_leaves(tree)) for tree in trees]
    assert len(set(digests)) == len(digests)
    assert digest(iterate_leaves({"a": x.clone(), "b": object()})) == digest(iterate_leaves({"a": x, "b": object()}))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.complex64]
)
def test_every_bit_of_a_tensor_is_in_its_digest(dtype: torch.dtype) -> None:
    """In odd numbers, across several chunks, through views that lie anywhere."""
    values = (torch.rand(300_011, generator=torch.Generator().manual_seed(0)) < 0.5).to(dtype)
    (known,) = found = {digest([("a", values)]), digest([("a", values.repeat(2)[300_011:])])}
    for place in (0, 1, 131_071, 131_072, 262_143, 262_144, 300_010):
        other = values.clone()
        other[place] = int(not values[place])
        found.add(digest([("a", other)]))
    assert len(found) == 8
    assert known in found


def test_quantised_weights_have_a_digest() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    models = [nn.Linear(32, 32), nn.Linear(32, 32)]
    for model in models:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert digest_weights(models[0]) == digest_weights(copy.deepcopy(models[0])) != digest_weights(models[1])


def test_a_file_or_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for path in (file, folder):
        refused(path, "exists and holds no calibration's checkpoints")
    assert file.read_text() == "mine"
    assert [entry.name for entry in folder.iterdir()] == ["thesis.txt"]


@pytest.fixture
def copied(halfway: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "copy"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 5000, '{"type": 1, "version": 1}', "\udce9"])
def test_damaged_json_is_refused(copied: Path, text: str) -> None:
    (copied / "calibration.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(copied, "calibration.json is damaged: .* Delete .* to start anew")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("type", "diffcr_compile.routing", "expected 'diffcr_compile.calibration', version 4"),
        ("version", 1, "version 1; expected"),
        ("version", 5, "version 5; expected"),
        ("version", "1", "version '1'; expected"),
        ("tensors", "step-000099.safetensors", "lacks the file 'step-000099.safetensors'"),
        ("tensors", "../copy/step-000006.safetensors", "lacks the file"),
        ("sha256", "0" * 64, "truncated or changed"),
        *(
            pytest.param(key, value, "damaged")
            for key, value in (("settings", None), ("settings", 3), ("progress", None), ("progress", {}))
        ),
    ],
)
def test_a_changed_entry_is_refused(copied: Path, key: str, value: Any, match: str) -> None:
    file = copied / "calibration.json"
    record = json.loads(file.read_text())
    record |= {key: value}
    file.write_text(json.dumps(record | {"checksum": record_checksum(record)}))
    refused(copied, match)


@pytest.mark.parametrize("length", [0, 7, 100, -1, None])
@pytest.mark.parametrize("name", ["step-000006.safetensors", "targets-0.safetensors"])
def test_truncated_and_missing_tensors_are_refused(copied: Path, name: str, length: int | None) -> None:
    file = copied / name
    file.write_bytes(file.read_bytes()[:length])
    if length is None:
        file.unlink()
    model = fresh()
    with pytest.raises(ArtefactError, match=rf"{name}'?.*[Dd]elete .* to start anew"):
        run(model, "all", copied)
    assert not diffcr_compile.ratios(model).any()


@pytest.mark.parametrize(
    "name",
    [
        "step-000006.safetensors",
        pytest.param(
            "targets-0.safetensors",
        ),
    ],
)
def test_missing_tensors_leave_the_model_as_it_was(copied: Path, name: str) -> None:
    (copied / name).unlink()
    refused(copied, f"lacks the file '{name}'")


def test_targets_of_another_run_are_refused(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copied / "targets-0.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    refused(copied, "targets-0")


@pytest.mark.parametrize(
    "name",
    [
        "step-000006.safetensors",
        pytest.param("calibration.json"),
        pytest.param("targets-0.safetensors"),
    ],
)
def test_single_flipped_bits_are_refused_or_do_nothing(
    halfway: Path, copied: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    settings = json.loads((halfway / "calibration.json").read_text())["settings"]

    def read(folder: Path) -> Any:
        checkpoint = Checkpoint(folder, settings)
        found = checkpoint.read()
        assert found is not None
        return found[0], found[1], checkpoint.read_targets()

    progress, tensors, targets = read(halfway)
    data = (halfway / name).read_bytes()
    generator = random.Random(0)
    bad: list[str] = []
    outcomes = {"refused": 0, "same": 0}
    for _ in range(cases(300, 5000)):
        place = generator.randrange(8 * len(data))
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        (copied / name).write_bytes(changed)
        try:
            found = read(copied)
        except ArtefactError:
            outcomes["refused"] += 1
            continue
        except Exception as error:
            bad.append(f"bit {place}: {type(error).__name__}: {error}")
            continue
        same = found[0] == progress and set(found[1]) == set(tensors) and same_bits(found[2], targets)
        if same and all(torch.equal(found[1][key], value) for key, value in tensors.items()):
            outcomes["same"] += 1
        else:
            bad.append(f"bit {place} changes what is read")
    assert outcomes["refused"] > 0
    assert bad == []
    record_property("refused", outcomes["refused"])
    record_property("read the same", outcomes["same"])


def cases(quick: int, nightly: int) -> int:
    return nightly if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else quick


# Kills.


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def kill_at_random(folder: Path, kills: int) -> dict[str, Any]:
    """Runs one calibration through, killing it ``kills`` times on the way; what it ended with, against one that nobody killed.

    The parent never runs backward: a child forked after that could not.
    """

    def calibrate_into(target: Path, checkpoint: Path | None) -> Callable[[], None]:
        def work() -> None:
            report, parameters = run(fresh(), "all", checkpoint)
            torch.save({"report": replace(report, seconds=0.0).to_dict(), "parameters": parameters}, target)

        return work

    fresh()
    start = time.perf_counter()
    os.waitpid(fork(calibrate_into(folder / "expected", None)), 0)
    longest = time.perf_counter() - start
    generator = random.Random(0)
    found, checkpoint, killed, resumed = folder / "found", folder / "checkpoint", 0, 0
    while killed < kills:
        shutil.rmtree(checkpoint, ignore_errors=True)
        for _ in range(2):  # a second kill meets a checkpoint
            child = fork(calibrate_into(found, checkpoint))
            time.sleep(generator.uniform(0.1, 0.9) * longest)
            os.kill(child, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        steps = sorted(path.name for path in checkpoint.glob("*.safetensors")) if checkpoint.exists() else []
        resumed += len(steps) > 0
        found.unlink(missing_ok=True)
        _, status = os.waitpid(fork(calibrate_into(found, checkpoint)), 0)
        if status:
            return {"killed": killed, "same": False, "why": f"status {status} with {steps}"}
        ours, theirs = torch.load(found), torch.load(folder / "expected")
        if ours["report"] != theirs["report"] or not same_bits(ours["parameters"], theirs["parameters"]):
            return {"killed": killed, "same": False, "why": f"another end with {steps}"}
    return {"killed": killed, "resumed": resumed, "same": True, "why": ""}


@pytest.mark.slow
def test_killed_at_random_it_goes_on_to_the_same_end(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, __file__, str(tmp_path), str(cases(3, 50))]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["same"], found["why"]
    assert found["killed"] >= cases(3, 50)
    assert found["resumed"] > 0  # from a checkpoint, not from the beginning
    record_property("kills", found["killed"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(kill_at_random(Path(sys.argv[1]), int(sys.argv[2]))))
