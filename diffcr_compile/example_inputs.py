"""Inputs for a denoiser of which only the configuration is known: no model is named, all that may fit is tried.

Every parameter of the forward gets candidates by its name and the configuration's numbers. The model runs on the meta device,
and an input is replaced wherever another candidate lets the model come further, until it comes through.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import iterate_leaves
from .dry_run import dry_run, shadow
from .errors import CaptureError

BATCH, TEXT_TOKENS, SIDE, FRAMES = 2, 77, 64, 4
"""Sizes where the configuration gives none: 64 x 64 latents are a picture of 1024 x 1024."""

Make = Callable[[torch.device], Any]
"""Makes one candidate on a device; None instead of a maker: the argument is left out."""

Choice = dict[str, Make | None]
Progress = tuple[float, tuple[int, ...]]
"""How far a forward came: module calls begun and ended, then the lines on which it stopped."""

_THROUGH: Progress = (float("inf"), ())


def example_inputs(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that ``model`` takes, on its device; ``config``: what it was built with.

    Raises CaptureError naming the inputs that could not be made.
    """
    candidates = _candidates(model, config)
    sample, *others = candidates
    attempts = _Attempts(model)
    starts = [{sample: option, **{name: candidates[name][0] for name in others}} for option in candidates[sample]]
    reached = {}
    with dry_run(attempts.model, fake=False):
        for start in sorted(starts, key=attempts.progress, reverse=True):
            choice = _ascend(attempts, {name: candidates[name] for name in others}, start)
            progress = attempts.progress(choice)
            if progress == _THROUGH:
                device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
                return _make(choice, device)
            reached[progress] = choice
        raise _failure(attempts, {name: candidates[name] for name in others}, reached[max(reached)])


class _Attempts:
    """Runs of a copy of the model without weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls, self.error = shadow(model), 0, ""
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else nn.Parameter(parameter.to("meta"), False)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to("meta")
            module.register_forward_pre_hook(self._count)
            module.register_forward_hook(self._count)

    def progress(self, choice: Choice) -> Progress:
        self.calls = 0
        inputs = _make(choice, torch.device("meta"))
        try:
            with torch.device("meta"):
                output = self.model(**inputs)
        except Exception as error:  # whatever the model raises on inputs that do not fit
            self.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            return self.calls, tuple(line or 0 for _, line in traceback.walk_tb(error.__traceback__))
        sample = next(iter(inputs.values()))
        if any(isinstance(leaf, Tensor) and leaf.dim() == sample.dim() for _, leaf in iterate_leaves(output)):
            return _THROUGH
        self.error = f"no output of it has {sample.dim()} axes, as its first input"
        return self.calls, ()

    def _count(self, *_: Any) -> None:
        self.calls += 1


def _make(choice: Choice, device: torch.device) -> dict[str, Any]:
    return {name: make(device) for name, make in choice.items() if make is not None}


def _ascend(attempts: _Attempts, candidates: dict[str, list[Make | None]], choice: Choice) -> Choice:
    """Replace one input after the other while that brings the model further."""
    reached, before = attempts.progress(choice), None
    while reached not in (before, _THROUGH):
        before = reached
        for name, option in [(name, option) for name, options in candidates.items() for option in options]:
            if option is choice[name] or reached == _THROUGH:
                continue
            found = attempts.progress({**choice, name: option})
            if found > reached:
                choice, reached = {**choice, name: option}, found
    return choice


def _failure(attempts: _Attempts, candidates: dict[str, list[Make | None]], choice: Choice) -> CaptureError:
    """Names the inputs of which no candidate does better than the others."""
    reached = attempts.progress(choice)
    stopped = attempts.error
    undecided = [
        name
        for name, options in candidates.items()
        if choice[name] is not None
        and (len(options) == 1 or [attempts.progress({**choice, name: make}) for make in options].count(reached) > 1)
    ]
    return CaptureError(
        f"no inputs for {type(attempts.model).__name__} could be made from its configuration: nothing that was tried for "
        f"{' or '.join(undecided) or next(iter(choice))} fits (it stopped with {stopped}). Give them with --inputs "
        f"FILE.safetensors, whose keys are names of the forward's arguments: {', '.join(choice)}."
    )


def _candidates(model: nn.Module, config: Mapping[str, Any]) -> dict[str, list[Make | None]]:
    """What may be tried for each of the forward's parameters, likeliest first; the first parameter is the noisy sample."""
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind in keywords]
    if not parameters:
        raise CaptureError(f"{type(model).__name__}.forward names no arguments, so its inputs can't be guessed.")
    guess = _Guess(config)
    found: dict[str, list[Make | None]] = {parameters[0].name: [*guess.samples()]}
    for parameter in parameters[1:]:
        options = guess.options(parameter.name)
        if parameter.default is parameter.empty:
            found[parameter.name] = [*options]
        elif parameter.name == "encoder_hidden_states":  # without, cross-attention would look at the picture instead
            found[parameter.name] = [*options, None]
        elif parameter.default is None:
            found[parameter.name] = [None, *options]
    return {name: options or [None] for name, options in found.items()}


