"""The proof: what it accepts, in which form, and what it must not let pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffcr_compile.passes import verify
from diffcr_compile.passes.analysis import Refused
from diffcr_compile.passes.blocks import BLOCK_PASSES
from diffcr_compile.passes.verify import TOLERANCE, randomised_copy, relative_error
from hand import B, D, Hand, N, analyse, block_of, draw
from torch import Tensor, nn
from torch.nn import functional as F

from diffcr_compile.plan import BlockPlan
from diffcr_compile.primitives import select_tokens


def prove(forward: Callable[..., Any], **arguments: Any) -> BlockPlan:
    plan = analyse(block_of(forward), arguments, BLOCK_PASSES).plan
    assert plan is not None
    return plan


def plain(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x)


def shared_table(self: Hand, x: Tensor, rope: Tensor) -> Tensor:
    """The table (N, d) broadcasts over (B, heads, N, d) from the right: nowhere to put a batch axis."""
    q, k, v = self.heads(x)
    return x + self.join(F.scaled_dot_product_attention(q * rope, k * rope, v))


def table_with_room(self: Hand, x: Tensor, rope: Tensor) -> Tensor:
    """The table (1, N, D) has an axis of one that can be widened."""
    return x + self.attend(x * rope)


@pytest.mark.parametrize(
    ("forward", "tables", "lift"),
    [
        (plain, {}, "direct"),
        (shared_table, {"rope": draw(N, D // 2)}, "vmap"),
        (table_with_room, {"rope": draw(1, N, D)}, "inserted axis"),
    ],
)
def test_the_first_form_that_holds_is_taken(forward: Callable[..., Any], tables: dict[str, Tensor], lift: str) -> None:
    proved = prove(forward, x=draw(), **tables)
    assert proved.lift == lift
    assert 0 <= proved.error < TOLERANCE


def cut_table(self: Hand, x: Tensor, rope: Tensor) -> Tensor:
    """The table (N, D) is cut by length: with a batch axis in front, the samples are."""
    return x + self.attend(x * (1 + rope[: x.shape[1]]))


def cut_table_and_text(self: Hand, x: Tensor, text: Tensor, rope: Tensor) -> Tensor:
    """And attention to a text of its own length."""
    x = cut_table(self, x, rope)
    q, k, v = self.heads(x)[0], *(part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (text, text.flip(-1)))
    return x + self.join(F.scaled_dot_product_attention(q, k, v))


def test_samples_are_not_cut_where_there_are_more_of_them_than_kept_tokens() -> None:
    assert prove(cut_table, x=draw(), rope=draw(N, D)).lift == "vmap"


@pytest.mark.parametrize("length", [N, N + 2], ids=["as long as the picture", "of another length"])
def test_a_text_does_not_follow_the_tokens_for_being_as_long(length: int) -> None:
    plan = prove(cut_table_and_text, x=draw(), text=draw(B, length, D), rope=draw(N, D))
    follows = {leaf.name: [axis.axis for axis in leaf.token_axes] for leaf in plan.leaves}
    assert follows == {"x": [1], "text": [], "rope": [0]}


def positions_from_length(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x + torch.arange(x.shape[1]).view(1, -1, 1).float())


def causal(self: Hand, x: Tensor) -> Tensor:
    return x + self.join(F.scaled_dot_product_attention(*self.heads(x), is_causal=True))


def neighbours(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x + x.roll(1, dims=1))


def table_cut_by_length(self: Hand, x: Tensor, table: Tensor) -> Tensor:
    return x + self.attend(x + table[: x.shape[1]])


def across_the_batch(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x - x.mean(dim=0, keepdim=True))


@pytest.mark.parametrize(
    ("forward", "tables"),
    [
        (positions_from_length, {}),
        (causal, {}),
        (neighbours, {}),
        (table_cut_by_length, {"table": draw(40, D)}),
        (across_the_batch, {}),
    ],
)
def test_what_depends_on_order_length_or_other_samples_is_refused(
    forward: Callable[..., Any], tables: dict[str, Tensor]
) -> None:
    with pytest.raises(Refused):
        prove(forward, x=draw(), **tables)


@pytest.mark.parametrize("times", [1, 3])
def test_samples_that_keep_the_same_tokens_by_chance_are_drawn_anew(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = []

    def alike(scores: Tensor, k: int) -> Tensor:
        draws.append(k)
        return select_tokens(scores[:1].expand_as(scores) if len(draws) <= times else scores, k)

    monkeypatch.setattr(verify, "select_tokens", alike)
    assert prove(plain, x=draw()).lift == "direct"
    assert len(draws) > times
    monkeypatch.setattr(verify, "DRAWS", 0)
    with pytest.raises(Refused, match="keep the same tokens"):
        prove(plain, x=draw())


class SilentConvolution(Hand):
    """A convolution over the sequence behind a gate that is zero: at initialisation it commutes with anything."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(D, D, 3, padding=1)
        self.gate = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.gate * self.convolution(x.transpose(1, 2)).transpose(1, 2)


