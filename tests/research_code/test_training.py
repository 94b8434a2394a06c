"""`mola_training.py` and `mola_training_instruction.py`: the commands people have, and what they do here."""

import dataclasses
import importlib.util
import json
import logging
import os
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mola import load_model
from mola.data.encode import encode_examples
from mola.data.prepare import load_examples
from mola.data.templates import get_template
from mola.loading import load_tokenizer
from mola.parsing import parse
from mola.research_code.trackers import tracker_environment
from mola.research_code.training import as_command, train_settings
from mola.research_code.training_options import ResearchInstructionOptions, ResearchTrainOptions
from mola.training.options import TrainOptions
from tests.damage import change_tensors
from tests.research_code.scripts import SEVEN, character_tokenizer, error_line, run_script, write_dataset

GOLDEN = Path(__file__).parents[1] / "golden"
TRAIN, INSTRUCTION = "mola_training.py", "mola_training_instruction.py"


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No tracker from the environment; the scripts' default paths are relative to the working folder."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(tmp_path, tiny_model_dir, monkeypatch):
    """Runs the training script for a few steps in `tmp_path/run`; flags given replace or extend it."""
    data = write_dataset(tmp_path / "science_qa.hf", {"train": 13, "validation": 3, "test": 3})

    def run(script=TRAIN, **flags):
        settings = {
            "base_model": tiny_model_dir,
            "data_path": data,
            "output_dir": tmp_path / "run",
            "batch_size": 4,
            "micro_batch_size": 2,
            "val_set_size": 1,
            "dtype": "float32",
            "number_experts": "2,2,3,3",
            "cutoff_len": 512,
            "learning_rate": 1e-2,
            **flags,
        }
        words = [f"--{name}={value}" for name, value in settings.items() if value is not None]
        return run_script(script, monkeypatch, *words)

    return run


