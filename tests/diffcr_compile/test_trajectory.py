"""Trajectories are noticed from timesteps and steady inputs."""

from __future__ import annotations

import torch

from diffcr_compile.arguments import Path
from diffcr_compile.trajectory import MAX_SLOTS, Trajectory


def follow(*steps: float) -> list[tuple[int, bool]]:
    """(slot, first of its slot) of each forward."""
    trajectory, seen = Trajectory(), []
    for step in steps:
        trajectory.advance(step)
        seen.append((trajectory.slot, trajectory.first))
    return seen


def test_steps_towards_the_data_continue() -> None:
    assert follow(999, 500, 1) == [(0, True), (0, False), (0, False)]


def test_rising_timesteps_are_a_trajectory_too() -> None:
    """The first rise may begin another picture after one of a single step; the second says that timesteps rise here."""
    assert follow(0.0, 0.3, 0.6, 0.9) == [(0, True), (0, True), (0, False), (0, False)]


def test_after_a_picture_of_one_step_another_begins() -> None:
    assert follow(250, 999, 500, 1) == [(0, True), (0, True), (0, False), (0, False)]


def test_turning_back_begins_a_new_one() -> None:
    assert follow(999, 500, 1, 999, 500) == [(0, True), (0, False), (0, False), (0, True), (0, False)]


def test_calls_at_one_timestep_have_slots_of_their_own() -> None:
    assert follow(999, 999, 500, 500) == [(0, True), (1, True), (0, False), (1, False)]


def test_a_slot_met_late_starts_empty() -> None:
    assert follow(999, 500, 500, 1, 1) == [(0, True), (0, False), (1, True), (0, False), (1, False)]


def test_one_step_samplers_never_continue() -> None:
    seen = follow(*[999.0] * (3 * MAX_SLOTS))
    assert all(first for _, first in seen)
    assert max(slot for slot, _ in seen) == MAX_SLOTS - 1


def test_samples_that_part_ways_begin_a_new_one() -> None:
    trajectory, firsts = Trajectory(), []
    for values in ([9.0, 9.0], [8.0, 7.0], [7.0, 8.0], [6.0, 7.0]):
        trajectory.advance(torch.tensor(values))
        firsts.append(trajectory.first)
    assert firsts == [True, False, True, False]


def test_another_batch_size_begins_a_new_one() -> None:
    trajectory = Trajectory()
    trajectory.advance(torch.tensor([9.0, 9.0]))
    trajectory.advance(torch.tensor([8.0]))
    assert trajectory.first


def given(*tensors: torch.Tensor) -> dict[Path, torch.Tensor]:
    return {("latents", place): tensor for place, tensor in enumerate(tensors)}


def follow_given(*calls: tuple[float, dict[Path, torch.Tensor]]) -> list[tuple[int, bool]]:
    trajectory, seen = Trajectory(), []
    for step, tensors in calls:
        trajectory.advance(step, tensors)
        seen.append((trajectory.slot, trajectory.first))
    return seen


def test_another_prompt_begins_a_new_one() -> None:
    """Latents are new tensors at every step, a prompt is one tensor at all of them; lower timesteps may be another picture's."""
    first, second = torch.zeros(1), torch.zeros(1)
    steps = ((9.0, first), (6.0, first), (3.0, first), (2.0, second), (1.0, second))
    seen = follow_given(*((step, given(torch.zeros(1), prompt)) for step, prompt in steps))
    assert seen == [(0, True), (0, False), (0, False), (0, True), (0, False)]


def test_a_prompt_that_is_gone_is_another() -> None:
    """Its place in memory may have been taken by the next one."""
    trajectory, prompt = Trajectory(), torch.zeros(1)
    for step in (9.0, 6.0, 3.0):
        trajectory.advance(step, given(torch.zeros(1), prompt))
    del prompt
    trajectory.advance(2.0, given(torch.zeros(1), torch.zeros(1)))
    assert trajectory.first


def test_tensors_made_anew_at_every_step_say_nothing() -> None:
    seen = follow_given(*((step, given(torch.zeros(1))) for step in (9.0, 6.0, 3.0, 1.0)))
    assert seen == [(0, True), (0, False), (0, False), (0, False)]


def test_guidance_in_two_calls_has_a_prompt_in_each_slot() -> None:
    prompts = torch.zeros(1), torch.zeros(1)
    seen = follow_given(*((step, given(torch.zeros(1), prompt)) for step in (9.0, 6.0, 3.0) for prompt in prompts))
    assert seen == [(0, True), (1, True)] + 2 * [(0, False), (1, False)]


def test_what_comes_and_goes_says_nothing() -> None:
    """A control input that is there for some of the steps."""
    prompt, control = torch.zeros(1), torch.zeros(1)
    steps = ((9.0, True), (6.0, True), (3.0, False), (1.0, True))
    seen = follow_given(*((step, given(prompt, *[control] * there)) for step, there in steps))
    assert seen == [(0, True), (0, False), (0, False), (0, False)]