def test_zero_gates_hide_nothing() -> None:
    with pytest.raises(Refused, match="not interchangeable"):
        analyse(SilentConvolution().eval(), {"x": draw()}, BLOCK_PASSES)


def test_a_randomised_copy_leaves_the_original_alone() -> None:
    block = SilentConvolution()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    copy = randomised_copy(block.to(torch.bfloat16), torch.Generator().manual_seed(0))
    assert all(torch.equal(tensor, before[name].bfloat16()) for name, tensor in block.state_dict().items())
    assert all(parameter.dtype == torch.float32 and parameter.abs().min() > 0 for parameter in copy.parameters())
    assert not copy.training


def test_weights_of_a_randomised_copy_share_memory_and_no_values() -> None:
    """Eight weights of one size take little more than one; one that is used twice stays one, on the meta device too."""
    layers = [nn.Linear(256, 512) for _ in range(8)]
    for device in ("cpu", "meta"):
        block = nn.Sequential(*layers, nn.LayerNorm(512), nn.BatchNorm1d(512), nn.Linear(512, 4), layers[0]).to(device)
        copy = randomised_copy(block, torch.Generator().manual_seed(0))
        weights = [part.weight for part in copy if isinstance(part, nn.Linear)]
        assert weights[0] is weights[-1]
        rows = torch.cat(weights[:8])
        assert len(rows.unique(dim=0)) == len(rows)
        assert all(abs(float(weight.std()) * weight.shape[1] ** 0.5 - 1) < 0.1 for weight in weights)
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in copy.state_dict().values()}
        assert sum(storage.nbytes() for storage in held.values()) < 2 * weights[0].nbytes
        assert not any(tensor.is_meta or tensor.requires_grad for tensor in (*copy.parameters(), *copy.buffers()))
        assert copy[9].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 0.0),
        (torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]), 0.5),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("inf")]), float("inf")),
        (torch.tensor([1.0]), torch.tensor([1.0, 2.0]), float("inf")),
    ],
)
def test_relative_error(found: Tensor, expected: Tensor, error: float) -> None:
    assert relative_error(found, expected) == error


def test_the_proof_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    prove(plain, x=draw())
    assert torch.equal(torch.get_rng_state(), before)


def masked_by_hand(self: Hand, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    scores = (q @ k.mT / 2).masked_fill(~mask[:, None, None], -torch.inf)
    return x + self.join(scores.softmax(dim=-1) @ v)


def masked_safely(self: Hand, x: Tensor, mask: Tensor) -> Tensor:
    return x + self.join(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask[:, None, None]))


def padded_safely(self: Hand, x: Tensor, mask: Tensor) -> Tensor:
    return x + self.join(F.scaled_dot_product_attention(*self.heads(x), attn_mask=~mask[:, None, None]))


def padded_by_hand(self: Hand, x: Tensor, mask: Tensor) -> Tensor:
    return masked_by_hand(self, x, ~mask)


@pytest.mark.parametrize("forward", [masked_by_hand, padded_by_hand])
def test_a_mask_that_may_make_nan_is_refused(forward: Callable[..., Any]) -> None:
    """Of a sample the kept tokens alone may be masked, which in the dense model never is."""
    with pytest.raises(Refused, match=r"nothing to attend to makes NaN .* a large number instead of -inf"):
        prove(forward, x=draw(), mask=torch.ones(B, N, dtype=torch.bool))


@pytest.mark.parametrize("forward", [masked_safely, padded_safely])
def test_a_mask_that_makes_zeros_is_taken(forward: Callable[..., Any]) -> None:
    proved = prove(forward, x=draw(), mask=torch.ones(B, N, dtype=torch.bool))
    assert [leaf.name for leaf in proved.leaves if leaf.token_axes] == ["x", "mask"]


def divided(self: Hand, x: Tensor) -> Tensor:
    return x + self.attend(x) / (x - x)


def test_what_is_never_finite_is_refused_as_such() -> None:
    with pytest.raises(Refused, match="not finite on random inputs"):
        prove(divided, x=draw())
