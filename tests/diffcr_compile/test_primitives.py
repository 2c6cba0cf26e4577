"""The vocabulary of routed programs, against plain loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffcr_compile import primitives

B, N, K, D = 3, 7, 4, 5


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def kept() -> Tensor:
    return torch.tensor([[0, 2, 3, 6], [1, 2, 4, 5], [0, 1, 5, 6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_scores_are_float32_dot_products(dtype: torch.dtype) -> None:
    x, weight = draw(B, N, D, dtype=dtype), draw(D, seed=1, dtype=dtype)
    scores = primitives.score_tokens(x, weight, 1, 0)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, x.float() @ weight.float(), rtol=1e-5, atol=1e-6)  # float32 rounding of five terms
    first = primitives.score_tokens(x.transpose(0, 1), weight, 0, 1)
    assert torch.equal(first, scores)


def test_a_score_does_not_depend_on_the_place_in_the_batch() -> None:
    x, weight = draw(B, N, 64), draw(64, seed=1)
    scores = primitives.score_tokens(x, weight, 1, 0)
    alone = torch.cat(
        [primitives.score_tokens(x[b : b + 1, n : n + 1], weight, 1, 0) for b in range(B) for n in range(N)]
    )
    assert torch.equal(scores.flatten(), alone.flatten())


@given(seed=st.integers(0, 1000), k=st.integers(1, N))
def test_selection_is_the_sorted_top_k(seed: int, k: int) -> None:
    scores = draw(B, N, seed=seed)
    kept = primitives.select_tokens(scores, k)
    assert kept.shape == (B, k)
    for row, chosen in zip(scores.tolist(), kept.tolist(), strict=True):
        assert chosen == sorted(sorted(range(N), key=lambda n: -row[n])[:k])


@given(before=st.integers(0, 3), after=st.integers(0, 3))
def test_joint_indices_leave_out_the_skipped_alone(before: int, after: int) -> None:
    kept = torch.tensor([[0, 2, 3, 6], [1, 2, 4, 5]])
    found = primitives.place_indices(kept, before, N, after).tolist()
    total = range(before + N + after)
    expected = [[n for n in total if not before <= n < before + N or n - before in row] for row in kept.tolist()]
    assert found == expected


@pytest.mark.parametrize(("token_axis", "batch_axis"), [(1, 0), (0, 1), (2, 0), (1, 2)])
def test_take_then_put_is_the_identity(kept: Tensor, token_axis: int, batch_axis: int) -> None:
    sizes = [D, D, D]
    sizes[token_axis], sizes[batch_axis] = N, B
    x = draw(*sizes)
    taken = primitives.take_tokens(x, kept, token_axis, batch_axis)
    for sample in range(B):
        expected = x.select(batch_axis, sample).index_select(token_axis - (batch_axis < token_axis), kept[sample])
        assert torch.equal(taken.select(batch_axis, sample), expected)
    assert torch.equal(primitives.put_tokens(x, kept, taken, token_axis, batch_axis), x)
    put = primitives.put_tokens(x, kept, torch.zeros_like(taken), token_axis, batch_axis)
    assert not primitives.take_tokens(put, kept, token_axis, batch_axis).any()
    assert int((put != x).sum()) == taken.numel()


def test_a_batch_axis_of_one_is_shared(kept: Tensor) -> None:
    x = draw(1, N, D)
    assert torch.equal(primitives.take_tokens(x, kept, 1, 0), primitives.take_tokens(x.expand(B, N, D), kept, 1, 0))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_shared_table_gains_a_batch_axis_in_front(kept: Tensor, axis: int) -> None:
    x = draw(N, D) if axis == 0 else draw(D, N)
    taken = primitives.take_shared_tokens(x, kept, axis)
    assert all(torch.equal(taken[sample], x.index_select(axis, kept[sample])) for sample in range(B))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_put_takes_the_updates_dtype(kept: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, update = draw(B, N, D, dtype=dtypes[0]), draw(B, K, D, dtype=dtypes[1])
    put = primitives.put_tokens(x, kept, update, 1, 0)
    assert put.dtype == dtypes[1]
    assert torch.equal(put, primitives.put_tokens(x.to(dtypes[1]), kept, update, 1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", [0.0, -80.0, 80.0, -2000.0])
def test_the_exact_gate_changes_no_value(dtype: torch.dtype, score: float) -> None:
    update, x = draw(B, K, D, dtype=dtype), draw(B, K, D, seed=1, dtype=dtype)
    gated = primitives.gate_exact(update, x, torch.full((B, K), score, requires_grad=True), 1, 0)
    assert torch.equal(gated, update)
    with torch.no_grad():
        assert primitives.gate_exact(update, x, torch.full((B, K), score), 1, 0) is update


def test_the_exact_gate_changes_no_value_where_the_change_overflows() -> None:
    x = torch.tensor([[[-6e4, 6e4]]], dtype=torch.float16)
    scores = torch.zeros(1, 1, requires_grad=True)
    gated = primitives.gate_exact(-x, x, scores, 1, 0)
    assert torch.equal(gated, -x)
    (gated.float() * torch.tensor([1e-5, 3e-5])).sum().backward()
    assert scores.grad is not None
    assert torch.allclose(scores.grad, torch.tensor(0.5 * (1.2 - 3.6)), rtol=1e-2)  # the gradient is of half precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_a_share_of_zero_changes_nothing(dtype: torch.dtype) -> None:
    x = torch.tensor([-6e4, 6e4, 3.0]).to(dtype)
    added = primitives.add_share(x, torch.zeros(()), -x, x)
    assert torch.equal(added, x)
    assert added.dtype == dtype


def test_the_exact_gates_slope_is_that_of_log_sigmoid() -> None:
    update, x = draw(B, K, D, dtype=torch.float64), draw(B, K, D, seed=1, dtype=torch.float64)
    scores = draw(B, K, seed=2, dtype=torch.float64).requires_grad_()
    upstream = draw(B, K, D, seed=3, dtype=torch.float64)
    (primitives.gate_exact(update, x, scores, 1, 0) * upstream).sum().backward()
    expected = (1 - scores.detach().sigmoid()) * ((update - x) * upstream).sum(-1)
    assert scores.grad is not None
    assert torch.allclose(scores.grad, expected, rtol=1e-10)  # float64 rounding


def test_the_sigmoid_gate_scales_the_change() -> None:
    update, x, scores = draw(B, K, D), draw(B, K, D, seed=1), draw(B, K, seed=2)
    expected = x + scores.sigmoid().unsqueeze(-1) * (update - x)
    assert torch.equal(primitives.gate_sigmoid(update, x, scores, 1, 0), expected)


def _block(x: Tensor, scale: Tensor, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Knows x (b, n, D), scale (b, D), and a table (n, D) without batch axis."""
    moved = x * scale.unsqueeze(1) + (0 if table is None else table)
    return moved + moved.mean(dim=1, keepdim=True), moved.sum(dim=1)


