"""Flags of the training scripts: defaults, forms, what they do, and what is refused."""

import dataclasses

import pytest
import torch
from research_code.training_options import ResearchInstructionOptions, ResearchTrainOptions
from safetensors.torch import load_file

from research_code.training import train_settings
from tests.grids import slow
from tests.research_code.scripts import SEVEN, error_line, run_script, write_dataset
from tests.research_code.training.runs import INSTRUCTION, TRAIN, adapter_config, log_entries, record


def settings_of(options):
    return train_settings(options, reports=False)


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


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"base_model": "my-model"}, {"base_model": "my-model"}),
        ({"output_dir": "out"}, {"output_dir": "out"}),
        ({"learning_rate": 1e-5}, {"learning_rate": 1e-5}),
        ({"num_epochs": 2.0}, {"num_train_epochs": 2.0}),
        (
            {"batch_size": 12, "micro_batch_size": 4},
            {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
        ),
        ({"cutoff_len": 128}, {"cutoff_len": 128}),
        ({"truncation": "right"}, {"truncation": "right"}),
        ({"train_on_inputs": False}, {"train_on_inputs": False}),
        ({"add_eos_token": False}, {"add_eos_token": False}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"prompt_template_name": "vigogne"}, {"template": "vigogne"}),
        ({"val_set_size": 0}, {"eval_strategy": "no"}),
        ({"val_set_size": 3, "save_steps": 7}, {"validation_size": 3, "eval_steps": 7, "save_steps": 7}),
        ({"warmup_steps": 3}, {"warmup_steps": 3}),
        ({"seed": 7}, {"seed": 7}),
        ({"dtype": "float32"}, {"dtype": "float32"}),
        ({"overwrite_output_dir": True}, {"overwrite_output_dir": True}),
        ({"trust_remote_code": True}, {"trust_remote_code": True}),
        ({"lora_r": "4", "lora_alpha": 8, "lora_dropout": 0.2}, {"lora_alpha": 8, "lora_dropout": 0.2}),
        ({"number_experts": "2,4", "top_k": "1,2"}, {"num_experts": "2,4", "top_k": "1,2"}),
        ({"obalance": True}, {"router_aux_loss_coef": 1e-3, "router_aux_loss_reduction": "layer"}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_each_flag_becomes(flags, expected, saved_questions):
    data = str(saved_questions)
    plain = settings_of(ResearchTrainOptions(data_path=data))
    assert plain["data"] == data
    changed = settings_of(ResearchTrainOptions(data_path=data, **flags))
    assert expected.items() <= changed.items()
    assert all(plain.get(name) != value for name, value in expected.items() if name != "router_aux_loss_reduction")


def test_flags_that_only_the_script_for_instructions_has(tmp_path):
    """It has a different flag for the template, and `meta` where the other script has `alpaca`."""
    data = str(write_dataset(tmp_path / "data.hf", {"train": 240}))
    flags = {"load_in_8bit": True, "prompt_template_name_meta": "vigogne"}
    changed = settings_of(ResearchInstructionOptions(data_path=data, **flags))
    plain = [settings_of(script(data_path=data)) for script in (ResearchTrainOptions, ResearchInstructionOptions)]
    assert [settings["template"] for settings in (*plain, changed)] == ["alpaca", "meta", "vigogne"]
    assert [settings.get("load_in_8bit") for settings in (*plain, changed)] == [None, None, True]


def test_several_processes_share_the_batch(tmp_path, monkeypatch):
    data = str(write_dataset(tmp_path / "data.hf", {"train": 320}))
    options = ResearchTrainOptions(data_path=data, batch_size=16, micro_batch_size=4, val_set_size=0, num_epochs=10)
    alone = settings_of(options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = settings_of(options)
    assert (alone["gradient_accumulation_steps"], shared["gradient_accumulation_steps"]) == (4, 2)
    assert alone["warmup_steps"] == shared["warmup_steps"] == 20  # a tenth of 200 steps, which are as many


@pytest.mark.parametrize("word", ["--train_on_inputs=False", *slow("--train_on_inputs=false", "--notrain_on_inputs")])
def test_false_is_false(word, command, tmp_path, tiny_model_dir, monkeypatch):
    """The run leaves all flags of the experts out: on 4 layers the default list is 2,4,6,8."""
    paths = {"base_model": tiny_model_dir, "data_path": tmp_path / "science_qa.hf", "output_dir": tmp_path / "run"}
    sizes = {"batch_size": 13, "micro_batch_size": 13, "val_set_size": 0, "cutoff_len": 512}
    words = [f"--{name}={value}" for name, value in (paths | sizes).items()]
    assert run_script(TRAIN, monkeypatch, *words, word) == 0
    data = record(tmp_path / "run")["data"]
    assert data["train"]["trained_tokens"] < data["train"]["tokens"] / 2
    assert data.keys() == {"train"}  # without held-out rows there is no evaluation
    assert data["train"]["kept"] == 13
    config = adapter_config(tmp_path / "run")
    assert (config["num_experts"], config["r"], config["top_k"]) == ([2, 4, 6, 8], 8, 2)
    assert (config["lora_alpha"], config["lora_dropout"]) == (16, 0.05)
    assert set(config["target_modules"]) == set(SEVEN.split(","))
    assert (config["router_aux_loss_coef"], config["router_aux_loss_reduction"]) == (0.0, "module")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["2,2,3,3", "[2,2,3,3]", "(2, 2, 3, 3)"])
def test_lists_in_any_form(form, command, tmp_path):
    assert command(number_experts=form, lora_r="4", top_k="2,2,3,2") == 0
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    shapes = [weights[f"base_model.model.model.layers.{i}.mlp.up_proj.mola_A"].shape[:2] for i in range(4)]
    assert shapes == [(2, 4), (2, 4), (3, 4), (3, 4)]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"number_experts": "2,2,2"}, ["`num_experts`", "3", "4"]),
        ({"top_k": "2,2,2,4"}, ["top_k", "4", "3"]),
        ({"top_k": "0"}, ["top_k", "0"]),
        ({"lora_r": "8,0,8,8"}, ["`r`", "0"]),
        ({"lora_target_modules": "q_proj,k_porj"}, ["k_porj"]),
        ({"batch_size": 6, "micro_batch_size": 4}, ["`batch_size`", "6", "4", "--batch_size"]),
        ({"cutoff_len": 64, "truncation": "error"}, ["`cutoff_len`", "64"]),
        ({"cutoff_len": 4000}, ["`cutoff_len`", "4000", "1024"]),
        ({"data_path": "nowhere.hf"}, ["nowhere.hf"]),
        ({"prompt_template_name": "alpacca"}, ["`template`", "alpacca", "alpaca_short"]),
        ({"lora_target_modules": "[q_proj,k_porj]"}, ["`target_modules`", "'k_porj'"]),
        ({"wandb_run_name": "first"}, ["`wandb_run_name`", "`wandb_project`"]),
        ({"resume_from_checkpoint": "./step2_biology"}, ["`resume_from_checkpoint`", "./step2_biology"]),
        ({"learnig_rate": 1}, ["--learnig_rate", "--learning_rate"]),
        ({"val_set_size": 13}, ["`val_set_size`", "13"]),
        ({"val_set_size": 400}, ["`val_set_size`", "400", "13"]),
    ],
)
def test_wrong_flags_end_in_one_line(flags, parts, command, capsys, tmp_path):
    assert command(**flags) == 2
    line = error_line(TRAIN, capsys)
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "run" / "adapter_config.json").exists()


