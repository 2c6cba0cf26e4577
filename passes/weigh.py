"""Leave out families that are too small to be worth routing."""

from __future__ import annotations

from dataclasses import replace

from ..plan import Refusal, Site
from .analysis import ModelAnalysis


def drop_small_families(analysis: ModelAnalysis) -> ModelAnalysis:
    """Families with less than ``min_flops_share`` of the model's FLOPs stay dense; the reason names their share."""
    total = max(analysis.module_flops.get("", 0), 1)
    shares = [0.0] * len(analysis.families)
    for site in analysis.sites:
        shares[site.family] += analysis.module_flops.get(site.fqn, 0) / total
    kept = [index for index, share in enumerate(shares) if share >= analysis.config.min_flops_share]
    refusals = list(analysis.refusals)
    for index, share in enumerate(shares):
        if index not in kept:
            fqns = tuple(site.fqn for site in analysis.sites if site.family == index)
            reason = f"{share:.2%} of the FLOPs, below min_flops_share = {analysis.config.min_flops_share:.2%}"
            refusals.append(Refusal(analysis.families[index].kind, fqns, reason))
    return replace(
        analysis,
        families=tuple(analysis.families[index] for index in kept),
        context_graphs=tuple(analysis.context_graphs[index] for index in kept),
        sites=tuple(Site(site.fqn, kept.index(site.family)) for site in analysis.sites if site.family in kept),
        refusals=tuple(refusals),
    )
