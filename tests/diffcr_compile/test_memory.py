"""A block's memory: what it foretells, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcr_compile.memory import MAX_REACH, Memory, foretell, remember_all, remember_tokens, resume_tokens

B, N, D = 2, 5, 3


def empty(degree: int) -> Memory:
    shape = (degree + 1, B, N)
    rank = torch.arange(N) / N
    return Memory(
        (torch.zeros(degree + 1, B * N, D),),
        torch.zeros(shape),
        torch.zeros(B, N),
        rank,
        torch.zeros(1),
        torch.tensor(float(degree)),
        torch.zeros(degree + 1, 0),
    )


def at(memory: Memory, time: float) -> Memory:
    return memory._replace(now=torch.tensor([time]))


def curve(coefficients: Tensor, time: float) -> Tensor:
    """A polynomial in time for each number of (B, N, D)."""
    return sum(c * time**power for power, c in enumerate(coefficients))  # type: ignore[return-value]


@given(degree=st.integers(0, 2), seed=st.integers(0, 100))
def test_a_polynomial_of_its_degree_is_foretold(degree: int, seed: int) -> None:
    coefficients = torch.randn(degree + 1, B, N, D, generator=torch.Generator().manual_seed(seed))
    memory = empty(degree)
    for index, time in enumerate((1.0, 0.8, 0.7)[: degree + 1]):
        remember_all(at(memory, time), [curve(coefficients, time)], [(1, 0)], first=index == 0)
    found = resume_tokens(torch.zeros(B, N, D), at(memory, 0.62), 0, 1, 0)
    assert torch.allclose(found, curve(coefficients, 0.62), atol=1e-4)


@given(steps=st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=3), degree=st.integers(0, 2), rising=st.booleans())
def test_uneven_steps_do_not_blow_updates_up(steps: list[float], degree: int, rising: bool) -> None:
    """Updates of one, whatever their signs, never foretell more than a token's own spacing allows (29 for a parabola)."""
    moments = [sum(steps[:count]) * (1 if rising else -1) for count in range(4)]
    times = torch.tensor(moments[2::-1][: degree + 1]).reshape(-1, 1, 1)
    foretold = 0.0
    for place in range(degree + 1):
        updates = [torch.full((1, 1, 1), float(place == other)) for other in range(degree + 1)]
        foretold += abs(float(foretell(updates, times, torch.tensor([moments[3]]))))
    assert foretold <= (1.0, 5.0, 29.0)[degree] * 1.001


@pytest.mark.parametrize("degree", [0, 1])
def test_a_lower_degree_is_that_of_fewer_updates(degree: int) -> None:
    """And between two degrees it is a mix of both."""
    updates = torch.randn(3, B, N, D, generator=torch.Generator().manual_seed(0))
    found = []
    for remembered, followed in ((2, degree), (degree, degree), (2, degree + 1), (2, degree + 0.25)):
        memory = empty(remembered)._replace(degree=torch.tensor(float(followed)))
        for index, time in enumerate((1.0, 0.8, 0.7)):
            remember_all(at(memory, time), [updates[index]], [(1, 0)], first=index == 0)
        found.append(resume_tokens(torch.zeros(B, N, D), at(memory, 0.62), 0, 1, 0))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.allclose(found[3], 0.75 * found[0] + 0.25 * found[2], atol=1e-5)


def test_each_token_has_times_of_its_own() -> None:
    """Tokens refreshed at other steps are foretold along their own line."""
    line = torch.randn(2, B, N, D, generator=torch.Generator().manual_seed(0))
    memory = empty(1)
    remember_all(at(memory, 1.0), [curve(line, 1.0)], [(1, 0)], first=True)
    for time, kept in ((0.9, [[0, 2], [1, 4]]), (0.8, [[1, 3], [0, 2]]), (0.7, [[4, 0], [3, 1]])):
        indices = torch.tensor(kept)
        update = curve(line, time).gather(1, indices.unsqueeze(-1).expand(-1, -1, D))
        remember_tokens(at(memory, time), indices, [update], [(1, 0)])
    found = resume_tokens(torch.zeros(B, N, D), at(memory, 0.7), 0, 1, 0)
    assert torch.allclose(found, curve(line, 0.7), atol=1e-5)
    assert memory.age.tolist() == [[0, 1, 2, 1, 0], [1, 0, 1, 0, 2]]


def test_order_zero_is_the_last_update_to_the_bit() -> None:
    update = torch.randn(B, N, D)
    memory = empty(0)
    remember_all(memory, [update], [(1, 0)], first=True)
    assert torch.equal(resume_tokens(torch.zeros(B, N, D), at(memory, 3.0), 0, 1, 0), update)


def test_tokens_first_are_remembered_alike() -> None:
    """A sequence-first stream (N, B, D) has the same memory."""
    memory = empty(0)
    update = torch.randn(N, B, D)
    remember_all(memory, [update], [(0, 1)], first=True)
    kept = torch.tensor([[0, 3], [1, 2]])
    fresh = torch.randn(2, B, D)
    remember_tokens(memory, kept, [fresh], [(0, 1)])
    expected = update.clone()
    for sample in range(B):
        expected[kept[sample], sample] = fresh[:, sample]
    assert torch.equal(resume_tokens(torch.zeros(N, B, D), memory, 0, 0, 1), expected)


def test_far_ahead_is_held_back() -> None:
    updates = [torch.ones(1, 1, 1), torch.zeros(1, 1, 1)]
    found = foretell(updates, torch.tensor([0.9, 1.0]).reshape(2, 1, 1), torch.tensor([-50.0]))
    assert found.item() == pytest.approx(1 + MAX_REACH)


def test_equal_times_foretell_the_last_update() -> None:
    updates = [torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.full((1, 1, 1), 7.0)]
    for degree in (0, 1, 2):
        found = foretell(updates[: degree + 1], torch.ones(degree + 1, 1, 1), torch.tensor([0.5]))
        assert found.item() == 1
