"""Search the module tree for blocks: outermost and repeated first, one analysis per distinct family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..arguments import iterate_leaves, map_leaves
from ..plan import BlockPlan, Refusal, Site
from .analysis import Call, ModelAnalysis, Refused, TensorInfo, log, run_passes
from .attention import find_attention
from .block import BlockAnalysis
from .branches import prove_added
from .export import export_block
from .tokens import find_stream, plan_leaves
from .verify import prove_block

BLOCK_PASSES = (export_block, find_attention, find_stream, plan_leaves, prove_block)

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
    order = {fqn: min(call.in_order for call in calls) for fqn, calls in analysis.calls.items()}
    sites = sorted(search.sites, key=lambda site: order[site.fqn])
    return replace(analysis, families=tuple(search.families), sites=tuple(sites), refusals=tuple(search.refusals()))


class _Search:
    """Walks the modules and keeps the verdict on each family, so that no block is exported twice."""

    def __init__(self, analysis: ModelAnalysis) -> None:
        self.analysis = analysis
        self.families: list[BlockPlan] = []
        self.sites: list[Site] = []
        self._modules = dict(analysis.model.named_modules())
        self._verdicts: dict[Any, int | str] = {}
        self._graphs: dict[Any, Any] = {}
        self._refused: dict[tuple[str, str], list[str]] = {}
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
        """Try what was refused as a block as a branch, outermost first, beside and not within what is routed."""
        for fqn in sorted((fqn for fqns in self._refused.values() for fqn in fqns), key=lambda fqn: fqn.count(".")):
            related = any(_contains(site.fqn, fqn) or _contains(fqn, site.fqn) for site in self.sites)
            if not related and self._try(self._modules[fqn], fqn, as_branch=True):
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
        if not call.attends:
            return False
        inputs = {leaf.shape for _, leaf in iterate_leaves(call.arguments) if _is_stream(leaf)}
        return any(_is_stream(leaf) and leaf.shape in inputs for _, leaf in iterate_leaves(call.output))

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

    def _try(self, module: nn.Module, fqn: str, *, as_branch: bool = False) -> bool:
        """Whether the module's family can be routed; the site, or the refusal as a block, is noted."""
        if not self.analysis.filter_fn(module, fqn):
            if not as_branch:
                self._refuse(module, fqn, "left out by filter_fn")
            return False
        caller = self._caller(fqn) if as_branch else None
        for call in self.analysis.calls[fqn]:
            key = (_family_key(module, call), None if caller is None else self._key_in_caller(fqn, caller))
            if key not in self._verdicts:
                self._verdicts[key] = self._analyse(module, fqn, call, caller)
            verdict = self._verdicts[key]
            if isinstance(verdict, str):
                if not as_branch:
                    self._refuse(module, fqn, verdict)
                return False
        self.sites.append(Site(fqn, int(verdict)))
        return True

    def _analyse(self, module: nn.Module, fqn: str, call: Call, caller: str | None) -> int | str:
        """Index of the new family, or the reason why there is none. ``caller``: who must add it, for a branch."""
        block = BlockAnalysis(module, fqn, call, self.analysis.config, is_branch=caller is not None)
        try:
            if caller is not None:
                prove_added(self._graph_of(caller), fqn.removeprefix(f"{caller}."))
            block = run_passes(BLOCK_PASSES, block)
        except Refused as refused:
            log.info("%s stays dense: %s", fqn, refused)
            return str(refused)
        assert block.plan is not None
        self.families.append(block.plan)
        return len(self.families) - 1

    def _caller(self, fqn: str) -> str:
        """The nearest module around ``fqn`` that was called itself; the root is the empty name."""
        name = fqn
        while name:
            name = name.rpartition(".")[0]
            if name in self.analysis.calls:
                return name
        return ""

    def _key_in_caller(self, fqn: str, caller: str) -> Any:
        return fqn.removeprefix(f"{caller}."), _family_key(self._modules[caller], self.analysis.calls[caller][0])

    def _graph_of(self, caller: str) -> fx.Graph:
        """The exported graph of a caller, made once per family."""
        module, call = self._modules[caller], self.analysis.calls[caller][0]
        key = _family_key(module, call)
        if key not in self._graphs:
            try:
                self._graphs[key] = export_block(BlockAnalysis(module, caller, call, self.analysis.config)).graph
            except Refused as refused:
                self._graphs[key] = refused
        graph = self._graphs[key]
        if isinstance(graph, Refused):
            raise graph
        return graph

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


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _family_key(module: nn.Module, call: Call) -> Any:
    """What two blocks must share for one proof to serve both: class, parameters, settings, and the kind of call."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    settings = tuple((name, type(part).__name__, _settings(part)) for name, part in module.named_modules())
    leaves = map_leaves(lambda _, leaf: len(leaf.shape) if isinstance(leaf, TensorInfo) else repr(leaf), call.arguments)
    return type(module), shapes, settings, repr(leaves)


def _settings(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """Plain attributes that may change what a module does; its own position in a stack is none of them."""
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | str | float | int)
        and not name.startswith("_")
        and name != "training"
        and not _is_position(name)
    )


def _is_position(name: str) -> bool:
    return any(
        part in name for part in ("layer_idx", "layer_id", "layer_index", "block_idx", "block_id", "block_index")
    )
