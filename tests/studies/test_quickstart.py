"""The quickstart: its recipe, and the whole of it on the real model."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from mola import MolaError
from mola.data.templates import get_template
from mola.models.smollm2 import MARKER
from mola.options.parsing import parse
from mola.studies.quickstart import QuickstartOptions, main
from mola.training.train import TrainOptions

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "src" / "mola" / "studies" / "quickstart.yaml")
MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"


def test_recipe_leaves_enough_steps_to_learn(tmp_path):
    options = parse(
        TrainOptions,
        ["--config", RECIPE, "--output", str(tmp_path)],
        prog="mola train",
    )
    assert options.num_experts == "2468"
    assert options.warmup_steps < 70


def test_the_recipe_is_found_outside_of_a_checkout(tmp_path, monkeypatch):
    """The command gets as far as the base model, whose folder cannot be made here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".cache").write_text("")
    with pytest.raises(MolaError, match="`folder` cannot be written.*cache"):
        main(QuickstartOptions())


def test_missing_recipe_is_an_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MolaError, match="nowhere.yaml"):
        main(QuickstartOptions(recipe="nowhere.yaml"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("folder", "message"), [("run", "`output_dir` must be empty"), ("model", "cannot be written")])
def test_results_of_other_commands_are_not_replaced(folder, message, tmp_path):
    """An earlier run, and a file where the folder of the model is to be made."""
    (tmp_path / "run").mkdir()
    mine = tmp_path / "run" / "adapter_model.safetensors" if folder == "run" else tmp_path / "model"
    mine.write_text("mine")
    options = QuickstartOptions(str(tmp_path / "run"), RECIPE, str(tmp_path / "model" / "below"), dtype="float32")
    with pytest.raises(MolaError, match=message):
        main(options)
    assert mine.read_text() == "mine"


def test_summary_holds_what_the_steps_measured(tmp_path, tiny_model_dir, capsys, monkeypatch):
    """The whole way in two steps on the tiny model, which counts as converted; with fewer questions."""
    monkeypatch.setattr("mola.data.prepare.SAMPLE_SIZES", {"train": 20, "validation": 4, "test": 10})
    model, run, recipe = tmp_path / "model", tmp_path / "run", tmp_path / "recipe.yaml"
    shutil.copytree(tiny_model_dir, model)
    (model / MARKER).write_text("{}", encoding="utf-8")
    recipe.write_text("{task: sample, cutoff_len: 1024, num_experts: 1224, max_steps: 2, warmup_steps: 0}", "utf-8")
    options = QuickstartOptions(str(run), str(recipe), str(model), seed=3, dtype="float32")
    assert main(options) == 0
    files = ("summary.json", "before.json", "run.json", "after.json", "inspect.json")
    summary, before, record, after, experts = (json.loads((run / name).read_text("utf-8")) for name in files)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (before["accuracy"], after["accuracy"])
    assert summary["eval_loss"] == record["metrics"]["eval_loss"] > 0
    assert 0 < record["seconds"] < summary["seconds"]
    printed = capsys.readouterr().out
    assert f"Evaluation loss after training: {summary['eval_loss']:.3f}" in printed.splitlines()
    words = shlex.split(printed[printed.index("mola generate") :].partition("\nOpen ")[0])
    asked = get_template("alpaca_short").prompt(words[words.index("--instruction") + 1], "")
    assert asked in [sample["prompt"] for sample in after["samples"]]
    assert {each["settings"]["dtype"] for each in (before, record, after, experts)} == {"float32"}
    assert record["settings"]["seed"] == 3


def test_a_recipe_of_a_lora_has_no_experts_to_inspect(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("mola.data.prepare.SAMPLE_SIZES", {"train": 20, "validation": 4, "test": 10})
    model, run, recipe = tmp_path / "model", tmp_path / "run", tmp_path / "recipe.yaml"
    shutil.copytree(tiny_model_dir, model)
    (model / MARKER).write_text("{}", encoding="utf-8")
    recipe.write_text("{task: sample, cutoff_len: 1024, num_experts: 1, max_steps: 2, warmup_steps: 0}", "utf-8")
    assert main(QuickstartOptions(str(run), str(recipe), str(model), dtype="float32")) == 0
    assert json.loads((run / "adapter_config.json").read_text("utf-8"))["peft_type"] == "LORA"
    assert (run / "summary.json").exists()
    assert not (run / "inspect.json").exists()


def test_wrong_dtype_is_an_error_before_any_work(tmp_path):
    with pytest.raises(MolaError, match="`dtype` must be one of"):
        main(QuickstartOptions(str(tmp_path / "run"), RECIPE, str(tmp_path / "model"), dtype="float8"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not MODEL.is_dir(), reason="needs the model that `make quickstart` converts")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_quickstart_learns(tmp_path, capsys, dtype):
    options = QuickstartOptions(output_dir=str(tmp_path / "run"), recipe=RECIPE, model_dir=str(MODEL), dtype=dtype)
    assert main(options) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.3
    assert summary["eval_loss"] < 0.5  # the weights do not end in a jump of the loss, which accuracy hides
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.splitlines()[-1] == f"Open {tmp_path / 'run' / 'report.html'} in a browser"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"{summary['accuracy_after']:.1%}".replace("%", "\u00a0%") in page