@pytest.mark.parametrize("call", [primitives.call_per_sample, primitives.call_in_loop])
def test_lifted_calls_run_each_sample_alone(call: object) -> None:
    x, scale, tables = draw(B, K, D), draw(B, D, seed=1), draw(B, K, D, seed=2)
    found = call(_block, (x, scale), {"table": tables}, (0, 0, 0), (True, True, False), (0, 0))  # type: ignore[operator]
    for sample in range(B):
        one = slice(sample, sample + 1)
        expected = _block(x[one], scale[one], tables[sample])
        assert all(torch.allclose(a[one], b, rtol=1e-6, atol=1e-6) for a, b in zip(found, expected, strict=True))
        # float32: vmap may add a mean in another order


class _Doubled(torch.autograd.Function):
    """Without ``setup_context``, as older ones are: torch.vmap refuses it."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


def _opaque(x: Tensor, table: Tensor) -> Tensor:
    return _Doubled.apply(x + table)  # type: ignore[no-any-return,no-untyped-call]


def _lift(call: Callable[..., tuple[Tensor, ...]], block: object, x: Tensor, table: Tensor) -> Tensor:
    (found,) = call(block, (x,), {"table": table}, (0, 0), (True, False), (0,))
    return found


def test_what_vmap_refuses_runs_one_by_one() -> None:
    x, tables = draw(B, K, D), draw(B, K, D, seed=1)
    with pytest.raises(RuntimeError, match="vmap"):
        _lift(primitives.call_per_sample, _opaque, x, tables)
    assert torch.equal(_lift(primitives.call_per_sample, primitives.OneByOne(_opaque), x, tables), 2 * (x + tables))


def test_a_single_sample_is_not_mapped() -> None:
    x, table = draw(1, K, D), draw(1, K, D, seed=1)
    assert torch.equal(_lift(primitives.call_per_sample, _opaque, x, table), 2 * (x + table))


def test_symbolic_sizes_are_not_mapped() -> None:
    """torch's linear layer reads them as numbers under torch.vmap, and raises."""
    weight = draw(D, D, seed=2)

    def call(x: Tensor, table: Tensor) -> Tensor:
        return _lift(
            primitives.call_per_sample, lambda x, table: torch.nn.functional.linear(x + table, weight), x, table
        )

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
    for num_tokens in (K, K + 2):
        x, tables = draw(B, num_tokens, D), draw(B, num_tokens, D, seed=1)
        expected = (x + tables) @ weight.T
        assert torch.allclose(compiled(x, tables), expected, rtol=1e-5, atol=1e-5)  # float32: order of sums


def test_a_direct_call_returns_the_tensors_in_order() -> None:
    x, scale = draw(B, K, D), draw(B, D, seed=1)
    found = primitives.call_block(_block, (x, scale), {})
    assert all(torch.equal(a, b) for a, b in zip(found, _block(x, scale), strict=True))
