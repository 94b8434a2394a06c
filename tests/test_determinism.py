"""The same commands with the same seeds write the same bits, in processes whose hashes of text differ."""

import json
import os
import re
import subprocess
import sys

import datasets
import pytest

from tests.waiting import PATIENCE

SCRIPT = """
import sys, torch
from mola.cli import main
torch.set_num_threads(1)
base = ["--base_model", sys.argv[1]]
adapter = [*base, "--adapter", "run", "--task", "sample", "--data", "data/test.json"]
small = ["--train_size", "12", "--validation_size", "2", "--test_size", "4"]
trained = ["--num_experts", "1224", "--r", "2", "--lora_dropout", "0.1", "--router_jitter_noise", "0.1", "--seed", "3"]
trained += ["--router_aux_loss_coef", "0.01", "--num_train_epochs", "2", "--batch_size", "4"]
for words in (
    ["prepare", "sample", "--output", "data", "--seed", "3", *small],
    ["train", *base, "--task", "sample", "--data", "data/dataset.hf", "--output", "run", "--use_cpu", *trained],
    ["evaluate", *adapter, "--output", "answers.json", "--max_new_tokens", "8"],
    ["evaluate", *adapter, "--output", "likelihoods.json", "--scoring", "likelihood"],
    ["inspect", *adapter, "--json", "experts.json", "--html", "experts.html"],
    ["generate", *base, "--adapter", "run", "--prompt", "Which", "--temperature", "1.0", "--seed", "5"],
):
    code = main(words)
    assert code == 0, words
"""
pytestmark = pytest.mark.slow
# What says when and how fast.
TIMES = re.compile(r"(\w*_runtime|\w*_per_second|seconds)$")


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not TIMES.fullmatch(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def entries(path):
    return [without_times(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def twice(tiny_model_dir, tmp_path_factory):
    """Two folders in which the same commands have run, and what they printed."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tiny_model_dir)],
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, folder in enumerate(folders, 1)
    ]
    printed = [process.communicate(timeout=PATIENCE) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed[0][1] + printed[1][1]
    return folders, [out for out, _ in printed]


def test_prepared_data_are_the_same(twice):
    for name in ("train", "validation", "test"):
        one, two = ((folder / "data" / f"{name}.json").read_bytes() for folder in twice[0])
        assert one == two
    one, two = (datasets.load_from_disk(str(folder / "data" / "dataset.hf")) for folder in twice[0])
    assert {name: rows.to_list() for name, rows in one.items()} == {name: rows.to_list() for name, rows in two.items()}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "routing.jsonl"])
def test_trained_adapter_has_the_same_bytes(twice, name):
    one, two = ((folder / "run" / name).read_bytes() for folder in twice[0])
    assert one == two


def test_loss_curve_and_checkpoints_are_the_same(twice):
    one, two = (entries(folder / "run" / "metrics.jsonl") for folder in twice[0])
    assert one == two
    one, two = (
        {path.name: path.read_bytes() for path in (folder / "run" / "checkpoint-6").iterdir()} for folder in twice[0]
    )
    with_paths_and_times = {"trainer_state.json", "training_args.bin"}
    assert {name for name in one if one[name] != two[name]} <= with_paths_and_times


@pytest.mark.parametrize("name", ["answers.json", "likelihoods.json", "experts.json"])
def test_results_are_the_same(twice, name):
    one, two = (without_times(json.loads((folder / name).read_text(encoding="utf-8"))) for folder in twice[0])
    assert one == two


def test_pages_and_generated_text_are_the_same(twice):
    one, two = ((folder / "experts.html").read_bytes() for folder in twice[0])
    assert one == two
    one, two = (printed.splitlines()[-1] for printed in twice[1])
    assert one == two
    assert one.strip(), "the generated text"
