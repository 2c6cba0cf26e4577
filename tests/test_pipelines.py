"""Routed transformers inside real pipelines of diffusers: tiny, random weights, embeddings in place of text encoders."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import map_tensors, reference_flops, relative_error, routed_fqns, same_snapshot, snapshot, tensors_of
from torch import Tensor, nn

import diffcr_compile
from diffcr_compile import CalibrationConfig, DiffCRConfig

STEPS, LONG, FIFTY, NUM_REGIONS, CHANNELS = 4, 8, 50, 4, 16
SUMMATION = 1e-4
"""Relative error, float32, of a model run at another batch size, where products are summed in another order."""
REUSE = DiffCRConfig(skip="reuse", num_regions=4)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:the routers are untrained", "ignore::FutureWarning")]


@dataclass(frozen=True)
class Case:
    """One pipeline, its transformer and other parts by class and options, the suffixes of its text encoders, its inputs and
    those of another size. tokens: of the image; blocks: of the transformer; calls: of it in each sampling step; high: the
    largest timestep; callback: whether it takes callback_on_step_end."""

    pipeline: str
    transformer: dict[str, Any]
    inputs: dict[str, Any]
    other: dict[str, Any]
    texts: tuple[str, ...] = ("", "_2", "_3")
    scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "FlowMatchEulerDiscreteScheduler"})
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    more: dict[str, Any] = field(default_factory=dict)
    tokens: int = 16
    other_tokens: int = 24
    blocks: int = 2
    calls: int = 1
    high: float = 1000.0
    callback: bool = True


def make(name: str, library: str = "diffusers", **options: Any) -> Any:
    """An object of a diffusers class, or of one of transformers by its configuration; parameters that start at zero become noise,
    so that no path is silent."""
    kind = getattr(importlib.import_module(library), name)
    made = kind(kind.config_class(**options)) if hasattr(kind, "config_class") else kind(**options)
    for parameter in made.eval().parameters() if isinstance(made, nn.Module) else ():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return made


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompts(batch: int) -> dict[str, Tensor]:
    pooled = {"pooled_prompt_embeds": drawn(batch, 22), "negative_pooled_prompt_embeds": drawn(batch, 22, seed=1)}
    return pooled | {"prompt_embeds": drawn(batch, 7, 20), "negative_prompt_embeds": drawn(batch, 7, 20, seed=1)}


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
GRID = {**HEADS, "sample_size": 8, "in_channels": CHANNELS}
DIT = {"name": "DiTTransformer2DModel", **GRID, "out_channels": 2 * CHANNELS}
PIXART = {**DIT, "name": "PixArtTransformer2DModel", "cross_attention_dim": 16, "caption_channels": 20}
JOINT = {"joint_attention_dim": 20, "pooled_projection_dim": 22}
SD3 = {"name": "SD3Transformer2DModel", **GRID, **JOINT, "caption_projection_dim": 16, "out_channels": CHANNELS}
SD3 |= {"pos_embed_max_size": 9}
FLUX = {"name": "FluxTransformer2DModel", **HEADS, **JOINT, "attention_head_dim": 16, "in_channels": 4 * CHANNELS}
FLUX |= {"num_single_layers": 2, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}
WAN = {"name": "WanTransformer3DModel", **HEADS, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
WAN |= {"text_dim": 20, "freq_dim": 16, "ffn_dim": 48, "rope_max_seq_len": 32}
FIRST_FRAME = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}
EYE = {"library": "transformers", "name": "CLIPVisionModel", "hidden_size": 16, "intermediate_size": 16}
EYE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
GLASSES = {"library": "transformers", "name": "CLIPImageProcessor", "do_rescale": False}
GLASSES |= {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
VAE = {"name": "AutoencoderKL", "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": CHANNELS}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
VAE |= {"shift_factor": 0.1, "scaling_factor": 0.5}
FILM_VAE = {"name": "AutoencoderKLWan", "base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_dim": 4}
FILM_VAE |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
UNIPC = {"name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
SD3_CONTROL = {"controlnet": {**SD3, "name": "SD3ControlNetModel", "num_layers": 1}}
FLUX_CONTROL = {"controlnet": {**FLUX, "name": "FluxControlNetModel", "num_layers": 1, "num_single_layers": 1}}

IMAGE = drawn(1, 3, 16, 16).sigmoid()
SIZE, WIDE = {"height": 16, "width": 16}, {"height": 16, "width": 24}
TEXT = {key: value for key, value in prompts(1).items() if "pooled" not in key}
MASKS = {"prompt_attention_mask": torch.ones(1, 7), "negative_prompt_attention_mask": (torch.arange(7) < 5)[None].int()}
BINLESS = {**TEXT, **MASKS, **SIZE, "negative_prompt": None, "use_resolution_binning": False}
GUIDED, START, TWICE = {**prompts(1), **SIZE}, {"image": IMAGE, "strength": 0.8}, {"true_cfg_scale": 2.0}
CONTROLLED, WIDER = GUIDED | {"control_image": IMAGE}, WIDE | {"control_image": drawn(1, 3, 16, 24).sigmoid()}
INPAINT = GUIDED | START | {"mask_image": (IMAGE[:, :1] > 0.5).float()}
FILM = {**TEXT, "height": 32, "width": 48, "num_frames": 5}
ANIMATED = FILM | {"image": IMAGE}
ANIMATED |= {key: drawn(1, 512, 20, seed=seed) for seed, key in enumerate(TEXT)}
"""Wan takes the first 512 tokens for text, and the rest for the image."""
LABEL, LABELS = {"class_labels": [3]}, {"class_labels": [3, 5]}
OLD: dict[str, Any] = {"callback": False, "scheduler": {"name": "DDIMScheduler"}}
FLOW: dict[str, Any] = {"texts": ("", "_2"), "blocks": 4, "high": 1.0}
CASES = {
    "dit": Case("DiTPipeline", DIT, LABEL, LABELS, (), other_tokens=16, **OLD),
    "pixart": Case("PixArtSigmaPipeline", PIXART, BINLESS, WIDE, ("",), **OLD),
    "sd3": Case("StableDiffusion3Pipeline", SD3, GUIDED, WIDE),
    "sd3 img2img": Case("StableDiffusion3Img2ImgPipeline", SD3, GUIDED | START, WIDE),
    "sd3 inpaint": Case("StableDiffusion3InpaintPipeline", SD3, INPAINT, WIDE),
    "sd3 controlnet": Case("StableDiffusion3ControlNetPipeline", SD3, CONTROLLED, WIDER, more=SD3_CONTROL),
    "flux": Case("FluxPipeline", FLUX, GUIDED | TWICE, WIDE, calls=2, **FLOW),
    "flux img2img": Case("FluxImg2ImgPipeline", FLUX, {**prompts(2), **SIZE, **START}, WIDE, **FLOW),
    "flux controlnet": Case(
        "FluxControlNetPipeline", FLUX, CONTROLLED | TWICE, WIDER, more=FLUX_CONTROL, calls=2, **FLOW
    ),
    "flux inpaint": Case("FluxInpaintPipeline", FLUX, INPAINT | TWICE, WIDE, calls=2, **FLOW),
    "wan": Case("WanPipeline", WAN, FILM, {"num_frames": 9}, ("",), UNIPC, FILM_VAE, {}, 12, 18, calls=2),
    "wan image to video": Case(
        "WanImageToVideoPipeline",
        WAN | FIRST_FRAME,
        ANIMATED,
        {"num_frames": 9},
        ("",),
        UNIPC,
        FILM_VAE,
        {"image_encoder": EYE, "image_processor": GLASSES},
        12,
        18,
        calls=2,
    ),
}
every = pytest.mark.parametrize("name", CASES)
VARIANT = pytest.mark.nightly
"""Of a pipeline for text to image, whose name it has before a space."""


@functools.cache
def pipe(name: str) -> Any:
    """The pipeline, without text encoders and tokenizers."""
    case = CASES[name]
    texts = {f"{part}{suffix}": None for part in ("text_encoder", "tokenizer") for suffix in case.texts}
    parts = {"transformer": case.transformer, "vae": case.vae, "scheduler": case.scheduler, **case.more}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = make(case.pipeline, **{part: make(**options) for part, options in parts.items()}, **texts)
    found.set_progress_bar_config(disable=True)
    return found


@functools.cache
def original(name: str) -> nn.Module:
    return copy.deepcopy(pipe(name).transformer)


def draw(name: str, transformer: nn.Module, **options: Any) -> Tensor:
    """The picture of the pipeline with this transformer, always from one seed."""
    original(name)
    pipe(name).transformer = transformer
    given = {"num_inference_steps": STEPS, "output_type": "pt", "return_dict": False} | CASES[name].inputs | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some pipelines encode images with the global generator
        picture = pipe(name)(**given, generator=torch.Generator().manual_seed(0))[0]
    assert picture.isfinite().all()
    return torch.as_tensor(picture)


@functools.cache
def plain(name: str, **options: Any) -> Tensor:
    return draw(name, original(name), **options)


@functools.cache
def _deferred(name: str) -> tuple[nn.Module, Tensor]:
    """The transformer, its blocks found by the pipeline's first call, and that call's picture."""
    model = diffcr_compile.transform(copy.deepcopy(original(name)))
    picture = draw(name, model)
    diffcr_compile.cost(model)
    return model, picture


def routed(name: str, values: Any = 0.0) -> nn.Module:
    """A copy of the transformed transformer at this table."""
    model = copy.deepcopy(_deferred(name)[0])
    diffcr_compile.set_ratios(model, values)
    return model


@functools.cache
def recorded(name: str, **options: Any) -> Any:
    """What the plain pipeline feeds its transformer."""
    with diffcr_compile.record(original(name)) as batches:
        draw(name, original(name), **options)
    return batches


@functools.cache
def _reusing(name: str) -> nn.Module:
    return diffcr_compile.transform(copy.deepcopy(original(name)), REUSE, example_inputs=recorded(name)[0])


def reusing(name: str, values: Any) -> nn.Module:
    shared = {
        "sd3 img2img": "sd3",
        "sd3 inpaint": "sd3",
        "flux img2img": "flux",
        "flux inpaint": "flux",
    }  # one signature: spares searching the same blocks again
    model = copy.deepcopy(_reusing(shared.get(name, name)))
    diffcr_compile.set_ratios(model, values)
    return model


def flops(name: str, model: nn.Module, **options: Any) -> int:
    return reference_flops(lambda: draw(name, model, **options))


def regions(name: str, batches: Any) -> list[int]:
    """Region of each call, from its timestep."""
    values = [float(batch["timestep"].reshape(-1)[0]) / CASES[name].high for batch in batches]
    return [min(int(value * NUM_REGIONS), NUM_REGIONS - 1) for value in values]


def by_region(name: str) -> Tensor:
    """A table with a ratio of its own for every region and block, in thousandths."""
    places = torch.arange(NUM_REGIONS)[:, None] * 150 + torch.arange(CASES[name].blocks) * 70 + 100
    return places / 1000


@every
def test_first_call_finds_the_blocks_and_changes_no_bit(name: str) -> None:
    model, picture = _deferred(name)
    assert len(routed_fqns(model)) == CASES[name].blocks
    assert torch.equal(picture, plain(name))
    assert torch.equal(draw(name, model), plain(name))


@every
def test_table_by_region(name: str) -> None:
    check_table_by_region(name, STEPS)


def check_table_by_region(name: str, num_steps: int) -> None:
    """As many tokens kept, each of them once, and FLOPs saved as the rows of the steps' regions say."""
    steps = {"num_inference_steps": num_steps}
    table = by_region(name)
    model, batches = routed(name, table), recorded(name, **steps)
    rows = regions(name, batches)
    assert len(set(rows)) >= 3
    with diffcr_compile.trace(model) as seen:
        picture = draw(name, model, **steps)
    assert not torch.equal(picture, plain(name, **steps))
    tokens, ratios = CASES[name].tokens, (table * 1000).round().int().tolist()
    for block, kept in enumerate(seen.kept.values()):
        expected = [tokens - tokens * ratios[row][block] // 1000 for row in rows]
        assert [call.shape[1] for call in kept] == expected
        assert all(len(set(sample)) == len(sample) for call in kept for sample in call.tolist())
    saved = [diffcr_compile.cost(model).dense_flops - spent for spent in diffcr_compile.cost(model).routed_flops]
    assert min(saved) > 0
    assert flops(name, original(name), **steps) - flops(name, model, **steps) == sum(saved[row] for row in rows)


@every
def test_calibrate_routers_on_recorded_batches(name: str) -> None:
    model = routed(name)
    with diffcr_compile.record(model) as batches:
        draw(name, model)
    assert len(batches) == len(recorded(name))
    config = CalibrationConfig(steps=3, trainable="routers")
    report = diffcr_compile.calibrate(model, batches, budget=0.85, config=config)
    assert report.share <= 0.85
    assert diffcr_compile.cost(model).share == pytest.approx(report.share)
    assert flops(name, model) < flops(name, original(name))
    assert torch.equal(draw(name, diffcr_compile.restore(model)), plain(name))


@pytest.mark.parametrize("name", [pytest.param(name, marks=VARIANT if " " in name else ()) for name in CASES])
def test_reuse_without_training(name: str) -> None:
    model = reusing(name, 0.0)
    with diffcr_compile.record(model) as batches:
        for steps in (STEPS, LONG):
            assert torch.equal(draw(name, model, num_inference_steps=steps), plain(name, num_inference_steps=steps))
    report = diffcr_compile.calibrate(model, batches, budget=0.7, config=CalibrationConfig(preset="training-free"))
    assert report.share <= 0.7
    assert diffcr_compile.cost(model).share == pytest.approx(report.share)
    assert flops(name, model, num_inference_steps=LONG) < flops(name, original(name), num_inference_steps=LONG)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan"])
def test_fifty_steps(name: str) -> None:
    """With reuse one trajectory goes through all of them: each call is dense at the first step and at no other."""
    steps: dict[str, Any] = {"num_inference_steps": FIFTY}
    dense, case = plain(name, **steps), CASES[name]
    for options in (routed, reusing):
        assert torch.equal(draw(name, options(name, 0.0), **steps), dense)
    check_table_by_region(name, FIFTY)
    model = reusing(name, 0.5)
    with diffcr_compile.trace(model) as seen:
        assert not torch.equal(draw(name, model, **steps), dense)
    for kept in seen.kept.values():
        expected = [case.tokens] * case.calls + [case.tokens // 2] * (FIFTY - 1) * case.calls
        assert [call.shape[1] for call in kept] == expected


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_full_context_costs_less_than_dense(name: str) -> None:
    shares = [diffcr_compile.cost(reusing(name, ratio)).share for ratio in (0.0, 0.1, 0.25, 0.5, 0.75)]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("scope", ["regional", "full"])
def test_lowered_inside_a_pipeline(scope: Any) -> None:
    """As eagerly, picture after picture; its graphs are run by ATen."""
    torch._dynamo.reset()
    name = "sd3"
    expected = draw(name, reusing(name, 0.5))
    model = diffcr_compile.lower(reusing(name, 0.5), scope=scope, backend="aot_eager")
    for _ in range(2):
        assert relative_error(draw(name, model), expected) < 1e-4
    assert not torch.equal(expected, plain(name))


@every
def test_each_call_begins_a_new_trajectory(name: str) -> None:
    table = by_region(name)
    fresh = {steps: draw(name, reusing(name, table), num_inference_steps=steps) for steps in (STEPS, LONG)}
    model = reusing(name, table)
    for steps in (STEPS, LONG, LONG, STEPS, STEPS):
        assert torch.equal(draw(name, model, num_inference_steps=steps), fresh[steps])
    assert not torch.equal(fresh[LONG], plain(name, num_inference_steps=LONG))


def test_first_call_finds_the_blocks_for_reuse() -> None:
    model = diffcr_compile.transform(copy.deepcopy(original("dit")), REUSE)
    assert torch.equal(draw("dit", model), plain("dit"))


def test_trajectory_begins_after_a_call_of_one_step() -> None:
    name, full = "sd3 img2img", {"strength": 1.0}
    model = reusing(name, 0.5)
    draw(name, model, strength=1 / STEPS)
    assert torch.equal(draw(name, model, **full), draw(name, reusing(name, 0.5), **full))


def test_trajectory_begins_below_the_end_of_another() -> None:
    name, weak = "flux img2img", {"strength": 0.2, "num_inference_steps": 20}
    model = reusing(name, 0.5)
    draw(name, model)
    assert torch.equal(draw(name, model, **weak), draw(name, reusing(name, 0.5), **weak))


def test_reuse_beside_guidance_by_skipped_layers() -> None:
    model = reusing("sd3", 0.5)
    with diffcr_compile.trace(model) as seen:
        draw("sd3", model, num_inference_steps=LONG, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    assert [kept.shape[1] for kept in seen.kept["transformer_blocks.1"]] == [16] + [8] * (LONG - 1)


def test_text_that_is_broadcast_over_the_pictures() -> None:
    options = {**prompts(1), "num_images_per_prompt": 2}
    model = diffcr_compile.transform(copy.deepcopy(original("flux img2img")))
    assert torch.equal(
        draw("flux img2img", model, **options), draw("flux img2img", original("flux img2img"), **options)
    )
    diffcr_compile.set_ratios(model, 0.5)
    draw("flux img2img", model, **options)


def halves(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [map_tensors(lambda leaf, at=at: leaf[at : at + 1] if len(leaf) == 2 else leaf, batch) for at in (0, 1)]


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    first, second = (iter(tensors_of(batch)) for batch in batches)
    pairs = map(torch.stack, zip(first, second, strict=True))
    return map_tensors(lambda leaf: next(pairs).flatten(0, 1) if len(leaf) == 1 else (next(pairs), leaf)[1], batches[0])


@every
@pytest.mark.parametrize("options", [routed, reusing], ids=["identity", "reuse"])
def test_batched_guidance_equals_two_calls(name: str, options: Callable[[str, Any], nn.Module]) -> None:
    batches = [batch | {"return_dict": False} for batch in recorded(name)]
    if CASES[name].calls == 2:
        steps = [(joined(pair), pair) for pair in zip(batches[::2], batches[1::2], strict=True)]
    else:
        steps = [(batch, halves(batch)) for batch in batches]
    together, apart, dense = options(name, 0.5), options(name, 0.5), original(name)
    with torch.no_grad():
        for both, pair in steps:
            expected = together(**both)[0]
            assert len(expected) == 2
            assert relative_error(torch.cat([apart(**one)[0] for one in pair]), expected) < SUMMATION
    assert relative_error(dense(**both)[0], expected) > 10 * SUMMATION


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.callback])
def test_callback_is_called_and_may_change_the_latents(name: str) -> None:
    steps: list[int] = []
    num_calls = len(recorded(name))  # records by running the pipeline, which must not happen within a run of it

    def callback(_: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        return {"latents": -tensors["latents"]} if len(steps) <= num_calls else tensors

    model = reusing(name, 0.5)
    picture = draw(name, model)
    changed = draw(name, model, callback_on_step_end=callback)
    assert steps == list(range(num_calls // CASES[name].calls))
    assert not torch.equal(changed, picture)
    assert torch.equal(draw(name, model), picture)


def test_callback_of_an_old_pipeline_is_called() -> None:
    steps: list[int] = []
    model = reusing("pixart", 0.5)
    picture = draw("pixart", model, callback=lambda step, timestep, latents: steps.append(step), callback_steps=1)
    assert steps == list(range(STEPS))
    assert torch.equal(picture, draw("pixart", model))
    assert not torch.equal(picture, plain("pixart"))


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_a_sampling_that_a_callback_interrupts_leaves_the_next_one_alone(name: str) -> None:
    model = reusing(name, 0.5)
    picture = draw(name, model)

    def interrupt(owner: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        owner._interrupt = step >= 1
        return tensors

    assert not torch.equal(draw(name, model, callback_on_step_end=interrupt), picture)
    assert torch.equal(draw(name, model), picture)


def test_the_readmes_first_lines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pipeline that has its prompt embedded, and graphs run by ATen."""

    class Pipeline:
        transformer = copy.deepcopy(original("sd3"))

        def __call__(self, prompt: str) -> None:
            assert prompt
            draw("sd3", self.transformer, num_inference_steps=LONG)

    lower = diffcr_compile.lower
    monkeypatch.setattr(diffcr_compile, "lower", lambda model: lower(model, backend="aot_eager"))
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    names: dict[str, Any] = {"pipe": Pipeline()}
    exec(readme.partition("```python\n")[2].partition("```")[0], names)
    assert 0 < diffcr_compile.cost(names["model"]).share <= 0.65
    picture = draw("sd3", names["model"], num_inference_steps=LONG)
    assert not torch.equal(picture, plain("sd3", num_inference_steps=LONG))


@every
@pytest.mark.parametrize("options", [routed, reusing], ids=["identity", "reuse"])
def test_other_steps_and_size(name: str, options: Callable[[str, Any], nn.Module]) -> None:
    case = CASES[name]
    given = {"num_inference_steps": 6, **case.other}
    dense = draw(name, original(name), **given)
    assert torch.equal(draw(name, options(name, 0.0), **given), dense)
    model = options(name, 0.5)
    with diffcr_compile.trace(model) as seen:
        picture = draw(name, model, **given)
    assert picture.shape == dense.shape
    assert not torch.equal(picture, dense)
    assert {kept[-1].shape[1] for kept in seen.kept.values()} == {case.other_tokens - case.other_tokens // 2}


@every
def test_saved_and_restored_models_are_plain(name: str, tmp_path: Path) -> None:
    model = routed(name, by_region(name))
    assert not torch.equal(draw(name, model), plain(name))
    pipe(name).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, subfolder="transformer")
    saved, expected = loaded.state_dict(), original(name).state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in saved.items())
    # A copy, because tensors in a mapped file are not aligned like others, and products of one row then differ in the last bit.
    assert torch.equal(draw(name, copy.deepcopy(loaded)), plain(name))
    assert torch.equal(draw(name, diffcr_compile.restore(model)), plain(name))
    assert same_snapshot(snapshot(model), snapshot(original(name)))
