"""Coverage: every denoiser of the zoo, transformed and checked against a plain loop.

    python examples/benchmarks/coverage.py [NAME ...] [--write]

For each model: ratio zero is bit-identical (class, keys, outputs); at 0.5 and batch 3 every routed block equals the original
block run on each sample's kept tokens alone, and skipped tokens keep their bits; FLOPs fall; ``restore`` is exact; a saved
routing gives the same bits in another model of these weights; ``fullgraph=True`` traces wherever the dense model does.
``--write`` renews ``coverage.md`` and the raw ``coverage.json``, or the rows of the names given in them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import LEFT_OUT, ZOO, Entry

import diffcr_compile
from diffcr_compile.arguments import bind_arguments, iterate_leaves, map_leaves, unbind_arguments
from diffcr_compile.plan import BlockPlan, LeafPlan
from diffcr_compile.primitives import take_tokens

BATCH = 3
RATIO = 0.5
CONTEXT_TOLERANCE = 1e-4
TOLERANCE = 1e-4
"""Largest difference from the loop as a share of the largest value, in float32: products of another batch size round
otherwise, by up to about 1e-6 in these models; a wrongly indexed side input shows 1e-2 and more."""


@dataclass
class Row:
    """One line of the table. ``failures``: what did not hold; ``dense_reason``: why nothing is routed."""

    name: str
    families: list[str] = field(default_factory=list)
    blocks: int = 0
    routable: float = 0.0
    share: float = 1.0
    lifts: list[str] = field(default_factory=list)
    lift_cost: float = 1.0
    context: str = ""
    worst: float = 0.0
    fullgraph: str = ""
    seconds: float = 0.0
    dense_reason: str = ""
    failures: list[str] = field(default_factory=list)


def check(entry: Entry, *, compile_too: bool = True) -> Row:
    """Transform a model of the zoo and hold it to the laws."""
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.inputs(BATCH)
    row = Row(entry.name)
    before, keys, kind = run(model, inputs), list(model.state_dict()), type(model)
    start = time.perf_counter()
    try:
        diffcr_compile.transform(model, example_inputs=inputs)
    except diffcr_compile.BlockNotFoundError as error:
        row.dense_reason = " / ".join(line.strip("- ") for line in str(error).splitlines()[1:-1])
        return row
    except diffcr_compile.CaptureError as error:
        row.dense_reason = "not captured: " + str(error).partition("It raised ")[2].splitlines()[0]
        return row
    row.seconds = time.perf_counter() - start
    explanation = diffcr_compile.explain(model)
    row.blocks, row.routable = len(explanation.plan.sites), explanation.routable_share
    row.families = [f"{family.plan.kind} x{len(family.blocks)}" for family in explanation.families]
    row.lifts = [family.plan.lift for family in explanation.families]
    expect(row, same(run(model, inputs), before), "ratio zero is not bit-identical")
    expect(row, list(model.state_dict()) == keys and type(model) is kind, "class or keys changed")
    diffcr_compile.set_ratios(model, RATIO)
    cost = diffcr_compile.cost(model, inputs)
    row.share = cost.share
    expect(row, cost.share < 1, "FLOPs do not fall")
    row.worst = compare_with_loop(model, inputs, row)
    row.lift_cost = measure_lift(model, inputs)
    expect(row, row.worst < TOLERANCE, f"differs by {row.worst:.1e} from each sample run alone")
    expect(row, loads_the_same(entry, model, inputs), "loaded into another such model it computes something else")
    if compile_too:
        row.fullgraph = fullgraph_verdict(entry, model, inputs)
        expect(row, row.fullgraph != "broken", "the dense model traces with fullgraph=True, the routed one does not")
    diffcr_compile.restore(model)
    expect(row, same(run(model, inputs), before), "not restored exactly")
    row.context = check_context(model, inputs, row)
    return row


def loads_the_same(entry: Entry, routed: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the saved routing of a model gives its bits in another of the same weights, where it is proved on the way."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        diffcr_compile.save(routed, folder)
        return same(run(diffcr_compile.load(entry.build(), folder), inputs), run(routed, inputs))


def check_context(model: nn.Module, inputs: dict[str, Any], row: Row) -> str:
    """With full context every kept token equals the dense block's result at that token; how many families allow it."""
    diffcr_compile.transform(model, diffcr_compile.DiffCRConfig(context="all"), example_inputs=inputs)
    diffcr_compile.set_ratios(model, RATIO)
    plan = diffcr_compile.explain(model).plan
    allowed = [family for family in plan.families if family.context == "all"]
    worst = 0.0
    with watched(model) as calls, diffcr_compile.trace(model) as seen:
        run(model, inputs)
    for site in plan.sites:
        family = plan.families[site.family]
        if family not in allowed:
            continue
        module = model.get_submodule(site.fqn)
        for (args, kwargs, output), kept in zip(calls[site.fqn], seen.kept[site.fqn], strict=True):
            with torch.no_grad():
                dense = type(module).forward(module, *args, **kwargs)
            pairs = zip(tensors(output), tensors(dense), family.outputs, strict=True)
            for found, expected, known in pairs:
                if known.routed:
                    axes = (known.dims.index("N"), known.batch_axis)
                    found, expected = (take_tokens(tensor, kept, *axes) for tensor in (found, expected))
                worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)))
    expect(row, worst < CONTEXT_TOLERANCE, f"full context: a kept token differs by {worst:.1e} from the dense block's")
    diffcr_compile.restore(model)
    return f"{len(allowed)}/{len(plan.families)}"


