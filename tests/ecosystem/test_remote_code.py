"""A base model that comes with its own code: every command runs it when told to, and only then."""

import json
import shutil

import pytest

from mola.cli import main
from mola.data.prepare import PrepareOptions, prepare

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory):
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("own") / "model")
    (folder / "modeling_own.py").write_text(CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {auto: f"modeling_own.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=16, validation_size=4, test_size=4))
    return folder


def run(name, *words, **options):
    return main([name, *map(str, words), *(f"--{key}={value}" for key, value in options.items())])


def test_every_command_with_the_models_own_code(base, data, tmp_path, capsys):
    model = {"base_model": base, "trust_remote_code": "true"}
    placed = {**model, "dtype": "float32", "device": "cpu"}
    asked = {"task": "sample", "data": data / "train.json"}
    adapter, lora = tmp_path / "run", tmp_path / "lora"
    shape = {"num_experts": "2,2,2,2", "r": 2, "max_steps": 1, "warmup_steps": 0, "eval_strategy": "no"}
    shape |= {"use_cpu": "true", "dtype": "float32", "disable_tqdm": "true", "expert_telemetry": "false"}
    tested = {"task": "sample", "data": data / "test.json"}
    commands = [
        ("plan", {**model, "num_experts": "2,2,2,2"}),
        ("train", {**model, **asked, **shape, "output_dir": adapter}),
        ("evaluate", {**placed, **tested, "adapter": adapter, "limit": 2, "max_new_tokens": 2}),
        ("generate", {**placed, "adapter": adapter, "prompt": "x", "max_new_tokens": 2}),
        ("allocate", {**model, "method": "alphalora", "budget": 8, "output": tmp_path / "found.json"}),
        ("inspect", {**placed, **tested, "adapter": adapter, "limit": 2, "json": tmp_path / "seen.json"}),
    ]
    for name, options in commands:
        assert run(name, **options) == 0, capsys.readouterr().err
    exported = {**placed, "task": "sample", "data": data / "train.json", "limit": 8, "r": 2}
    assert run("convert", adapter, "--to", "lora", output=lora, **exported) == 0, capsys.readouterr().err
    assert run("merge", lora, output=tmp_path / "merged", **model) == 0, capsys.readouterr().err
    again = {"base_model": tmp_path / "merged", "trust_remote_code": "true", "device": "cpu"}
    assert run("generate", **again, prompt="x", max_new_tokens=2) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["plan", "generate"])
def test_it_is_not_run_unasked(name, base, capsys):
    (base / "modeling_own.py").write_text(CODE + "raise SystemExit('was run')", encoding="utf-8")
    try:
        options = {"plan": {"num_experts": "2"}, "generate": {"prompt": "x"}}[name]
        assert run(name, base_model=base, **options) == 2
    finally:
        (base / "modeling_own.py").write_text(CODE, encoding="utf-8")
    assert (
        "comes with code of its own, which would have to be run. Look at it, and pass --trust_remote_code"
        in capsys.readouterr().err
    )


def test_labels_that_transformers_would_not_shift_are_not_smoothed(base, data, tmp_path, capsys):
    asked = {"base_model": base, "trust_remote_code": "true", "task": "sample", "data": data / "train.json"}
    assert run("train", **asked, output_dir=tmp_path / "run", label_smoothing_factor=0.1) == 2
    assert "`label_smoothing_factor` (0.1) cannot be used with the base model's own class OwnForCausalLM" in (
        capsys.readouterr().err
    )
