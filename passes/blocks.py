"""Search the module tree for blocks: outermost and repeated first, one analysis per distinct family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..arguments import iterate_leaves, leaf_name, map_leaves
from ..context import ContextGraph
from ..plan import BlockPlan, Refusal, Site
from ..settings import fingerprint, setting, settings_of
from .analysis import Call, ModelAnalysis, NotJoined, Refused, TensorInfo, log, run_passes
from .attention import find_attention
from .block import BlockAnalysis
from .branches import prove_added
from .context import prove_context, prove_same_context
from .export import export_block, trace_around
from .tokens import find_stream, plan_leaves
from .verify import prove_block

BLOCK_PASSES = (export_block, find_attention, find_stream, plan_leaves, prove_block, prove_context)

_FILTERED = "left out by filter_fn"

_NESTED = (
    "it is called with nested tensors, whose samples have different numbers of tokens; routing keeps the same number of each. A "
    "stack of torch's layers makes them of padded ones unless it is built with enable_nested_tensor=False"
)

_CONTAINER_SHARE = 0.9
"""A module whose repeated parts hold this share of its parameters is a stack of blocks, not a block."""


def find_blocks(analysis: ModelAnalysis) -> ModelAnalysis:
    """Fill in ``families``, ``sites`` and ``refusals``.

    A module with attention whose class is repeated is tried before its parts; one that stands alone after them. What is
    refused is searched within, and last as a branch that its caller adds. Sites are in order of first execution.
    """
    search = _Search(analysis)
    for fqn, module in analysis.model.named_children():
        search.visit(module, fqn)
    search.visit_branches()
    search.visit_feed_forwards()
    order = {fqn: min(call.in_order for call in calls) for fqn, calls in analysis.calls.items()}
    sites = sorted(search.sites, key=lambda site: order[site.fqn])
    return replace(
        analysis,
        families=tuple(search.families),
        context_graphs=tuple(search.context_graphs),
        sites=tuple(sites),
        refusals=tuple(search.refusals()),
    )


class _Search:
    """Walks the modules and keeps the verdict on each family, so that no block is exported twice."""

    def __init__(self, analysis: ModelAnalysis) -> None:
        self.analysis = analysis
        self.families: list[BlockPlan] = []
        self.context_graphs: list[ContextGraph | None] = []
        self.sites: list[Site] = []
        self._modules = dict(analysis.model.named_modules())
        self._verdicts: dict[Any, int | Refused] = {}
        self._proved: dict[Any, tuple[int, BlockAnalysis]] = {}
        self._exported: dict[Any, BlockAnalysis | Refused] = {}
        self._around: dict[Any, fx.Graph | Refused] = {}
        self._refused: dict[tuple[str, str], list[str]] = {}
        self._not_joined: list[str] = []
        self._counts: dict[type, int] = {}
        for fqn in analysis.calls:
            kind = type(self._modules[fqn])
            self._counts[kind] = self._counts.get(kind, 0) + 1

    def visit(self, module: nn.Module, fqn: str) -> bool:
        """Whether anything at or below ``module`` is routed."""
        if fqn not in self.analysis.calls or not self._may_be_block(fqn):
            return self._visit_children(module, fqn)
        if self._counts[type(module)] > 1 and not self._is_stack(module):
            return self._try(module, fqn) or self._visit_children(module, fqn)
        return self._visit_children(module, fqn) or self._try(module, fqn)

    def visit_branches(self) -> None:
        """Try as a branch that of which no output is joined to an input, outermost first, beside and not within what is routed."""
        for fqn in sorted(self._not_joined, key=lambda fqn: fqn.count(".")):
            related = any(_contains(site.fqn, fqn) or _contains(fqn, site.fqn) for site in self.sites)
            if not related and self._try(self._modules[fqn], fqn, as_branch=True):
                self._forget(fqn)

    def visit_feed_forwards(self) -> None:
        """Try what attends to nothing, beside a routed attention branch or in a block that can't be routed: its tokens may be
        left out alike."""
        beside = {self._caller(site.fqn): plan for site in self.sites if (plan := self.families[site.family]).is_branch}
        refused = {fqn for (_, reason), fqns in self._refused.items() for fqn in fqns if reason != _FILTERED}
        for fqn, calls in self.analysis.calls.items():
            related = any(
                _contains(site.fqn, fqn) or _contains(fqn, site.fqn) or site.fqn == fqn for site in self.sites
            )
            if not fqn or related or calls[0].attends or not self.analysis.module_flops.get(fqn):
                continue
            caller, layout = self._caller(fqn), None
            if caller in beside and self._answers(calls[0]):
                layout = len(beside[caller].leaves[beside[caller].stream].dims), beside[caller].token_axis
            elif caller in refused:
                layout = self._layout(fqn, caller)
            if layout is not None and self._try(self._modules[fqn], fqn, as_branch=True, layout=layout):
                self._forget(fqn)

    def refusals(self) -> Iterator[Refusal]:
        """What stays dense, one entry for each (class, reason)."""
        for (kind, reason), fqns in self._refused.items():
            yield Refusal(kind, tuple(fqns), reason)

    def _visit_children(self, module: nn.Module, fqn: str) -> bool:
        found = [self.visit(child, f"{fqn}.{name}") for name, child in module.named_children()]
        return any(found)

    def _may_be_block(self, fqn: str) -> bool:
        """Whether a call of the module attends, and takes and returns a float tensor of the same shape."""
        call = self.analysis.calls[fqn][0]
        return call.attends and self._answers(call)

    def _answers(self, call: Call) -> bool:
        """Whether a module takes and returns a float tensor of the same shape."""
        return bool(_streams(call))

    def _layout(self, fqn: str, caller: str) -> tuple[int, int] | None:
        """Rank and token axis of what a part takes, where it answers the tokens (B, N, D) or (N, B, D) of its caller and one more
        sample has told which axis is the batch."""
        (call, *others), around = self.analysis.calls[fqn], self.analysis.calls[caller][0]
        known, streams = self.analysis.batch_axes.get(fqn, {}), _streams(around) & _streams(call)
        if any(_streams(other) != _streams(call) for other in others):
            return None
        if any(True for _ in self._modules[fqn].children()) and len(streams) == 1:
            for path, leaf in iterate_leaves(call.arguments):
                if _is_stream(leaf) and leaf.shape in streams and len(leaf.shape) == 3 and known.get(path) in (0, 1):
                    return 3, 1 - known[path]
        return None

    def _is_stack(self, module: nn.Module) -> bool:
        """Whether nearly all of the module lies in several parts of one class that might be blocks themselves."""
        parts: dict[type, list[nn.Module]] = {}
        for child in module.modules():
            if child is not module and any(True for _ in child.children()):
                parts.setdefault(type(child), []).append(child)
        total = _num_parameters(module)
        return any(
            len(group) > 1 and sum(map(_num_parameters, group)) >= _CONTAINER_SHARE * total > 0
            for group in parts.values()
        )

    def _try(
        self, module: nn.Module, fqn: str, *, as_branch: bool = False, layout: tuple[int, int] | None = None
    ) -> bool:
        """Whether the module's family can be routed; the site, or the refusal as a block, is noted."""
        if not self.analysis.filter_fn(module, fqn):
            if not as_branch:
                self._refuse(module, fqn, _FILTERED)
            return False
        if fqn in self.analysis.nested:
            if not as_branch:
                self._refuse(module, fqn, _NESTED)
            return False
        if as_branch and self._is_shared(module):
            log.info(
                "%s stays dense: several modules hold it, and each would have to add its output to the tokens", fqn
            )
            return False
        caller = self._caller(fqn) if as_branch else None
        for call in self.analysis.calls[fqn]:
            key = (_family_key(module, call), None if caller is None else self._key_in_caller(fqn, caller), layout)
            if key not in self._verdicts:
                self._verdicts[key] = self._analyse(module, fqn, call, caller, layout)
            verdict = self._verdicts[key]
            if isinstance(verdict, Refused):
                if not as_branch:
                    self._refuse(module, fqn, str(verdict))
                if not as_branch and isinstance(verdict, NotJoined):
                    self._not_joined.append(fqn)
                return False
        assert isinstance(verdict, int)
        self.sites.append(Site(fqn, verdict))
        return True

    def _analyse(
        self, module: nn.Module, fqn: str, call: Call, caller: str | None, layout: tuple[int, int] | None
    ) -> int | Refused:
        """Index of the new family, or the reason why there is none. ``caller``: who must add it, for a branch."""
        alike = (
            _family_key(module, call, positions=False),
            None if caller is None else self._key_in_caller(fqn, caller),
            layout,
        )
        if alike in self._proved:
            family, proved = self._proved[alike]
            try:
                prove_block(own := replace(proved, module=module, fqn=fqn))
                prove_same_context(own)
                return family
            except Refused:
                log.info("%s is not like its neighbours, though only its place in the stack differs", fqn)
        block = BlockAnalysis(module, fqn, call, self.analysis.config, is_branch=caller is not None, layout=layout)
        try:
            _check_call(call)
            if caller is not None:
                prove_added(self._graph_of(caller), fqn.removeprefix(f"{caller}."))
            block = run_passes((self.export_block, *BLOCK_PASSES[1:]), block)
        except Refused as refused:
            log.info("%s stays dense: %s", fqn, refused)
            return refused.with_traceback(None)
        assert block.plan is not None
        self.families.append(block.plan)
        self.context_graphs.append(block.context_graph)
        self._proved.setdefault(alike, (len(self.families) - 1, block))
        return len(self.families) - 1

    def _caller(self, fqn: str) -> str:
        """The nearest module around ``fqn`` that was called itself; the root is the empty name."""
        name = fqn
        while name:
            name = name.rpartition(".")[0]
            if name in self.analysis.calls:
                return name
        return ""

    def _is_shared(self, module: nn.Module) -> bool:
        """Whether several modules hold it: a branch is proved in one caller."""
        return sum(module is child for holder in self._modules.values() for child in holder.children()) > 1

    def _key_in_caller(self, fqn: str, caller: str) -> Any:
        return fqn.removeprefix(f"{caller}."), _family_key(self._modules[caller], self.analysis.calls[caller][0])

    def _graph_of(self, caller: str) -> fx.Graph:
        """The graph of a caller, or that around its attention; made once per family."""
        module, call = self._modules[caller], self.analysis.calls[caller][0]
        key, block = _family_key(module, call), BlockAnalysis(module, caller, call, self.analysis.config)
        if key not in self._exported:
            with contextlib.suppress(Refused):
                self.export_block(block)
        exported = self._exported[key]
        if isinstance(exported, BlockAnalysis):
            assert exported.graph is not None
            return exported.graph
        if key not in self._around:
            self._around[key] = self._trace_around_attention(block) or exported
        graph = self._around[key]
        if isinstance(graph, Refused):
            raise graph
        return graph

    def export_block(self, block: BlockAnalysis) -> BlockAnalysis:
        """The pass of this name. What it found, or refused, is kept: a block is met again as a branch, and as the caller of its
        parts."""
        key = _family_key(block.module, block.call)
        known = self._exported.get(key)
        if isinstance(known, BlockAnalysis) and known.fqn == block.fqn:
            return replace(known, is_branch=block.is_branch, layout=block.layout)
        try:
            self._exported[key] = exported = export_block(block)
        except Refused as refused:
            self._exported[key] = refused
            raise
        return exported

    def _trace_around_attention(self, block: BlockAnalysis) -> fx.Graph | None:
        """The graph of a caller that can't be exported, with its attending parts taken for what they return."""
        parts = {
            fqn.removeprefix(f"{block.fqn}."): calls
            for fqn, calls in self.analysis.calls.items()
            if self._caller(fqn) == block.fqn != fqn and calls[0].attends
        }
        try:
            return trace_around(block, parts) if parts else None
        except Refused as refused:
            log.info("%s around its attention: %s", block.fqn, refused)
            return None

    def _refuse(self, module: nn.Module, fqn: str, reason: str) -> None:
        self._refused.setdefault((type(module).__name__, reason), []).append(fqn)

    def _forget(self, fqn: str) -> None:
        self._refused = {
            key: kept for key, fqns in self._refused.items() if (kept := [name for name in fqns if name != fqn])
        }