def record(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def adapter_config(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def log_entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def loss_on(adapter, base, data, cutoff_len=512):
    """Mean loss of the training rows, prompt included."""
    tokenizer = load_tokenizer(base, "right")
    examples = load_examples(data, None, "train")
    encoded, _ = encode_examples(
        examples, tokenizer, get_template("alpaca"), cutoff_len=cutoff_len, train_on_inputs=True
    )
    model = load_model(base, adapter, dtype="float32", device="cpu")
    with torch.no_grad():
        losses = [model(input_ids=(ids := torch.tensor([row])), labels=ids).loss for row in encoded["input_ids"]]
    return float(torch.stack(losses).mean())


# ---------------------------------------------------------------------- the paper's commands


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
    words += ["--val_set_size", 1, "--lora_r", "8,8,8,8", "--lora_alpha", 16, "--lora_dropout", 0.05]
    words += ["--lora_target_modules", SEVEN, "--number_experts", "2,4,6,8", "--top_k", "2,2,2,2"]
    words += ["--train_on_inputs", "--group_by_length", "--add_eos_token"]
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
    words += ["--val_set_size", 1, "--lora_r", "8,8,8,8", "--lora_alpha", 16, "--lora_dropout", 0.05]
    words += ["--lora_target_modules", SEVEN, "--number_experts", "2,4,6,8", "--top_k", "2,2,2,2"]
    words += ["--train_on_inputs", "--add_eos_token"]
    with caplog.at_level(logging.INFO, "mola"):
        assert run_script(INSTRUCTION, monkeypatch, *words) == 0
    config = adapter_config(tmp_path / "out")
    assert (config["router_aux_loss_coef"], config["router_aux_loss_reduction"]) == (1e-3, "layer")
    run = record(tmp_path / "out")
    assert (run["steps"], run["settings"]["template"]) == (12, "meta")
    # Long texts lose their end, and that is said.
    assert run["data"]["train"]["truncated"] > 0
    assert "truncated" in caplog.text


# ---------------------------------------------------------------------- flags


SHARED = {
    "base_model": "NousResearch/Llama-2-7b-hf",
    "batch_size": 128,
    "micro_batch_size": 8,
    "learning_rate": 3e-4,
    "cutoff_len": 256,
    "lora_r": None,  # 8 everywhere
    "lora_alpha": None,  # 16
    "lora_dropout": None,  # 0.05
    "lora_target_modules": None,  # the seven
    "number_experts": None,  # 2468
    "top_k": None,  # 2 everywhere
    "train_on_inputs": True,
    "add_eos_token": True,
    "group_by_length": False,
    "wandb_project": "",
    "wandb_run_name": "",
    "wandb_watch": "",
    "wandb_log_model": "",
    "resume_from_checkpoint": None,
}
DEFAULTS = {
    ResearchTrainOptions: {
        **SHARED,
        "data_path": "./sampled_data/sampled_scienceqa_train_all.hf",
        "output_dir": "./sampled_scienceqa_256r_8mbs_no8bit_1",
        "num_epochs": 1,
        "val_set_size": 2,
        "prompt_template_name": "alpaca",
        "obalance": False,
    },
    ResearchInstructionOptions: {
        **SHARED,
        "data_path": "./meta_moe_50k.hf",
        "output_dir": "./meta_moe_llm2_3ep_2468",
        "num_epochs": 3,
        "val_set_size": 100,
        "load_in_8bit": False,
        "prompt_template_name_meta": "meta",
        "obalance": True,
    },
}


@pytest.mark.parametrize("options", DEFAULTS)
def test_flags_and_defaults(options):
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    assert DEFAULTS[options].items() <= defaults.items()


def test_defaults_of_the_experts(command, tmp_path):
    """What None stands for: on 4 layers the default list is 2,4,6,8."""
    assert command(number_experts=None) == 0
    config = adapter_config(tmp_path / "run")
    assert (config["num_experts"], config["r"], config["top_k"]) == ([2, 4, 6, 8], 8, 2)
    assert (config["lora_alpha"], config["lora_dropout"]) == (16, 0.05)
    assert set(config["target_modules"]) == set(SEVEN.split(","))


@pytest.mark.parametrize("word", ["--train_on_inputs=False", "--train_on_inputs=false", "--notrain_on_inputs"])
def test_false_is_false(word, command, tmp_path, tiny_model_dir, monkeypatch):
    words = [
        "--base_model",
        tiny_model_dir,
        "--data_path",
        tmp_path / "science_qa.hf",
        "--output_dir",
        tmp_path / "run",
    ]
    words += ["--batch_size", 12, "--micro_batch_size", 12, "--val_set_size", 1, "--cutoff_len", 512, word]
    assert run_script(TRAIN, monkeypatch, *words) == 0
    data = record(tmp_path / "run")["data"]["train"]
    assert data["trained_tokens"] < data["tokens"] / 2


@pytest.mark.parametrize("form", ["2,2,3,3", "[2,2,3,3]", "(2, 2, 3, 3)"])
def test_lists_in_any_form(form, command, tmp_path):
    assert command(number_experts=form, lora_r="4", top_k="2,2,3,2") == 0
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    shapes = [weights[f"base_model.model.model.layers.{i}.mlp.up_proj.mola_A"].shape[:2] for i in range(4)]
    assert shapes == [(2, 4), (2, 4), (3, 4), (3, 4)]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"number_experts": "2,2,2"}, ["num_experts", "3", "4"]),
        ({"top_k": "2,2,2,4"}, ["top_k", "4", "3"]),
        ({"top_k": "0"}, ["top_k", "0"]),
        ({"lora_r": "8,0,8,8"}, ["`r`", "0"]),
        ({"lora_target_modules": "q_proj,k_porj"}, ["k_porj"]),
        ({"lora_target_modules": "q_proj,lm_heads"}, ["lm_heads"]),
        ({"batch_size": 6, "micro_batch_size": 4}, ["`batch_size`", "6", "4", "--batch_size"]),
        ({"batch_size": 2, "micro_batch_size": 4}, ["`batch_size`", "--batch_size 4"]),
        ({"micro_batch_size": 0}, ["`micro_batch_size`", "0"]),
        ({"cutoff_len": 64, "truncation": "error"}, ["`cutoff_len`", "64"]),
        ({"cutoff_len": 4000}, ["`cutoff_len`", "4000", "1024"]),
        ({"data_path": "nowhere.hf"}, ["nowhere.hf"]),
        ({"prompt_template_name": "alpacca"}, ["alpacca", "alpaca_short"]),
        ({"wandb_run_name": "first"}, ["`wandb_run_name`", "`wandb_project`"]),
        ({"resume_from_checkpoint": "./step2_biology"}, ["`resume_from_checkpoint`", "./step2_biology"]),
        ({"learnig_rate": 1}, ["--learnig_rate", "--learning_rate"]),
        ({"warmup_steps": 100}, ["`warmup_steps`", "100"]),
        ({"val_set_size": 13}, ["`val_set_size`", "13"]),
        ({"val_set_size": 400}, ["`val_set_size`", "400", "13"]),
        ({"val_set_size": 13, "warmup_steps": 0}, ["`validation_size`", "13"]),
        ({"val_set_size": "nan"}, ["`val_set_size`", "nan"]),
        ({"val_set_size": "inf"}, ["`val_set_size`", "inf"]),
        ({"val_set_size": -1}, ["`val_set_size`", "-1"]),
        ({"val_set_size": 1.5}, ["`val_set_size`", "1.5"]),
        ({"num_epochs": "nan"}, ["`num_epochs`", "nan"]),
        ({"num_epochs": "inf"}, ["`num_epochs`", "inf"]),
        ({"num_epochs": 0}, ["`num_epochs`", "0"]),
        ({"learning_rate": "nan"}, ["`learning_rate`", "nan"]),
        ({"warmup_steps": "inf"}, ["`warmup_steps`", "inf"]),
    ],
)
def test_wrong_flags_end_in_one_line(flags, parts, command, capsys, tmp_path):
    assert command(**flags) == 2
    line = error_line(TRAIN, capsys)
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "run" / "adapter_config.json").exists()


