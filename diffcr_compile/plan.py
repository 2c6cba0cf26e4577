"""What the passes found, as frozen data: written by ``passes``, read by the run-time layers and by ``explain``.

Axes are written as text: ``B`` batch, ``N`` the routed tokens, ``t0``, ``t1``, ... other lengths, digits for constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .arguments import Path, Signature
from .config import Context

Lift = Literal["direct", "inserted axis", "vmap", "loop"]
"""How a block is called when each sample keeps other tokens; the last three where a side input has no batch axis."""

Size = tuple[int, int]
"""The size of one axis of one leaf: (leaf index, axis)."""

PLACEHOLDERS = ("block", "router", "k", "memory")
"""Of a routed program, beside those of its leaves, which have other names."""


@dataclass(frozen=True)
class TokenAxis:
    """An axis that follows the tokens: ``before + N + after`` long, the other parts being sizes of other leaves' axes."""

    axis: int
    before: tuple[Size, ...] = ()
    after: tuple[Size, ...] = ()

    @property
    def joint(self) -> bool:
        """Whether other tokens share the axis with the routed ones."""
        return bool(self.before or self.after)


@dataclass(frozen=True)
class LeafPlan:
    """One tensor (or other value) that the block is called with."""

    path: Path
    name: str
    is_tensor: bool
    dims: tuple[str, ...] = ()
    token_axes: tuple[TokenAxis, ...] = ()
    batch_axis: int | None = None


@dataclass(frozen=True)
class OutputPlan:
    """One tensor of the block's output.

    routed: it follows the tokens. source: index of the leaf it is joined to by residual adds, if any. added: the caller adds it
    to the tokens (the module is a branch), so that a skipped token's value is zero.
    """

    dims: tuple[str, ...]
    batch_axis: int
    routed: bool
    source: int | None
    added: bool = False


@dataclass(frozen=True)
class StatePlan:
    """Keys or values of one attention, remembered of all tokens: their axes, and which are over samples and tokens."""

    dims: tuple[str, ...]
    batch_axis: int
    tokens: TokenAxis


@dataclass(frozen=True)
class BlockPlan:
    """How the blocks of one family are routed at one call signature.

    arguments: the bound call, and outputs_template: the block's return value, each with tensors replaced by their index.
    stream: index of the leaf that holds the routed tokens. in_place: the block writes into them. context: which tokens give keys
    and values; ``context_note``: why the kept ones alone, where more were asked for; states: keys and values remembered, with
    stale context.
    """

    kind: str
    positional: tuple[str, ...]
    signature: Signature
    arguments: dict[str, Any]
    leaves: tuple[LeafPlan, ...]
    output_template: Any
    outputs: tuple[OutputPlan, ...]
    stream: int
    token_axis: int
    batch_axis: int
    width: int
    attention: str
    lift: Lift
    error: float
    in_place: bool = False
    context: Context = "kept"
    context_note: str = ""
    states: tuple[StatePlan, ...] = ()

    def tensors(self, values: Sequence[Any]) -> list[Any]:
        """Those of a call's leaves that are tensors."""
        return [value for value, leaf in zip(values, self.leaves, strict=True) if leaf.is_tensor]

    @property
    def can_skip_block(self) -> bool:
        """Whether every output has an input or zeros to fall back on, so that a ratio of one may skip the block."""
        shape = self.leaves[self.stream].dims[:-1]
        return all(output.source is not None or (output.added and output.dims[:-1] == shape) for output in self.outputs)

    @property
    def beside(self) -> dict[int, int]:
        """Of the outputs that are not routed, where a ratio of one may skip the block: by their number that of the leaf that each
        is joined to. With reuse their updates are remembered too."""
        if not self.can_skip_block:
            return {}
        return {
            index: output.source
            for index, output in enumerate(self.outputs)
            if not output.routed and output.source is not None
        }

    @property
    def is_branch(self) -> bool:
        """Whether the caller adds what the module returns."""
        return self.outputs[self.routed_output].added

    @property
    def form(self) -> Any:
        """What the plans of one block must share: the stream that its router sees, and the outputs that its memory is of."""
        outputs = tuple(
            (
                output.added,
                output.batch_axis,
                None if output.source is None else self.leaves[output.source].path,
                (output.dims.index("N"), output.dims[-1]) if output.routed else None,
            )
            for output in self.outputs
        )
        return self.leaves[self.stream].path, self.token_axis, self.batch_axis, self.width, outputs

    @property
    def routed_output(self) -> int:
        """Index of the output that holds the stream's tokens."""
        routed = [index for index, output in enumerate(self.outputs) if output.routed]
        return min(routed, key=lambda index: (self.outputs[index].source != self.stream, index))


