"""``save`` and ``load``: the same outputs in a fresh process; damage is refused and the model left alone."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffcr_compile.passes import new_calls
from models import Shape, TinyDiT, original, routed, same_bits, same_snapshot, snapshot, tiny_inputs

import diffcr_compile
from diffcr_compile import ArtefactError, CalibrationReport
from diffcr_compile.artefact import record_checksum

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained")

SHAPE = Shape("joint", depth=2, heads=1, head_dim=6)
INPUTS = tiny_inputs(SHAPE, timestep=torch.tensor([20.0, 500.0, 990.0]))
MASKED = tiny_inputs(replace(SHAPE, masked=True), timestep=torch.tensor([500.0, 500.0, 500.0]))


@pytest.fixture
def model() -> TinyDiT:
    model = routed(SHAPE)
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            block.diffcr_router.weight.copy_(torch.randn(6, generator=torch.Generator().manual_seed(index)))
    diffcr_compile.set_ratios(model, [[0.1, 0.2], [0.333, 0.4], [0.5, 0.6], [0.7, 1.0]])
    return model


@pytest.fixture
def saved(model: TinyDiT, tmp_path: Path) -> Path:
    diffcr_compile.save(model, tmp_path / "routing")
    return tmp_path / "routing"


def test_a_loaded_model_is_the_saved_one(model: TinyDiT, saved: Path) -> None:
    other = original(SHAPE)
    assert diffcr_compile.load(other, saved) is other
    assert same_bits(other(**INPUTS), model(**INPUTS))
    assert torch.equal(diffcr_compile.ratios(other), diffcr_compile.ratios(model))
    assert str(diffcr_compile.explain(other)) == str(diffcr_compile.explain(model))
    assert diffcr_compile.cost(other, INPUTS) == diffcr_compile.cost(model, INPUTS)
    diffcr_compile.restore(other)
    assert same_snapshot(snapshot(other), snapshot(original(SHAPE)))


def test_a_model_is_loaded_on_the_meta_device_and_given_its_weights_later(model: TinyDiT, saved: Path) -> None:
    other = diffcr_compile.load(original(SHAPE).to("meta"), saved).to_empty(device="cpu")
    other.load_state_dict(original(SHAPE).state_dict())
    assert same_bits(other(**INPUTS), model(**INPUTS))


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_outputs(model: TinyDiT, saved: Path, tmp_path: Path) -> None:
    torch.save((original(SHAPE).state_dict(), INPUTS), tmp_path / "given.pt")
    code = f"""
import sys, torch
import diffcr_compile
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from models import Shape, TinyDiT
torch.set_num_threads(1)
weights, inputs = torch.load("given.pt")
model = TinyDiT({SHAPE!r}).eval()
model.load_state_dict(weights, strict=True)
torch.save(diffcr_compile.load(model, "routing")(**inputs).detach(), "output.pt")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert same_bits(torch.load(tmp_path / "output.pt"), model(**INPUTS).detach())