class _Guess:
    """Candidates from an argument's name and the numbers of a configuration."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        def size(default: int, *keys: str) -> int:
            return next((config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0), default)

        self.height = size(SIDE, "sample_height", "sample_size")
        self.width = size(SIDE, "sample_width", "sample_size")
        self.frames = size(FRAMES, "sample_frames", "num_frames", "video_length")
        self.text = size(TEXT_TOKENS, "max_text_seq_length", "num_text_tokens")
        self.axes = next((len(value) for key, value in config.items() if "axes" in key and value), 3)
        heads = size(0, "num_attention_heads") * size(0, "attention_head_dim")
        numbers = [value for value in config.values() if type(value) is int and value > 3]
        self.widths = list(dict.fromkeys([*numbers, heads]))
        self.channels = [config["in_channels"]] if size(0, "in_channels") else self.widths

    def samples(self) -> list[Make]:
        """Latents of pictures and videos: channels first, packed, channels after the frames, or last."""
        frames, height, width = self.frames, self.height, self.width
        shapes = [
            shape
            for c in self.channels
            for shape in (
                (c, height, width),
                (c, frames, height, width),
                (height * width, c),
                (frames, c, height, width),
                (frames, height, width, c),
                (c, height * width),
            )
        ]
        return [_normal(*shape) for shape in shapes]

    def options(self, name: str) -> list[Make]:
        """For an argument other than the sample."""
        image = self.height * self.width
        if name.endswith("kwargs"):
            sizes = {"resolution": _full(1.0, 2), "aspect_ratio": _full(1.0, 1)}
            return [lambda device: _make({**sizes}, device)] if "cond" in name else []
        if name in ("num_frames", "height", "width"):
            return [lambda _: {"num_frames": 1, "height": self.height, "width": self.width}[name]]
        if name.endswith("shapes"):
            return [lambda _: [[(1, self.height, self.width)]] * BATCH]
        if name.startswith("timestep") or name == "guidance":
            return [_full(0.5)]  # lies in the range of timesteps that end at 1, and of those that end at 1000
        if "label" in name:
            return [_full(1)]
        if name.endswith("ids"):
            length = self.text if name.startswith(("txt", "text")) else image
            return [
                lambda device: torch.zeros(length, self.axes, dtype=torch.float32, device=device),
                _full(0.0, length, self.axes),
            ]
        if "mask" in name:
            return [_full(True, length) for length in (self.text, image, self.text + image)]
        vectors, sequences = ([_normal(*axis, width) for width in self.widths] for axis in ((), (self.text,)))
        return vectors if "pooled" in name else sequences + vectors


def _normal(*shape: int) -> Make:
    def make(device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(BATCH, *shape, dtype=torch.float32, device=device)
        generator = torch.Generator("cpu").manual_seed(sum(shape))
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    return make


def _full(value: float, *shape: int) -> Make:
    dtype = torch.float32 if isinstance(value, float) else None
    return lambda device: torch.full((BATCH, *shape), value, dtype=dtype, device=device)
