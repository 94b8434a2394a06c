"""Every command takes every format of data as it is, without a task."""

import json
import re

import pytest

from mola.cli import main
from tests.data.own_data import FORMATS, write

LOSS = re.compile(r"loss per token|accuracy")


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    """A trained mixture."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(_train(tiny_model_dir, write(folder, "messages", 12), folder / "run")) == 0
    return folder / "run"


def _train(base, data, output):
    settings = {"num_experts": "2,2,2,2", "max_steps": 2, "warmup_steps": 0, "dtype": "float32", "cutoff_len": 1024}
    words = [f"--{name}={value}" for name, value in settings.items()]
    return ["train", f"--base_model={base}", f"--data={data}", f"--output={output}", *words, "--disable_tqdm=true"]


@pytest.mark.parametrize("name", FORMATS)
def test_train_and_evaluate_take_it(name, tiny_model_dir, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    data = write(tmp_path, name, 12)
    assert main(_train(tiny_model_dir, data, tmp_path / "run")) == 0
    assert re.search(
        rf"{data.name}: 12 .*, template .*, \d+ % of [\d,]+ tokens trained", caplog.text.replace("%", " %")
    )
    result = tmp_path / "result.json"
    assert main(["evaluate", "--adapter", str(tmp_path / "run"), "--data", str(data), "--output", str(result)]) == 0
    assert ("accuracy" in capsys.readouterr().out) is ("choices" in name)
    found = json.loads(result.read_text())
    assert found["total"] == 12
    assert ("loss" in found) is ("choices" not in name)


@pytest.mark.slow  # tests/test_data_formats.py has fast tests of single commands
@pytest.mark.parametrize("name", FORMATS)
def test_the_other_commands_take_it(name, adapter, tiny_model_dir, tmp_path):
    data = str(write(tmp_path, name, 70))
    base = ["--base_model", str(tiny_model_dir)]
    assert main(["inspect", "--adapter", str(adapter), "--data", data, "--json", str(tmp_path / "experts.json")]) == 0
    scored = ["--method", "gradient", "--data", data, "--output", str(tmp_path / "experts-of-layers.json")]
    assert main(["allocate", *base, "--budget", "10", *scored]) == 0
    fitted = ["--r", "4", "--data", data, "--output", str(tmp_path / "lora"), "--dtype", "float32"]
    assert main(["convert", str(adapter), "--to", "lora", *fitted]) == 0
    steps = ["--max_steps=1", "--warmup_steps=0", "--dtype=float32", "--num_experts=2468", "--cutoff_len=1024"]
    compared = ["compare", *base, f"--data={data}", f"--output={tmp_path / 'out'}", *steps, "--disable_tqdm=true"]
    assert main(compared) == 0
