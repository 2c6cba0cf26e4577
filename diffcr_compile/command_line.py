"""The command ``diffcr-compile``: explain, calibrate, bench and report, for a model directory that diffusers wrote.

What a person reads or a machine parses (``--json``) goes to stdout, progress to stderr. Exit codes: 0; 1 for what the package
refuses, with one paragraph on stderr; 2 for a command that can't be understood; 130 for one interrupted by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import statistics
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from . import CalibrationConfig, CalibrationReport, DiffCRConfig, calibrate, cost, explain, lower, save, set_ratios
from .arguments import map_leaves
from .artefact import is_ours
from .dry_run import shadow
from .errors import ArtefactError, CaptureError, DiffCRError
from .example_inputs import example_inputs
from .files import make_folder
from .model_directory import INSTALL, build_model, has_weights, read_inputs, read_json
from .transform import transform

try:
    import click
except ImportError:
    raise SystemExit(f"diffcr-compile on the command line needs click. {INSTALL}") from None

FOLDER = click.Path(file_okay=False, exists=True, path_type=Path)
FILE = click.Path(dir_okay=False, exists=True, path_type=Path)
SHARE = click.FloatRange(0, 1)
WARMUP_ROUNDS = 2


class _Command(click.Command):
    """A command with ``--verbose``, whose errors are one paragraph."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        text = "Show the passes' log and, of an error, the traceback."
        self.params.append(click.Option(["--verbose"], is_flag=True, help=text))

    def invoke(self, ctx: click.Context) -> Any:
        verbose = ctx.params.pop("verbose")
        logger, handler = logging.getLogger("diffcr_compile"), logging.StreamHandler(sys.stderr)
        level = logger.level
        if verbose:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="the routers are untrained"
                )  # said in the output where it matters
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except (RuntimeError, ValueError, TypeError, OSError, SafetensorError) as error:
            if verbose:
                traceback.print_exc(file=sys.stderr)
            kind = "" if isinstance(error, DiffCRError) else f"{type(error).__name__}: "
            click.echo(f"Error: {kind}{error}", err=True)
            ctx.exit(1)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


class _Group(click.Group):
    command_class = _Command


@click.group(cls=_Group)
@click.version_option(package_name="diffcr-compile", prog_name="diffcr-compile")
def main() -> None:
    """Learn where a Diffusion Transformer spends its compute, and save the rest.

    MODEL is a directory with diffusers' config.json, as save_pretrained writes it.
    """