@dataclass(frozen=True)
class Site:
    """One routed module: its name in the model and its family."""

    fqn: str
    family: int


@dataclass(frozen=True)
class Refusal:
    """Modules that stay dense, with the reason: one entry for all that share it."""

    kind: str
    fqns: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        others = f" and {len(self.fqns) - 1} more" if len(self.fqns) > 1 else ""
        return f"{self.fqns[0]}{others} ({self.kind}): {self.reason}"


@dataclass(frozen=True)
class TimestepPlan:
    """The model's timestep input and the range of its values in training."""

    argument: str
    low: float
    high: float


@dataclass(frozen=True)
class ModelPlan:
    """What ``transform`` decided about a model. ``dense_flops``: of one forward on the inputs it was analysed with;
    ``input_paths``: the leaves of the model's call; the batch axes: of its tensor leaves and of its output's, in order.
    ``later_families``: plans for the kinds of call that were met since, ``later_sites``: the blocks that have them."""

    families: tuple[BlockPlan, ...]
    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    timestep: TimestepPlan | None
    timestep_note: str
    input_paths: frozenset[Path]
    input_batch_axes: dict[Path, int]
    output_batch_axes: tuple[int, ...]
    dense_flops: int
    family_flops: tuple[int, ...]
    later_families: tuple[BlockPlan, ...] = ()
    later_sites: tuple[Site, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelPlan:
        return self


def plan_to_dict(plan: ModelPlan) -> dict[str, Any]:
    """Dictionary form of a plan; what a block returns is left as it is, dataclasses and all."""
    data = asdict(plan)
    for name in ("families", "later_families"):
        for family, known in zip(data[name], getattr(plan, name), strict=True):
            family["output_template"] = known.output_template
    return data


def plan_from_dict(data: dict[str, Any]) -> ModelPlan:
    """Inverse of :func:`plan_to_dict`. Raises KeyError, TypeError or ValueError for what no plan looks like."""
    return ModelPlan(
        **{
            **data,
            "families": tuple(map(_family_from_dict, data["families"])),
            "sites": tuple(Site(**site) for site in data["sites"]),
            "refusals": tuple(Refusal(**refusal) for refusal in data["refusals"]),
            "timestep": None if data["timestep"] is None else TimestepPlan(**data["timestep"]),
            "later_families": tuple(map(_family_from_dict, data.get("later_families", ()))),
            "later_sites": tuple(Site(**site) for site in data.get("later_sites", ())),
        }
    )


def _family_from_dict(data: dict[str, Any]) -> BlockPlan:
    return BlockPlan(
        **{
            **data,
            "leaves": tuple(_leaf_from_dict(leaf) for leaf in data["leaves"]),
            "outputs": tuple(OutputPlan(**output) for output in data["outputs"]),
            "states": tuple(_state_from_dict(state) for state in data.get("states", ())),
        }
    )


def _leaf_from_dict(data: dict[str, Any]) -> LeafPlan:
    return LeafPlan(**{**data, "token_axes": tuple(TokenAxis(**axis) for axis in data["token_axes"])})


def _state_from_dict(data: dict[str, Any]) -> StatePlan:
    return StatePlan(**{**data, "tokens": TokenAxis(**data["tokens"])})
