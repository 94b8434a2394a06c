"""The paper's commands, and the command of `mola train` that each of them shows."""

import logging
import shlex
import shutil

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from research_code.training_options import ResearchTrainOptions
from safetensors.torch import load_file

from mola.options.parsing import parse
from mola.training.options import TrainOptions
from research_code.training import _as_command, train_settings
from tests.damage import change_tensors
from tests.research_code.scripts import SEVEN, run_script, write_dataset
from tests.research_code.training.runs import INSTRUCTION, TRAIN, adapter_config, loss_on, record

EXPERTS = ["--val_set_size", 1, "--lora_r", "8,8,8,8", "--lora_alpha", 16, "--lora_dropout", 0.05]
EXPERTS += ["--lora_target_modules", SEVEN, "--number_experts", "2,4,6,8", "--top_k", "2,2,2,2"]


@pytest.mark.slow
def test_sample_command_trains(tmp_path, tiny_model_dir, monkeypatch, caplog):
    """Its flags as they are, except paths and lists of the model's depth: 199 rows, 2 steps."""
    data = write_dataset(tmp_path / "sampled.hf", {"train": 200, "validation": 20, "test": 20})
    words = ["--base_model", tiny_model_dir, "--data_path", data, "--output_dir", tmp_path / "mola"]
    words += [
        "--batch_size",
        "128",
        "--micro_batch_size",
        "8",
        "--num_epochs",
        "1",
        "--learning_rate",
        "3e-4",
        "--cutoff_len",
        "256",
    ]
    words += [*EXPERTS, "--train_on_inputs", "--group_by_length", "--add_eos_token"]
    assert run_script(TRAIN, monkeypatch, *words) == 0
    folder = tmp_path / "mola"
    run = record(folder)
    assert run["status"] == "finished"
    assert run["steps"] == 2  # 25 micro-batches: the 9 left over after the first 16 make a step
    assert run["effective_batch_size"] == 128
    assert run["settings"]["train_sampling_strategy"] == "group_by_length"
    assert adapter_config(folder)["num_experts"] == [2, 4, 6, 8]
    weights = load_file(folder / "adapter_model.safetensors")
    moved = [name for name, tensor in weights.items() if "mola_B" in name and tensor.abs().max() > 0]
    assert len(moved) == 28
    shutil.copytree(folder, tmp_path / "before", ignore=shutil.ignore_patterns("checkpoint-*"))
    change_tensors(tmp_path / "before", lambda tensors: [t.zero_() for name, t in tensors.items() if "mola_B" in name])
    before, after = (loss_on(path, tiny_model_dir, data) for path in (tmp_path / "before", folder))
    assert after < before
    assert "The same as: mola train" in caplog.text


def test_instruction_command_trains_on_text_without_a_prompt(tmp_path, tiny_model_dir, monkeypatch, caplog):
    texts = [f"What is {i} and {i}?\nIt is {2 * i}, of course." for i in range(60)]
    split = datasets.Dataset.from_list([{"input": None, "instruction": None, "output": text} for text in texts])
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "meta.hf"))
    words = ["--base_model", tiny_model_dir, "--data_path", tmp_path / "meta.hf", "--output_dir", tmp_path / "out"]
    words += [
        "--batch_size",
        "16",
        "--micro_batch_size",
        "8",
        "--num_epochs",
        "3",
        "--learning_rate",
        "3e-4",
        "--cutoff_len",
        "40",
    ]
    words += [*EXPERTS, "--train_on_inputs", "--add_eos_token"]
    with caplog.at_level(logging.INFO, "mola"):
        assert run_script(INSTRUCTION, monkeypatch, *words) == 0
    config = adapter_config(tmp_path / "out")
    assert (config["router_aux_loss_coef"], config["router_aux_loss_reduction"]) == (1e-3, "layer")
    run = record(tmp_path / "out")
    assert (run["steps"], run["settings"]["template"]) == (12, "meta")
    # Long texts lose their end, and that is said.
    assert run["data"]["train"]["truncated"] > 0
    assert "truncated" in caplog.text


@given(
    learning_rate=st.floats(min_value=1e-30, max_value=1e30),
    epochs=st.floats(min_value=1e-9, max_value=1e9),
    path=st.text(st.characters(exclude_categories=("C",)), min_size=1),
    flag=st.booleans(),
)
def test_command_shown_has_the_very_same_values(learning_rate, epochs, path, flag):
    settings = {"learning_rate": learning_rate, "num_train_epochs": epochs, "data": path, "add_eos_token": flag}
    words = shlex.split(_as_command({**settings, "adapter": None}, {}))
    assert words[:2] == ["mola", "train"]
    given_back = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
    assert given_back.keys() == settings.keys()
    assert float(given_back["learning_rate"]) == learning_rate
    assert float(given_back["num_train_epochs"]) == epochs
    assert given_back["data"] == path
    assert given_back["add_eos_token"] == str(flag).lower()


def test_command_shown_is_understood_by_mola_train(tmp_path, tiny_model_dir):
    data = write_dataset(tmp_path / "data.hf", {"train": 4})
    numbers = {"learning_rate": 1.23456789e-4, "num_epochs": 2.0, "lora_alpha": 16.0, "lora_dropout": 0.123456789}
    options = ResearchTrainOptions(
        base_model=str(tiny_model_dir), data_path=str(data), output_dir="a run", val_set_size=0.1234567, **numbers
    )
    settings = train_settings(options, reports=False)
    words = shlex.split(_as_command(settings, {}))[2:]
    assert "--lora_alpha=16" in words
    shown, meant = parse(TrainOptions, words, prog="mola train"), TrainOptions(**settings)
    assert {name: getattr(shown, name) for name in settings} == {name: getattr(meant, name) for name in settings}