@torch.no_grad()
def measure_lift(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Worst over the families: time of the routed block over that of the plain block called on one sample's tokens for all."""
    plan = diffcr_compile.explain(model).plan
    worst = 0.0
    with watched(model) as calls, diffcr_compile.trace(model) as seen:
        run(model, inputs)
    for index, family in enumerate(plan.families):
        fqn = next(site.fqn for site in plan.sites if site.family == index)
        module = model.get_submodule(fqn)
        (args, kwargs, _), kept = calls[fqn][0], seen.kept[fqn][0]
        bound = bind_arguments(family.positional, args, kwargs)
        values = [leaf for _, leaf in iterate_leaves(bound) if leaf is not None]
        shared = iter(
            [_index_tokens(leaf, value, kept[0], values) for leaf, value in zip(family.leaves, values, strict=True)]
        )
        call = map_leaves(lambda _, leaf, shared=shared: None if leaf is None else next(shared), bound)
        plain_args, plain_kwargs = unbind_arguments(family.positional, call)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(7):
            for seconds, function, given in zip(
                times,
                (module, functools.partial(type(module).forward, module)),
                ((args, kwargs), (plain_args, plain_kwargs)),
                strict=True,
            ):
                start = time.perf_counter()
                function(*given[0], **given[1])
                seconds.append(time.perf_counter() - start)
        worst = max(worst, statistics.median(times[0]) / statistics.median(times[1]))
    return worst


def expect(row: Row, condition: bool, failure: str) -> None:
    """Note a failure; the row goes on, so that one run shows all."""
    if not condition:
        row.failures.append(failure)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The tensors of the model's output on a copy of the inputs (some models write into them)."""
    return [leaf for leaf in pytree.tree_leaves(model(**copy.deepcopy(inputs))) if isinstance(leaf, Tensor)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two outputs are equal to the bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def fullgraph_verdict(entry: Entry, routed: nn.Module, inputs: dict[str, Any]) -> str:
    """ "yes", "dense neither" where the dense model has a graph break of its own, or "broken"."""
    torch.manual_seed(0)
    for model, verdict in ((entry.build(), "dense neither"), (routed, "broken")):
        torch._dynamo.reset()
        try:
            run(torch.compile(model, backend="eager", fullgraph=True), inputs)  # type: ignore[arg-type]
        except Exception:
            return verdict
    return "yes"


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, list[tuple[Any, Any, Any]]]]:
    """Inside, every call of a routed block is noted: (args, kwargs, output), by name."""
    calls: dict[str, list[tuple[Any, Any, Any]]] = {}
    handles = []
    for site in diffcr_compile.explain(model).plan.sites:
        module = model.get_submodule(site.fqn)
        handles.append(module.register_forward_pre_hook(_note_inputs(calls.setdefault(site.fqn, [])), with_kwargs=True))
        handles.append(module.register_forward_hook(_note_output(calls[site.fqn])))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a block's output."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def compare_with_loop(model: nn.Module, inputs: dict[str, Any], row: Row) -> float:
    """Largest relative error of the routed blocks against the original block on each sample's kept tokens alone."""
    with watched(model) as calls, diffcr_compile.trace(model) as seen:
        run(model, inputs)
    worst, different = 0.0, False
    plan = diffcr_compile.explain(model).plan
    for site in plan.sites:
        module, family = model.get_submodule(site.fqn), plan.families[site.family]
        for (args, kwargs, output), kept in zip(calls[site.fqn], seen.kept[site.fqn], strict=True):
            different |= len({tuple(sample) for sample in kept.tolist()}) > 1
            worst = max(worst, *block_errors(module, family, args, kwargs, output, kept, row))
    expect(row, different, "all samples keep the same tokens")
    return worst


def _note_inputs(calls: list[Any]) -> Callable[..., None]:
    return lambda module, args, kwargs: calls.append((copy.deepcopy(args), copy.deepcopy(kwargs), None))


def _note_output(calls: list[Any]) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls[-1] = (*calls[-1][:2], copy.deepcopy(output))

    return note