@pytest.mark.quant
def test_base_in_8_bits(command, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'mola-peft[quant]'")
    assert command(script=INSTRUCTION, load_in_8bit=True, val_set_size=1) == 0
    assert record(tmp_path / "run")["quantization"] == {"quant_method": "bitsandbytes", "load_in_8bit": True}


def test_validation_rows_come_from_the_training_split(command, tmp_path):
    assert command(val_set_size=2) == 0
    run = record(tmp_path / "run")
    assert (run["data"]["train"]["kept"], run["data"]["evaluation"]["kept"]) == (11, 2)
    assert "eval_loss" in run["metrics"]


def test_without_validation_rows_there_is_no_evaluation(command, tmp_path):
    assert command(val_set_size=0) == 0
    run = record(tmp_path / "run")
    assert run["data"].keys() == {"train"}
    assert run["data"]["train"]["kept"] == 13


def test_same_flags_give_the_same_weights(command, tmp_path):
    assert command() == 0
    assert command(output_dir=tmp_path / "again") == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_warmup_is_at_most_a_tenth_of_the_run(command, tmp_path, caplog):
    assert command(num_epochs=5) == 0  # 12 rows, batch 4: 15 steps
    assert record(tmp_path / "run")["settings"]["warmup_steps"] == 1
    assert "1 of 15 steps" in caplog.text
    assert max(entry.get("learning_rate", 0) for entry in log_entries(tmp_path / "run")) > 0


def test_long_run_keeps_the_hundred_steps_of_warmup(command, tmp_path, caplog):
    options = ResearchTrainOptions(data_path=str(tmp_path / "science_qa.hf"), batch_size=8, num_epochs=1000)
    assert train_settings(options)["warmup_steps"] == 100
    assert "Warm-up" not in caplog.text


@pytest.mark.parametrize(("flag", "coefficient"), [(True, 1e-3), (False, 0.0)])
def test_balance_loss(flag, coefficient, command, tmp_path):
    assert command(obalance=flag) == 0
    config = adapter_config(tmp_path / "run")
    assert (config["router_aux_loss_coef"], config["router_aux_loss_reduction"]) == (coefficient, "layer")


def test_missing_tracker_is_a_warning(command, tmp_path, caplog, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    assert command(wandb_project="2024", wandb_run_name="first") == 0
    assert "wandb is not installed" in caplog.text
    assert record(tmp_path / "run")["settings"]["report_to"] in ([], "none", ["none"])


def test_no_tracker_unless_named(tmp_path, monkeypatch):
    options = ResearchTrainOptions(data_path=str(write_dataset(tmp_path / "data.hf", {"train": 4})))
    assert train_settings(options)["report_to"] == "none"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setenv("WANDB_PROJECT", "from-the-environment")
    options = dataclasses.replace(options, wandb_run_name="first", wandb_watch="gradients")
    before = dict(os.environ)
    settings = train_settings(options)
    assert (settings["report_to"], settings["run_name"]) == ("wandb", "first")
    assert tracker_environment(options) == {"WANDB_PROJECT": "from-the-environment", "WANDB_WATCH": "gradients"}
    assert dict(os.environ) == before  # a function that makes settings changes nothing


def test_variables_of_the_tracker_are_set_and_shown(command, monkeypatch, caplog):
    """The package is not needed to see what the run would start with."""
    seen = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    # Registered, so that they are as before after the test.
    monkeypatch.setenv("WANDB_PROJECT", "other")
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")

    def start(settings):
        seen.update(os.environ)
        return 0

    monkeypatch.setattr("mola.research_code.training.TrainOptions", dict)
    monkeypatch.setattr("mola.research_code.training.train_main", start)
    with caplog.at_level(logging.INFO, "mola"):
        assert command(wandb_project="my project", wandb_log_model="checkpoint") == 0
    assert (seen["WANDB_PROJECT"], seen["WANDB_LOG_MODEL"]) == ("my project", "checkpoint")
    assert "The same as: WANDB_PROJECT='my project' WANDB_LOG_MODEL=checkpoint mola train " in caplog.text


# ---------------------------------------------------------------------- the command shown


@given(
    learning_rate=st.floats(min_value=1e-30, max_value=1e30),
    epochs=st.floats(min_value=1e-9, max_value=1e9),
    path=st.text(st.characters(exclude_categories=("C",)), min_size=1),
    flag=st.booleans(),
)
def test_command_shown_has_the_very_same_values(learning_rate, epochs, path, flag):
    settings = {"learning_rate": learning_rate, "num_train_epochs": epochs, "data": path, "add_eos_token": flag}
    words = shlex.split(as_command({**settings, "adapter": None}))
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
    settings = train_settings(options)
    words = shlex.split(as_command(settings))[2:]
    assert "--lora_alpha=16" in words
    shown, meant = parse(TrainOptions, words, prog="mola train"), TrainOptions(**settings)
    assert {name: getattr(shown, name) for name in settings} == {name: getattr(meant, name) for name in settings}


# ---------------------------------------------------------------------- resume_from_checkpoint


def test_empty_path_means_new_experts(command, tmp_path):
    assert command(resume_from_checkpoint="") == 0
    assert record(tmp_path / "run")["settings"]["adapter"] is None


def test_private_default_folder_is_not_loaded(command, tmp_path):
    """The research code silently continued from a folder of this name, if there was one."""
    assert command() == 0
    shutil.copytree(tmp_path / "run", tmp_path / "step2_biology256r_8mbs_no8bit_scale10")
    assert command(output_dir=tmp_path / "second") == 0
    assert record(tmp_path / "second")["settings"]["adapter"] is None


def test_new_run_from_the_experts_of_an_adapter(command, tmp_path, tiny_model_dir):
    assert command() == 0
    first = tmp_path / "run"
    assert command(resume_from_checkpoint=first, output_dir=tmp_path / "next", obalance=True, lora_dropout=0.1) == 0
    assert record(tmp_path / "next")["settings"]["adapter"] == str(first)
    config = adapter_config(tmp_path / "next")
    assert (config["router_aux_loss_coef"], config["lora_dropout"]) == (1e-3, 0.1)
    assert (config["num_experts"], config["lora_alpha"]) == ([2, 2, 3, 3], 16)
    # It starts where the first ended: its first loss is lower than that of new experts.
    assert loss_on(tmp_path / "next", tiny_model_dir, tmp_path / "science_qa.hf") < loss_on(
        first, tiny_model_dir, tmp_path / "science_qa.hf"
    )


def test_adapter_that_contradicts_a_list_is_refused(command, tmp_path, capsys):
    assert command() == 0
    capsys.readouterr()
    flags = {"number_experts": "2,2,2,2", "output_dir": tmp_path / "next", "resume_from_checkpoint": tmp_path / "run"}
    assert command(**flags) == 2
    line = error_line(TRAIN, capsys)
    assert "2,2,2,2" in line
    assert "2,2,3,3" in line


@pytest.mark.parametrize("start", ["run", "run/checkpoint-3-copy", "other/../run"])
def test_adapter_in_the_output_folder_is_refused_and_stays(start, command, tmp_path, capsys):
    """Its experts would be removed, and there may be no other copy."""
    assert command() == 0
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.move(tmp_path / "copy", tmp_path / "run" / "checkpoint-3-copy")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert command(resume_from_checkpoint=start, overwrite_output_dir=True) == 2
    line = error_line(TRAIN, capsys)
    assert [
        part for part in ("`resume_from_checkpoint`", start, "`output_dir`", str(tmp_path)) if part not in line
    ] == []
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_adapter_of_the_research_code_in_the_output_folder_is_refused(command, tmp_path, golden_base, capsys):
    shutil.copytree(GOLDEN / "case_a", tmp_path / "run")
    flags = {"base_model": golden_base, "resume_from_checkpoint": tmp_path / "run", "top_k": 2, "number_experts": None}
    assert command(**flags, overwrite_output_dir=True) == 2
    assert "`resume_from_checkpoint` must lie outside of `output_dir`" in error_line(TRAIN, capsys)
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    assert not (tmp_path / "run.mola").exists()


def test_lists_for_an_adapter_of_another_method_are_refused(command, tmp_path, tiny_model, capsys):
    get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    capsys.readouterr()
    assert command(resume_from_checkpoint=tmp_path / "lora", top_k=1) == 2
    line = error_line(TRAIN, capsys)
    assert [part for part in ("`number_experts` (2,2,3,3)", "`top_k` (1)", "LORA", "lora") if part not in line] == []


def test_run_goes_on_from_its_checkpoint_to_the_same_weights(command, tmp_path):
    whole = {"num_epochs": 2, "save_steps": 2, "learning_rate": 1e-2}
    assert command(**whole, output_dir=tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    flags = {**whole, "output_dir": tmp_path / "cut", "resume_from_checkpoint": tmp_path / "cut" / "checkpoint-2"}
    assert command(**flags) == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [entry["step"] for entry in log_entries(tmp_path / "cut") if "eval_loss" in entry][:3] == [2, 4, 6]


def test_continued_run_goes_on_too(command, tmp_path, capsys):
    """A run that started from an adapter is resumed with its checkpoint as the only thing to name."""
    assert command() == 0
    flags = {"output_dir": tmp_path / "next", "num_epochs": 2, "save_steps": 2}
    assert command(resume_from_checkpoint=tmp_path / "run", **flags) == 0
    final = load_file(tmp_path / "next" / "adapter_model.safetensors")
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "next" / name)
    capsys.readouterr()
    # Its lists are those of the adapter that it began with.
    assert command(resume_from_checkpoint="last", **flags, number_experts="2,2,2,2") == 2
    line = error_line(TRAIN, capsys)
    assert [
        part for part in ("`number_experts`", "2,2,2,2", "2,2,3,3", str(tmp_path / "run")) if part not in line
    ] == []
    assert command(resume_from_checkpoint=tmp_path / "next" / "checkpoint-2", **flags, lora_r=4) == 2
    assert "`lora_r`" in error_line(TRAIN, capsys)
    assert command(resume_from_checkpoint="last", **flags) == 0
    again = load_file(tmp_path / "next" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], again[name]) for name in final)


