"""How tokens lie is read off a call, and the order in which they take turns covers the picture."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffcr_compile.layout import grids_of_call, interleaved_rank, token_grid


def picture(rank: torch.Tensor, share: float, height: int, width: int) -> torch.Tensor:
    return (rank.reshape(height, width) < share).long()


def test_the_first_half_is_a_checkerboard() -> None:
    half = picture(interleaved_rank(64, ((16, 16),)), 0.5, 8, 8)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(half, (rows + columns + 1) % 2)


def test_the_first_quarter_has_one_in_each_cell() -> None:
    quarter = picture(interleaved_rank(64, ((8, 8),)), 0.25, 8, 8)
    assert (quarter.unfold(0, 2, 2).unfold(1, 2, 2).sum(dim=(2, 3)) == 1).all()


def test_frames_are_shifted_against_each_other() -> None:
    frames = (interleaved_rank(2 * 16, ((2, 8, 8),)).reshape(2, 4, 4) < 0.5).long()
    assert (frames[0] + frames[1] == 1).all()


@pytest.mark.parametrize("num_tokens", [1, 7, 63, 100])
def test_every_run_covers_a_sequence_evenly(num_tokens: int) -> None:
    """Without a grid: any half holds no more than a few neighbours in a row."""
    rank = interleaved_rank(num_tokens, ())
    assert sorted(rank.tolist()) == pytest.approx([i / num_tokens for i in range(num_tokens)], abs=1e-6)
    kept = "".join("1" if value < 0.5 else "0" for value in rank.tolist())
    assert "0000" not in kept
    assert "0000" not in kept.replace("1", "x").replace("0", "1").replace("x", "0")


def positions(*sizes: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(*map(range, sizes))))


def test_latents_with_axes_of_their_own_tell_the_grid() -> None:
    assert grids_of_call({"x": torch.zeros(2, 4, 16, 8)}) == ((16, 8),)
    assert grids_of_call({"x": torch.zeros(2, 4, 3, 16, 8), "ids": positions(2, 2)}) == ((3, 16, 8),)
    assert grids_of_call({"x": torch.zeros(2, 4, 16, 8, dtype=torch.int64)}) == ()


@pytest.mark.parametrize("batched", [False, True])
def test_packed_latents_lie_as_their_positions_say(batched: bool) -> None:
    """FLUX's way: a constant, the row, the column of each token; no such thing of the text, whose positions are all alike."""
    table = positions(1, 6, 10).float()
    bound = {
        "x": torch.randn(2, 60, 16),
        "words": torch.zeros(7, 3),
        "ids": table.expand(2, -1, -1) if batched else table,
    }
    assert grids_of_call(bound) == ((6, 10),)
    rank = interleaved_rank(60, grids_of_call(bound)).reshape(6, 10) < 0.5
    assert (rank[1:] != rank[:-1]).all()
    assert (rank[:, 1:] != rank[:, :-1]).all()


@pytest.mark.parametrize(
    "table",
    [
        positions(6, 10).flip(1),  # columns first
        positions(6, 10)[torch.randperm(60, generator=torch.Generator().manual_seed(0))],
        positions(6, 10)[:-1],
        positions(6, 10) + 0.5,
        positions(60, 1),
        positions(2, 2, 2, 2),
    ],
)
def test_other_tables_are_no_positions(table: torch.Tensor) -> None:
    assert grids_of_call({"x": torch.randn(2, 60, 16), "ids": table}) == ()


def test_numbers_that_stand_together_are_tried_for_a_grid() -> None:
    """Qwen-Image's list of sizes, LTX's arguments; what does not fit the tokens is passed over."""
    assert grids_of_call({"x": torch.zeros(1, 60, 4), "img_shapes": [[(1, 6, 10)]]}) == ((1, 6, 10),)
    grids = grids_of_call(
        {"x": torch.zeros(1, 60, 4), "frames": 5, "height": 3, "width": 4, "sizes": (7, 9), "on": True}
    )
    assert grids == ((5, 3, 4), (7, 9))
    assert token_grid(60, grids) == (5, 3, 4)
    assert token_grid(61, grids) is None
