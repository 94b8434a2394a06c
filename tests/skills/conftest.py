"""LoRAs of the tiny model, and prompts of three kinds whose bytes tell them apart."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mola.cli import main

WORDS = {"birds": ("wing", "beak", "nest"), "rivers": ("FLOW", "BANK", "MUD"), "tools": ("1234", "56", "789")}


def make_lora(model_dir, folder, seed, layers=(1, 2, 3), **settings) -> Path:
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=settings.pop("target_modules", ["q_proj", "down_proj"]),
        layers_to_transform=None if layers is None else list(layers),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **settings,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    get_peft_model(model, config).save_pretrained(folder)
    return Path(folder)


def write_rows(path, words, number=20) -> Path:
    texts = (f"{words[i % 3]} {words[(i + i // 3) % 3]} {i}" for i in range(number))
    path.write_text(json.dumps([{"instruction": text, "input": "", "output": "yes"} for text in texts]))
    return path


@pytest.fixture(scope="session")
def loras(tiny_model_dir, tmp_path_factory):
    """Name -> LoRA of the layers 1 to 3, of which the tiny model has four."""
    folder = tmp_path_factory.mktemp("loras")
    return {name: make_lora(tiny_model_dir, folder / name, seed) for seed, name in enumerate(WORDS)}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Name -> 20 prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    return {name: write_rows(folder / f"{name}.json", words) for name, words in WORDS.items()}


@pytest.fixture
def run(capsys):
    """Runs a command, which must succeed, and returns what it prints."""

    def call(*words):
        code = main([*map(str, words)])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


@pytest.fixture
def refused(capsys):
    """Runs a command, which must fail, and returns its one line."""

    def call(*words):
        assert main([*map(str, words)]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        return line

    return call


@pytest.fixture
def add(run, loras, data):
    """Adds skills to a folder by their names."""

    def call(folder, *names, **options):
        pairs = [f"{name}={loras[name]}" for name in names]
        flags = [f"--{name}={value}" for name, value in options.items()]
        return run("skills", "add", folder, *pairs, "--data", *(data[name] for name in names), *flags)

    return call


@pytest.fixture(scope="session")
def made_folder(loras, data, tmp_path_factory):
    """A folder with the skills `birds` and `rivers`."""
    folder = tmp_path_factory.mktemp("made") / "skills"
    names = ("birds", "rivers")
    pairs = [f"{name}={loras[name]}" for name in names]
    assert main(["skills", "add", str(folder), *pairs, "--data", *(str(data[name]) for name in names)]) == 0
    return folder


@pytest.fixture
def folder(made_folder, tmp_path):
    """A copy of the folder with the skills `birds` and `rivers`."""
    return shutil.copytree(made_folder, tmp_path / "skills")
