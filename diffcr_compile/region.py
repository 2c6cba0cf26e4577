"""Which timestep region a forward lies in: decided by the timestep's value at the root, once per forward.

A batch whose samples lie in different regions is split at the root: the forward under way serves the first region, and
when it ends the others are run and all are put together again.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as _KEPT
from torch.utils._python_dispatch import _disable_current_modes

from .arguments import bind_arguments, iterate_leaves, leaf_name, map_leaves, positional_names, unbind_as
from .eager import in_a_graph
from .errors import CaptureError, UnsupportedError
from .layout import grids_of_call
from .plan import TimestepPlan
from .primitives import half_of
from .routed import STATE, ModelRouting, routing_of, settle
from .trajectory import Trajectory, read_timesteps
from .unwrap import unwrap

_SLACK = 1e-3
"""Share of the timestep range by which rounding may carry a value past its ends."""

_SEARCHING = threading.RLock()
"""Threads that call a deferred model for the first time at once have its blocks looked for one after the other, so once."""

_SHARED = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""What an output may hold beside tensors that is of all samples."""

_IN_A_GRAPH = (
    "the timestep region is looked up outside the graph: compile the model by diffcr_compile.lower, not whole by torch.compile or "
    "torch.export; or use a table with equal rows and router='token'."
)


def add_region_hooks(model: nn.Module) -> None:
    """Resolve the region before every forward of the root, and finish a split batch after it, both before other hooks see it: what
    they make of the call was part of the model when it was looked at."""
    _add_hooks(model)
    if isinstance(
        model, fx.GraphModule
    ):  # of a graph module a copy keeps neither hooks nor attributes, but what it is told
        model._register_deepcopy_hook(_add_hooks)
        model.meta.setdefault(_KEPT, {})[STATE] = routing_of(model)


def _add_hooks(model: nn.Module) -> None:
    model.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)
    model.register_forward_hook(_leave, with_kwargs=True, prepend=True)
    model.register_forward_hook(_give_up, always_call=True)


def remove_region_hooks(model: nn.Module) -> None:
    """Inverse of :func:`add_region_hooks`, on copies of the model too."""
    for hooks, hook, flags in (
        (model._forward_pre_hooks, _enter, model._forward_pre_hooks_with_kwargs),
        (model._forward_hooks, _leave, model._forward_hooks_with_kwargs),
        (model._forward_hooks, _give_up, model._forward_hooks_always_called),
    ):
        for key in [key for key, value in hooks.items() if value is hook]:
            del hooks[key]
            flags.pop(key, None)
    if isinstance(model, fx.GraphModule):
        model._unregister_deepcopy_hook(_add_hooks)
        del model.meta[_KEPT][STATE]
        if not model.meta[_KEPT]:
            del model.meta[_KEPT]


def region_of(values: Tensor | float, plan: TimestepPlan, num_regions: int) -> list[int]:
    """Region of each sample, 0 the cleanest: one entry where all share a timestep, or there are none. One read of the timestep
    by the host.

    values: a number, or a tensor of one value, of one per sample (B,), or of one per token (B, ...), whose largest counts.
    Raises ValueError outside the range of training, which is fixed at ``transform``; UnsupportedError for a tensor without values.
    """
    if isinstance(values, Tensor):
        values = values.detach()
        values = values.flatten(1).amax(dim=1) if values.ndim > 1 else values.reshape(-1)
        numbers = read_timesteps(values)
    else:
        numbers = [float(values)]
    width = plan.high - plan.low
    for number in numbers:
        if not plan.low - _SLACK * width <= number <= plan.high + _SLACK * width:
            raise ValueError(
                f"timestep {plan.argument!r} is {number:g}, outside {plan.low:g}..{plan.high:g}, the range fixed when the model "
                "was transformed. Pass DiffCRConfig(timestep_range=(low, high)) to transform if the model is used so."
            )
    return [min(max(int((number - plan.low) / width * num_regions), 0), num_regions - 1) for number in numbers] or [0]


def resolve_regions(model: nn.Module, state: ModelRouting, bound: dict[str, Any]) -> list[int]:
    """Regions of the samples of a bound call of the root; reads no timestep where nothing depends on it.

    Raises UnsupportedError in an exported graph, where it can't be read.
    """
    routes = state.learning is not None or state.routes
    if state.config.guidance == "shared" and routes:
        _check_pairs(state, bound)
    if state.plan.timestep is None or not (state.learning or state.needs_region):
        return [0]
    if torch.compiler.is_exporting() and in_a_graph():
        raise UnsupportedError(_IN_A_GRAPH)
    return regions_of_call(model, state, bound)