@pytest.mark.slow
@pytest.mark.quant
def test_base_in_8_bits(command, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'mola-peft[quant]'")
    assert command(script=INSTRUCTION, load_in_8bit=True, val_set_size=1) == 0
    assert record(tmp_path / "run")["quantization"] == {"quant_method": "bitsandbytes", "load_in_8bit": True}


def test_validation_rows_come_from_the_training_split(finished):
    run = record(finished)
    assert (run["data"]["train"]["kept"], run["data"]["evaluation"]["kept"]) == (12, 1)
    assert "eval_loss" in run["metrics"]


def test_same_flags_give_the_same_weights(finished, command, tmp_path):
    assert command(output_dir=tmp_path / "again") == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_warmup_is_at_most_a_tenth_of_the_run(command, tmp_path, caplog):
    assert command(num_epochs=5) == 0  # 12 rows, batch 4: 15 steps
    assert record(tmp_path / "run")["settings"]["warmup_steps"] == 1
    assert "1 of 15 steps" in caplog.text
    assert max(entry.get("learning_rate", 0) for entry in log_entries(tmp_path / "run")) > 0


def test_long_run_keeps_the_hundred_steps_of_warmup(command, tmp_path, caplog):
    options = ResearchTrainOptions(data_path=str(tmp_path / "science_qa.hf"), batch_size=8, num_epochs=1000)
    assert settings_of(options)["warmup_steps"] == 100
    assert "Warm-up" not in caplog.text
