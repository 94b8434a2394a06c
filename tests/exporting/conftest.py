"""A mixture, LoRAs and data of the tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from mola import MolaConfig
from mola.cli import main
from mola.data.prepare import PrepareOptions, prepare
from tests.damage import change_tensors


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model, length=12):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 3 + 2 * length).view(2, length)).logits


def load(model_dir, adapter):
    return PeftModel.from_pretrained(base(model_dir), adapter)


def saved(model_dir, folder, config, **changes):
    """A random adapter whose update is not zero."""
    torch.manual_seed(changes.pop("seed", 0))
    get_peft_model(base(model_dir), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Folder with train.json and test.json of generated questions."""
    folder = tmp_path_factory.mktemp("questions") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=40, validation_size=2, test_size=12))
    return folder


@pytest.fixture
def mixture(made_mixture, tmp_path):
    """A mixture with one to three experts of rank 2; the first layer is a LoRA of rank 6, the head is trained."""
    return Path(shutil.copytree(made_mixture, tmp_path / "mixture"))


@pytest.fixture(scope="session")
def made_mixture(tiny_model_dir, tmp_path_factory):
    config = MolaConfig(
        num_experts=[1, 2, 3, 3],
        r=[6, 2, 2, 2],
        top_k=2,
        lora_alpha=4,
        init_lora_weights=False,
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    folder = saved(tiny_model_dir, tmp_path_factory.mktemp("mixture") / "mixture", config)
    change_tensors(folder, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(0.01))
    return folder


@pytest.fixture
def lora(tiny_model_dir, tmp_path):
    """Makes LoRA adapters: `lora("name", r=4, ...)` gives the folder."""

    def make(name, seed=0, **settings):
        settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
        return str(saved(tiny_model_dir, tmp_path / name, LoraConfig(task_type="CAUSAL_LM", **settings), seed=seed))

    return make


@pytest.fixture
def run(capsys):
    """Run `mola` with words; its output, which must end well."""

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


@pytest.fixture
def refusal(capsys):
    """Run `mola` with words; the one line with which it refuses."""

    def call(*words):
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    return call


def report_of(folder):
    return json.loads((folder / "export.json").read_text())
