"""``explain``: what was found in a model, as data that prints well."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .config import RouterInput, Selection
from .plan import BlockPlan, ModelPlan
from .routed import BlockRouting, settle
from .table import read_table
from .unwrap import unwrap


@dataclass(frozen=True)
class FamilyExplanation:
    """Blocks that share one plan: their names, the plan, and the routed program as Python code of its FX graph.

    reuses: a skipped token's last updates are remembered, and what they foretell is added to it. later: the blocks' plans for the
    kinds of call that were met since.
    """

    plan: BlockPlan
    blocks: tuple[str, ...]
    flops_share: float
    program: str
    reuses: bool = False
    later: tuple[BlockPlan, ...] = ()

    def __str__(self) -> str:
        plan = self.plan
        stream = plan.leaves[plan.stream]
        others = f" ... {self.blocks[-1]}" if len(self.blocks) > 1 else ""
        lines = [
            f"{plan.kind} x {len(self.blocks)}: {self.blocks[0]}{others}",
            f"  {self.flops_share:.1%} of the FLOPs; attention: {plan.attention}; called: {plan.lift}; "
            f"proof error: {plan.error:.1e}",
            f"  tokens: {stream.name}[{', '.join(stream.dims)}]",
        ]
        for leaf in plan.leaves:
            if leaf is not stream and leaf.is_tensor:
                follows = "follows the tokens" if leaf.token_axes else "as it is"
                lines.append(f"  {leaf.name}[{', '.join(leaf.dims)}]: {follows}")
        for index, output in enumerate(plan.outputs):
            joined = "made anew" if output.source is None else f"joined to {plan.leaves[output.source].name}"
            put = ", skipped tokens " + ("get zeros" if output.source is None else "keep their input")
            put += " plus what their last updates foretell" if self.reuses else ""
            lines.append(f"  output {index}[{', '.join(output.dims)}]: {joined}{put if output.routed else ''}")
        if self.plan.context != "kept":
            those = "remembered of skipped ones" if self.plan.context == "stale" else "computed"
            lines.append(
                f"  keys and values: from all tokens, {those}, by a graph of its own rewritten from the block's"
            )
        elif self.plan.context_note:
            lines.append(f"  {self.plan.context_note}")
        for other in self.later:
            given = ", ".join(leaf.name + (" (follows the tokens)" if leaf.token_axes else "") for leaf in other.leaves)
            lines.append(f"  met later: a call with {given}; called: {other.lift}; proof error: {other.error:.1e}")
        lines += ["  routed program:", *(f"    {line}" for line in self.program.strip().splitlines())]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What is routed in a model and what is not. model: its class. plan: blocks, axes and reasons as data. families: of blocks
    that are alike. table: float32 (num_regions, num_blocks), shares of the tokens that skip. trained: whether routers and table
    come of a calibration. router: what the routers see; selection: whether they are asked."""

    model: str
    plan: ModelPlan
    families: tuple[FamilyExplanation, ...]
    table: Tensor
    trained: bool
    router: RouterInput = "token"
    selection: Selection = "score"

    @property
    def routable_share(self) -> float:
        """Share of the dense FLOPs that lies in routed blocks."""
        return sum(family.flops_share for family in self.families)

    def __str__(self) -> str:
        blocks = sum(len(family.blocks) for family in self.families)
        lines = [
            f"{self.model}: {blocks} routed blocks in {len(self.families)} families, {self.routable_share:.1%} of "
            f"{self.plan.dense_flops / 1e9:.3g} GFLOPs; {self._choice()}",
            f"{self.plan.timestep_note}; ratio table {tuple(self.table.shape)}, mean {float(self.table.mean()):.3f}",
            "",
            *(str(family) + "\n" for family in self.families),
        ]
        if self.plan.refusals:
            lines += ["stay dense:", *(f"  {refusal}" for refusal in self.plan.refusals)]
        return "\n".join(lines)

    def _choice(self) -> str:
        """What decides which tokens are kept."""
        if self.selection == "turn":
            return "tokens are kept in turn, no router is asked"
        each = ", one vector for each timestep region" if self.router == "timestep" else ""
        return f"routers {'trained' if self.trained else 'untrained'}{each}"


def explain(model: nn.Module) -> Explanation:
    """Which blocks are routed, why, which tensors follow the tokens, what it costs, and what stays dense for which reason.

    Raises NotTransformedError; CaptureError where the blocks have not been looked for yet.
    """
    model = unwrap(model)
    state = settle(model)
    plan, config = state.plan, state.config
    reuses = config.skip == "reuse" and plan.timestep is not None  # without a timestep there is no trajectory to follow
    families = []
    for index, family in enumerate(plan.families):
        blocks = tuple(site.fqn for site in plan.sites if site.family == index)
        routing = next(block for block in state.blocks if block.fqn == blocks[0])
        share = plan.family_flops[index] / max(plan.dense_flops, 1)
        later = tuple(program.plan for program in routing.programs.values() if program.plan is not family)
        families.append(FamilyExplanation(family, blocks, share, _program(routing, family), reuses, later))
    return Explanation(
        type(model).__name__, plan, tuple(families), read_table(state), state.trained, config.router, config.selection
    )


def _program(routing: BlockRouting, family: BlockPlan) -> str:
    """The graph's code, without the cleaning up of names that only frees memory and without module prefixes."""
    program = next(program for program in routing.programs.values() if program.plan is family)
    lines = [line.partition(";")[0].rstrip() for line in program.graph.code.strip().splitlines()]
    return "\n".join(
        line.replace("diffcr_compile_primitives_", "").replace("diffcr_compile_memory_", "")
        for line in lines
        if line.strip()
    )
