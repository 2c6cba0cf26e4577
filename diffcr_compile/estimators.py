"""How a ratio gets a gradient: what a block computes while it learns.

An estimator is a function of a block's call, ``(module, routing, args, kwargs) -> output``, whose value is differentiable in
the master of its ratio. ``learning`` puts one in force.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import bind_arguments, iterate_leaves, map_leaves
from .config import Estimator
from .eager import in_a_graph
from .memory import older_and_higher, oldest_first
from .primitives import add_share, lay_along, score_tokens, share_scores
from .ratios import BIN, SCALE, capacity, neighbour_bins
from .routed import BlockRouting, Recalled, forward_at, prepare_context, router_vector

Estimate = Callable[[nn.Module, BlockRouting, tuple[Any, ...], dict[str, Any]], Any]


def two_bin(module: nn.Module, routing: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Two forwards (DiffCR, section 3): a mix of the outputs at the two neighbouring bins, by nearness.

    lower + w (upper - lower) with w the ratio's place between the bins: at a bin the value is that bin's, and the slope of
    the ratio is <dL/dout, upper - lower> / width everywhere.
    """
    low, high, weight = _place(routing)
    own, remembered = routing.own_tokens(args, kwargs), _look(routing, args, kwargs) if low else None
    lower = _run(module, routing, low, *own, remembered)
    upper = _run(module, routing, high, args, kwargs, _look(routing, args, kwargs))
    others = iter([leaf for _, leaf in iterate_leaves(upper) if isinstance(leaf, Tensor)])

    def mix(_: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        other = next(others)
        return add_share(leaf, weight, other, leaf)

    return map_leaves(mix, lower)


def single_pass(module: nn.Module, routing: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward, at the larger of the two bins; the tokens that the smaller one leaves out get ``1 - w`` of their update.

    At a bin the value is that bin's. The slope is <dL/dout, -update> over the tokens between the bins, divided by the width: the
    two-bin slope but for what those tokens' keys and values give the others. With reuse rehearsed, an update counts from what the
    memory foretells.
    """
    low, high, weight = _place(routing)
    bound = bind_arguments(routing.positional, args, kwargs)
    program = routing.program(bound)
    values = program.values(bound, routing.fqn)
    plan, config = program.plan, routing.model.config
    recalled = _look(routing, args, kwargs)
    memory = None if recalled is None else recalled[0]
    tokens = values[plan.stream]
    scores = score_tokens(tokens, router_vector(module), plan.token_axis, plan.batch_axis)
    if config.guidance == "shared":
        scores = share_scores(scores)
    num_tokens = scores.shape[1]
    most, least = (capacity(num_tokens, ratio) for ratio in (low, high))
    priority = scores
    if memory is not None and config.selection != "score":
        turn = config.selection == "turn"
        priority = oldest_first(memory) if turn else older_and_higher(scores, memory)
    between = priority.argsort(dim=1, descending=True)[:, (least if plan.can_skip_block else max(least, 1)) : most]
    factor = torch.zeros_like(scores).scatter(1, between, -weight.to(scores).expand(between.shape))
    if (
        low == 0 and config.selection != "turn"
    ):  # a dense call has no gate: the router's gradient enters as gate_exact lets it
        log_gate = nn.functional.logsigmoid(scores)
        factor = factor + (log_gate - log_gate.detach())
    skips_all = high == SCALE and plan.can_skip_block
    before = [
        program.fallback(index, values, memory) if output.routed or skips_all else None
        for index, output in enumerate(plan.outputs)
    ]
    output = _run(module, routing, low, *routing.own_tokens(args, kwargs), recalled if low else None)
    places = iter(zip(plan.outputs, before, strict=True))

    def fade(_: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        known, start = next(places)
        if start is None:
            return leaf
        if not known.routed:  # the smaller bin skips the block, and these tokens with it
            return add_share(leaf, weight, start, leaf)
        along = lay_along(factor, leaf, known.dims.index("N"), known.batch_axis)
        return add_share(leaf, along, leaf, start)

    return map_leaves(fade, output)


ESTIMATORS: dict[Estimator, Estimate] = {"two-bin": two_bin, "single-pass": single_pass}


def estimate(
    name: Estimator, module: nn.Module, routing: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The block's output by the estimator of that name."""
    return ESTIMATORS[name](module, routing, args, kwargs)


def _run(
    module: nn.Module,
    routing: BlockRouting,
    ratio: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recalled: Recalled | None,
) -> Any:
    """The block at a bin: by its graph where the blocks are lowered, of which there are as many as bins."""
    context = prepare_context(module, routing, args, kwargs)
    run = forward_at if routing.compiled is None or in_a_graph() else routing.compiled
    return run(module, ratio, args, kwargs, recalled, context)


def _look(routing: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recalled | None:
    """What was rehearsed for this block, a copy each time; None where nothing was."""
    rehearsal = routing.model.rehearsal
    if rehearsal is None:
        return None
    bound = bind_arguments(routing.positional, args, kwargs)
    program = routing.program(bound)
    return rehearsal.look(routing.index, program.plan, program.values(bound, routing.fqn))


def _place(routing: BlockRouting) -> tuple[int, int, Tensor]:
    """The bins around the ratio in force, in thousandths, and its differentiable place between them, () in [0, 1]."""
    masters = routing.model.masters
    assert masters is not None
    master = masters[routing.model.region(), routing.index]
    low, high = neighbour_bins(float(master.detach()))
    return low, high, (master - low / SCALE) * (SCALE / BIN)
