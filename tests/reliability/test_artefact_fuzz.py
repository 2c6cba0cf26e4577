"""``load`` on what is no artefact, or no longer one: refused with a message and the model left alone, or loaded equal.

Every case starts from one directory that ``save`` wrote, and damages it: at random (truncation, flipped bits), by kind (shapes,
headers, numbers, paths) or field by field, with the checksum of the routers made anew so that the checks behind it are reached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from models import Shape, original, same_bits, same_snapshot, snapshot, tiny_inputs
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

import diffcr_compile
from diffcr_compile import ArtefactError
from diffcr_compile.artefact import record_checksum
from diffcr_compile.routed import STATE
from reliability.support import cases, randomise_routers, transformed

pytestmark = pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore:There is a performance drop")

SHAPE = Shape("rotary", depth=2, heads=2, head_dim=4)
INPUTS = tiny_inputs(SHAPE, timestep=torch.tensor([20.0, 500.0, 990.0]))
JSON, TENSORS = "routing.json", "routers.safetensors"
Record = dict[str, Any]
Outcome = Literal["refused", "equal", "different"]

MiB = 2**20
ALLOWANCE = 64 * MiB
"""Address space that a refusal may take beyond what the process has: the artefact of a model of 60 blocks is below one MiB."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as ``save`` writes it."""
    model = randomise_routers(transformed(SHAPE))
    diffcr_compile.set_ratios(model, [[0.1, 0.2], [0.333, 0.4], [0.5, 0.6], [0.7, 1.0]])
    folder = tmp_path_factory.mktemp("artefact") / "routing"
    diffcr_compile.save(model, folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "routing"))


@pytest.fixture(scope="module")
def expected(whole: Path) -> tuple[Tensor, str]:
    """Output and explanation of a model that loaded the whole artefact."""
    model = diffcr_compile.load(original(SHAPE), whole)
    return model(**INPUTS).detach(), str(diffcr_compile.explain(model))


