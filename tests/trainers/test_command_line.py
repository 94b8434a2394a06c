"""TRL's commands: alone they make LoRA, through `mola.integrations.trl_command` mixtures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from safetensors.torch import load_file

from mola import MolaError
from mola.data.examples import load_data

RECIPE = Path(__file__).parents[2] / "recipes" / "trl" / "sft.yaml"
FLAGS = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "up_proj"]}


def test_flags_of_trl_make_a_lora(trl):
    assert type(trl.get_peft_config(trl.ModelConfig(use_peft=True))) is LoraConfig


@pytest.mark.slow
def test_recipe_of_trl_trains_a_mixture(trl, tiny_model_dir, tmp_path):
    rows = [json.dumps({"text": f"{i} plus {i} is {2 * i}"}) for i in range(8)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe = {
        **{"model_name_or_path": str(tiny_model_dir), "dataset_name": str(tmp_path / "data")},
        **{"output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 2, "max_length": 32},
        **{"report_to": "none", "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "save_strategy": "no", **FLAGS},
        **{"mola_num_experts": "2468", "mola_router_aux_loss_coef": 0.01},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    words = ["-m", "mola.integrations.trl_command", "sft", "--config", str(tmp_path / "recipe.yaml")]
    process = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"], config["num_experts"]) == ("MOLA", 4, [2, 4, 6, 8])
    assert (config["lora_alpha"], config["router_aux_loss_coef"]) == (8, 0.01)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.rsplit(".", 2)[1] for name in weights} == {"q_proj", "up_proj"}
    assert all(weights[name].abs().sum() > 0 for name in weights)


@pytest.mark.slow
def test_pairs_train_a_mixture_by_the_command_that_mola_train_names(trl, tiny_model_dir, tmp_path):
    """`mola train` does not train on pairs of a chosen and a rejected answer, and says which command does."""
    rows = [json.dumps({"prompt": f"{i} + {i} =", "chosen": f" {2 * i}", "rejected": " 5"}) for i in range(8)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(MolaError) as error:
        load_data(tmp_path / "data", None, "train")
    command = str(error.value).partition("TRL trains on them: python ")[2].partition(" (see")[0]
    places = {"MODEL": str(tiny_model_dir), "FOLDER": str(tmp_path / "data"), "RUN": str(tmp_path / "out")}
    words = [places.get(word, word) for word in command.split()]
    few = [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--use_cpu",
        "--bf16",
        "false",
        "--report_to",
        "none",
    ]
    process = subprocess.run([sys.executable, *words, *few], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "MOLA"


def test_the_recipe_of_the_repository_is_read(trl, tmp_path):
    from mola.integrations.trl_command import MixtureArguments, mixture_config

    types = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig, MixtureArguments)
    words = ["--config", str(RECIPE), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    _, _, model, data, mixture = trl.TrlParser(types).parse_args_and_config(words)
    assert [(each.path, each.data_files) for each in data.datasets] == [("json", "rows.jsonl")]
    config = mixture_config(model, mixture)
    assert (config.num_experts, config.r, config.lora_dropout, len(config.target_modules)) == ("2468", 8, 0.0, 7)


def test_an_unknown_key_is_named(trl, tmp_path):
    from mola.integrations.trl_command import main

    (tmp_path / "recipe.yaml").write_text("lora_rank: 4\n", encoding="utf-8")
    words = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "no"]
    with pytest.raises(ValueError, match="lora_rank"):
        main(["sft", *words])


def test_flags_that_mixtures_do_not_have_are_an_error(trl):
    from mola.integrations.trl_command import MixtureArguments, main, mixture_config

    with pytest.raises(MolaError, match="`use_dora` does not work with a mixture, got True"):
        mixture_config(trl.ModelConfig(use_peft=True, use_dora=True), MixtureArguments())
    if hasattr(trl.ModelConfig, "lora_target_parameters"):
        given = trl.ModelConfig(use_peft=True, lora_target_parameters=["experts.down_proj"], lora_dropout=0.0)
        assert mixture_config(given, MixtureArguments()).target_parameters == ["experts.down_proj"]
    with pytest.raises(MolaError, match="`num_experts`"):
        mixture_config(trl.ModelConfig(use_peft=True), MixtureArguments(mola_num_experts="2,x"))
    with pytest.raises(MolaError, match="script of TRL that trains adapters, such as sft or dpo: got 'nosuch'"):
        main(["nosuch"])