@torch.no_grad()
def block_errors(
    module: nn.Module, plan: BlockPlan, args: Any, kwargs: Any, output: Any, kept: Tensor, row: Row
) -> Iterator[float]:
    """Error of each output and sample of one call. The loop: one sample, its kept tokens, the class's own forward."""
    bound = bind_arguments(plan.positional, args, kwargs)
    values = [leaf for _, leaf in iterate_leaves(bound) if leaf is not None]
    results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    for sample in range(kept.shape[0]):
        alone = iter(
            [_alone(leaf, value, sample, kept[sample], values) for leaf, value in zip(plan.leaves, values, strict=True)]
        )
        call = map_leaves(lambda _, leaf, alone=alone: None if leaf is None else next(alone), bound)
        sample_args, sample_kwargs = unbind_arguments(plan.positional, call)
        expected = pytree.tree_leaves(type(module).forward(module, *sample_args, **sample_kwargs))
        tensors = [leaf for leaf in expected if isinstance(leaf, Tensor)]
        for known, result, value in zip(plan.outputs, results, tensors, strict=True):
            result = result.narrow(known.batch_axis, sample, 1)
            if known.routed:
                axis = known.dims.index("N")
                skipped = torch.tensor([i for i in range(result.shape[axis]) if i not in kept[sample].tolist()])
                before = torch.zeros_like(result)
                if known.source is not None:
                    before = values[known.source].narrow(known.batch_axis, sample, 1)
                same_bits = torch.equal(result.index_select(axis, skipped), before.index_select(axis, skipped))
                expect(row, same_bits, f"{plan.kind}: a skipped token changed")
                result = result.index_select(axis, kept[sample])
            yield float((result - value).abs().max() / value.abs().max().clamp(min=1e-6))


def _alone(leaf: LeafPlan, value: Any, sample: int, kept: Tensor, values: list[Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if leaf.batch_axis is not None and value.shape[leaf.batch_axis] > 1:
        value = value.narrow(leaf.batch_axis, sample, 1)
    return _index_tokens(leaf, value, kept, values)


def _index_tokens(leaf: LeafPlan, value: Any, kept: Tensor, values: list[Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    for axis in leaf.token_axes:
        before = sum(values[index].shape[size] for index, size in axis.before)
        after = sum(values[index].shape[size] for index, size in axis.after)
        end = value.shape[axis.axis]
        positions = [*range(before), *(before + token for token in kept.tolist()), *range(end - after, end)]
        value = value.index_select(axis.axis, torch.tensor(positions))
    return value.clone()


def as_markdown(rows: list[Row]) -> str:
    """The table, with its summary line."""
    routed = [row for row in rows if row.blocks]
    seconds = [row.seconds for row in routed] or [0.0]
    lines = [
        "# Coverage of diffusers' denoisers",
        "",
        f"{len(routed)} of {len(rows)} denoiser classes routed, {len(rows) - len(routed)} refused whole; "
        f"`transform` takes {statistics.median(seconds):.1f} s at the median, {max(seconds):.1f} s at worst (tiny models). "
        f"Failed checks: {sum(len(row.failures) for row in rows)}.",
        "",
        f"Made by `python examples/benchmarks/coverage.py --write` with torch {torch.__version__}, tiny configurations, batch "
        f"{BATCH}. Routable: share of the dense FLOPs in routed blocks. At 0.5: share of the dense FLOPs with half of the tokens "
        "skipped. Error: largest relative difference of a routed block from each sample run alone. Lift cost: time of the worst "
        "family's routed block, router, gather and scatter included, over that of the plain block on as many tokens in one batch "
        "(tiny blocks, so mostly launches). All: families whose keys and values may come from all tokens.",
        "",
        "| class | families | lift | lift cost | routable | at 0.5 | error | all | fullgraph | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.blocks:
            cells = [
                ", ".join(row.families),
                ", ".join(dict.fromkeys(row.lifts)),
                f"{row.lift_cost:.1f}",
                f"{row.routable:.0%}",
                f"{row.share:.0%}",
            ]
            cells += [f"{row.worst:.0e}", row.context, row.fullgraph, f"{row.seconds:.1f}"]
        else:
            cells = [f"refused: {row.dense_reason[:300]}", *[""] * 8]
        lines.append("| " + " | ".join([row.name, *cells]) + " |")
    lines += ["", "Left out, being no denoisers of their own:", ""]
    lines += [f"- {name}: {reason}" for name, reason in LEFT_OUT.items()]
    return "\n".join(lines) + "\n"


def write(rows: list[Row]) -> None:
    """Renew these rows in the record, and the table made from it."""
    record = Path(__file__).with_suffix(".json")
    known = {row["name"]: Row(**row) for row in json.loads(record.read_text())} if record.exists() else {}
    known |= {row.name: row for row in rows}
    rows = [known[name] for name in ZOO if name in known]
    record.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if any(row.blocks for row in rows):
        record.with_suffix(".md").write_text(as_markdown(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models of the zoo; all if none is given")
    parser.add_argument("--write", action="store_true", help="renew coverage.md and coverage.json")
    parser.add_argument("--no-compile", action="store_true", help="leave out the fullgraph check")
    options = parser.parse_args()
    rows = []
    for name in options.names or ZOO:
        try:
            row = check(ZOO[name], compile_too=not options.no_compile)
        except Exception as error:
            row = Row(name, failures=[f"{type(error).__name__}: {str(error)[:300]}"])
        rows.append(row)
        found = row.families or f"REFUSED {row.dense_reason[:600]}"
        print(row.name, found, row.lifts, f"{row.seconds:.1f}s", row.fullgraph, row.context, flush=True)
        for failure in row.failures:
            print("   FAILED", failure, flush=True)
        if options.write:
            write(rows)
    print(as_markdown(rows).splitlines()[2])


if __name__ == "__main__":
    main()