@pytest.fixture(autouse=True)
def count_outcomes(monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> Iterator[None]:
    """How often ``load`` refused and how often it did not, noted for ``examples/benchmarks/reliability.py``."""
    load, counts = diffcr_compile.load, Counter[str]()

    def counted(*args: Any) -> Any:
        try:
            model = load(*args)
        except diffcr_compile.DiffCRError:
            counts["refused"] += 1
            raise
        counts["loaded"] += 1
        return model

    monkeypatch.setattr(diffcr_compile, "load", counted)
    yield
    for name, count in counts.items():
        record_property(name, count)


def read_record(folder: Path) -> Record:
    return json.loads((folder / JSON).read_text())


def read_routers(folder: Path) -> dict[str, Tensor]:
    """The routers by name; safetensors returns them in another order each time."""
    return dict(sorted(load_safetensors((folder / TENSORS).read_bytes()).items()))


def write(folder: Path, record: Record, tensors: bytes | None = None) -> None:
    """Put a changed record, and routers, in the place of those in ``folder``, with the checksums that ``save`` would write."""
    if tensors is not None:
        (folder / TENSORS).write_bytes(tensors)
        record["sha256"] = hashlib.sha256(tensors).hexdigest()
    record["checksum"] = record_checksum(record)
    (folder / JSON).write_text(json.dumps(record))


def refusal(folder: Path) -> str:
    """The message with which ``load`` refuses ``folder``; the model must then be as it was. Fails where it does not refuse."""
    model = original(SHAPE)
    before, forward = snapshot(model), model(**INPUTS)
    with pytest.raises(diffcr_compile.DiffCRError) as caught:
        diffcr_compile.load(model, folder)
    assert same_snapshot(snapshot(model), before)
    assert all(STATE not in vars(module) and "forward" not in vars(module) for module in model.modules())
    assert same_bits(model(**INPUTS), forward)
    return str(caught.value)


def outcome(folder: Path, expected: tuple[Tensor, str]) -> Outcome:
    """What comes of loading: a refusal that leaves the model alone, or a model that equals the saved one or does not."""
    model = original(SHAPE)
    before = snapshot(model)
    try:
        diffcr_compile.load(model, folder)
    except diffcr_compile.DiffCRError:
        assert same_snapshot(snapshot(model), before)
        return "refused"
    try:
        equal = same_bits(model(**INPUTS).detach(), expected[0]) and str(diffcr_compile.explain(model)) == expected[1]
    except Exception:  # it loaded, and what it loaded fails when it is used
        equal = False
    return "equal" if equal else "different"


def flip(data: bytes, generator: random.Random, count: int) -> bytes:
    """``data`` with ``count`` different bits flipped."""
    flipped = bytearray(data)
    for position in generator.sample(range(8 * len(data)), count):
        flipped[position // 8] ^= 1 << position % 8
    return bytes(flipped)


# Damage at random.


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_truncated_file_is_refused(folder: Path, name: str) -> None:
    data, generator = (folder / name).read_bytes(), random.Random(name)
    for length in [0, 1, len(data) - 1, *(generator.randrange(len(data)) for _ in range(cases(15, 500)))]:
        (folder / name).write_bytes(data[:length])
        assert str(folder) in refusal(folder)


def test_flipped_bits_in_the_routers_are_refused(folder: Path) -> None:
    data, generator = (folder / TENSORS).read_bytes(), random.Random(1)
    for case in range(cases(20, 1000)):
        (folder / TENSORS).write_bytes(flip(data, generator, 1 + case % 4))
        assert "truncated or changed" in refusal(folder)


def test_flipped_bits_in_the_record_never_load_something_else(folder: Path, expected: tuple[Tensor, str]) -> None:
    data, generator = (folder / JSON).read_bytes(), random.Random(2)
    table = data.index(b'"table"')
    outcomes: Counter[Outcome] = Counter()
    digit = data.index(b"100", table)
    (folder / JSON).write_bytes(data[:digit] + b"3" + data[digit + 1 :])  # one bit of a ratio
    outcomes[outcome(folder, expected)] += 1
    for case in range(cases(100, 4000)):
        start = table * (case % 2)  # the table in every other case: few of the other bytes hold a number
        (folder / JSON).write_bytes(data[:start] + flip(data[start:], generator, 1 + case % 3))
        outcomes[outcome(folder, expected)] += 1
    assert outcomes["refused"] > 0
    assert outcomes["different"] == 0


def test_another_spelling_of_the_same_record_loads_equal(folder: Path, expected: tuple[Tensor, str]) -> None:
    record = read_record(folder)
    for text in (json.dumps(record), json.dumps(record, indent=7), "\n\t " + json.dumps(record) + "\n"):
        (folder / JSON).write_text(text)
        assert outcome(folder, expected) in ("equal", "refused")


# The routers' file, with a checksum that fits.


def _renamed(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    first, *rest = tensors
    return {name: tensors[first], **{key: tensors[key] for key in rest}}


def _first_as(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {
        key: change(value) if index == 0 else value for index, (key, value) in enumerate(tensors.items())
    }


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_first_as(lambda tensor: tensor[:-1].clone()), id="short"),
        pytest.param(_first_as(lambda tensor: tensor.unsqueeze(0)), id="another rank"),
        pytest.param(_first_as(lambda tensor: tensor.new_zeros(())), id="a number"),
        pytest.param(_first_as(lambda tensor: tensor.new_zeros(0)), id="empty"),
        pytest.param(_first_as(lambda tensor: tensor.long()), id="integers"),
        pytest.param(_first_as(lambda tensor: tensor > 0), id="flags"),
        pytest.param(_first_as(lambda tensor: tensor.to(torch.complex64)), id="complex"),
        pytest.param(lambda tensors: {}, id="none at all"),
        pytest.param(lambda tensors: dict(list(tensors.items())[1:]), id="one missing"),
        pytest.param(lambda tensors: {**tensors, "blocks.9": torch.zeros(8)}, id="one more"),
        pytest.param(lambda tensors: _renamed(tensors, "../blocks.0"), id="a name that goes up"),
        pytest.param(lambda tensors: _renamed(tensors, "/blocks.0"), id="an absolute name"),
        pytest.param(lambda tensors: _renamed(tensors, ""), id="no name"),
        pytest.param(lambda tensors: _renamed(tensors, "blocks.0\0"), id="a zero in the name"),
    ],
)
def test_other_routers_are_refused(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = read_routers(folder)
    write(folder, read_record(folder), save_safetensors(change(tensors)))
    assert TENSORS in refusal(folder)


def _header(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


def _safetensors(header: bytes, data: bytes = bytes(48), length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(bytes(7), id="no length"),
        pytest.param(bytes(8), id="no header"),
        pytest.param(_safetensors(b"{}", length=2**63 - 1), id="a header of eight exbibytes"),
        pytest.param(_safetensors(b"{}", length=2**64 - 1), id="a header of all ones"),
        pytest.param(_safetensors(b"{}", length=90_000_000), id="a header of 90 megabytes"),
        pytest.param(_safetensors(b"{"), id="half a header"),
        pytest.param(_safetensors(b"[" * 100_000), id="a deep header"),
        pytest.param(_safetensors(b"\xff\xfe{}"), id="a header that is no text"),
        pytest.param(_safetensors(_header(a=_entry([2**62, 2**62], [0, 48]))), id="a shape that overflows"),
        pytest.param(_safetensors(_header(a=_entry([2**40], [0, 2**42]))), id="a tensor of four tebibytes"),
        pytest.param(_safetensors(_header(a=_entry([12], [48, 0]))), id="offsets that run backwards"),
        pytest.param(_safetensors(_header(a=_entry([-12], [0, 48]))), id="a negative size"),
        pytest.param(_safetensors(_header(a=_entry([12], [0, 10**30]))), id="an offset of a hundred bits"),
        pytest.param(_safetensors(_header(a=_entry([6], [0, 24]), b=_entry([6], [12, 36]))), id="tensors that overlap"),
        pytest.param(_safetensors(_header(a=_entry([6], [24, 48]))), id="a hole"),
        pytest.param(_safetensors(_header(a=_entry([12], [0, 48], dtype="F31"))), id="an unknown dtype"),
        pytest.param(_safetensors(_header(a=_entry([float("nan")], [0, 48]))), id="a size that is no number"),
        pytest.param(_safetensors(_header(a=_entry([1] * 100_000, [0, 4]), b=_entry([11], [4, 48]))), id="many axes"),
    ],
)
def test_headers_that_lie_are_refused(folder: Path, data: bytes) -> None:
    write(folder, read_record(folder), data)
    assert TENSORS in refusal(folder)


# Numbers and nesting in the record.


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _set(*path: Any, value: Any) -> Callable[[Record], None]:
    """Change of a record: what lies at ``path`` becomes ``value``."""

    def change(record: Record) -> None:
        place: Any = record
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_set("table", 0, 0, value=10**4000), id="a ratio of 4000 digits"),
        pytest.param(_set("table", 0, 0, value=-1), id="a ratio below zero"),
        pytest.param(_set("table", 0, 0, value=float("nan")), id="a ratio that is no number"),
        pytest.param(_set("table", 0, 0, value=float("inf")), id="an infinite ratio"),
        pytest.param(_set("table", 0, value=[0] * 100_000), id="a long row"),
        pytest.param(_set("table", value=[[0, 0]] * 100_000), id="many rows"),
        pytest.param(_set("table", value=_nested(900)), id="a deep table"),
        pytest.param(_set("plan", value=_nested(300)), id="a deep plan"),
        pytest.param(_set("plan", value=_nested(900)), id="a deeper plan"),
        pytest.param(_set("plan", value=[0] * 100_000), id="a long plan"),
        pytest.param(_set("plan", value={"dict": []}), id="an empty plan"),
        pytest.param(_set("plan", value={"dict": [], "tuple": []}), id="a plan of two kinds"),
        pytest.param(_set("plan", value={"dict": [[["families"], 1]]}), id="a key that is no name"),
        pytest.param(_set("plan", value={"record": ["os:system", [["command", "true"]]]}), id="a function for a plan"),
        pytest.param(_set("plan", value={"record": ["subprocess:Popen", [["args", "true"]]]}), id="a class for a plan"),
        pytest.param(_set("plan", value={"record": ["nowhere:Thing", []]}), id="a dataclass from nowhere"),
        pytest.param(_set("config", "num_regions", value=10**30), id="many regions"),
        pytest.param(_set("config", "num_regions", value=2.0), id="a fraction of regions"),
        pytest.param(_set("config", "timestep_range", value=[float("nan"), 1]), id="a range that is none"),
        pytest.param(_set("config", "timestep_range", value=[1, 2, 3]), id="a range of three"),
        pytest.param(_set("config", "skip", value=["identity"]), id="a list of options"),
        pytest.param(_set("config", "type", value="CalibrationConfig"), id="other options"),
        pytest.param(_set("config", "version", value=2), id="newer options"),
        pytest.param(_set("config", "colour", value=1), id="an unknown option"),
        pytest.param(_set("type", value="diffcr_compile.calibration"), id="another type"),
        pytest.param(_set("type", value=None), id="no type"),
        pytest.param(_set("version", value=3), id="a newer version"),
        pytest.param(_set("version", value=10**4000), id="a far newer version"),
        pytest.param(_set("version", value="1"), id="a version in words"),
        pytest.param(_set("version", value=None), id="no version"),
        pytest.param(_set("fingerprint", value=None), id="no fingerprint"),
        pytest.param(_set("sha256", value=None), id="no checksum"),
    ],
)
def test_numbers_and_kinds_that_no_record_has_are_refused(folder: Path, change: Callable[[Record], None]) -> None:
    record = read_record(folder)
    change(record)
    write(folder, record)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("field", ["type", "version", "config", "fingerprint", "plan", "table", "trained", "sha256"])