def regions_of_call(model: nn.Module, state: ModelRouting, bound: dict[str, Any]) -> list[int]:
    """Regions of the samples of a bound call of the root, one entry where all share a timestep."""
    timestep = state.plan.timestep
    return [0] if timestep is None else region_of(timestep_value(bound, timestep, model), timestep, state.num_regions)


def _check_pairs(state: ModelRouting, bound: dict[str, Any]) -> None:
    """Raises UnsupportedError for an odd batch: here, where no graph that is being compiled makes it another error."""
    axes = state.plan.input_batch_axes
    sizes = [
        leaf.shape[axes[path]] for path, leaf in iterate_leaves(bound) if path in axes and isinstance(leaf, Tensor)
    ]
    if sizes:
        half_of(max(sizes))


def in_one_region(regions: list[int]) -> int:
    """The region of all samples. Raises UnsupportedError where they lie in several, which a trajectory can't."""
    if len(set(regions)) > 1:
        raise UnsupportedError(
            f"the samples of this batch lie in timestep regions {sorted(set(regions))}, and with skip='reuse' a batch takes its "
            "steps together. Call the model with samples of one region at a time, or use a table with equal rows and "
            "router='token'."
        )
    return regions[0]


def group_samples(state: ModelRouting, regions: list[int]) -> dict[int, Tensor]:
    """Samples by their region, int64, regions in the order in which they come.

    Raises UnsupportedError where guidance pairs would be parted.
    """
    half = len(regions) // 2
    if state.config.guidance == "shared" and len(set(regions)) > 1 and regions[:half] != regions[half:]:
        raise UnsupportedError(
            f"with guidance='shared' samples i and i + B / 2 keep the same tokens, and those of this batch lie in different "
            f"timestep regions {regions}. Give both halves the same timesteps, or transform with guidance='separate'."
        )
    return {
        region: torch.tensor([i for i, r in enumerate(regions) if r == region], device="cpu")
        for region in dict.fromkeys(regions)
    }


def follow_trajectory(model: nn.Module, state: ModelRouting, bound: dict[str, Any]) -> None:
    """With reuse, and where anything is skipped: this forward continues this thread's trajectory, or begins a new one.

    Not while learning, which follows none: what its skipped tokens take is what was rehearsed, or nothing, and they bypass their
    block. One read of the timestep by the host.
    """
    if state.config.skip != "reuse" or state.plan is None or state.plan.timestep is None or state.rehearsal is not None:
        return
    current, timestep = state.current, state.plan.timestep
    if state.learning or state.dense or not state.routes:
        current.trajectory = None
        return
    if in_a_graph():
        raise UnsupportedError(
            "skip='reuse' follows the timesteps of a trajectory outside the graph: compile the model by diffcr_compile.lower, not "
            "by torch.compile or torch.export."
        )
    if current.trajectory is None:
        current.trajectory = Trajectory()
    current.trajectory.degree = state.degree
    advance(current.trajectory, model, timestep, bound)


def advance(trajectory: Trajectory, model: nn.Module, timestep: TimestepPlan, bound: dict[str, Any]) -> None:
    """A forward by this bound call of the root begins, and goes on with the trajectory or begins a new one."""
    given = {path: leaf for path, leaf in iterate_leaves(bound) if isinstance(leaf, Tensor)}
    trajectory.advance(timestep_value(bound, timestep, model), given)
    if trajectory.first:
        trajectory.grids[trajectory.slot] = grids_of_call(bound)


def reset(model: nn.Module) -> None:
    """With ``skip="reuse"``: the next forward of this thread begins a new trajectory, and its first step is dense; what was
    remembered is freed. Trajectories are noticed by themselves: needed only to free memory, or where one begins at or below the
    timestep that another ended with (image to image at low strength) and is either given the very tensors, its latents apart, that
    the other was given (pipelines make some anew), or the other was of one step.

    Raises NotTransformedError, CaptureError.
    """
    current = settle(unwrap(model)).current
    current.trajectory = current.call = None
    current.recalled.clear()


