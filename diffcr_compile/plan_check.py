"""Whether a plan that was read from a file is one that its model can run: every index, axis, name and choice is looked at."""

from __future__ import annotations

import inspect
import keyword
import math
from collections.abc import Iterable
from typing import Any, get_args

from torch import nn

from .arguments import iterate_leaves, positional_names
from .config import Context, DiffCRConfig
from .plan import PLACEHOLDERS, BlockPlan, LeafPlan, Lift, ModelPlan, OutputPlan, StatePlan, TimestepPlan, TokenAxis


def check_plan(plan: ModelPlan, model: nn.Module, config: DiffCRConfig) -> None:
    """Raises ValueError, naming what is wrong."""
    for index, family in enumerate(plan.families):
        _check_family(f"family {index}", family, config)
    _check_sites(plan, model)
    for index, family in enumerate(plan.later_families):
        _check_family(f"later family {index}", family, config)
    _check_later_sites(plan)
    _require(_counts((plan.dense_flops, *plan.family_flops)), "FLOPs are counts")
    _require(len(plan.family_flops) == len(plan.families), "every family has its FLOPs")
    _require(
        isinstance(plan.output_batch_axes, tuple) and _counts(plan.output_batch_axes),
        "batch axes of outputs are counts",
    )
    _require(
        isinstance(plan.input_batch_axes, dict) and _counts(plan.input_batch_axes.values()),
        "batch axes of inputs are counts",
    )
    _require(isinstance(plan.input_paths, frozenset), "the paths of inputs are a set")
    _require(
        config.router == "token" or plan.timestep is not None, "routers see a timestep that the model does not take"
    )
    _require(
        config.skip == "identity" or plan.timestep is not None, "reuse follows a timestep that the model does not take"
    )
    if plan.timestep is not None:
        _check_timestep(plan.timestep, model)


def _check_timestep(timestep: TimestepPlan, model: nn.Module) -> None:
    known = inspect.signature(type(model).forward).parameters
    _require(timestep.argument in known, f"the model takes no timestep input {timestep.argument!r}")
    low, high = timestep.low, timestep.high
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in (low, high))
    _require(numbers and low < high, f"no range of timesteps goes from {low!r} to {high!r}")


def _check_sites(plan: ModelPlan, model: nn.Module) -> None:
    modules = dict(model.named_modules())
    names = [site.fqn for site in plan.sites]
    _require(bool(names) and len(set(names)) == len(names), "every routed block is named once")
    for site in plan.sites:
        _require(_index(site.family, plan.families), f"{site.fqn!r} is of an unknown family")
        family, module = plan.families[site.family], modules.get(site.fqn)
        if site.fqn == "" or module is None:
            raise ValueError(f"the model has no block {site.fqn!r}")
        _require(type(module).__name__ == family.kind, f"{site.fqn!r} is no {family.kind!r}")
        _require(positional_names(type(module)) == family.positional, f"{site.fqn!r} takes other arguments")


def _check_later_sites(plan: ModelPlan) -> None:
    known = {site.fqn: [plan.families[site.family]] for site in plan.sites}
    for site in plan.later_sites:
        _require(site.fqn in known, f"{site.fqn!r} was called later, and is not routed")
        _require(_index(site.family, plan.later_families), f"{site.fqn!r} is of an unknown later family")
        family, plans = plan.later_families[site.family], known[site.fqn]
        same = (family.kind, family.positional, family.form) == (plans[0].kind, plans[0].positional, plans[0].form)
        _require(same, f"{site.fqn!r} has other tokens routed in a later kind of call")
        _require(
            all(family.signature != other.signature for other in plans), f"{site.fqn!r} has one plan for a kind of call"
        )
        plans.append(family)


def _check_family(name: str, plan: BlockPlan, config: DiffCRConfig) -> None:
    leaves, outputs = plan.leaves, plan.outputs
    for leaf in leaves:
        _check_leaf(name, leaf, leaves)
    names = [leaf.name for leaf in leaves]
    _require(len({*names, *PLACEHOLDERS}) == len(names) + len(PLACEHOLDERS), f"{name}: inputs have names of their own")
    _require(_index(plan.stream, leaves) and leaves[plan.stream].is_tensor, f"{name}: the stream is one of the inputs")
    stream = leaves[plan.stream]
    for axis, size in ((plan.token_axis, "N"), (plan.batch_axis, "B")):
        _require(
            _index(axis, stream.dims) and stream.dims[axis] == size, f"{name}: axis {axis!r} of the stream is no {size}"
        )
    _require(stream.batch_axis == plan.batch_axis, f"{name}: the stream's batch axis is the block's")
    _require(
        any(axis.axis == plan.token_axis for axis in stream.token_axes), f"{name}: the stream is indexed by its tokens"
    )
    _require(type(plan.width) is int and stream.dims[-1] == str(plan.width), f"{name}: the width is the stream's")
    _require(plan.lift in get_args(Lift), f"{name}: {plan.lift!r} is no way to call a block")
    _require(plan.context in get_args(Context), f"{name}: {plan.context!r} is no context")
    _require(plan.context in ("kept", config.context), f"{name}: {plan.context!r} context was not asked for")
    _require(
        plan.context == "stale" or not plan.states, f"{name}: keys and values are remembered for stale context only"
    )
    for state in plan.states:
        _check_state(name, state, leaves)
    for output in outputs:
        _check_output(name, output, leaves)
    _require(any(output.routed for output in outputs), f"{name}: an output follows the tokens")
    given = [index for _, index in iterate_leaves(plan.arguments) if index is not None]
    _require(
        isinstance(plan.arguments, dict) and sorted(given, key=repr) == sorted(range(len(leaves)), key=repr),
        f"{name}: the call takes each input once",
    )
    returned = [index for _, index in iterate_leaves(plan.output_template) if type(index) is int]
    _require(set(returned) == set(range(len(outputs))), f"{name}: the block returns each output")
    paths = {path for path, *_ in plan.signature}
    _require(paths == {leaf.path for leaf in leaves}, f"{name}: the signature is that of the inputs")


def _check_leaf(name: str, leaf: LeafPlan, leaves: tuple[LeafPlan, ...]) -> None:
    proper = isinstance(leaf.name, str) and leaf.name.isidentifier() and not keyword.iskeyword(leaf.name)
    _require(proper, f"{name}: {leaf.name!r} is no name of an input")
    _check_dims(name, leaf.dims)
    _require(
        leaf.batch_axis is None or _index(leaf.batch_axis, leaf.dims),
        f"{name}: {leaf.name} has no axis {leaf.batch_axis!r}",
    )
    for axis in leaf.token_axes:
        _check_axis(f"{name}: {leaf.name}", axis, leaf.dims, leaves)


def _check_axis(name: str, axis: TokenAxis, dims: tuple[str, ...], leaves: tuple[LeafPlan, ...]) -> None:
    _require(_index(axis.axis, dims), f"{name} has no axis {axis.axis!r}")
    for size in (*axis.before, *axis.after):
        index, place = size
        known = _index(index, leaves) and _index(place, leaves[index].dims)
        _require(known, f"{name} holds tokens of an unknown input {size!r}")


def _check_state(name: str, state: StatePlan, leaves: tuple[LeafPlan, ...]) -> None:
    name = f"{name}: keys or values"
    _check_dims(name, state.dims)
    _check_axis(name, state.tokens, state.dims, leaves)
    axes = (state.batch_axis, state.tokens.axis)
    _require(_index(state.batch_axis, state.dims) and len(set(axes)) == 2, f"{name} have a batch axis of their own")
    fixed = [size for axis, size in enumerate(state.dims) if axis not in axes]
    _require(all(size.isdecimal() and len(size) < 10 for size in fixed), f"{name} are of fixed sizes otherwise")


def _check_output(name: str, output: OutputPlan, leaves: tuple[LeafPlan, ...]) -> None:
    _check_dims(name, output.dims)
    _require(_index(output.batch_axis, output.dims), f"{name}: an output has no axis {output.batch_axis!r}")
    _require(not output.routed or "N" in output.dims, f"{name}: an output that follows the tokens has them")
    known = output.source is None or (_index(output.source, leaves) and leaves[output.source].is_tensor)
    _require(known, f"{name}: an output is joined to an unknown input {output.source!r}")


def _check_dims(name: str, dims: Any) -> None:
    _require(isinstance(dims, tuple) and all(isinstance(size, str) for size in dims), f"{name}: {dims!r} are no axes")


def _index(value: Any, of: tuple[Any, ...]) -> bool:
    return type(value) is int and 0 <= value < len(of)


def _counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