def test_a_missing_field_is_refused(folder: Path, field: str) -> None:
    record = read_record(folder)
    del record[field]
    write(folder, record)
    assert str(folder) in refusal(folder)


# Fields of the plan that fit no model.


def _find(node: Any, path: tuple[Any, ...]) -> Any:
    """The list that holds what lies at ``path`` of an encoded plan, and its place there."""
    ((tag, content),) = node.items()
    holder, place = content, path[0]
    if tag == "dict":
        holder, place = next(item for item in content if item[0] == path[0]), 1
    return (holder, place) if len(path) == 1 else _find(holder[place], path[1:])


def _plan(*path: Any, value: Any) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        holder, place = _find(record["plan"], path)
        holder[place] = value

    return change


FAMILY = ("families", 0)
LEAF = (*FAMILY, "leaves", 0)
OUTPUT = (*FAMILY, "outputs", 0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_plan(*FAMILY, "width", value=7), id="another width"),
        pytest.param(_plan(*FAMILY, "width", value=-8), id="a negative width"),
        pytest.param(_plan(*FAMILY, "width", value=6.5), id="a fraction of a width"),
        pytest.param(_plan("sites", 0, "fqn", value=""), id="the root as a block"),
        pytest.param(_plan("sites", 0, "fqn", value="blocks.9"), id="an unknown block"),
        pytest.param(_plan("sites", 0, "fqn", value="../blocks.0"), id="a block that goes up"),
        pytest.param(_plan("sites", 0, "fqn", value="blocks.1"), id="one block twice"),
        pytest.param(_plan(*FAMILY, "stream", value=7), id="a stream out of range"),
        pytest.param(_plan(*FAMILY, "stream", value=-1), id="a stream from behind"),
        pytest.param(_plan(*FAMILY, "stream", value=10**30), id="a huge stream"),
        pytest.param(_plan(*FAMILY, "stream", value=None), id="no stream"),
        pytest.param(_plan(*FAMILY, "stream", value="0"), id="a stream in words"),
        pytest.param(_plan(*FAMILY, "token_axis", value=7), id="a token axis out of range"),
        pytest.param(_plan(*FAMILY, "token_axis", value=0), id="tokens along the batch"),
        pytest.param(_plan(*FAMILY, "batch_axis", value=7), id="a batch axis out of range"),
        pytest.param(_plan(*FAMILY, "batch_axis", value=float("nan")), id="a batch axis of nan"),
        pytest.param(_plan(*FAMILY, "lift", value="cat"), id="an unknown lift"),
        pytest.param(_plan(*FAMILY, "context", value="none"), id="an unknown context"),
        pytest.param(_plan(*FAMILY, "context", value="all"), id="a context against the options"),
        pytest.param(_plan(*FAMILY, "arguments", "x", value=7), id="an argument out of range"),
        pytest.param(_plan(*FAMILY, "output_template", value=7), id="a template out of range"),
        pytest.param(_plan(*FAMILY, "kind", value="Block9"), id="another class of blocks"),
        pytest.param(_plan(*LEAF, "batch_axis", value=9), id="a leaf's batch axis out of range"),
        pytest.param(_plan(*LEAF, "token_axes", 0, "axis", value=9), id="a leaf's axis out of range"),
        pytest.param(
            _plan(*LEAF, "token_axes", 0, "before", value={"tuple": [{"tuple": [99, 0]}]}),
            id="tokens after an unknown leaf",
        ),
        pytest.param(_plan(*LEAF, "dims", value={"tuple": ["B"]}), id="dims of another rank"),
        pytest.param(_plan(*OUTPUT, "dims", value={"tuple": ["B", "8"]}), id="an output without tokens"),
        pytest.param(_plan(*OUTPUT, "source", value=9), id="an unknown source"),
        pytest.param(_plan(*OUTPUT, "batch_axis", value=9), id="an output's axis out of range"),
        pytest.param(_plan("sites", 0, "family", value=7), id="an unknown family"),
        pytest.param(_plan("sites", 0, "family", value=-1), id="a family from behind"),
        pytest.param(_plan("output_batch_axes", value=3), id="a number for axes"),
        pytest.param(_plan("input_batch_axes", value=None), id="no batch axes"),
        pytest.param(_plan("dense_flops", value=-1), id="negative FLOPs"),
        pytest.param(_plan("timestep", "argument", value="nope"), id="an unknown timestep input"),
        pytest.param(_plan("timestep", "low", value=1e30), id="a timestep range upside down"),
        pytest.param(_plan("timestep", "low", value=float("nan")), id="a timestep range of nan"),
        pytest.param(_set("table", 0, 0, value=1.5), id="a fraction of a thousandth"),
        pytest.param(_set("trained", value=[[]]), id="trained in a list"),
    ],
)
def test_a_plan_that_fits_no_model_is_refused(folder: Path, change: Callable[[Record], None]) -> None:
    record = read_record(folder)
    change(record)
    write(folder, record)
    assert refusal(folder)


@pytest.mark.parametrize(
    "fqn", ["embed", "blocks.0.stream", ""], ids=["a linear layer", "a part of a block", "the root"]
)
def test_a_site_that_is_no_block_is_refused(folder: Path, fqn: str) -> None:
    record, tensors = read_record(folder), read_routers(folder)
    _plan("sites", 0, "fqn", value=fqn)(record)
    write(folder, record, save_safetensors(_renamed(tensors, fqn)))
    assert refusal(folder)


def test_a_site_named_twice_is_refused(folder: Path) -> None:
    record, tensors = read_record(folder), read_routers(folder)
    _plan("sites", 1, "fqn", value="blocks.0")(record)
    write(folder, record, save_safetensors({"blocks.0": tensors["blocks.0"]}))
    assert refusal(folder)


def test_a_name_is_never_run_as_code(folder: Path, tmp_path: Path) -> None:
    record, proof = read_record(folder), tmp_path / "ran"
    last = len(_find(record["plan"], (*FAMILY, "leaves"))[0][1]["tuple"]) - 1
    _plan(*FAMILY, "leaves", last, "name", value=f"rope_1=open({str(proof)!r}, 'w')")(record)
    write(folder, record)
    with contextlib.suppress(ArtefactError):
        diffcr_compile.load(original(SHAPE), folder)
    assert not proof.exists()