@contextlib.contextmanager
def pin_region(state: ModelRouting, region: int, row: tuple[int, ...] | None = None) -> Iterator[None]:
    """Inside, this thread's forwards lie in ``region``, whatever their timestep; ``row``: its ratios, in thousandths."""
    current = state.current
    before = current.region, current.pinned, current.row
    current.region, current.pinned, current.row = region, True, row
    state.last_region = region
    try:
        yield
    finally:
        current.region, current.pinned, current.row = before


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    state = routing_of(model)
    if not isinstance(state, ModelRouting):
        return None
    if state.deferred is not None:
        _settle_now(model, state, args, kwargs)
    if state.plan is None:  # a shadow of the model, while its blocks are being looked for
        return None
    if not in_a_graph():
        state.sync_with_masters()
        state.current.call = (weakref.ref(model), args, kwargs)
    begin = _outside(_begin) if _breaks(state) else _begin
    return begin(model, state, args, kwargs)


def _breaks(state: ModelRouting) -> bool:
    """Whether a graph that is being compiled ends here: which region it is, the graph can't say, nor put samples together."""
    compiles = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    return compiles and state.config.skip != "reuse" and (state.learning is not None or state.needs_region)


def _outside(function: Any) -> Any:
    """The function, which a graph that is being compiled breaks for, or says why it can't. Made when it is asked for: that imports
    the compiler."""
    torch._dynamo.graph_break(msg=_IN_A_GRAPH)
    return torch.compiler.disable(function, reason=_IN_A_GRAPH)


def _begin(
    model: nn.Module, state: ModelRouting, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any] | None:
    """Look up the region, and take the first part of a batch that lies in several."""
    if state.current.split is not None:  # an error ended the forward that it belongs to
        state.current.split = None
    if state.current.pinned:
        return None
    if state.dense:
        state.current.trajectory = None
        return None
    config = state.config
    if not (state.learning or state.needs_region or config.skip == "reuse" or config.guidance == "shared"):
        return None
    if (
        state.current.inside and not in_a_graph()
    ):  # the last one was interrupted (Ctrl-C), and torch ran no hook after it
        state.current.trajectory = None
    state.current.inside = True
    bound = bind_arguments(state.positional, args, kwargs)
    follow_trajectory(model, state, bound)
    regions = resolve_regions(model, state, bound)
    state.current.region = state.last_region = regions[0]
    if len(set(regions)) == 1:
        return None
    if state.current.trajectory is not None or state.rehearsal is not None:
        in_one_region(regions)
    groups = group_samples(state, regions)
    first = pick_samples(model, state, groups[regions[0]], len(regions), args, kwargs)
    state.current.split = (groups, args, kwargs)
    return first


