"""The command line: each command on tiny model directories, and what it says of bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner, Result
from diffcr_compile.calibration.ratios import BudgetedRatios
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import diffcr_compile
from diffcr_compile.command_line import main

CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 11,
}
BLOCKS = [f"transformer_blocks.{index}" for index in range(3)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def answer(*arguments: object) -> dict[str, Any]:
    """The JSON document of a command that must succeed."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def refusal(*arguments: object, code: int = 1) -> str:
    """What stderr says of a command that must fail: without traceback, and with nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "Error: " in result.stderr
    return result.stderr.partition("Error: ")[2]


def build() -> Any:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel.from_config(CONFIG).eval()


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.randint(1, 999, (2,), generator=generator),
        "class_labels": torch.randint(11, (2,), generator=generator),
    }


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    folder = tmp_path / "config_only"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    folder = tmp_path / "batches"
    folder.mkdir()
    for seed in range(3):
        save_file(batch(seed), folder / f"{seed}.safetensors")
    return folder


def test_explain_lists_every_routed_block(config_only: Path) -> None:
    found = answer("explain", config_only, "--ratio", "0.5", "--options", "num_regions=3")
    assert [block for family in found["families"] for block in family["blocks"]] == BLOCKS
    assert found["model"] == "DiTTransformer2DModel"
    assert found["parameters"] == sum(parameter.numel() for parameter in build().parameters())
    assert found["inputs"]["hidden_states"] == [2, 4, 8, 8]
    assert found["options"]["num_regions"] == len(found["region_flops"]) == 3
    assert found["share"] == found["region_flops"][0] / found["dense_flops"]
    assert 1 - found["routable_share"] < found["share"] < 1


def test_explain_counts_what_the_package_counts(config_only: Path, batches: Path) -> None:
    found = answer("explain", config_only, "--ratio", "0.5", "--inputs", batches / "0.safetensors")
    model = diffcr_compile.transform(build(), example_inputs=batch(0))
    with pytest.warns(UserWarning, match="untrained"):
        diffcr_compile.set_ratios(model, 0.5)
    costs = diffcr_compile.cost(model)
    assert (found["dense_flops"], found["region_flops"]) == (costs.dense_flops, list(costs.routed_flops))
    assert found["inputs_from"].endswith("0.safetensors")


def test_explain_prints_blocks_inputs_and_that_weights_are_not_used(config_only: Path) -> None:
    result = run("explain", config_only, "--options", "skip=reuse")
    assert result.exit_code == 0
    assert "3 routed blocks in 1 families" in result.stdout
    assert "weights: " in result.stdout
    assert "'hidden_states': [2, 4, 8, 8]" in result.stdout
    assert "from all tokens" in result.stdout  # reuse attends to all
    assert "transforming" in result.stderr


def test_explain_allocates_no_weights_where_no_values_are_read(
    config_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**CONFIG, "_class_name": "PixArtTransformer2DModel", "cross_attention_dim": 16, "caption_channels": 12}
    (config_only / "config.json").write_text(json.dumps(config))
    models = []

    def transform(model: Any, *arguments: Any, **options: Any) -> Any:
        models.append(model)
        return diffcr_compile.transform(model, *arguments, **options)

    monkeypatch.setattr("diffcr_compile.command_line.transform", transform)
    found = answer("explain", config_only)
    assert [block for family in found["families"] for block in family["blocks"]] == BLOCKS
    assert found["weights"] == "none, on the meta device"
    (model,) = models
    weights = [tensor for name, tensor in model.named_parameters() if "diffcr_router" not in name]
    assert {tensor.device.type for tensor in weights} == {"meta"}


def test_calibrate_writes_a_routing_that_loads_and_meets_the_budget(
    weights: Path, batches: Path, tmp_path: Path
) -> None:
    output, config = tmp_path / "out", tmp_path / "calibration.json"
    config.write_text(json.dumps({"steps": 4}))
    report = answer("calibrate", weights, "--batches", batches, "--budget", 0.8, "--output", output, "--config", config)
    trained = diffusers.DiTTransformer2DModel.from_pretrained(output / "model").eval()
    before = build().state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    diffcr_compile.load(trained, output)
    assert torch.equal(diffcr_compile.ratios(trained), torch.tensor(report["table"]))
    assert 0.78 < diffcr_compile.cost(trained, batch(0)).share <= 0.8
    assert report["share"] == diffcr_compile.cost(trained, batch(0)).share
    assert len(report["history"]) == 4
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    printed = run("report", output, "--output", tmp_path / "page.html")
    assert printed.stdout.strip() == str(diffcr_compile.CalibrationReport.load(output)).strip()
    assert "data:image/png;base64," in (tmp_path / "page.html").read_text()


def test_a_checkpoint_in_half_precision_takes_the_batches_of_its_pipeline(batches: Path, tmp_path: Path) -> None:
    weights, output = tmp_path / "half", tmp_path / "out"
    build().bfloat16().save_pretrained(weights)
    for place, file in enumerate(sorted(batches.iterdir())):
        given = batch(place)
        save_file(given | {"hidden_states": given["hidden_states"].bfloat16()}, file)
    (tmp_path / "calibration.json").write_text(json.dumps({"steps": 4}))
    arguments = ("--batches", batches, "--budget", 0.8, "--output", output, "--config", tmp_path / "calibration.json")
    assert answer("calibrate", weights, *arguments)["share"] <= 0.8
    with safe_open(next((output / "model").glob("*.safetensors")), framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_what_can_have_no_effect_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    given = ("calibrate", nothing, "--batches", nothing, "--budget", 0.8, "--output", tmp_path / "out")
    for chosen in (("--training-free",), ("--options", "skip=reuse")):
        assert "--checkpoint has no effect" in refusal(*given, *chosen, "--checkpoint", tmp_path / "progress", code=2)


def test_checkpoints_in_the_output_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    output = tmp_path / "out"
    given = ("calibrate", tmp_path, "--batches", tmp_path, "--budget", 0.8, "--output", output)
    for progress in (output, output / "progress", output / "a" / ".." / "progress"):
        assert "give a folder beside it" in refusal(*given, "--checkpoint", progress, code=2)
    assert not output.exists()


def test_a_pipelines_directory_is_told_from_its_models(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert f"Of this pipeline it may be {tmp_path / 'transformer'}." in refusal("explain", tmp_path)


def test_the_cost_of_a_loaded_routing_with_reuse(tmp_path: Path) -> None:
    config = diffcr_compile.DiffCRConfig(skip="reuse")
    diffcr_compile.save(diffcr_compile.transform(build(), config, example_inputs=batch(0)), tmp_path / "routing")
    assert diffcr_compile.cost(diffcr_compile.load(build(), tmp_path / "routing"), batch(0)).share == 1


def test_training_free_calibration_leaves_the_weights(weights: Path, batches: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for place, file in enumerate(
        sorted(batches.iterdir())
    ):  # as they are while sampling: all samples at one timestep, falling
        save_file(batch(place) | {"timestep": torch.full((2,), 900 - 300 * place)}, file)
    arguments = ("calibrate", weights, "--batches", batches, "--budget", 0.8, "--output", output)
    report = answer(*arguments, "--options", "skip=reuse")
    assert report["history"] == []
    assert not (output / "model").exists()
    assert 0.78 < report["share"] <= 0.8
    model = diffcr_compile.load(build(), output)
    assert torch.equal(diffcr_compile.ratios(model), torch.tensor(report["table"]))
    again = answer(*arguments, "--training-free")  # over the routing that is there
    assert again["share"] <= 0.8
    assert answer("report", output, "--output", tmp_path / "page.png")["table"] == again["table"]
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_calibrate_leaves_no_weights_of_an_earlier_run(weights: Path, batches: Path, tmp_path: Path) -> None:
    """They were learned with the routing that is replaced; but MODEL itself is kept, wherever it lies."""
    output, config = tmp_path / "out", tmp_path / "calibration.json"
    rest = ("--batches", batches, "--budget", 0.8, "--output", output)
    config.write_text(json.dumps({"steps": 2}))
    answer("calibrate", weights, *rest, "--config", config)
    assert (output / "model").exists()
    answer("calibrate", output / "model", *rest, "--training-free")
    assert (output / "model" / "config.json").exists()
    config.write_text(json.dumps({"steps": 2, "trainable": "routers"}))
    answer("calibrate", weights, *rest, "--config", config)
    assert not (output / "model").exists()
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("fails", "linked"), [("weights", True), ("routing", False)])
def test_a_calibration_that_can_not_be_written_leaves_the_old_one(
    weights: Path, batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, linked: bool
) -> None:
    output, config = tmp_path / "out", tmp_path / "calibration.json"
    arguments = ("calibrate", weights, "--batches", batches, "--budget", 0.8, "--output", output, "--config", config)
    config.write_text(json.dumps({"steps": 2}))
    answer(*arguments)
    if linked:
        (output / "model").rename(tmp_path / "elsewhere")
        (output / "model").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "elsewhere" / "config.json").unlink()
        answer(*arguments)
        assert (output / "model").is_symlink()
        assert (tmp_path / "elsewhere" / "config.json").is_file()
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    if fails == "weights":
        monkeypatch.setattr(diffusers.DiTTransformer2DModel, "save_pretrained", full)
    else:
        monkeypatch.setattr("diffcr_compile.command_line.save", full)
    assert "No space left" in refusal(*arguments)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_what_calibrate_reads_is_not_where_it_writes(weights: Path, batches: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    inner = output / "model" / "inner"
    rest = ("--budget", 0.8, "--output", output)
    shutil.copytree(weights, inner)
    said = refusal("calibrate", inner, "--batches", batches, *rest, code=2)
    assert f"MODEL {inner} lies in {output / 'model'}" in said
    shutil.copytree(batches, output / "model" / "batches")
    assert "--batches" in refusal("calibrate", weights, "--batches", output / "model" / "batches", *rest, code=2)
    assert len(list((output / "model" / "batches").iterdir())) == len(list(batches.iterdir()))
    given = ("calibrate", weights, "--batches", batches, "--budget", 0.8, "--checkpoint", tmp_path / "progress")
    assert "holds checkpoints alone" in refusal(*given, "--output", tmp_path / "progress" / "out", code=2)
    assert not (tmp_path / "progress").exists()


def test_calibrate_finds_an_impossible_output_before_it_learns(
    weights: Path, batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("diffcr_compile.command_line.calibrate", pytest.fail)
    arguments = ("calibrate", weights, "--batches", batches, "--budget", 0.8)
    assert "can't be made (Not a directory)" in refusal(*arguments, "--output", tmp_path / "file" / "out")


@pytest.mark.slow
def test_bench_times_dense_and_routed(config_only: Path) -> None:
    found = answer("bench", config_only, "--ratio", 0.5, "--repeats", 2)
    assert [(row["mode"], row["ratio"]) for row in found["rows"]] == [("eager", 0.5), ("lowered", 0.5)]
    for row in found["rows"]:
        for key in ("dense_ms", "routed_ms", "speedup"):
            low, middle, high = row[key]
            assert 0 < low <= middle <= high
    assert found["weights"] == "random"
    share = answer("explain", config_only, "--ratio", 0.5)["share"]
    assert [row["promised"] for row in found["rows"]] == pytest.approx([1 / share] * 2)
    assert share < 1


def test_version() -> None:
    assert run("--version").stdout.startswith("diffcr-compile, version ")


def test_python_runs_the_package_too() -> None:
    command = [sys.executable, "-m", "diffcr_compile", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.stdout.startswith("diffcr-compile, version "), found.stderr


def test_verbose_shows_the_passes_and_the_traceback(config_only: Path) -> None:
    shown = run("explain", config_only, "--verbose")
    assert "find_blocks" in shown.stderr
    assert "find_blocks" not in run("explain", config_only).stderr
    (config_only / "config.json").write_text("{")
    failed = run("explain", config_only, "--verbose")
    assert failed.exit_code == 1
    assert "Traceback" in failed.stderr


@pytest.mark.parametrize("command", ["explain", "bench"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json is not JSON"),
        ("[1]", "must hold a JSON object, found list"),
        ("{}", "has no _class_name"),
        ('{"_class_name": 3}', "has no _class_name"),
        ('{"_class_name": "NoSuchModel"}', "no model class 'NoSuchModel'"),
        ('{"_class_name": "DDPMScheduler"}', "no model class 'DDPMScheduler'"),
        ('{"_class_name": "DiTTransformer2DModel", "norm_type": "none"}', "DiTTransformer2DModel could not be built"),
    ],
)
def test_a_bad_configuration_is_named(config_only: Path, command: str, text: str, said: str) -> None:
    (config_only / "config.json").write_text(text)
    assert said in refusal(command, config_only)


def test_a_model_without_tokens_is_refused(config_only: Path) -> None:
    (config_only / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderTiny", "in_channels": 3, "out_channels": 3})
    )
    said = refusal("explain", config_only)
    assert "AutoencoderTiny" in said


@pytest.mark.parametrize("command", ["explain", "bench"])
def test_missing_folders_are_named(tmp_path: Path, command: str) -> None:
    assert "nowhere" in refusal(command, tmp_path / "nowhere", code=2)
    assert "no config.json" in refusal(command, tmp_path)


@pytest.mark.parametrize(
    ("option", "said"),
    [("skip", "expected key=value"), ("skip=perhaps", "skip must be one of"), ("speed=1", "no option named 'speed'")],
)
def test_bad_options_are_named(config_only: Path, option: str, said: str) -> None:
    assert said in refusal("explain", config_only, "--options", option, code=2)


@pytest.mark.parametrize(("device", "said"), [("meta", "expected a device that computes"), ("tpuu", "is no device")])
@pytest.mark.parametrize("command", ["bench", "calibrate"])
def test_bad_devices_are_named(weights: Path, batches: Path, command: str, device: str, said: str) -> None:
    more = ("--batches", batches, "--budget", 0.8, "--output", weights / "out") if command == "calibrate" else ()
    assert said in refusal(command, weights, "--device", device, *more, code=2)


def test_another_preset_beside_training_free_is_refused(weights: Path, batches: Path, tmp_path: Path) -> None:
    config, output = tmp_path / "calibration.json", tmp_path / "out"
    config.write_text('{"preset": "paper"}')
    arguments = ("calibrate", weights, "--batches", batches, "--budget", 0.8, "--output", output)
    said = refusal(*arguments, "--training-free", "--config", config, code=2)
    assert "--training-free" in said
    assert "'paper'" in said
    assert not output.exists()


def test_bad_inputs_are_named(config_only: Path, tmp_path: Path) -> None:
    file = tmp_path / "inputs.safetensors"
    save_file({"latents": torch.zeros(1)}, file)
    said = refusal("explain", config_only, "--inputs", file)
    assert "inputs.safetensors holds 'latents'" in said
    assert "hidden_states, timestep, class_labels" in said
    save_file({**batch(0), "hidden_states": torch.zeros(2, 5, 8, 8)}, file)
    assert "could not be run on the inputs" in refusal("explain", config_only, "--inputs", file)
    file.write_bytes(b"no tensors")
    assert "inputs.safetensors is no safetensors file" in refusal("bench", config_only, "--inputs", file)


@pytest.mark.parametrize(("budget", "code", "said"), [(0, 2, "--budget"), (2, 2, "--budget"), (0.001, 1, "budget")])
def test_budgets_out_of_reach_are_refused(
    weights: Path, batches: Path, tmp_path: Path, budget: float, code: int, said: str
) -> None:
    arguments = ("calibrate", weights, "--batches", batches, "--output", tmp_path / "out", "--training-free")
    assert said in refusal(*arguments, "--budget", budget, code=code)
    assert list((tmp_path / "out").glob("*")) == []


def test_calibrate_refuses_what_it_cannot_use(config_only: Path, weights: Path, batches: Path, tmp_path: Path) -> None:
    def said(model: Path, *more: object, output: Path = tmp_path / "out", given: Path = batches) -> str:
        return refusal("calibrate", model, "--batches", given, "--budget", 0.8, "--output", output, *more)

    assert "holds no weights" in said(config_only)
    assert "is not empty and holds no routing" in said(weights, output=batches)
    (tmp_path / "empty").mkdir()
    assert "empty holds no batches" in said(weights, given=tmp_path / "empty")
    config = tmp_path / "calibration.json"
    config.write_text("{'steps': 3}")
    assert "calibration.json is not JSON" in said(weights, "--config", config)
    config.write_text('{"step": 3}')
    assert "calibration.json: CalibrationConfig has no option named 'step'" in said(weights, "--config", config)
    (weights / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert "could not be built" in said(weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupted_calibration_says_how_to_go_on(
    weights: Path, batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, progress = tmp_path / "calibration.json", tmp_path / "progress"
    config.write_text('{"steps": 4, "trainable": "routers", "checkpoint_every": 1}')
    step, shares = BudgetedRatios.step, []

    def interrupted_once(self: BudgetedRatios, share: float) -> None:
        shares.append(share)
        if len(shares) == 3:
            raise KeyboardInterrupt
        step(self, share)

    monkeypatch.setattr(BudgetedRatios, "step", interrupted_once)
    arguments = ("calibrate", weights, "--batches", batches, "--budget", 0.8, "--output", tmp_path / "out")
    result = run(*arguments, "--config", config, "--checkpoint", progress)
    assert result.exit_code == 130
    assert f"The same command goes on from {progress}.\nInterrupted." in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    answer(*arguments, "--config", config, "--checkpoint", progress)
    assert shares == pytest.approx([0.9, 0.8, 0.8, 0.8])  # the third step again, and not the first


def test_report_refuses_other_folders_and_formats(tmp_path: Path) -> None:
    assert "holds no report" in refusal("report", tmp_path)
    assert "FILE.html or FILE.png" in refusal("report", tmp_path, "--output", tmp_path / "page.pdf", code=2)


@pytest.mark.parametrize("missing", ["click", "diffusers"])
def test_what_is_missing_is_named_with_its_remedy(config_only: Path, missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from diffcr_compile.command_line import main; main()"
    finished = subprocess.run([sys.executable, "-c", code, "explain", config_only], capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stdout == ""
    last = finished.stderr.strip().splitlines()[-1]
    assert f"needs {missing}" in last
    assert "pip install 'diffcr-compile[cli]'" in last
    assert "Traceback" not in finished.stderr