def test_whole_model_checkpoint_of_the_research_code_is_refused(command, tmp_path, capsys):
    folder = tmp_path / "checkpoint-200"
    folder.mkdir()
    for name in ("pytorch_model.bin", "trainer_state.json"):
        (folder / name).write_text("{}")
    assert command(resume_from_checkpoint=folder) == 2
    assert "whole model" in error_line(TRAIN, capsys)


@pytest.fixture
def golden_base(tmp_path):
    """The recorded base model with a tokenizer and room for prompts."""
    folder = tmp_path / "base_tiny"
    shutil.copytree(GOLDEN / "base_tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    character_tokenizer(folder)
    return folder


def test_training_goes_on_from_an_adapter_of_the_research_code(command, tmp_path, golden_base, capsys):
    source = tmp_path / "scienceqa_mola"
    shutil.copytree(GOLDEN / "case_a", source)
    flags = {
        "base_model": golden_base,
        "resume_from_checkpoint": source,
        "number_experts": "2,3,4,5",
        "lora_r": "4,4,4,4",
        "learning_rate": 1e-20,
    }
    assert command(**flags) == 2  # a wrong top_k would run to the end
    line = error_line(TRAIN, capsys)
    assert [part for part in ("`top_k`", "scienceqa_mola", "--top_k", "2 was the default") if part not in line] == []
    assert not (tmp_path / "scienceqa_mola.mola").exists()
    assert command(**flags, top_k="2") == 0
    numbers = load_file(GOLDEN / "case_a" / "fixture.safetensors")
    base = AutoModelForCausalLM.from_pretrained(golden_base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    with torch.no_grad():
        logits = model(input_ids=numbers["input_ids"], attention_mask=numbers["attention_mask"]).logits
    torch.testing.assert_close(logits, numbers["logits"], atol=2e-5, rtol=1e-4)
    # A second run uses the converted folder again; a changed top_k does not.
    stamp = (tmp_path / "scienceqa_mola.mola" / "adapter_model.safetensors").stat().st_mtime_ns
    assert command(**flags, output_dir=tmp_path / "second", top_k="[2,2,2,2]") == 0
    assert (tmp_path / "scienceqa_mola.mola" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert command(**flags, output_dir=tmp_path / "third", top_k="1") == 2
    assert "`top_k` 1. Remove that folder" in error_line(TRAIN, capsys)


@pytest.mark.parametrize("text", ["", "0", "two"])
def test_number_of_processes_that_is_none_is_refused(text, command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", text)
    assert command() == 2
    assert f"`WORLD_SIZE` must be the number of processes: got {text!r}" in error_line(TRAIN, capsys)
