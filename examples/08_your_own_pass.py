"""A pass of one's own behind those of `transform`: the first block of every family stays dense.

    python examples/08_your_own_pass.py

A pass is a function from what is known of a model to what is known after it; it looks and decides, and changes nothing.
`transform` runs PASSES and then routes what they found. Here the list is longer by one, and `attach` routes the plan.
"""

from dataclasses import replace

import digits
import torch
from diffcr_compile.passes.analysis import ModelAnalysis, run_passes
from diffcr_compile.passes.route import plan_model

import diffcr_compile
from diffcr_compile import DiffCRConfig
from diffcr_compile.plan import Refusal
from diffcr_compile.routed import ModelRouting
from diffcr_compile.transform import PASSES, attach


def keep_first_dense(analysis: ModelAnalysis) -> ModelAnalysis:
    """Before: sites a.0, a.1, a.2 of one family. After: a.1, a.2, and a.0 among the refusals. A family of one block stays whole,
    since a plan may name no family without blocks."""
    first: dict[int, str] = {}
    for site in analysis.sites:  # in order of first execution
        first.setdefault(site.family, site.fqn)
    sizes = [sum(site.family == family for site in analysis.sites) for family in range(len(analysis.families))]
    dense = {fqn: family for family, fqn in first.items() if sizes[family] > 1}
    refusals = tuple(
        Refusal(analysis.families[family].kind, (fqn,), "the first of its family (keep_first_dense)")
        for fqn, family in dense.items()
    )
    return replace(
        analysis,
        sites=tuple(site for site in analysis.sites if site.fqn not in dense),
        refusals=(*analysis.refusals, *refusals),
    )


def main() -> None:
    config = DiffCRConfig()
    batches = digits.calibration_batches(num_batches=4, batch_size=2)
    model = digits.load_model()
    start = ModelAnalysis(model, config, batches[0], filter_fn=lambda module, fqn: True)
    analysis = run_passes((*PASSES, keep_first_dense), start)
    attach(model, ModelRouting(config), plan_model(analysis))

    report = diffcr_compile.calibrate(
        model, batches, budget=0.75, config=diffcr_compile.CalibrationConfig(preset="training-free")
    )
    found = diffcr_compile.explain(model)
    print(f"routed: {', '.join(report.blocks)}")
    print(f"stay dense: {'; '.join(map(str, found.plan.refusals))}")
    print(f"routable: {found.routable_share:.1%} of the FLOPs; share {report.share:.4f} (budget 0.75)")
    with torch.no_grad(), diffcr_compile.trace(model) as seen:
        model(**batches[1])
    print("kept tokens in one forward:", {fqn: [kept.shape[1] for kept in calls] for fqn, calls in seen.kept.items()})


if __name__ == "__main__":
    main()
