"""The sampler of a recorded sampling, recovered from it, so that a table can be tried on a sampling of its own.

Errors of one step are the next one's inputs, so what a table does on recorded inputs says little of where its samples end.
Samplers are linear: the next latents are a sum of these, of what the denoiser answered and, in multistep ones, of the same one step
earlier, with numbers that least squares finds. A deviation then goes on by the same sum, whatever else the sampler adds (noise),
since that is the same in both. Where it puts the original of an inpainting in place, deviations end there, which the sum does not
know: of latents that are mostly given, errors come out too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import Path, iterate_leaves, map_leaves
from ..region import advance
from ..routed import ModelRouting
from ..trajectory import Trajectory
from .batches import model_inputs
from .objective import output_tensors

MOST_VALUES = 1 << 16
"""Values of a step that are fitted."""

NOISY = 0.1
"""Share of the next latents' square that a sum may leave open: noise that the sampler adds."""

BETTER = 100.0
"""How many times less the sum with an earlier step must leave open for a sampler to be taken for a multistep one, where it is exact
but for rounding. Latents that are clipped on their way (to the range of pictures) are foretold a little better
from where they came than from the answers, which says nothing of a deviation."""


@dataclass(frozen=True)
class Step:
    """One step of the recording. calls: indices of its batches, several for guidance in several calls; begins: of a new trajectory.
    factors: of the latents and of each answer in the sum that makes the next latents, then of the same one step earlier."""

    calls: tuple[int, ...]
    begins: bool
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Latents:
    """Where the latents are: path of an input, of which the answer moves the first ``length`` along ``axis``, being ``parts`` times
    as long (mean and variance). paired: both halves of a batch are the same latents, for guidance in one call."""

    path: Path
    axis: int
    length: int
    parts: int
    paired: bool = False

    def of(self, batch: dict[str, Any]) -> Tensor:
        """Those of a batch, float32."""
        latents: Tensor = dict(iterate_leaves(batch))[self.path]
        return latents.narrow(self.axis, 0, self.length).float()

    def moved(self, batch: dict[str, Any], by: Tensor | None) -> dict[str, Any]:
        """The batch with other latents."""
        if by is None:
            return batch

        def move(path: Path, leaf: Any) -> Any:
            if path != self.path:
                return leaf
            leaf = leaf.clone()
            part = leaf.narrow(self.axis, 0, self.length)
            part.copy_(part.float() + by)
            return leaf

        return map_leaves(move, batch)

    def answers(self, output: Tensor) -> list[Tensor]:
        """An output as tensors of the latents' shape; the two halves of guidance apart, each for both."""
        parts = output.float().tensor_split(self.parts, dim=self.axis)
        if not self.paired:
            return list(parts)
        return [torch.cat([half, half]) for part in parts for half in part.chunk(2)]


@dataclass(frozen=True)
class Sampler:
    """How recorded latents went on."""

    latents: Latents
    steps: tuple[Step, ...]

    @torch.no_grad()
    def error(self, model: nn.Module, batches: Iterable[dict[str, Any]], targets: Iterable[list[Tensor]]) -> float:
        """Mean squared distance of the model's own samples from the recorded ones, as a share of the latents' mean square.

        batches: the recorded calls in order, of which only the first of each trajectory has its latents as they are; targets: their
        dense outputs.
        """
        calls, total, scale = iter(zip(batches, targets, strict=True)), 0.0, 0.0
        moved: Tensor | None = None
        before: list[Tensor] = []
        for step, after in zip(self.steps, (*self.steps[1:], None), strict=True):
            if step.begins:
                moved, before = None, []
            deviations: list[Tensor] = []
            for _ in step.calls:
                batch, target = next(calls)
                output = output_tensors(model(**self.latents.moved(batch, moved)))[0]
                deviations += self.latents.answers(output.float() - target[0].to(output.device).float())
            values = [torch.zeros_like(deviations[0]) if moved is None else moved, *deviations]
            terms = zip(
                step.factors, (*values, *before), strict=False
            )  # no earlier step at the beginning, or none that counts
            moved, before = sum((factor * value for factor, value in terms), torch.zeros_like(values[0])), values
            if after is None or after.begins:
                total += float(moved.square().mean())
                scale += float(self.latents.of(batch).square().mean())
        return total / max(scale, 1e-12)


