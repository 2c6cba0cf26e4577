"""What calibration is fed: regions apart, every sample once, an order that a seed decides."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from diffcr_compile.calibration.batches import by_region, drawn, read_batches, to_device
from hypothesis import given
from hypothesis import strategies as st
from models import Shape, TinyDiT, facebook_dit, facebook_inputs, routed, tensors_of, tiny_inputs
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CalibrationError, DiffCRConfig
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
    return by_region(model, routing_of(model), batches)


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


def test_tensors_go_to_the_models_device_wherever_they_lie() -> None:
    batch = {"x": torch.ones(2), "rope": (torch.ones(1), [torch.zeros(1)]), "scale": 3, "mask": None}
    found = to_device(nn.Linear(1, 1, device="meta"), batch)
    assert [tensor.device.type for tensor in tensors_of(found)] == ["meta"] * 3
    assert (found["scale"], found["mask"]) == (3, None)
    assert to_device(nn.Identity(), batch)["x"].device.type == "cpu"
