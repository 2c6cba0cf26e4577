"""What calibration is fed: regions apart, every sample once, an order that a seed decides."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffcr_compile.calibration.batches import Batches, by_region, drawn, read_batches, to_device
from hypothesis import given
from hypothesis import strategies as st
from models import (
    Shape,
    TinyDiT,
    facebook_dit,
    facebook_inputs,
    original,
    routed,
    same_snapshot,
    snapshot,
    tensors_of,
    tiny_inputs,
)
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CalibrationConfig, CalibrationError, DiffCRConfig
from diffcr_compile.region import region_of
from diffcr_compile.routed import routing_of

PLAIN = Shape("plain", depth=1, heads=1, head_dim=6)
JOINT = Shape("joint", depth=1, heads=1, head_dim=6, masked=True)
Batch = dict[str, Any]


def timesteps(*values: float) -> Tensor:
    return torch.tensor(values)


def regions_of(model: nn.Module, batch: Batch, name: str = "timestep") -> set[int]:
    state = routing_of(model)
    return set(region_of(batch[name], state.plan.timestep, state.num_regions))


def samples_of(batches: list[Batch], shared: tuple[str, ...] = ("rope",)) -> Counter[str]:
    """Every sample with all that belongs to it, to the bit."""
    found: Counter[str] = Counter()
    for batch in batches:
        for place in range(len(batch["x"])):
            sample = {
                name: tensors_of(value) if name in shared else value[place]
                for name, value in batch.items()
                if value is not None
            }
            found[repr([(name, map_lists(value)) for name, value in sorted(sample.items())])] += 1
    return found


def map_lists(value: Any) -> Any:
    return [tensor.tolist() for tensor in tensors_of(value)]


@functools.cache
def model_of(shape: Shape) -> TinyDiT:
    return routed(shape)


def put_together(model: nn.Module, batches: list[Batch]) -> list[Batch]:
    given = Batches(batches)
    found = by_region(model, routing_of(model), given)
    return batches if found is given else list(found)


def test_repeated_the_first_follow_the_last() -> None:
    given = Batches([{"place": place} for place in range(3)], [[5], [3, 4], [7]])
    found = given.repeated(5)
    assert [batch["place"] for batch in found] == [0, 1, 2, 0, 1]
    assert (len(found), found[-1]["place"]) == (5, 1)
    assert [found.name(place) for place in (1, 4, 3)] == ["batches 3, 4", "batches 3, 4", "batch 5"]


@pytest.mark.parametrize("shape", [PLAIN, JOINT], ids=["plain", "joint"])
@given(
    steps=st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=5), min_size=1, max_size=4),
    num_tokens=st.sampled_from([(7,), (7, 9)]),
    seed=st.integers(0, 100),
)
def test_every_sample_occurs_once_and_regions_are_apart(
    shape: Shape, steps: list[list[int]], num_tokens: tuple[int, ...], seed: int
) -> None:
    model, sizes = model_of(shape), itertools.cycle(num_tokens)
    rope = tiny_inputs(shape, num_tokens=7).get("rope")
    batches = []
    for place, row in enumerate(steps):
        step, size = timesteps(*row).float(), next(sizes)
        batch = tiny_inputs(shape, batch=len(row), num_tokens=size, timestep=step, seed=seed + place)
        batches.append({**batch, "rope": rope} if size == 7 and rope is not None else batch)
    batches += [batch | {"x": batch["x"] + 1} for batch in batches]  # so that every pile has two
    found = put_together(model, batches)
    assert samples_of(found) == samples_of(batches)
    assert all(len(regions_of(model, batch)) == 1 for batch in found)
    assert max(len(batch["x"]) for batch in found) <= max(map(len, steps))


def test_a_single_batch_of_several_regions_is_taken_apart() -> None:
    model = model_of(PLAIN)
    batches = [tiny_inputs(PLAIN, timestep=timesteps(20, 400, 950))]
    found = put_together(model, batches)
    assert samples_of(found) == samples_of(batches)
    assert [len(regions_of(model, batch)) for batch in found] == [1, 1, 1]


def test_few_batches_become_few() -> None:
    """Three batches of three regions: three of one, not nine."""
    model = model_of(PLAIN)
    steps = timesteps(20, 400, 950)
    batches = [tiny_inputs(PLAIN, timestep=steps.roll(seed), seed=seed) for seed in range(3)]
    assert [len(batch["x"]) for batch in put_together(model, batches)] == [3, 3, 3]


def test_what_samples_do_not_share_keeps_them_apart() -> None:
    """Rotary tables differ from batch to batch, and have no batch axis."""
    model, steps = model_of(JOINT), timesteps(20, 400, 950)
    batches = [tiny_inputs(JOINT, timestep=steps, seed=seed) for seed in range(2)]
    found = put_together(model, batches + batches)
    assert samples_of(found) == samples_of(batches + batches)
    assert [len(batch["x"]) for batch in found] == [2] * 6
    shared = [{**batch, "rope": batches[0]["rope"]} for batch in batches]
    assert [len(batch["x"]) for batch in put_together(model, shared)] == [2] * 3


def test_dtypes_are_kept_apart() -> None:
    model, steps = model_of(PLAIN), timesteps(20, 400, 950)
    batches = [tiny_inputs(PLAIN, timestep=steps, dtype=dtype) for dtype in (torch.float32, torch.float64)] * 2
    found = put_together(model, batches)
    assert Counter(batch["x"].dtype for batch in found) == {torch.float32: 3, torch.float64: 3}
    assert samples_of(found) == samples_of(batches)


@pytest.mark.parametrize("steps", [(20, 21, 22), (500, 600, 510)])
def test_batches_of_one_region_are_left_alone(steps: tuple[float, ...]) -> None:
    model = model_of(PLAIN)
    batches = [tiny_inputs(PLAIN, timestep=timesteps(*steps)), tiny_inputs(PLAIN, num_tokens=13, timestep=980.0)]
    found = put_together(model, batches)
    assert all(ours is theirs for ours, theirs in zip(found, batches, strict=True))


def test_unknown_inputs_leave_all_batches_alone() -> None:
    model, steps = model_of(PLAIN), timesteps(20, 400, 950)
    batches = [
        tiny_inputs(PLAIN, timestep=steps),
        {**tiny_inputs(PLAIN, timestep=steps), "mask": torch.ones(3, 11, 11)},
    ]
    assert put_together(model, batches) is batches


@pytest.mark.parametrize(
    "timestep", [torch.tensor([500.0]), *(pytest.param(one) for one in (torch.tensor(500.0), 500.0, 500))]
)
def test_one_timestep_for_all_samples_leaves_all_batches_alone(timestep: Any) -> None:
    model = model_of(PLAIN)
    batches = [tiny_inputs(PLAIN) | {"timestep": timestep}, tiny_inputs(PLAIN, timestep=timesteps(1, 400, 999))]
    assert put_together(model, batches) is batches


def test_batches_of_one_region_are_left_alone_where_they_share_it() -> None:
    model = model_of(PLAIN)
    batches = [tiny_inputs(PLAIN, batch=size, timestep=500.0) for size in (2, 3)]
    found = put_together(model, batches)
    assert all(ours is theirs for ours, theirs in zip(found, batches, strict=True))


def test_unproved_batch_axes_leave_all_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    model = routed(PLAIN)
    state = routing_of(model)
    monkeypatch.setattr(state, "plan", replace(state.plan, input_batch_axes={}))
    batches = [tiny_inputs(PLAIN, timestep=timesteps(20, 400, 950))]
    assert put_together(model, batches) is batches


def test_one_region_leaves_all_batches_alone() -> None:
    config = DiffCRConfig(num_regions=1)
    model = diffcr_compile.transform(facebook_dit(), config, example_inputs=facebook_inputs(3))
    batches = [facebook_inputs(4)]
    assert put_together(model, batches) is batches


def test_images_and_labels_stay_together() -> None:
    model = diffcr_compile.transform(facebook_dit(), example_inputs=facebook_inputs(3))
    batches = [facebook_inputs(size) for size in (3, 4, 5)]
    found = put_together(model, batches)
    assert samples_of(found) == samples_of(batches)
    assert all(len(regions_of(model, batch, "t")) == 1 for batch in found)
    # what is fed in parts is what was fed together; a batch's rows may be added up in another order
    whole = torch.cat([model(**batch) for batch in batches]).flatten(1).sum(1).sort().values
    parts = torch.cat([model(**batch) for batch in found]).flatten(1).sum(1).sort().values
    assert torch.allclose(whole, parts, atol=1e-4)


@given(num_batches=st.integers(1, 9), seed=st.integers(0, 2**20), turn=st.integers(0, 50))
def test_all_batches_are_drawn_each_time_round(num_batches: int, seed: int, turn: int) -> None:
    draws = range(turn * num_batches, (turn + 1) * num_batches)
    order = [drawn(num_batches, draw, seed) for draw in draws]
    assert sorted(order) == list(range(num_batches))
    assert order == [drawn(num_batches, draw, seed) for draw in draws]


def test_the_order_changes_with_turn_and_seed_and_not_with_the_global_generator() -> None:
    def order(seed: int, turn: int) -> list[int]:
        return [drawn(8, draw, seed) for draw in range(8 * turn, 8 * turn + 8)]

    torch.manual_seed(0)
    first = order(0, 0)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert order(0, 0) == first
    assert len({tuple(order(seed, turn)) for seed in range(3) for turn in range(3)}) == 9
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_batches_are_refused() -> None:
    with pytest.raises(CalibrationError, match="given no batches"):
        read_batches(iter([]))


@pytest.mark.parametrize("batch", [torch.ones(3), (torch.ones(3),), None])
def test_what_is_no_dictionary_is_refused(batch: Any) -> None:
    with pytest.raises(TypeError, match=f"keyword dictionaries of the model's forward, found {type(batch).__name__}"):
        read_batches([{"x": torch.ones(1)}, batch])


def test_tensors_go_to_the_models_device_and_not_to_where_offloaded_weights_lie() -> None:
    batch = {"x": torch.ones(2), "rope": (torch.ones(1), [torch.zeros(1)]), "scale": 3, "mask": None}
    model = nn.ModuleDict({"offloaded": nn.Linear(1, 1, device="meta"), "here": nn.Linear(1, 1)})
    for module in (model, model["offloaded"], nn.Identity()):
        found = to_device(module, batch)
        assert [tensor.device.type for tensor in tensors_of(found)] == ["cpu"] * 3
        assert (found["scale"], found["mask"]) == (3, None)


# What goes wrong on a batch names it.

GOOD = [tiny_inputs(PLAIN, timestep=step) for step in (900.0, 600.0, 300.0, 100.0)]
BAD: dict[str, Callable[[Batch], Batch]] = {
    "of another width": lambda batch: {**batch, "x": torch.zeros(3, 11, 7)},
    "of another dtype": lambda batch: {**batch, "x": batch["x"].double()},
    "with a key too many": lambda batch: {**batch, "y": torch.zeros(3)},
    "with a key too few": lambda batch: {"timestep": batch["timestep"]},
}
WAYS = {
    "weights": (CalibrationConfig(steps=4), {}),
    "routers": (CalibrationConfig(steps=4, trainable="routers", warm_start=False), {}),
    "training-free": (CalibrationConfig(preset="training-free"), {}),
    "training-free reuse": (CalibrationConfig(preset="training-free", steps=2), {"skip": "reuse"}),
    "reuse": (CalibrationConfig(steps=4), {"skip": "reuse"}),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_the_model_refuses_is_named(way: str, bad: str) -> None:
    config, options = WAYS[way]
    model = diffcr_compile.transform(original(PLAIN), DiffCRConfig(**options), example_inputs=GOOD[0])
    before = snapshot(model)
    batches = [GOOD[0], BAD[bad](GOOD[1]), *GOOD[2:]]
    with pytest.raises(CalibrationError, match=r"TinyDiT could not be run on batch 1\. It raised \w+: ") as raised:
        diffcr_compile.calibrate(model, batches, budget=0.9, config=config)
    assert str(raised.value.__cause__) in str(raised.value)
    assert same_snapshot(snapshot(model), before)


@pytest.mark.parametrize("place", [0, 2])
def test_a_batch_without_values_is_refused(place: int) -> None:
    batches = list(GOOD)
    batches[place] = {**GOOD[place], "x": GOOD[place]["x"].to("meta")}
    with pytest.raises(CalibrationError, match=rf"batch {place} holds a meta tensor \(x\)"):
        diffcr_compile.calibrate(routed(PLAIN), batches, budget=0.9, config=CalibrationConfig(steps=2))


def test_a_refusal_of_our_own_keeps_its_kind_and_names_the_batch() -> None:
    batches = [GOOD[0], {"x": GOOD[1]["x"]}]
    with pytest.raises(diffcr_compile.UnsupportedError, match="batch 1: TinyDiT is called without its timestep input"):
        diffcr_compile.calibrate(routed(PLAIN), batches, budget=0.9, config=CalibrationConfig(steps=2))


def test_samples_that_were_put_together_anew_keep_their_batch_numbers() -> None:
    mixed = [tiny_inputs(PLAIN, timestep=timesteps(20, 400, 950), seed=seed) for seed in range(3)]
    mixed[2] = BAD["of another width"](mixed[2])
    with pytest.raises(CalibrationError, match="could not be run on batch 2"):
        diffcr_compile.calibrate(routed(PLAIN), mixed, budget=0.9, config=CalibrationConfig(steps=2))
    found = by_region(model_of(PLAIN), routing_of(model_of(PLAIN)), Batches(mixed[:2] * 2))
    assert [found.name(place) for place in range(len(found))] == ["batches 0, 1, 2", "batch 3"] * 3


@pytest.mark.parametrize("error", [ZeroDivisionError("by 0"), KeyboardInterrupt()])
def test_errors_of_a_loss_of_ones_own_pass_with_a_note(error: BaseException) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if float(batch["timestep"][0]) == 600:
            raise error
        return model(**batch).square().mean()

    with pytest.raises(type(error)) as raised:
        diffcr_compile.calibrate(routed(PLAIN), GOOD, budget=0.9, loss=loss, config=CalibrationConfig(steps=4))
    assert raised.value is error
    noted = isinstance(error, Exception)
    assert getattr(error, "__notes__", []) == ["in batch 1 of calibrate"] * noted


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_is_no_fault_of_a_batch_passes(error: type[BaseException]) -> None:
    model = routed(PLAIN)

    def interrupt(*_: object) -> None:
        if routing_of(model).dense:
            raise error

    model.head.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        diffcr_compile.calibrate(model, GOOD, budget=0.9, config=CalibrationConfig(steps=2))


def test_a_defaultdict_stays_one() -> None:
    batch = defaultdict(list, {"x": torch.ones(2), "names": ["a"]})
    moved = to_device(nn.Linear(1, 1), batch)
    assert type(moved) is defaultdict
    assert moved.default_factory is list
    assert moved["names"] == ["a"]
