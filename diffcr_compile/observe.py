"""Watch a model: what its denoiser is fed (``record``), which tokens its blocks keep (``trace``), how they are called."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Path, bind_arguments, map_leaves, positional_names
from .eager import force_eager
from .errors import UnsupportedError
from .recording import Recording
from .region import region_of, timestep_value
from .routed import BlockRouting, ModelRouting, routing_of, settle
from .unwrap import unwrap


@contextlib.contextmanager
def record(
    model: nn.Module, *, limit: int | None = None, folder: str | os.PathLike[str] | None = None
) -> Iterator[Sequence[dict[str, Any]]]:
    """Collect what ``model`` is called with inside: a sequence of keyword dictionaries, detached copies on the CPU.

    Works on plain and on transformed models; runs eagerly; calls of other threads are left out, and those that fail. The sequence
    is what ``calibrate`` takes as batches.

    limit: at most so many calls are kept, >= 1, evenly over the timestep regions of a transformed model and at random within each
        (a generator of its own decides), in the order in which they came. What reuse is measured on needs whole trajectories: no
        limit then. None: all are kept.
    folder: where to keep them as safetensors files, read when they are asked for; None: in memory.
    Raises ValueError; ArtefactError where ``folder`` exists and is not empty, or can't be made. With a folder, a call with an
    argument that no file holds (an object of the user's) raises UnsupportedError.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be an integer >= 1, found {limit!r}")
    model = unwrap(model)
    batches = Recording(folder)
    choice = None if limit is None else _Choice(limit, model)

    thread = threading.get_ident()
    under_way: list[dict[str, Any]] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is model and threading.get_ident() == thread:  # copied now: a forward may write into its inputs
            under_way.append(map_leaves(_to_cpu, bind_arguments(positional_names(type(model)), args, kwargs)))

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is model and threading.get_ident() == thread and under_way:
            batch = under_way.pop()
            if output is not None and (choice is None or choice.admits(batches, batch)):  # None: the forward has failed
                batches.append(batch)

    with force_eager():
        handles = (
            model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(end, with_kwargs=True, prepend=True, always_call=True),
        )
        try:
            yield batches
        finally:
            for handle in handles:
                handle.remove()


class _Choice:
    """Which calls stay, of a stream of unknown length: reservoir sampling (Vitter 1985), one reservoir a timestep region.

    kept: the regions of the calls kept so far, in their order.
    """

    def __init__(self, limit: int, model: nn.Module) -> None:
        self.limit, self.model = limit, model
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.seen: dict[int, int] = {}
        self.kept: list[int] = []

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.generator, device="cpu"))

    def admits(self, batches: Recording, bound: dict[str, Any]) -> bool:
        """Whether this call is kept; what it takes the place of is dropped from ``batches``."""
        region = self._region(bound)
        self.seen[region] = self.seen.get(region, 0) + 1
        mine = [place for place, known in enumerate(self.kept) if known == region]
        if len(self.kept) >= self.limit:
            counts = Counter(self.kept)
            fullest = max(counts, key=lambda known: (counts[known], known))
            if counts[fullest] > len(mine) + 1:  # a region that is short of calls takes from the one that has most
                mine = [place for place, known in enumerate(self.kept) if known == fullest]
            elif not mine or self._draw(self.seen[region]) >= len(mine):
                return False
            dropped = mine[self._draw(len(mine))]
            del self.kept[dropped]
            batches.drop(dropped)
        self.kept.append(region)
        return True

    def _region(self, bound: dict[str, Any]) -> int:
        """Of the call's first sample; 0 where the model knows none, -1 outside their range, which is no error at ratio zero."""
        state = routing_of(self.model)
        if state is None or state.plan is None or state.plan.timestep is None:
            return 0
        timestep = state.plan.timestep
        try:
            return region_of(timestep_value(bound, timestep, self.model), timestep, state.num_regions)[0]
        except (ValueError, UnsupportedError):
            return -1


@dataclass
class Trace:
    """kept: by block name, one int64 CPU tensor (B, K) per call, the kept tokens' positions in rising order."""

    kept: dict[str, list[Tensor]] = field(default_factory=dict)


@contextlib.contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Collect which tokens each block keeps inside, in this thread; runs eagerly. A dense call keeps all N, a skipped block none.

    Raises NotTransformedError; CaptureError where the blocks have not been looked for yet.
    """
    model = unwrap(model)
    state = settle(model)
    seen = Trace({block.fqn: [] for block in state.blocks})

    thread = threading.get_ident()

    def observe(fqn: str, kept: Tensor) -> None:
        if threading.get_ident() == thread:
            seen.kept[fqn].append(kept.detach().cpu())

    with force_eager():
        state.observers.append(observe)
        try:
            yield seen
        finally:
            state.observers.remove(observe)


@contextlib.contextmanager
def watch_calls(
    model: nn.Module,
    state: ModelRouting,
    *,
    before: Callable[..., object] | None = None,
    after: Callable[..., object] | None = None,
) -> Iterator[None]:
    """Inside, every call of a routed block is shown to ``before(block, args, kwargs)`` as it comes in, and to
    ``after(block, args, kwargs, output)``, as it came in too, once it has run; those of a copy, in which a new kind of call is
    looked at, are not."""
    under_way: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(block: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        under_way.append(block.own_tokens(args, kwargs))

    def finish(block: BlockRouting, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert after is not None
        after(block, *under_way.pop(), output)

    def show(observe: Callable[..., object], block: BlockRouting, watched: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, *call: Any) -> None:
            if module is watched:
                observe(block, *call)

        return hook

    handles = []
    for block in state.blocks:
        module = model.get_submodule(block.fqn)
        if before is not None:
            handles.append(module.register_forward_pre_hook(show(before, block, module), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_pre_hook(show(keep, block, module), with_kwargs=True))
            finished = show(finish, block, module)  # the first hook: those of FSDP2 take the weights away again
            handles.append(module.register_forward_hook(finished, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to_cpu(_: Path, leaf: Any) -> Any:
    """A copy that can be learned from, wherever it was recorded."""
    with torch.inference_mode(False):
        return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf
