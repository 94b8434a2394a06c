"""The quickstart: its recipe, and the whole of it on the real model."""

import json
from pathlib import Path

import pytest

from mola.options.parsing import parse
from mola.studies.quickstart import QuickstartOptions, main
from mola.training.train import TrainOptions

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"


def test_recipe_leaves_enough_steps_to_learn(tmp_path):
    options = parse(
        TrainOptions,
        ["--config", str(ROOT / "recipes" / "quickstart.yaml"), "--output_dir", str(tmp_path)],
        prog="mola train",
    )
    assert options.num_experts == "2468"
    assert options.warmup_steps < 70


def test_missing_recipe_is_said_before_any_work(tmp_path, monkeypatch):
    from mola import MolaError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(MolaError, match=r"`recipe`"):
        main(QuickstartOptions())
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(not MODEL.is_dir(), reason="needs the model that `make quickstart` converts")
def test_quickstart_learns(tmp_path, capsys):
    options = QuickstartOptions(
        output_dir=str(tmp_path / "run"), recipe=str(ROOT / "recipes" / "quickstart.yaml"), model_dir=str(MODEL)
    )
    assert main(options) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.3
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.splitlines()[-1] == f"Open {tmp_path / 'run' / 'report.html'} in a browser"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"{summary['accuracy_after']:.1%}".replace("%", "\u00a0%") in page