def _key_value(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> DiffCRConfig:
    """``--options`` as a DiffCRConfig; values are JSON, or else text."""
    options = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals:
            raise click.BadParameter(f"expected key=value, found {item!r}")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        options[key] = value
    try:
        return DiffCRConfig.from_dict({"type": "DiffCRConfig", "version": 1, **options})
    except (TypeError, ValueError) as error:
        raise click.BadParameter(str(error)) from error


def _device(_: click.Context, __: click.Parameter, given: str) -> str:
    """A device on which models run."""
    try:
        kind = torch.device(given).type
    except RuntimeError as error:
        raise click.BadParameter(f"{given!r} is no device: {error}") from error
    if kind == "meta":
        raise click.BadParameter("expected a device that computes, found 'meta', which holds no values")
    return given


MODEL = click.argument("model", type=FOLDER)
OPTIONS = click.option(
    "--options", multiple=True, callback=_key_value, metavar="KEY=VALUE", help="Of DiffCRConfig; repeatable."
)
INPUTS = click.option(
    "--inputs", type=FILE, help="Safetensors; keys are the forward's keywords.  [default: made from the config]"
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
DEVICE = click.option(
    "--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True, callback=_device
)


@main.command("explain")
@MODEL
@click.option("--ratio", type=SHARE, default=0.0, help="Share of tokens that skip, for the cost.")
@OPTIONS
@INPUTS
@JSON
def explain_command(model: Path, ratio: float, options: DiffCRConfig, inputs: Path | None, as_json: bool) -> None:
    """What is routed in MODEL, what stays dense for which reason, and what it costs. Allocates no weights."""
    denoiser = build_model(model, "meta", weights=False)
    given = _inputs(denoiser, inputs, "meta")
    _say(f"transforming {type(denoiser).__name__}")
    transform(denoiser, options, example_inputs=given)
    set_ratios(denoiser, ratio)
    found, costs = explain(denoiser), cost(denoiser)
    setting = {
        "weights": "none, on the meta device",
        "inputs": _shapes(given),
        "inputs_from": str(inputs or "config"),
    }
    families = [
        {
            "kind": family.plan.kind,
            "blocks": family.blocks,
            "flops_share": family.flops_share,
            "attention": family.plan.attention,
            "called": family.plan.lift,
            "context": family.plan.context,
            "program": family.program,
        }
        for family in found.families
    ]
    data = {
        "model": found.model,
        "parameters": sum(p.numel() for name, p in denoiser.named_parameters() if "diffcr_router" not in name),
        **setting,
        "options": options.to_dict(),
        "families": families,
        "refusals": [{"blocks": r.fqns, "kind": r.kind, "reason": r.reason} for r in found.plan.refusals],
        "routable_share": found.routable_share,
        "ratio": ratio,
        "dense_flops": costs.dense_flops,
        "region_flops": costs.routed_flops,
        "share": costs.share,
    }
    notes = [f"{key.replace('_', ' ')}: {value}" for key, value in setting.items()]
    _print(
        data
        if as_json
        else "\n".join([*notes, f"at ratio {ratio:g}: {costs.share:.1%} of the dense FLOPs", "", str(found)])
    )


@main.command("calibrate")
@MODEL
@click.option(
    "--batches",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="A safetensors file a batch, or a folder of them, taken by name and counted from 0.",
)
@click.option(
    "--budget", required=True, type=click.FloatRange(0, 1, min_open=True), help="Share of the dense cost to keep."
)
@click.option(
    "--output",
    required=True,
    type=click.Path(file_okay=False, writable=True, path_type=Path),
    help="Folder of the routing and its report.",
)
@click.option("--config", type=FILE, help="JSON with fields of CalibrationConfig.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Where to write progress and resume from.")
@click.option("--training-free", is_flag=True, help="Measure instead of learning.")
@OPTIONS
@DEVICE
@JSON
def calibrate_command(
    model: Path,
    batches: Path,
    budget: float,
    output: Path,
    config: Path | None,
    checkpoint: Path | None,
    training_free: bool,
    options: DiffCRConfig,
    device: str,
    as_json: bool,
) -> None:
    """Learn ratios, routers and weights within a budget; write the routing, its report, and what weights were trained."""
    fields = {} if config is None else read_json(config)
    if training_free and fields.get("preset", "training-free") != "training-free":
        raise click.UsageError(
            f"--training-free and the preset {fields['preset']!r} of {config} contradict each other: leave one of them out."
        )
    if training_free or (options.skip == "reuse" and "preset" not in fields):
        fields["preset"] = "training-free"
    if fields.get("preset") == "training-free" and checkpoint is not None:
        raise click.UsageError("--checkpoint has no effect where nothing is learned (training-free): leave it out.")
    chosen = _calibration_config(fields, config)
    if checkpoint is not None and checkpoint.resolve().is_relative_to(output.resolve()):
        raise click.UsageError(
            f"--checkpoint {checkpoint} lies in --output {output}, which a calibration writes as a whole: give a folder beside it."
        )
    if checkpoint is not None and output.resolve().is_relative_to(checkpoint.resolve()):
        raise click.UsageError(
            f"--output {output} lies in --checkpoint {checkpoint}, which holds checkpoints alone: give a folder beside it."
        )
    if not has_weights(model):
        raise DiffCRError(f"{model} holds no weights (*.safetensors), and calibrating random ones is of no use.")
    weights = (output / "model").resolve()  # where a link of that name leads
    for name, path in (("MODEL", model), ("--batches", batches), ("--config", config)):
        if path is not None and weights in path.resolve().parents:
            raise click.UsageError(
                f"{name} {path} lies in {weights}, which is written anew: give a path outside, or another --output."
            )
    learns = chosen.preset != "training-free" and chosen.trainable != "routers"
    with _output(output):
        denoiser = build_model(model, device, weights=True)
        files = sorted(batches.glob("*.safetensors")) if batches.is_dir() else [batches]
        if not files:
            raise CaptureError(f"{batches} holds no batches; expected files named *.safetensors.")
        given = [read_inputs(denoiser, file, "cpu") for file in files]
        first = map_leaves(lambda _, leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, given[0])
        _say(f"calibrating {type(denoiser).__name__} to {budget:.0%} on {len(given)} batches")
        transform(denoiser, options, example_inputs=first)
        try:
            report = calibrate(denoiser, given, budget=budget, config=chosen, checkpoint=checkpoint)
        except KeyboardInterrupt:
            if checkpoint is not None and checkpoint.is_dir() and any(checkpoint.iterdir()):
                _say(f"The same command goes on from {checkpoint}.")
            raise
        with _replaced(weights, keeps=not learns and weights.exists() and weights.samefile(model)) as fresh:
            if learns:
                denoiser.save_pretrained(fresh)
            save(denoiser, output)
        report.save(output)
    _say(f"written to {output}")
    _print(report.to_dict() if as_json else str(report))


@main.command("bench")
@MODEL
@click.option("--ratio", "ratios", type=SHARE, multiple=True, default=(0.5,), show_default=True, help="Repeatable.")
@click.option("--repeats", type=click.IntRange(min=2), default=10, show_default=True, help="Rounds that count.")
@INPUTS
@DEVICE
@JSON
def bench_command(
    model: Path, ratios: tuple[float, ...], repeats: int, inputs: Path | None, device: str, as_json: bool
) -> None:
    """Time dense against routed in turn, eager and lowered, beside what the FLOPs promise."""
    dense = build_model(model, device, weights=has_weights(model))
    given = _inputs(dense, inputs, device)
    eager = transform(shadow(dense), example_inputs=given)
    lowered = lower(copy.deepcopy(eager, {id(p): p for p in (*eager.parameters(), *eager.buffers())}))
    promised = {}
    for ratio in ratios:
        set_ratios(eager, ratio)
        promised[ratio] = 1 / cost(eager).share
    seconds = _time(dense, eager, lowered, given, ratios, repeats)
    rows: list[dict[str, Any]] = [
        {
            "mode": mode,
            "ratio": ratio,
            "dense_ms": _quartiles([1000 * value for value in seconds[mode, 0.0]]),
            "routed_ms": _quartiles([1000 * value for value in seconds[mode, ratio]]),
            "speedup": _quartiles([a / b for a, b in zip(seconds[mode, 0.0], seconds[mode, ratio], strict=True)]),
            "promised": promised[ratio],
        }
        for mode in ("eager", "lowered")
        for ratio in ratios
    ]
    weights = "loaded" if has_weights(model) else "random"
    setting = {"model": type(dense).__name__, "weights": weights, "device": device, "torch": torch.__version__}
    data = {**setting, "inputs": _shapes(given), "rounds": repeats, "rows": rows}
    lines = [f"{key}: {value}" for key, value in data.items() if key != "rows"]
    lines += ["", "mode     ratio  dense ms  routed ms  speed-up (quartiles)  promised  arrives"]
    for row in rows:
        low, middle, high = row["speedup"]
        lines.append(
            f"{row['mode']:8} {row['ratio']:5.2f} {row['dense_ms'][1]:9.2f} {row['routed_ms'][1]:10.2f}  "
            f"{middle:5.2f}x ({low:.2f} to {high:.2f})   {row['promised']:7.2f}x {middle / row['promised']:8.0%}"
        )
    _print(data if as_json else "\n".join(lines))


@main.command("report")
@click.argument("folder", type=FOLDER)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="FILE.html (one page) or FILE.png.")
@JSON
def report_command(folder: Path, output: Path | None, as_json: bool) -> None:
    """Print the report of a calibration in FOLDER, and draw it."""
    if output is not None and output.suffix not in (".html", ".png"):
        raise click.BadParameter(f"expected FILE.html or FILE.png, found {output}", param_hint="--output")
    report = CalibrationReport.load(folder)
    if output is not None and output.suffix == ".png":
        output.write_bytes(report._repr_png_())
    elif output is not None:
        page = f'<!doctype html>\n<meta charset="utf-8">\n<title>diffcr-compile</title>\n{report._repr_html_()}\n'
        output.write_text(page, encoding="utf-8")
    _print(report.to_dict() if as_json else str(report))


@contextlib.contextmanager
def _output(folder: Path) -> Iterator[None]:
    """Where a calibration will be written, gone again if it made the folder and nothing came. Raises ArtefactError where there is
    something else, or nothing can be written."""
    if folder.exists() and any(folder.iterdir()) and not is_ours(folder):
        raise ArtefactError(
            f"{folder} is not empty and holds no routing; expected a new folder, or one of a calibration."
        )
    new = not folder.exists()
    make_folder(folder)
    try:
        yield
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def _replaced(folder: Path, *, keeps: bool) -> Iterator[Path]:
    """Where to write a folder's new contents, if any; afterwards the old ones are gone, unless it ``keeps`` them: beside another
    routing than their own, weights would pass for its. After an error they are as before."""
    fresh, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}") for _ in range(2))
    try:
        yield fresh
        if folder.exists() and not keeps:
            folder.rename(old)
        if fresh.exists():
            fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)


