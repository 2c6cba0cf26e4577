"""Sampling trajectories, noticed from the timesteps: which forward continues which.

Under ``skip="reuse"`` a forward may only take up updates of the same trajectory. One step after the other goes towards the
data; several calls at one timestep (guidance in two calls, a corrector) are told apart by their order, each in a *slot* with a
memory of its own. A timestep that turns back, or more calls at one timestep than there are slots, begins a new trajectory; so does
another tensor in the place of one that every step so far was given (a prompt's embedding, a table of positions).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .arguments import Path
from .config import DiffCRConfig
from .defaults import on_cpu
from .errors import UnsupportedError
from .memory import Memory, allocate, fits, writable
from .plan import BlockPlan

MAX_SLOTS = 4
"""Calls at one timestep that are told apart."""


@dataclass(eq=False)
class Trajectory:
    """The trajectory that a thread is on.

    now: the timestep of the forward under way, float32 (1,) or (B,). degree: of the polynomial through a token's updates. grid:
    size of the latents. slot: its place among the calls at that timestep. first: whether it is the first of its slot, and so dense.
    memories: by (slot, block). fills: every block remembers, even one that skips nothing yet: a forward is to learn from it.
    """

    now: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float32, device="cpu"))
    degree: float = 0.0
    grid: tuple[int, ...] = ()
    slot: int = 0
    first: bool = True
    memories: dict[tuple[int, int], Memory] = field(default_factory=dict)
    fills: bool = False
    ranks: dict[Any, Tensor] = field(default_factory=dict)
    _values: tuple[float, ...] = ()
    _given: dict[Path, weakref.ref[Tensor]] = field(default_factory=dict)
    _num_steps: int = 0
    _direction: int = 0
    _rose: bool = False
    _recalled: set[tuple[int, int]] = field(default_factory=set)
    _kinds: dict[int, Any] = field(default_factory=dict)
    _started: set[int] = field(default_factory=set)
    _filled: set[tuple[int, int]] = field(default_factory=set)

    def advance(
        self, timestep: Tensor | float, grid: tuple[int, ...], given: Mapping[Path, Tensor] | None = None
    ) -> None:
        """A forward at this timestep (a number, one value, or one per sample) on latents of this size begins, ``given`` these
        tensors. The host reads the timestep."""
        self._arrive(timestep, grid)
        given = given or {}
        before, values = self._values, tuple(self.now.tolist())
        direction = _direction(before, values)
        changed = [path for path, tensor in self._given.items() if path in given and tensor() is not given[path]]
        if direction == 0 and before and self.slot + 1 < MAX_SLOTS:
            self.slot += 1
        elif self._continues(direction) and not (changed and self._num_steps > 1):
            self._direction, self.slot = direction, 0
            self._num_steps += 1
            for path in changed:  # latents: new at the second step, and so at every one
                del self._given[path]
        else:
            self._rose = direction == 1 and self._direction == 0
            self._direction, self.slot = 0, 0
            self._num_steps, self._given = 1, {path: weakref.ref(tensor) for path, tensor in given.items()}
            self._started.clear()
            self._filled.clear()
        if self.slot == 0:  # a step is one of first calls: others at a timestep may have another batch size
            self._values = values
        self.first = self.slot not in self._started
        self._started.add(self.slot)

    def step(self, timestep: Tensor | float, grid: tuple[int, ...], *, first: bool) -> None:
        """A forward begins that is known to be the first here, or to go on."""
        self._arrive(timestep, grid)
        self.first = first

    def _arrive(self, timestep: Tensor | float, grid: tuple[int, ...]) -> None:
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, dtype=torch.float32, device="cpu")
        self.now = timestep.detach().float()
        self.now = self.now.flatten(1).amax(dim=1) if self.now.ndim > 1 else self.now.reshape(-1)
        self.grid = grid
        self._recalled.clear()

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
        if memory is None or not fits(memory, plan, values, config):
            stream = values[plan.stream]
            rank = self._rank(stream.shape[plan.token_axis], stream.device)
            memory, empty = allocate(plan, values, config, rank, self.now), True
            self._kinds.pop(self.slot, None)
        self._filled.add(key)
        memory = self.memories[key] = writable(memory)
        return self._at_present(memory), empty

    def look(self, index: int, plan: BlockPlan, values: list[Any], config: DiffCRConfig) -> tuple[Memory, bool]:
        """As :meth:`recall`, for a forward that learns: a copy, so that what is written is lost and a block may run again.

        Raises UnsupportedError where the memory does not fit the call.
        """
        memory = self.memories.get((self.slot, index))
        if memory is None or not fits(memory, plan, values, config):
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
        device = memory.age.device
        return memory._replace(
            now=self.now.to(device), degree=torch.tensor(self.degree, dtype=torch.float32, device=device)
        )

    def _rank(self, num_tokens: int, device: torch.device) -> Tensor:
        key = (num_tokens, self.grid, device)
        if key not in self.ranks:
            self.ranks[key] = interleaved_rank(num_tokens, self.grid).to(device)
        return self.ranks[key]

    @property
    def nbytes(self) -> int:
        """Memory of all blocks and slots in bytes."""
        return sum(memory.nbytes for memory in self.memories.values())


def _direction(before: tuple[float, ...], after: tuple[float, ...]) -> int:
    """1 or -1 where all timesteps rise or fall, 0 where they are the same (of any number of samples), 2 where they do neither."""
    if len(before) != len(after):
        return 0 if set(before) == set(after) and len(set(after)) == 1 else 2
    signs = {0 if math.isclose(a, b) else (1 if a > b else -1) for a, b in zip(after, before, strict=True)}
    return signs.pop() if len(signs) == 1 else 2


@on_cpu()
def interleaved_rank(num_tokens: int, grid: tuple[int, ...]) -> Tensor:
    """Order in which to keep the tokens so that any run of it covers the picture evenly: float32 (N,) in [0, 1).

    grid: (height, width) or (frames, height, width) of the latents; the tokens are taken for square patches of them, in raster
    order, and ordered as in Bayer's dither matrix, so that the first half is a checkerboard and the first quarter one cell of each
    2 x 2, shifted from frame to frame. Where no patch size fits: by multiples of the golden ratio along the sequence.
    """
    tokens = token_grid(num_tokens, grid)
    if tokens is None:
        golden = (math.sqrt(5) - 1) / 2
        keys = (torch.arange(num_tokens, dtype=torch.float64) * golden) % 1
        return _ranks(keys)
    frames, height, width = tokens
    frame, row, column = torch.meshgrid(*(torch.arange(size) for size in (frames, height, width)), indexing="ij")
    keys, row, column = torch.zeros(frames, height, width, dtype=torch.float64), row + frame, column + frame // 2
    scale = 1.0
    for level in range(max(height, width, 2).bit_length()):
        bit_row, bit_column = (row >> level) & 1, (column >> level) & 1
        scale /= 4
        keys += scale * (2 * (bit_row ^ bit_column) + bit_row)
    return _ranks(keys.flatten())


def token_grid(num_tokens: int, grid: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(frames, height, width) of the tokens of latents of this size, or None."""
    if len(grid) not in (2, 3):
        return None
    frames, height, width = (1, *grid) if len(grid) == 2 else grid
    for patch in range(1, min(height, width) + 1):
        for step in range(1, frames + 1):
            sizes = (frames // step, height // patch, width // patch)
            if height % patch == width % patch == frames % step == 0 and math.prod(sizes) == num_tokens:
                return sizes
    return None


def _ranks(keys: Tensor) -> Tensor:
    ranks = torch.empty(len(keys), dtype=torch.float64)
    ranks[keys.argsort(stable=True)] = torch.arange(len(keys), dtype=torch.float64)
    return (ranks / len(keys)).float()