def test_random_changes_of_the_plan_leave_a_refused_model_alone(folder: Path, expected: tuple[Tensor, str]) -> None:
    """A value anywhere in the record becomes another: the width, the sites and the routers must still agree."""
    generator, text = random.Random(3), (folder / JSON).read_text()
    values = [None, -1, 7, 10**30, "", "B", "blocks.9", [], {}, 0.5, True]
    outcomes: Counter[str] = Counter()
    for _ in range(cases(60, 3000)):
        record = json.loads(text)
        _change_somewhere(record, generator, generator.choice(values))
        write(folder, record)
        model = original(SHAPE)
        before = snapshot(model)
        try:
            diffcr_compile.load(model, folder)
        except Exception as error:
            outcomes[type(error).__name__] += 1
            assert same_snapshot(snapshot(model), before)
            continue
        outcomes["loaded"] += 1
    assert outcomes["ArtefactError"] > 0


def _change_somewhere(node: Any, generator: random.Random, value: Any) -> None:
    """Replace one value of a nested record, chosen by a random walk down to it."""
    while True:
        place = generator.choice(list(node) if isinstance(node, dict) else range(len(node)))
        below = node[place]
        if not isinstance(below, dict | list) or not below:
            node[place] = value
            return
        node = below


# Files that are none, and paths that lead elsewhere.


def _replace(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"real-{name}")
        make(folder / name)

    return change


@pytest.mark.parametrize("name", [JSON, TENSORS])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda file: None, id="missing"),
        pytest.param(lambda file: file.mkdir(), id="directory"),
        pytest.param(lambda file: os.mkfifo(file), id="fifo"),
        pytest.param(lambda file: file.symlink_to("/dev/zero"), id="link to a device"),
        pytest.param(lambda file: file.symlink_to("/"), id="link to a directory"),
        pytest.param(lambda file: file.symlink_to(file.name), id="link to itself"),
        pytest.param(lambda file: file.symlink_to("nowhere"), id="dangling link"),
    ],
)
def test_what_is_no_file_is_refused(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    _replace(name, make)(folder)
    signal.alarm(60)  # a fifo that is opened would never return
    try:
        assert str(folder) in refusal(folder)
    finally:
        signal.alarm(0)


def test_a_link_to_the_same_files_loads_equal(folder: Path, expected: tuple[Tensor, str]) -> None:
    for name in (JSON, TENSORS):
        _replace(name, lambda file: file.symlink_to(Path("..") / f"real-{file.name}"))(folder)
    assert outcome(folder, expected) in ("equal", "refused")
    linked = folder.parent / "linked"
    linked.symlink_to(folder, target_is_directory=True)
    assert outcome(linked, expected) in ("equal", "refused")


@pytest.mark.parametrize("where", ["missing", "routing/routing.json", "routing/routing.json/..", "/dev/null", "\0"])
def test_a_path_that_is_no_directory_is_refused(folder: Path, where: str) -> None:
    assert refusal(folder.parent / where)


def test_saving_over_a_link_keeps_the_target_whole(folder: Path, tmp_path: Path, expected: tuple[Tensor, str]) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    model = diffcr_compile.load(original(SHAPE), folder)
    diffcr_compile.save(model, link)
    assert outcome(link, expected) == "equal"
    assert outcome(folder, expected) == "equal"


# Memory.


def _refused_within(folder: Path, allowance: int) -> str:
    """``load`` in a child process that may take ``allowance`` bytes more than it has: ``refused``, or what else came of it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(120)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + allowance
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                diffcr_compile.load(original(SHAPE), folder)
                result = "loaded"
            except diffcr_compile.DiffCRError:
                result = "refused"
            except BaseException as error:
                result = type(error).__name__
            os.write(writer, result.encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as stream:
        return stream.read()


def _grow(name: str, size: int) -> Callable[[Path], None]:
    """Make a file ``size`` bytes long; the file system stores no zeros."""
    return lambda folder: os.truncate(folder / name, size)


def _fill(item: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / JSON).write_text("[" + ",".join([item] * (size // (len(item) + 1))) + "]") and None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_grow(JSON, 4096 * MiB), id="a record of four gibibytes"),
        pytest.param(
            _grow(TENSORS, 4096 * MiB),
            id="routers of four gibibytes",
        ),
        pytest.param(
            _fill("[]", 6 * MiB),
            id="a record of empty lists",
        ),
        pytest.param(_fill("0", 2 * MiB), id="a record of small numbers"),
    ],
)
def test_a_refusal_takes_little_memory(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    assert _refused_within(folder, ALLOWANCE) == "refused"


def test_a_whole_artefact_loads_within_the_allowance(folder: Path) -> None:
    assert _refused_within(folder, ALLOWANCE) == "loaded"