def _calibration_config(fields: dict[str, Any], file: Path | None) -> CalibrationConfig:
    try:
        return CalibrationConfig.from_dict({"type": "CalibrationConfig", "version": 1, **fields})
    except (TypeError, ValueError) as error:
        raise DiffCRError(f"{file or 'the calibration'}: {error}.") from error


def _inputs(model: Any, file: Path | None, device: str) -> dict[str, Any]:
    if file is not None:
        return read_inputs(model, file, device)
    _say("making inputs from the configuration")
    return example_inputs(model, model.config)


@torch.inference_mode()
def _time(
    dense: nn.Module,
    eager: nn.Module,
    lowered: nn.Module,
    inputs: dict[str, Any],
    ratios: tuple[float, ...],
    repeats: int,
) -> dict[tuple[str, float], list[float]]:
    """Seconds by mode and ratio, all of them in turn in each round; 0 is dense: the untouched model, or the lowered one."""
    seconds: dict[tuple[str, float], list[float]] = {
        (mode, ratio): [] for mode in ("eager", "lowered") for ratio in dict.fromkeys((0.0, *ratios))
    }
    wait: Callable[[], None] = torch.cuda.synchronize if next(dense.parameters()).is_cuda else lambda: None
    for index in tqdm(range(WARMUP_ROUNDS + repeats), desc="rounds", leave=False):
        for (mode, ratio), found in seconds.items():
            model = lowered if mode == "lowered" else eager if ratio else dense
            if model is not dense:
                set_ratios(model, ratio)
            wait()
            start = time.perf_counter()
            model(**inputs)
            wait()
            if index >= WARMUP_ROUNDS:
                found.append(time.perf_counter() - start)
    return seconds


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(value.shape) if isinstance(value, torch.Tensor) else repr(value) for name, value in inputs.items()
    }


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print(result: dict[str, Any] | str) -> None:
    click.echo(result if isinstance(result, str) else json.dumps(result, indent=1))