def _contains(outer: str, inner: str) -> bool:
    return inner.startswith(f"{outer}.")


def _is_stream(leaf: Any) -> bool:
    return isinstance(leaf, TensorInfo) and len(leaf.shape) >= 2 and leaf.dtype.is_floating_point


def _check_call(call: Call) -> None:
    """Refuses a block that gives more than the tensors it returns: its caller would miss that of a routed one."""
    if call.writes:
        raise Refused("it writes into the lists or dictionaries that it is given")
    for path, leaf in iterate_leaves(call.output):
        if leaf is not None and not isinstance(leaf, TensorInfo):
            place = f" at {leaf_name(path)}" if path else ""
            raise Refused(f"it returns {type(leaf).__name__}{place} beside tensors")


def _streams(call: Call) -> set[tuple[int, ...]]:
    """Shapes of the float tensors that a call takes and returns."""
    taken, returned = (
        {leaf.shape for _, leaf in iterate_leaves(side) if _is_stream(leaf)} for side in (call.arguments, call.output)
    )
    return taken & returned


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _family_key(module: nn.Module, call: Call, *, positions: bool = True) -> Any:
    """What two blocks must share for one proof to serve both: class, parameters, settings, and the kind of call. Without their
    ``positions`` (the number of a layer): for one export to serve both."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    settings = tuple(
        (name, type(part).__name__, settings_of(part, positions=positions)) for name, part in module.named_modules()
    )
    buffers = tuple((name, fingerprint(buffer)) for name, buffer in module.named_buffers())
    leaves = map_leaves(lambda _, leaf: _kind_of(leaf), call.arguments)
    return type(module), shapes, settings, buffers, repr(leaves)


def _kind_of(leaf: Any) -> object:
    """What two leaves share that one plan serves: rank, and which axes are of size one (to be broadcast); else the value."""
    return tuple(size == 1 for size in leaf.shape) if isinstance(leaf, TensorInfo) else setting(leaf)
