"""The vocabulary of routed programs: select, gather, call, gate, scatter.

Every function here is a node of the FX program that a pass writes for a block (``passes/route.py``); all are plain
torch, traced by Dynamo and differentiable. Axes: B batch, N tokens, K kept tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from .arguments import iterate_leaves, map_leaves
from .errors import UnsupportedError


def score_tokens(x: Tensor, weight: Tensor, token_axis: int, batch_axis: int) -> Tensor:
    """Router score of every token: float32 (B, N), the product of the token with the router's vector.

    x: any float dtype, any order of axes, width last. weight: (D,), on any device (offload leaves it where it is). The product is
    written out and summed over the width, so that a token's score does not depend on where in the batch it lies, as a matrix
    product's blocking may make it.
    """
    scores = (x.float() * weight.to(x.device).float()).sum(-1)
    return scores if batch_axis < token_axis else scores.transpose(0, 1)


def select_tokens(scores: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` highest scores of each sample, in rising order: int64 (B, K). 0 < k <= N."""
    return scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values


def share_scores(scores: Tensor) -> Tensor:
    """The mean score of each guidance pair, samples i and i + B / 2, for both of them: float32 (B, N).

    Raises UnsupportedError for an odd batch.
    """
    half = half_of(scores.shape[0])
    mean = (scores[:half] + scores[half:]) / 2
    return torch.cat([mean, mean])


def half_of(batch: int) -> int:
    """Half a batch of guidance pairs. Raises UnsupportedError where it is odd."""
    if batch % 2:
        raise UnsupportedError(
            f"guidance='shared' pairs each sample with one in the other half of its batch, and this batch is odd ({batch}). Call "
            "the model with the unconditional samples beside the conditional ones, or transform it with guidance='separate'."
        )
    return batch // 2


def place_indices(kept: Tensor, before: int, num_tokens: int, after: int) -> Tensor:
    """Indices into a joint sequence of ``before + N + after`` tokens that leave out the skipped ones of its middle part.

    kept: int64 (B, K) in [0, N). Returns int64 (B, before + K + after), rising if ``kept`` is.
    """
    batch = kept.shape[0]
    head = torch.arange(before, device=kept.device).expand(batch, before)
    tail = torch.arange(before + num_tokens, before + num_tokens + after, device=kept.device).expand(batch, after)
    return torch.cat([head, kept + before, tail], dim=1)


def take_tokens(x: Tensor, indices: Tensor, token_axis: int, batch_axis: int) -> Tensor:
    """Each sample's tokens ``indices`` (B, K) of ``x`` along ``token_axis``; a batch axis of size 1 is shared by all samples."""
    rows, axes = _flat_rows(indices, x, token_axis, batch_axis)
    taken = x.movedim(axes, (0, 1)).flatten(0, 1).index_select(0, rows.flatten())
    return taken.unflatten(0, rows.shape).movedim((0, 1), axes)


def take_shared_tokens(x: Tensor, indices: Tensor, token_axis: int) -> Tensor:
    """Each sample's tokens of an ``x`` that has no batch axis: the result has one, in front."""
    taken = x.index_select(token_axis, indices.flatten()).unflatten(token_axis, indices.shape)
    return taken.movedim(token_axis, 0)


def put_tokens(x: Tensor, indices: Tensor, update: Tensor, token_axis: int, batch_axis: int) -> Tensor:
    """``x`` with the tokens ``indices`` (B, K) replaced by ``update``; all others keep their values.

    In the dtype of ``update``, which is that of the dense block: float32 scales widen a bfloat16 stream under autocast, and blocks
    that cast a float32 stream to their weights' dtype narrow it.
    """
    rows, axes = _flat_rows(indices, x, token_axis, batch_axis)
    tokens, update = (tensor.movedim(axes, (0, 1)).flatten(0, 1) for tensor in (x.to(update.dtype), update))
    put = tokens.index_put((rows.flatten(),), update)
    return put.unflatten(0, (x.shape[axes[0]], x.shape[axes[1]])).movedim((0, 1), axes)


def blank_tokens(update: Tensor, num_tokens: int, token_axis: int) -> Tensor:
    """Zeros for ``num_tokens`` tokens of the kind of ``update``: what skipped tokens take from a branch."""
    sizes = list(update.shape)
    sizes[token_axis] = num_tokens
    return update.new_zeros(sizes)


def take_scores(scores: Tensor, kept: Tensor) -> Tensor:
    """Scores of the kept tokens: (B, K)."""
    return scores.gather(1, kept)


def gate_exact(update: Tensor, x: Tensor, scores: Tensor, token_axis: int, batch_axis: int) -> Tensor:
    """``update`` as it is, with a gradient to the router as if the block's change were scaled by the sigmoid of the score.

    f + (l - stop(l)) (f - x) with l = log sigmoid(score): the factor of the paper's gate divided by itself, written so that
    it neither changes a value nor underflows (a quotient of sigmoids does, in half precision).
    """
    if not torch.is_grad_enabled():
        return update
    log_gate = torch.nn.functional.logsigmoid(scores)
    slope = lay_along(log_gate - log_gate.detach(), x, token_axis, batch_axis)
    return add_share(update, slope, update, x)


def gate_sigmoid(update: Tensor, x: Tensor, scores: Tensor, token_axis: int, batch_axis: int) -> Tensor:
    """The paper's gate: the block's change of a kept token is multiplied by the sigmoid of its score."""
    gate = lay_along(scores.sigmoid(), x, token_axis, batch_axis)
    return (x + gate.to(update.dtype) * (update - x)).to(update.dtype)


def add_share(x: Tensor, share: Tensor, after: Tensor, before: Tensor) -> Tensor:
    """``x + share * (after - before)``, which for a share of zero is ``x``; integers stay as they are.

    The difference of two finite numbers of half precision may be infinite, that of their halves may not.
    """
    if not (x.is_floating_point() or x.is_complex()):
        return x
    return x + 2 * share.to(device=x.device, dtype=x.dtype) * (after / 2 - before / 2).to(x.dtype)


def call_block(block: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The original block on the kept tokens of the whole batch; its output's tensors in order."""
    return tuple(_tensors(block(*args, **kwargs)))


class OneByOne:
    """A block that ``torch.vmap`` can't be relied on to take as it now is."""

    def __init__(self, block: Callable[..., Any]) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def call_per_sample(
    block: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: tuple[int | None, ...],
    own_batch: tuple[bool, ...],
    out_axes: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """The original block under ``torch.vmap`` over samples, each with a batch of one.

    ``axes`` gives, for every tensor leaf of (args, kwargs) in order, the axis that runs over samples (None: shared by all);
    ``own_batch`` whether the block itself expects that axis, so that a slice gets it back with size one (a table that was
    gathered per sample has an axis that the block does not know). ``out_axes``: the batch axis of each tensor output.

    One after the other where there is but one sample, and where vmap fails in torch: on symbolic sizes (``dynamic=True``), and on
    a block that is known to be :class:`OneByOne`.
    """
    mapped = _tensors((args, kwargs))
    static = all(has_static_value(size) for leaf in mapped for size in leaf.shape)
    if isinstance(block, OneByOne) or not static or _batch_of(mapped, axes) == 1:
        return call_in_loop(block, args, kwargs, axes, own_batch, out_axes)

    def one_sample(*slices: Tensor) -> tuple[Tensor, ...]:
        values = [
            piece.unsqueeze(axis) if axis is not None and own else piece
            for piece, axis, own in zip(slices, axes, own_batch, strict=True)
        ]
        sample_args, sample_kwargs = _with_tensors((args, kwargs), values)
        outputs = _tensors(block(*sample_args, **sample_kwargs))
        return tuple(output.squeeze(axis) for output, axis in zip(outputs, out_axes, strict=True))

    return torch.vmap(one_sample, in_dims=axes, out_dims=out_axes, randomness="different")(*mapped)


def call_in_loop(
    block: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: tuple[int | None, ...],
    own_batch: tuple[bool, ...],
    out_axes: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """As :func:`call_per_sample`, one call of the block after the other."""
    mapped = _tensors((args, kwargs))
    columns: list[list[Tensor]] = []
    for sample in range(_batch_of(mapped, axes)):
        values = [
            leaf if axis is None else (leaf.narrow(axis, sample, 1) if own else leaf.select(axis, sample))
            for leaf, axis, own in zip(mapped, axes, own_batch, strict=True)
        ]
        sample_args, sample_kwargs = _with_tensors((args, kwargs), values)
        columns.append(_tensors(block(*sample_args, **sample_kwargs)))
    return tuple(torch.cat(column, dim=axis) for column, axis in zip(zip(*columns, strict=True), out_axes, strict=True))


def _batch_of(mapped: list[Tensor], axes: tuple[int | None, ...]) -> int:
    return next(leaf.shape[axis] for leaf, axis in zip(mapped, axes, strict=True) if axis is not None)


def flat_rows(indices: Tensor, batch: int, num_tokens: int, *, batch_first: bool) -> Tensor:
    """Where the tokens ``indices`` (B, K) lie once batch and token axis are made one: int64, (B, K), or (K, B) with tokens first.

    batch: size of the batch axis; 1 where it is shared by all samples.
    """
    samples = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
    if batch == 1:
        samples = torch.zeros_like(samples)
    return samples * num_tokens + indices if batch_first else (indices * batch + samples).T


def _flat_rows(indices: Tensor, x: Tensor, token_axis: int, batch_axis: int) -> tuple[Tensor, tuple[int, int]]:
    """Places of tokens in ``x`` with its batch and token axis made one, and those axes in order.

    Whole rows at flat places are copied faster than single numbers are gathered.
    """
    batch_first = batch_axis < token_axis
    rows = flat_rows(indices, x.shape[batch_axis], x.shape[token_axis], batch_first=batch_first)
    return rows, (batch_axis, token_axis) if batch_first else (token_axis, batch_axis)


def lay_along(values: Tensor, x: Tensor, token_axis: int, batch_axis: int) -> Tensor:
    """``values`` (B, K) laid along the batch and token axes of ``x``, with size one elsewhere."""
    if token_axis < batch_axis:
        values = values.transpose(0, 1)
    sizes = [1] * x.ndim
    sizes[batch_axis], sizes[token_axis] = values.shape if batch_axis < token_axis else values.shape[::-1]
    return values.reshape(sizes)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for _, leaf in iterate_leaves(value) if isinstance(leaf, Tensor)]


def _with_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` with its tensor leaves replaced in order."""
    remaining = iter(tensors)
    return map_leaves(lambda _, leaf: next(remaining) if isinstance(leaf, Tensor) else leaf, value)