def test_calls_of_another_batch_size_at_one_timestep_have_slots_of_their_own() -> None:
    """As in guidance by skipped layers: two halves in one batch, then one of them again."""
    trajectory, seen = Trajectory(), []
    for values in ([9.0, 9.0], [8.0, 8.0], [8.0], [7.0, 7.0], [7.0], [6.0, 6.0]):
        trajectory.advance(torch.tensor(values))
        seen.append((trajectory.slot, trajectory.first))
    assert seen == [(0, True), (0, False), (1, True), (0, False), (1, False), (0, False)]


def test_more_calls_at_one_timestep_than_there_are_slots_go_on_from_nothing() -> None:
    """Tiles of a large picture: the last ones would else take up each other's updates."""
    many = MAX_SLOTS + 1
    assert all(first for _, first in follow(*[9.0] * many, *[6.0] * many, *[3.0] * many))
    assert follow(*[9.0] * many, 6.0, 3.0, 1.0)[many:] == [(0, True), (0, False), (0, False)]


def test_a_call_before_a_trajectory_at_its_first_timestep_is_not_taken_up() -> None:
    """A picture of one step, or a call to warm up, before another picture that begins there."""
    other, prompt, table = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    steps = ((9.0, other), (9.0, prompt), (6.0, prompt), (3.0, prompt))
    seen = follow_given(*((step, given(torch.zeros(1), table, words)) for step, words in steps))
    assert seen == [(0, True), (1, True), (0, True), (0, False)]


def test_another_shape_dtype_or_device_begins_a_new_one() -> None:
    for changed in (torch.zeros(4, 2), torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, device="meta")):
        seen = follow_given(
            (9.0, given(torch.zeros(2, 4))),
            (6.0, given(torch.zeros(2, 4))),
            (3.0, given(changed)),
            (1.0, given(changed)),
        )
        assert seen == [(0, True), (0, False), (0, True), (0, False)]


def test_a_slot_of_another_shape_begins_anew_by_itself() -> None:
    """The prompt of the second call has another length from here on."""
    short, long = torch.zeros(2), torch.zeros(3)
    calls = ((9.0, short), (9.0, short), (6.0, short), (6.0, long), (3.0, short), (3.0, long))
    seen = follow_given(*((step, given(torch.zeros(1), words)) for step, words in calls))
    assert seen == [(0, True), (1, True), (0, False), (1, True), (0, False), (1, False)]


def test_memory_of_slots_that_a_trajectory_did_without_is_dropped() -> None:
    trajectory = Trajectory()
    for _ in range(3):  # a warm-up
        trajectory.advance(999.0)
    held = object()
    trajectory.memories = {(slot, index): held for slot in range(3) for index in range(2)}  # type: ignore[misc]
    for timestep in (990.0, 500.0, 10.0, 990.0, 500.0, 10.0):  # the first goes on from the warm-up
        trajectory.advance(timestep)
    assert set(trajectory.memories) == {(slot, index) for slot in range(3) for index in range(2)}
    trajectory.advance(990.0)
    assert set(trajectory.memories) == {(0, 0), (0, 1)}


def test_one_timestep_for_all_samples_is_one_number() -> None:
    trajectory = Trajectory()
    trajectory.advance(torch.tensor([500.0, 500.0, 500.0]))
    assert trajectory.now.tolist() == [500.0]
    trajectory.advance(torch.tensor([400.0, 300.0, 400.0]))
    assert trajectory.now.tolist() == [400.0, 300.0, 400.0]


def as_given(*calls: tuple[float, str, str]) -> list[tuple[int, bool]]:
    """(slot, first of its slot) of calls that are given a timestep, latents and a prompt; those of one name are one tensor."""
    trajectory, seen, made = Trajectory(), [], {}
    for timestep, *names in calls:
        tensors = [made.setdefault(name, torch.zeros(2)) for name in names]
        trajectory.advance(timestep, {("latents",): tensors[0], ("prompt",): tensors[1]})
        seen.append((trajectory.slot, trajectory.first))
    return seen


def test_timesteps_that_half_precision_makes_equal_are_steps_all_the_same() -> None:
    timesteps = torch.tensor([1000, 997.3, 994.5, 991.6, 988.6, 985.5, 982.3]).bfloat16().tolist()
    assert len(set(timesteps)) < 7
    found = as_given(*((timestep, f"latents {step}", "prompt") for step, timestep in enumerate(timesteps)))
    assert found == [(0, True), *[(0, False)] * 6]


def test_a_second_call_that_comes_late_is_no_step() -> None:
    """Guidance that begins in the third step, with another prompt or, of a third kind, with the same latents."""
    first = [(900.0, "a", "prompt"), (800.0, "b", "prompt"), (700.0, "c", "prompt")]
    for late in ((700.0, "c", "empty"), (700.0, "d", "empty"), (700.0, "c", "prompt")):
        assert as_given(*first, late) == [(0, True), (0, False), (0, False), (1, True)]


def test_tiles_of_one_picture_have_slots_of_their_own() -> None:
    calls = [(timestep, f"{timestep} {tile}", "prompt") for timestep in (900.0, 800.0, 700.0) for tile in range(3)]
    assert [slot for slot, _ in as_given(*calls)] == [0, 1, 2] * 3