def recover_sampler(
    model: nn.Module, state: ModelRouting, batches: Sequence[dict[str, Any]], targets: Sequence[list[Tensor]]
) -> Sampler | None:
    """The sampler by which recorded calls follow each other; None where they do not, or not by a sum that can be told.

    targets: the dense outputs of each call.
    """
    steps = list(_steps(model, state, batches))
    follows = [place for place, step in enumerate(steps) if place + 1 < len(steps) and not steps[place + 1].begins]
    if not follows:
        return None
    for latents in _candidates(model, batches, targets, steps):
        factors = _fit(latents, batches, targets, steps, follows)
        if factors is not None:
            last = factors[follows[-1]]
            known = [factors.get(place, factors.get(place - 1, last)) for place in range(len(steps))]
            return Sampler(
                latents, tuple(Step(step.calls, step.begins, found) for step, found in zip(steps, known, strict=True))
            )
    return None


def _steps(model: nn.Module, state: ModelRouting, batches: Iterable[dict[str, Any]]) -> Iterator[Step]:
    timestep = state.plan.timestep
    if timestep is None:
        return
    trajectory, begins = Trajectory(), True
    calls: list[int] = []
    for place, batch in enumerate(batches):
        advance(trajectory, model, timestep, batch)
        if trajectory.slot == 0:
            if calls:
                yield Step(tuple(calls), begins)
            calls, begins = [], trajectory.first
        calls.append(place)
    yield Step(tuple(calls), begins)


def _candidates(
    model: nn.Module, batches: Sequence[dict[str, Any]], targets: Sequence[list[Tensor]], steps: list[Step]
) -> Iterator[Latents]:
    """Inputs that the answer has the shape of, but for one axis, of one shape in all calls."""
    if not all(targets) or len({target[0].shape for target in targets}) > 1:
        return
    answer, first = targets[0][0], model_inputs(model, batches[0])
    paths = [path for path, leaf in iterate_leaves(first) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    for path in paths:
        shape = dict(iterate_leaves(first))[path].shape
        given = (dict(iterate_leaves(batch)).get(path) for batch in batches)
        everywhere = all(isinstance(leaf, Tensor) and leaf.shape == shape for leaf in given)
        if len(shape) != answer.ndim or len(shape) < 2 or not everywhere or not answer.numel() or 0 in shape:
            continue
        differing = [axis for axis, sizes in enumerate(zip(shape, answer.shape, strict=True)) if len(set(sizes)) > 1]
        axis = differing[0] if differing else 1
        length = min(shape[axis], answer.shape[axis])
        if len(differing) > 1 or axis == 0 or answer.shape[axis] % length:
            continue
        latents = Latents(path, axis, length, answer.shape[axis] // length)
        halves = [latents.of(batches[step.calls[0]]).chunk(2) for step in steps]
        paired = all(len(pair) == 2 and torch.equal(*pair) for pair in halves)
        yield Latents(path, axis, length, latents.parts, paired)


def _fit(
    latents: Latents,
    batches: Sequence[dict[str, Any]],
    targets: Sequence[list[Tensor]],
    steps: list[Step],
    follows: list[int],
) -> dict[int, tuple[float, ...]] | None:
    """Factors of each step that another follows; None where latents do not go on by the answers."""
    if len({len(step.calls) for step in steps}) > 1:
        return None
    columns = [
        _column([latents.of(batches[step.calls[0]])])
        + _column([part for call in step.calls for part in latents.answers(targets[call][0])])
        for step in steps
    ]
    found: dict[int, tuple[float, ...]] = {}
    moved = False
    for place in follows:
        after = columns[place + 1][0]
        alone, _ = _solve(columns[place][:1], after)
        error, factors = _solve(columns[place], after)
        if not steps[place].begins:
            earlier, more = _solve([*columns[place], *columns[place - 1]], after)
            if earlier < error / BETTER:
                error, factors = earlier, more
        if error > NOISY:
            return None
        moved = moved or error < alone / 2
        found[place] = factors
    return found if moved else None


def _column(values: list[Tensor]) -> list[Tensor]:
    """Float64 values on the CPU, every so many of them."""
    return [value.flatten()[:: -(-value.numel() // MOST_VALUES)].double().cpu() for value in values]


def _solve(columns: list[Tensor], after: Tensor) -> tuple[float, tuple[float, ...]]:
    """What the best sum of columns leaves open, as a share of the square, and its factors."""
    matrix = torch.stack(columns, dim=1)
    factors = torch.linalg.lstsq(matrix, after.unsqueeze(1), driver="gelsd").solution
    left = (matrix @ factors).squeeze(1) - after
    return float(left.square().sum() / after.square().sum().clamp(min=1e-30)), tuple(factors.squeeze(1).tolist())