def _leave(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    state = routing_of(model)
    if not isinstance(state, ModelRouting) or state.plan is None:
        return output
    finish = _outside(_finish) if _breaks(state) else _finish
    output, regions = finish(model, state, output)
    if not in_a_graph():
        state.current.call = None
    if torch.is_grad_enabled() and not in_a_graph() and (state.learning or state.needs_region):
        state.tell_backward(output, regions)
    return output


def _finish(model: nn.Module, state: ModelRouting, output: Any) -> tuple[Any, list[int]]:
    """The output of the whole batch, and the regions that its samples lie in."""
    regions = [state.region()]
    if state.current.inside:
        state.current.inside = False
    if state.current.split is not None:
        (groups, args, kwargs), state.current.split = state.current.split, None
        output, regions = _run_other_groups(model, state, groups, args, kwargs, output), list(groups)
    return output, regions


def _give_up(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After a forward that an error ended, which never left: nothing of it is under way, and with reuse some blocks remember it and
    others do not."""
    state = routing_of(model)
    if not isinstance(state, ModelRouting) or in_a_graph():
        return
    state.current.call = None
    if state.current.inside:
        state.current.inside, state.current.split = False, None
        state.current.trajectory = None


def _run_other_groups(
    model: nn.Module,
    state: ModelRouting,
    groups: dict[int, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """The output of the whole batch, given that of its first group."""
    outputs, batch = [output], sum(map(len, groups.values()))
    for region, samples in list(groups.items())[1:]:
        group_args, group_kwargs = _run_later_hooks(model, *pick_samples(model, state, samples, batch, args, kwargs))
        with pin_region(state, region):
            outputs.append(model.forward(*group_args, **group_kwargs))
    place = torch.argsort(torch.cat(list(groups.values())))
    _check_parts(model, state, outputs, [len(samples) for samples in groups.values()])
    axes = iter(state.plan.output_batch_axes)
    others = [iter([leaf for _, leaf in iterate_leaves(other)]) for other in outputs[1:]]

    def join(_: Any, leaf: Any) -> Any:
        parts = [leaf, *map(next, others)]
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, _SHARED):
                raise UnsupportedError(
                    f"{type(model).__name__} returns a {type(leaf).__name__}, and the samples of this batch lie in different "
                    "timestep regions: how to put such outputs of theirs together is unknown. Return tensors (in tuples, "
                    "dictionaries or dataclasses), or call it with samples of one region at a time."
                )
            return leaf
        axis = next(axes)
        return torch.cat(parts, dim=axis).index_select(axis, place.to(leaf.device))

    return map_leaves(join, outputs[0])


def _check_parts(model: nn.Module, state: ModelRouting, outputs: list[Any], sizes: list[int]) -> None:
    """Raises UnsupportedError where outputs are others than those that were seen when the model was transformed."""
    axes = state.plan.output_batch_axes
    for output, size in zip(outputs, sizes, strict=True):
        tensors = [leaf for _, leaf in iterate_leaves(output) if isinstance(leaf, Tensor)]
        found = [tuple(tensor.shape) for tensor in tensors]
        fits = len(tensors) == len(axes) and all(
            axis < len(shape) and shape[axis] == size for shape, axis in zip(found, axes, strict=True)
        )
        if not fits:
            raise UnsupportedError(
                f"the samples of this batch lie in different timestep regions, and {type(model).__name__} returns tensors of shape "
                f"{found} for {size} of them: others than when it was transformed, where samples lay along axes {list(axes)}. Call "
                "it with samples of one region at a time, or transform it with such a call."
            )


def _run_later_hooks(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call as it leaves the pre-hooks that come after ours, which torch runs for the first group alone."""
    hooks = list(model._forward_pre_hooks.items())
    ours = next(place for place, (_, hook) in enumerate(hooks) if hook is _enter)
    for key, hook in hooks[ours + 1 :]:
        if key in model._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(model, args, kwargs) or (args, kwargs)
        elif (changed := hook(model, args)) is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def _settle_now(model: nn.Module, state: ModelRouting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if in_a_graph():
        raise CaptureError(
            f"the blocks of {type(model).__name__} have not been looked for yet, and can't be while the model is compiled or "
            "exported. Pass example_inputs to transform, or run the model once before."
        )
    with _SEARCHING, _disable_current_modes():  # a mode that counts FLOPs counts those of the forward alone
        if state.deferred is not None:  # else another thread has been quicker
            state.deferred(model, state, bind_arguments(positional_names(type(model)), args, kwargs))


def timestep_value(bound: dict[str, Any], timestep: TimestepPlan, model: nn.Module) -> Tensor | float:
    """The timestep that a bound call of the root gives. Raises UnsupportedError where there is none."""
    value = bound.get(timestep.argument)
    if not isinstance(value, Tensor | int | float):
        raise UnsupportedError(
            f"{type(model).__name__} is called without its timestep input {timestep.argument!r} (found {type(value).__name__}), so "
            "its timestep region is unknown. Pass the timestep, or use a table with equal rows and router='token'."
        )
    return value


def pick_samples(
    model: nn.Module, state: ModelRouting, samples: Tensor, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call for some samples of a batch of that size, in the form in which it was written: hooks look at that. What is broadcast
    over the samples is given to all. Raises UnsupportedError for an input of another number of samples, or without a known axis for
    them."""
    axes, names = state.plan.input_batch_axes, state.positional
    bound = bind_arguments(names, args, kwargs)
    paths = {path for path, leaf in iterate_leaves(bound) if leaf is not None and not isinstance(leaf, bool)}
    known = paths <= state.plan.input_paths
    if not axes or not known:
        raise UnsupportedError(
            f"the samples of this batch lie in different timestep regions, and {type(model).__name__}'s batch axes "
            + (
                "were not proved when it was transformed"
                if not axes
                else "are unknown for inputs it was not analysed with"
            )
            + ". Call it with samples of one region at a time."
        )

    def pick(path: Any, leaf: Any) -> Any:
        if path not in axes or not isinstance(leaf, Tensor):
            return leaf
        size = leaf.shape[axes[path]]
        if size == 1:  # broadcast over the samples
            return leaf
        if size != batch:
            raise UnsupportedError(
                f"input {leaf_name(path)!r} of {type(model).__name__} has shape {tuple(leaf.shape)}, with {size} samples, but "
                f"there are {batch} timesteps. Give one timestep, or one for each sample."
            )
        return leaf.index_select(axes[path], samples.to(leaf.device))

    return unbind_as(names, map_leaves(pick, bound), args, kwargs)