def test_nothing_is_pickled_and_no_weights_are_stored(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["routers.safetensors", "routing.json"]
    record = json.loads((saved / "routing.json").read_text())
    assert (record["type"], record["version"]) == ("diffcr_compile.routing", 2)
    assert (saved / "routers.safetensors").stat().st_size < 1000


def test_saving_again_replaces(model: TinyDiT, saved: Path) -> None:
    diffcr_compile.set_ratios(model, 0.9)
    diffcr_compile.save(model, saved)
    other = diffcr_compile.load(original(SHAPE), saved)
    assert torch.equal(diffcr_compile.ratios(other), torch.full((4, 2), 0.9))
    assert [path.name for path in saved.parent.iterdir()] == ["routing"]


def test_saving_again_leaves_other_files_alone(model: TinyDiT, saved: Path) -> None:
    (saved / "model").mkdir()
    (saved / "model" / "weights.safetensors").write_text("hours of training")
    (saved / "report.png").write_text("a picture")
    diffcr_compile.set_ratios(model, 0.9)
    diffcr_compile.save(model, saved)
    assert (saved / "model" / "weights.safetensors").read_text() == "hours of training"
    assert (saved / "report.png").read_text() == "a picture"
    assert sorted(path.name for path in saved.iterdir()) == [
        "model",
        "report.png",
        "routers.safetensors",
        "routing.json",
    ]
    assert torch.equal(diffcr_compile.ratios(diffcr_compile.load(original(SHAPE), saved)), torch.full((4, 2), 0.9))


def test_a_save_that_fails_leaves_what_was_there(model: TinyDiT, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    diffcr_compile.set_ratios(model, 0.9)
    with torch.no_grad():
        model.blocks[0].diffcr_router.weight.zero_()
    write = Path.write_bytes

    def write_or_fail(self: Path, data: bytes) -> int:
        if "routing.json" in self.name:
            write(self, data[:50])
            raise OSError("no space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_or_fail)
    with pytest.raises(OSError, match="no space"):
        diffcr_compile.save(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_first_save_that_was_killed_hinders_no_other(model: TinyDiT, saved: Path) -> None:
    (saved / "routing.json").rename(saved / ".routing.json.0123")
    (saved / "routers.safetensors").rename(saved / "..routers.safetensors.0123.4567")
    diffcr_compile.save(model, saved)
    assert diffcr_compile.load(original(SHAPE), saved)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_the_umask_is_honoured(model: TinyDiT, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        diffcr_compile.save(model, tmp_path / "new" / "routing")
    finally:
        os.umask(before)
    folders, files = [tmp_path / "new", tmp_path / "new" / "routing"], list((tmp_path / "new" / "routing").iterdir())
    assert [mode(path) for path in folders] == [0o777 & ~umask] * 2
    assert [mode(path) for path in files] == [0o666 & ~umask] * 2


def test_files_of_another_program_are_let_be(model: TinyDiT, tmp_path: Path) -> None:
    """Though they have the names of ours."""
    (tmp_path / "routing.json").write_text('{"routes": ["/home"]}')
    with pytest.raises(ArtefactError, match="is no saved routing"):
        diffcr_compile.save(model, tmp_path)
    (tmp_path / "routing.json").unlink()
    (tmp_path / "routing.json").mkdir()
    with pytest.raises(ArtefactError, match="is no saved routing"):
        diffcr_compile.save(model, tmp_path)
    diffcr_compile.save(model, tmp_path / "ours")
    (tmp_path / "ours" / "report.json").write_text('{"mine": 1}')
    diffcr_compile.save(model, tmp_path / "ours")
    assert (tmp_path / "ours" / "report.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(model: TinyDiT, tmp_path: Path, there: bool) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    if there:
        (tmp_path / "real").mkdir()
    diffcr_compile.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["routers.safetensors", "routing.json"]


def test_the_working_directory_is_a_place(model: TinyDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        diffcr_compile.save(model, ".")
    assert same_bits(diffcr_compile.load(original(SHAPE), ".")(**INPUTS), model(**INPUTS))


def test_no_report_of_another_routing_stays(model: TinyDiT, tmp_path: Path) -> None:
    config = diffcr_compile.CalibrationConfig(steps=2, trainable="routers")
    diffcr_compile.calibrate(model, [INPUTS], budget=0.8, config=config)
    diffcr_compile.save(model, tmp_path / "routing")
    assert (tmp_path / "routing" / "report.json").is_file()
    diffcr_compile.save(routed(SHAPE), tmp_path / "routing")
    assert not (tmp_path / "routing" / "report.json").exists()


def test_save_touches_nothing_of_anothers(model: TinyDiT, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("words")
    for name in ("mine", "file"):
        with pytest.raises(ArtefactError, match="exists and is no saved routing"):
            diffcr_compile.save(model, tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "words"


def test_calibration_is_remembered(model: TinyDiT, tmp_path: Path) -> None:
    config = diffcr_compile.CalibrationConfig(steps=2, trainable="routers")
    diffcr_compile.calibrate(model, [INPUTS], budget=0.8, config=config)
    diffcr_compile.save(model, tmp_path / "routing")
    other = diffcr_compile.load(original(SHAPE), tmp_path / "routing")
    assert diffcr_compile.explain(other).trained
    assert same_bits(other(**INPUTS), model(**INPUTS))


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    def damage(path: Path) -> None:
        record = json.loads((path / "routing.json").read_text())
        change(record)
        record["checksum"] = record_checksum(record)
        (path / "routing.json").write_text(json.dumps(record))

    return damage


def truncate(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-20]) and None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "routing.json").unlink(), "holds no saved routing; expected the files routing.json and"),
        (lambda path: (path / "routers.safetensors").unlink(), "holds no saved routing"),
        (truncate("routing.json"), "routing.json is damaged"),
        (truncate("routers.safetensors"), "truncated or changed"),
        (lambda path: (path / "routing.json").write_text("[" * 100_000), "routing.json is damaged"),
        (lambda path: (path / "routing.json").write_bytes(b"\xff\xfe\x00"), "routing.json is damaged"),
        (edit(lambda record: record.update(type="cat")), "expected type 'diffcr_compile.routing'"),
        (edit(lambda record: record.update(version=3)), "version 3, newer than this package knows"),
        (edit(lambda record: record.update(fingerprint="0" * 64)), "made for another architecture than this TinyDiT"),
        (edit(lambda record: record.pop("plan")), "damaged: KeyError"),
        (edit(lambda record: record["config"].update(colour=1)), "no option named 'colour'"),
        (edit(lambda record: record["table"].pop()), r"expected a ratio table of shape \(4, 2\)"),
        (edit(lambda record: record["table"][0].__setitem__(0, 1001)), "ratios of whole thousandths"),
        (edit(lambda record: record["table"].__setitem__(0, 3)), "damaged"),
        (edit(lambda record: record.update(sha256="")), "truncated or changed"),
    ],
)
def test_damage_is_refused(saved: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(saved)
    model = original(SHAPE)
    with pytest.raises(ArtefactError, match=says):
        diffcr_compile.load(model, saved)
    assert same_snapshot(snapshot(model), snapshot(original(SHAPE)))
    assert same_bits(model(**INPUTS), original(SHAPE)(**INPUTS))


@pytest.fixture
def later(model: TinyDiT, tmp_path: Path) -> Path:
    """The routing of a model that was called with a mask, once it was analysed without."""
    model(**MASKED)
    diffcr_compile.save(model, tmp_path / "later")
    return tmp_path / "later"


def test_kinds_of_call_that_were_met_later_are_saved_too(
    model: TinyDiT, later: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = diffcr_compile.load(original(SHAPE), later)
    monkeypatch.setattr(new_calls, "capture_calls", lambda analysis: pytest.fail("a kind of call is analysed again"))
    for inputs in (INPUTS, MASKED):
        assert same_bits(other(**inputs), model(**inputs))
    assert str(diffcr_compile.explain(other)) == str(diffcr_compile.explain(model))
    assert "met later" in str(diffcr_compile.explain(other))
    diffcr_compile.save(other, later)
    again = diffcr_compile.load(original(SHAPE), later)
    assert same_bits(again(**MASKED), model(**MASKED))


def test_a_routing_of_before_they_were_saved_is_loaded(model: TinyDiT, saved: Path) -> None:
    edit(age)(saved)
    other = diffcr_compile.load(original(SHAPE), saved)
    for inputs in (INPUTS, MASKED):
        assert same_bits(other(**inputs), model(**inputs))


def age(record: dict) -> None:  # type: ignore[type-arg]
    """What the first version wrote."""
    record["version"] = 1
    fields = record["plan"]["dict"]
    fields[:] = [item for item in fields if not item[0].startswith("later")]


def change_later(name: str, value: Callable[[dict], object]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    """Have the plan's field ``name``, which the record holds as a tagged tuple, be what ``value`` makes of its items."""

    def change(record: dict) -> None:  # type: ignore[type-arg]
        (field,) = (item for item in record["plan"]["dict"] if item[0] == name)
        field[1] = {"tuple": value(field[1]["tuple"])}

    return edit(change)


def set_in(items: list, name: str, value: object) -> list:  # type: ignore[type-arg]
    """The first of tagged dictionaries with another value."""
    first = {"dict": [[key, value if key == name else old] for key, old in items[0]["dict"]]}
    return [first, *items[1:]]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change_later("later_families", lambda items: []), "of an unknown later family"),
        (change_later("later_families", lambda items: [1]), "is damaged"),
        (change_later("later_families", lambda items: set_in(items, "width", 7)), "the width is the stream's"),
        (change_later("later_families", lambda items: set_in(items, "stream", 9)), "the stream is one of the inputs"),
        (change_later("later_families", lambda items: set_in(items, "kind", "Other")), "has other tokens routed"),
        (change_later("later_families", lambda items: set_in(items, "outputs", {"tuple": []})), "is damaged"),
        (change_later("later_families", lambda items: set_in(items, "signature", {"tuple": []})), "the signature is"),
        (change_later("later_families", lambda items: set_in(items, "context", "all")), "context was not asked for"),
        (change_later("later_sites", lambda items: set_in(items, "fqn", "embed")), "was called later, and is not"),
        (change_later("later_sites", lambda items: set_in(items, "family", -1)), "of an unknown later family"),
        (change_later("later_sites", lambda items: set_in(items, "family", True)), "of an unknown later family"),
        (change_later("later_sites", lambda items: [*items, items[0]]), "has one plan for a kind of call"),
        (change_later("later_sites", lambda items: ["blocks.0"]), "is damaged"),
        (truncate("routing.json"), "routing.json is damaged"),
    ],
)
def test_damage_to_what_was_met_later_is_refused(later: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(later)
    model = original(SHAPE)
    with pytest.raises(ArtefactError, match=says):
        diffcr_compile.load(model, later)
    assert same_snapshot(snapshot(model), snapshot(original(SHAPE)))


def test_another_models_routing_is_refused(saved: Path) -> None:
    other = original(Shape("joint", depth=2, heads=2, head_dim=6))
    with pytest.raises(ArtefactError, match=r"Classes, names and shapes of all parameters must agree"):
        diffcr_compile.load(other, saved)


def test_load_on_a_transformed_model(model: TinyDiT, saved: Path) -> None:
    with pytest.raises(diffcr_compile.AlreadyTransformedError, match="restore"):
        diffcr_compile.load(model, saved)


def test_save_on_a_plain_model(tmp_path: Path) -> None:
    with pytest.raises(diffcr_compile.NotTransformedError, match="TinyDiT is not transformed"):
        diffcr_compile.save(original(SHAPE), tmp_path / "routing")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def calibrated() -> tuple[TinyDiT, CalibrationReport]:
    model = routed(SHAPE)
    config = diffcr_compile.CalibrationConfig(preset="training-free")
    return model, diffcr_compile.calibrate(model, [INPUTS], budget=(0.8, 0.6), config=config)


def test_a_report_goes_from_save_to_load_to_save(calibrated: tuple[TinyDiT, CalibrationReport], tmp_path: Path) -> None:
    model, report = calibrated
    diffcr_compile.save(model, tmp_path / "first")
    diffcr_compile.save(diffcr_compile.load(original(SHAPE), tmp_path / "first"), tmp_path / "second")
    assert CalibrationReport.load(tmp_path / "second").to_dict() == report.to_dict()
    (tmp_path / "second" / "report.json").write_text("[]")
    with pytest.raises(ArtefactError, match=r"report\.json is damaged: .* Delete it, and the routing loads without"):
        diffcr_compile.load(original(SHAPE), tmp_path / "second")


def test_a_report_is_written_beside_the_tables_that_its_calibration_made(
    calibrated: tuple[TinyDiT, CalibrationReport], tmp_path: Path
) -> None:
    model, report = copy.deepcopy(calibrated)
    for place, (table, told) in enumerate(((report.tables[0.6], True), (0.5, False), (report.table, True))):
        diffcr_compile.set_ratios(model, table)
        diffcr_compile.save(model, tmp_path / str(place))
        assert (tmp_path / str(place) / "report.json").is_file() is told
