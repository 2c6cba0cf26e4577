"""Sampling trajectories, noticed from the timesteps: which forward continues which.

Under ``skip="reuse"`` a forward may only take up updates of the same trajectory. One step after the other goes towards the
data; several calls at one timestep (guidance in two calls, a corrector) are told apart by their order, each in a *slot* with a
memory of its own. A timestep that turns back begins a new trajectory; so does another tensor in the place of one that every step
so far was given (a prompt's embedding, a table of positions), and one of another shape, dtype or device. One call more at a
timestep than any step so far had, given those very tensors beside other latents, is the next step: timesteps in half precision are
not all different. More calls at one timestep than there are slots belong together with nothing: they and the step after them are
dense.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from .arguments import Path
from .config import DiffCRConfig
from .errors import UnsupportedError
from .layout import Grids, interleaved_rank
from .memory import Memory, allocate, fits, is_of_dtype, writable
from .plan import BlockPlan

MAX_SLOTS = 4
"""Calls at one timestep that are told apart."""


def read_timesteps(values: Tensor) -> list[float]:
    """Numbers of a tensor (B,), read by the host. Raises UnsupportedError where it has none: on the meta device, or fake."""
    if values.is_meta or isinstance(values, FakeTensor):
        kind = "meta" if values.is_meta else "fake"
        raise UnsupportedError(
            f"which row of the table applies goes by the timestep's value, and a {kind} tensor has none. Pass a timestep with a "
            "value; or, where only shapes matter, use skip='identity', router='token' and a table with equal rows."
        )
    return [float(value) for value in values.tolist()]


@dataclass(eq=False)
class Trajectory:
    """The trajectory that a thread is on.

    now: the timestep of the forward under way, float32 (1,), or (B,) where samples differ. degree: of the polynomial through a
    token's updates. slot: its place among the calls at that timestep. first: whether it is the first of its slot, and so dense.
    grids: of each slot. memories: by (slot, block); those of slots that a whole trajectory did without are dropped. fills: every
    block remembers, even one that skips nothing yet: a forward is to learn from it.
    """

    now: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float32, device="cpu"))
    degree: float = 0.0
    slot: int = 0
    first: bool = True
    grids: dict[int, Grids] = field(default_factory=dict)
    memories: dict[tuple[int, int], Memory] = field(default_factory=dict)
    fills: bool = False
    ranks: dict[Any, Tensor] = field(default_factory=dict)
    _values: tuple[float, ...] = ()
    _given: dict[int, dict[Path, weakref.ref[Tensor]]] = field(default_factory=dict)
    _looks: dict[int, dict[Path, Any]] = field(default_factory=dict)
    _latest: dict[Path, weakref.ref[Tensor]] = field(default_factory=dict)
    _num_steps: int = 0
    _num_slots: int = 1
    _direction: int = 0
    _rose: bool = False
    _crowded: bool = False
    _recalled: set[tuple[int, int]] = field(default_factory=set)
    _kinds: dict[int, Any] = field(default_factory=dict)
    _started: set[int] = field(default_factory=set)
    _filled: set[tuple[int, int]] = field(default_factory=set)

    def advance(self, timestep: Tensor | float, given: Mapping[Path, Tensor] | None = None) -> None:
        """A forward at this timestep (a number, one value, or one per sample) begins, ``given`` these tensors. The host reads the
        timestep."""
        values = self._arrive(timestep)
        given = given or {}
        look = {path: (tensor.shape, tensor.dtype, tensor.device) for path, tensor in given.items()}
        before = self._values
        direction = _direction(before, values)
        if direction == 0 and self._is_next_step(given, look):
            direction = self._direction
        if direction == 0 and before and self.slot + 1 < MAX_SLOTS:
            self.slot += 1
            self._num_slots = max(self._num_slots, self.slot + 1)
            if self._num_steps == 1:
                self._given[self.slot] = _references(given)
            if self._differs(self.slot, look):
                self._forget(self.slot)
        elif self._continues(direction) and not self._is_another(given, look):
            self._direction, self.slot = direction, 0
            self._num_steps += 1
            known = self._given[0]  # but for latents, which are new at the second step, and so at every one
            self._given = {
                0: {path: each for path, each in known.items() if path not in given or each() is given[path]}
            }
        else:
            self._rose = direction == 1 and self._direction == 0
            self._crowded = direction == 0 and bool(before)
            self._direction, self.slot = 0, 0
            self._num_steps, self._num_slots, self._given = 1, 1, {0: _references(given)}
            self._looks.clear()
            self.memories = {key: held for key, held in self.memories.items() if key[0] in self._started}
            self._started.clear()
            self._filled.clear()
        if self.slot == 0:  # a step is one of first calls: others at a timestep may have another batch size
            self._values = values
        self._looks[self.slot], self._latest = look, _references(given)
        self.first = self.slot not in self._started
        self._started.add(self.slot)

    def step(self, timestep: Tensor | float, *, first: bool) -> None:
        """A forward begins that is known to be the first here, or to go on."""
        self._arrive(timestep)
        self.first = first

    def _arrive(self, timestep: Tensor | float) -> tuple[float, ...]:
        """Note the timestep of the forward that begins, and tell it."""
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, dtype=torch.float32, device="cpu")
        now = timestep.detach().float()
        now = now.flatten(1).amax(dim=1) if now.ndim > 1 else now.reshape(-1)
        values = tuple(read_timesteps(now))
        self.now = now[:1] if len(set(values)) == 1 else now
        self._recalled.clear()
        return values

    def _forget(self, slot: int) -> None:
        self._started.discard(slot)
        self._filled = {key for key in self._filled if key[0] != slot}

    def _is_another(self, given: Mapping[Path, Tensor], look: dict[Path, Any]) -> bool:
        """Whether a first call at the next timestep is of another picture than the first call before it.

        After a single step, where nothing is known yet to stay the same: if it was given more of the tensors that another call of
        that step was (which then began this picture, after a call of some other at the same timestep).
        """
        if self._crowded or self._differs(0, look):
            return True
        if self._num_steps > 1:
            return any(path in given and each() is not given[path] for path, each in self._given[0].items())
        shared = {
            slot: sum(path in given and each() is given[path] for path, each in known.items())
            for slot, known in self._given.items()
        }
        return max(shared.values()) > shared[0]

    def _is_next_step(self, given: Mapping[Path, Tensor], look: dict[Path, Any]) -> bool:
        """Whether a call at the timestep of the last one is the step after it all the same: one more than any step had, of the same
        shapes, given every tensor that stayed so far and otherwise none that the last call was given."""
        steady = self._given.get(0, {})
        if self._num_steps < 2 or self.slot + 1 < self._num_slots or not steady or self._differs(0, look):
            return False
        stays = all(path in given and each() is given[path] for path, each in steady.items())
        others = [path for path in self._latest if path not in steady and path in given]
        return stays and bool(others) and all(self._latest[path]() is not given[path] for path in others)

    def _differs(self, slot: int, look: dict[Path, Any]) -> bool:
        """Whether a tensor is of another shape, dtype or device than that in its place in the last call of the slot."""
        known = self._looks.get(slot, {})
        return any(known.get(path, seen) != seen for path, seen in look.items())

    def _continues(self, direction: int) -> bool:
        """Whether a step in this direction goes on.

        Timesteps fall in most models: a first rise is taken for the beginning of another picture after one of a single step, a
        second one for a model whose timesteps rise.
        """
        if self._direction == 0:
            return direction == -1 or (direction == 1 and self._rose)
        return direction == self._direction

    def recall(self, index: int, plan: BlockPlan, values: list[Any], config: DiffCRConfig) -> tuple[Memory, bool]:
        """Memory of block ``index`` in this slot, made new if it does not fit the call, and whether it is empty."""
        key = (self.slot, index)
        if key in self._recalled:
            raise UnsupportedError(
                "a routed block is called more than once in one forward, and with skip='reuse' it remembers one call. Leave it "
                "out with filter_fn, or use skip='identity'."
            )
        self._recalled.add(key)
        memory = self.memories.get(key)
        empty = self.first or key not in self._filled  # one that skipped nothing so far remembers another trajectory
        if (
            memory is None
            or not fits(memory, plan, values)
            or (empty and not is_of_dtype(memory, plan, values, config))
        ):
            memory, empty = allocate(plan, values, config, self.now), True
            self._kinds.pop(self.slot, None)
        self._filled.add(key)
        memory = self.memories[key] = writable(memory)
        return self._at_present(memory), empty

    def look(self, index: int, plan: BlockPlan, values: list[Any]) -> tuple[Memory, bool]:
        """As :meth:`recall`, for a forward that learns: a copy, so that what is written is lost and a block may run again.

        Raises UnsupportedError where the memory does not fit the call.
        """
        memory = self.memories.get((self.slot, index))
        if memory is None or not fits(memory, plan, values):
            stream = values[plan.stream]
            raise UnsupportedError(
                f"what was remembered for a block does not fit a call with tokens {tuple(stream.shape)} in {stream.dtype}. With "
                "skip='reuse' learning takes whole batches of a trajectory: let the loss call the model on the batch it is given, "
                "and autocast go around calibrate."
            )
        return self._at_present(pytree.tree_map(torch.clone, memory)), False

    def recall_all(self, indices: list[int], kind: Any) -> dict[int, tuple[Memory, bool]] | None:
        """Memories of all blocks in this slot, for a graph of the whole model; None where :meth:`has_run` was not told of this kind
        of call since they were made, or where one is of another trajectory."""
        keys = [(self.slot, index) for index in indices]
        if self._kinds.get(self.slot) != kind or not all(key in self.memories for key in keys):
            return None
        if not self.first and not self._filled.issuperset(keys):
            return None
        self._filled.update(keys)
        memories = {index: writable(self.memories[self.slot, index]) for index in indices}
        self.memories.update({(self.slot, index): held for index, held in memories.items()})
        return {index: (self._at_present(held), self.first) for index, held in memories.items()}

    def has_run(self, kind: Any) -> None:
        """A forward of this kind has run block by block: there is a memory for each."""
        self._kinds[self.slot] = kind

    def _at_present(self, memory: Memory) -> Memory:
        device, batch = memory.age.device, memory.age.shape[0]
        if len(self.now) not in (1, batch):
            raise UnsupportedError(
                f"a routed block runs on {batch} samples, and the model's {len(self.now)} have different timesteps: which of them "
                "are whose is unknown. With skip='reuse' expected one timestep for the batch."
            )
        degree = torch.tensor(self.degree, dtype=torch.float32, device=device)
        return memory._replace(now=self.now.to(device), degree=degree, rank=self._rank(memory.age.shape[1], device))

    def _rank(self, num_tokens: int, device: torch.device) -> Tensor:
        grids = self.grids.get(self.slot, ())
        key = (num_tokens, grids, device)
        if key not in self.ranks:
            self.ranks[key] = interleaved_rank(num_tokens, grids).to(device)
        return self.ranks[key]

    @property
    def nbytes(self) -> int:
        """Memory of all blocks and slots in bytes."""
        return sum(memory.nbytes for memory in self.memories.values())


def _references(given: Mapping[Path, Tensor]) -> dict[Path, weakref.ref[Tensor]]:
    return {path: weakref.ref(tensor) for path, tensor in given.items()}


def _direction(before: tuple[float, ...], after: tuple[float, ...]) -> int:
    """1 or -1 where all timesteps rise or fall, 0 where they are the same (of any number of samples), 2 where they do neither."""
    if len(before) != len(after):
        return 0 if set(before) == set(after) and len(set(after)) == 1 else 2
    signs = {0 if math.isclose(a, b) else (1 if a > b else -1) for a, b in zip(after, before, strict=True)}
    return signs.pop() if len(signs) == 1 else 2
