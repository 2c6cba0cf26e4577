"""Capture: run the model once and note what every module was called with, what it returned, and what that cost.

The run is made on a shadow of the model (its own module objects, the same parameters), under fake tensors where the model
allows it (no memory, no compute, no values), else for real. Nothing is left behind in the model, its caches or its hooks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..arguments import Path, bind_arguments, iterate_leaves, map_leaves, positional_names
from ..dry_run import dry_run, shadow
from ..errors import CaptureError
from ..flops import attention_flops, count_flops
from ..forget import forget_fakes
from .analysis import Call, ModelAnalysis, TensorInfo, log
from .timestep import SinusoidTracker


def capture_calls(analysis: ModelAnalysis) -> ModelAnalysis:
    """Fill in ``calls``, ``module_flops``, ``timestep_reach`` and the batch axes of the model's inputs and outputs, and of its
    modules' inputs.

    A batch of one is doubled first, where the model takes it: it would bake a size of one into every graph and hide the batch axis.
    Raises CaptureError where the model refuses its inputs.

    Where fake tensors have come into a cache outside the model they are taken out, and the model is run again, with what a real run
    leaves there.
    """
    try:
        found = _capture(analysis)
    finally:
        left = forget_fakes()
    if left:
        with contextlib.suppress(Exception):  # on the meta device, say
            _run_unwatched(shadow(analysis.model), analysis.inputs, fake=False)
        try:
            found = _capture(analysis)
        finally:
            forget_fakes()
    return found


def _capture(analysis: ModelAnalysis) -> ModelAnalysis:
    for path, leaf in iterate_leaves(analysis.inputs):
        if isinstance(leaf, Tensor) and leaf.is_nested:
            raise CaptureError(
                f"input {'.'.join(map(str, path))!r} is a nested tensor, whose samples have different numbers of tokens; routing "
                "keeps the same number of each. Pad them and pass a mask."
            )
    doubled = _double_single_batch(analysis.inputs)
    errors = []
    tried = [analysis.inputs] if doubled is analysis.inputs else [doubled, analysis.inputs]
    for inputs, fake in itertools.product(tried, (True, False)):
        run = _Run(shadow(analysis.model), inputs, fake=fake)
        try:
            run.execute()
        except Exception as error:  # whatever the user's model raises
            errors.append(f"{type(error).__name__}: {error}")
            log.info("capture under %s failed: %s", "fake tensors" if fake else "real tensors", errors[-1])
            continue
        axes, enlarged = _find_batch_axes(analysis.model, inputs, run.output, fake=fake)
        called = _call_unwatched(analysis.model, inputs, fake=fake) if enlarged is None else enlarged
        calls = {fqn: tuple(calls) for fqn, calls in run.calls.items() if fqn in called}
        return replace(
            analysis,
            calls=calls,
            nested=frozenset(fqn for fqn in calls if called[fqn] is None),
            batch_axes={} if enlarged is None else {fqn: _grown(calls[fqn][0], enlarged[fqn] or {}) for fqn in calls},
            module_flops=run.flops,
            timestep_reach=tuple(run.tracker.reached.items()),
            input_batch_axes=axes[0],
            output_batch_axes=axes[1],
            inputs=inputs,
        )
    leaves = iterate_leaves(analysis.inputs)
    given = ", ".join(f"{'.'.join(map(str, path))} {_describe(leaf)}" for path, leaf in leaves)
    raise CaptureError(
        f"{type(analysis.model).__name__} could not be run on the inputs it was given ({given}). It raised {errors[-1]}. "
        "Pass example_inputs that model(**example_inputs) accepts."
    )


class _Run:
    """One recorded forward of ``model``."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], *, fake: bool) -> None:
        self.model, self.inputs, self.fake = model, inputs, fake
        self.calls: dict[str, list[Call]] = {}
        self.flops: dict[str, int] = {}
        self.tracker = SinusoidTracker()
        self.output: Any = None
        self._known: dict[int, Tensor] = {}
        self._started: list[tuple[int, int, int, dict[Path, int]]] = []

    def execute(self) -> None:
        with dry_run(self.model, fake=self.fake) as convert:
            inputs = map_leaves(convert, self.inputs)
            leaves = dict(iterate_leaves(inputs))
            given = {path: value for path, value in iterate_leaves(self.inputs) if isinstance(value, Tensor)}
            self._known = {id(leaves[path]): value for path, value in given.items()}
            with count_flops() as counter, self._hooks(counter), self.tracker.track(leaves):
                self.output = self.model(**inputs)

    @contextlib.contextmanager
    def _hooks(self, counter: FlopCounterMode) -> Iterator[None]:
        handles = []
        for fqn, module in self.model.named_modules():
            # Next to the forward: a call is what the module's own hooks make of it, and its output what they are given.
            handles.append(module.register_forward_pre_hook(self._before(counter), with_kwargs=True))
            handles.append(module.register_forward_hook(self._after(fqn, counter), with_kwargs=True, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, counter: FlopCounterMode) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _identities(bind_arguments(positional_names(type(module)), args, kwargs))
            self._started.append(
                (counter.get_total_flops(), attention_flops(counter), self.tracker.num_operators, given)
            )

        return hook

    def _after(self, fqn: str, counter: FlopCounterMode) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            total, attending, operators, given = self._started.pop()
            self.flops[fqn] = self.flops.get(fqn, 0) + counter.get_total_flops() - total
            attends = attention_flops(counter) > attending
            bound = bind_arguments(positional_names(type(module)), args, kwargs)
            order = sum(map(len, self.calls.values()))
            operators = self.tracker.num_operators - operators
            arguments, result = map_leaves(self._info, bound), map_leaves(self._info, output)
            call = Call(fqn, arguments, result, order, attends, operators, writes=_identities(bound) != given)
            self.calls.setdefault(fqn, []).append(call)

        return hook

    def _info(self, _: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        value = None
        if not leaf.dtype.is_floating_point and not leaf.dtype.is_complex:
            value = self._known.get(id(leaf)) if self.fake else leaf.detach().clone()
        if value is not None and value.is_meta:
            value = None
        return TensorInfo(tuple(leaf.shape), leaf.dtype, value)


def _identities(bound: dict[str, Any]) -> dict[Path, int]:
    """Which object each leaf of a bound call is."""
    return {path: id(leaf) for path, leaf in iterate_leaves(bound)}


def _double_single_batch(inputs: dict[str, Any]) -> dict[str, Any]:
    if _batch(inputs) != 1:
        return inputs
    return _enlarge(inputs, {path: 0 for path, leaf in iterate_leaves(inputs) if _leads(leaf, 1)})


def _batch(inputs: dict[str, Any]) -> int:
    """Batch size of a call: the length of its first input where that is a list of samples, else the leading size of its first
    floating tensor of rank three or more, else of its first tensor."""
    if _lists_samples(inputs):
        return len(next(iter(inputs.values())))
    tensors = [leaf for _, leaf in iterate_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    large = [leaf for leaf in tensors if leaf.ndim >= 3 and leaf.dtype.is_floating_point]
    chosen = next(iter(large or tensors), None)
    return 0 if chosen is None else chosen.shape[0]


def _lists_samples(inputs: dict[str, Any]) -> bool:
    """Whether the first input, the noise, is a list with a tensor for each sample."""
    first = next(iter(inputs.values()), None)
    return isinstance(first, list) and bool(first) and all(_is_image(item) for item in first)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 3 and value.dtype.is_floating_point


def _leads(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size


def _enlarge(inputs: dict[str, Any], axes: dict[Path, int]) -> dict[str, Any]:
    """``inputs`` with one more sample (a copy of the first) along the axis given for each leaf, and in every list of samples."""
    if _lists_samples(inputs):
        batch = _batch(inputs)
        inputs = {name: _longer(value, batch) for name, value in inputs.items()}
        axes = {path: axis for path, axis in axes.items() if len(path) == 1}

    def one(path: Path, leaf: Any) -> Any:
        if path not in axes:
            return leaf
        return torch.cat([leaf, leaf.narrow(axes[path], 0, 1)], dim=axes[path])

    return map_leaves(one, inputs)


def _longer(value: Any, batch: int) -> Any:
    return [*value, value[0]] if isinstance(value, list) and len(value) == batch else value


_BatchAxes = tuple[dict[Path, int], tuple[int, ...]]
_Called = dict[str, dict[Path, tuple[int, ...]] | None]
"""The modules that a run called, with the shapes of what they were first called with; None for nested tensors, which have none."""


def _find_batch_axes(
    model: nn.Module, inputs: dict[str, Any], output: Any, *, fake: bool
) -> tuple[_BatchAxes, _Called | None]:
    """Batch axis of each input leaf and of each output tensor, proved by a run with one more sample; and what that run, in which
    nobody watched, has called.

    Empty where the proof fails: a batch whose samples lie in different timestep regions can't be split then.
    """
    batch = _batch(inputs)
    axes = {path: 0 for path, leaf in iterate_leaves(inputs) if _leads(leaf, batch)}
    try:
        called, enlarged = _run_unwatched(shadow(model), _enlarge(inputs, axes), fake=fake)
    except Exception as error:
        log.info("batch axes of the model's inputs not proved: %s: %s", type(error).__name__, error)
        return ({}, ()), None
    if _lists_samples(inputs):
        return ({}, ()), called
    out_axes = []
    for before, after in zip(_output_tensors(output), _output_tensors(enlarged), strict=True):
        grown = [axis for axis, size in enumerate(after.shape) if size != before.shape[axis]]
        if len(grown) != 1 or after.shape[grown[0]] != batch + 1:
            return ({}, ()), called
        out_axes.append(grown[0])
    return (axes, tuple(out_axes)), called


def _grown(call: Call, enlarged: dict[Path, tuple[int, ...]]) -> dict[Path, int]:
    """The one axis of each tensor of a call that was longer with one more sample."""
    axes = {}
    for path, leaf in iterate_leaves(call.arguments):
        if isinstance(leaf, TensorInfo) and path in enlarged and len(enlarged[path]) == len(leaf.shape):
            grown = [axis for axis, size in enumerate(enlarged[path]) if size != leaf.shape[axis]]
            if len(grown) == 1:
                axes[path] = grown[0]
    return axes


def _call_unwatched(model: nn.Module, inputs: dict[str, Any], *, fake: bool) -> _Called:
    """Which modules a run calls in which nobody watches; real where it does not go under fake tensors."""
    try:
        return _run_unwatched(shadow(model), inputs, fake=fake)[0]
    except Exception:
        if not fake:
            raise
        return _run_unwatched(shadow(model), inputs, fake=False)[0]


def _run_unwatched(model: nn.Module, inputs: dict[str, Any], *, fake: bool) -> tuple[_Called, Any]:
    """The modules that are called without hooks and modes, and the output. A layer of torch's may run its parts fused then: what
    is not called can't be routed."""
    called: _Called = {"": {}}

    def note(fqn: str, forward: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            bound = bind_arguments(names, args, kwargs)
            tensors = {path: leaf for path, leaf in iterate_leaves(bound) if isinstance(leaf, Tensor)}
            nested = any(leaf.is_nested for leaf in tensors.values())
            called.setdefault(fqn, None if nested else {path: tuple(leaf.shape) for path, leaf in tensors.items()})
            return forward(*args, **kwargs)

        return noted

    for fqn, module in model.named_modules():
        if fqn and "forward" not in vars(module):
            names = positional_names(type(module))
            module.forward = note(fqn, module.forward, names)  # type: ignore[method-assign]
        else:
            called[fqn] = {}
    with dry_run(model, fake=fake, watched=False) as convert:
        return called, model(**map_leaves(convert, inputs))


def _output_tensors(output: Any) -> list[Tensor]:
    return [leaf for _, leaf in iterate_leaves(output) if isinstance(leaf, Tensor)]


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)[:40]
