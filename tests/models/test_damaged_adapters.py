"""Commands name the fault of an adapter that is damaged, incomplete or made for another model, before the long work.

Commands get a base model without weights. Loading it would raise another error.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from mola import MolaConfig
from mola.checkpoints.adapter_folder import read_tensors
from mola.cli import main
from mola.errors import MolaError
from mola.models.adapters import check_adapter
from mola.models.loading import load_model
from tests.conftest import save_adapter, save_tiny_llama
from tests.damage import WEIGHTS, change_settings, change_tensors, cut_off, flip_bit, same

CONFIG = MolaConfig(
    r=2, num_experts=[2, 2, 3, 3], top_k=1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
)
PREFIX = "base_model.model.model.layers.2.self_attn.q_proj.mola_"


@pytest.fixture(scope="module")
def intact(tiny_model_dir, tmp_path_factory):
    return save_adapter(tiny_model_dir, tmp_path_factory.mktemp("intact"), CONFIG)


@pytest.fixture
def adapter(intact, tmp_path):
    """A copy to damage."""
    return shutil.copytree(intact, tmp_path / "adapter")


def with_values(part, value):
    def change(tensors):
        tensors[PREFIX + part].view(-1)[3] = value

    return lambda folder: change_tensors(folder, change)


def of_each_expert(change):
    return lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({PREFIX + p: change(tensors[PREFIX + p]) for p in ("A", "B", "router")})
    )


def narrower(folder):
    change_tensors(folder, lambda tensors: tensors.update({PREFIX + "A": tensors[PREFIX + "A"][..., :-1].contiguous()}))


def drop(folder):
    change_tensors(folder, lambda tensors: tensors.pop(PREFIX + "router"))


# Name -> how to damage the folder, and words of the message: the file or the tensor, and what to do.
FAULTS = {
    "cut off": (lambda folder: cut_off(folder / WEIGHTS, 0.9), [WEIGHTS, "opy"]),
    "empty": (lambda folder: cut_off(folder / WEIGHTS, 0), [WEIGHTS, "opy"]),
    "one bit": (lambda folder: flip_bit(folder / WEIGHTS, 8 * 10_000), [WEIGHTS, "damaged", "Copy the folder again"]),
    "NaN": (with_values("B", float("nan")), ["layers.2.self_attn.q_proj.mola_B", "1 of 192", "earlier checkpoint"]),
    "infinite": (
        with_values("router", -float("inf")),
        ["layers.2.self_attn.q_proj.mola_router", "1 of 96", "earlier checkpoint"],
    ),
    "shape": (narrower, ["layers.2.self_attn.q_proj.mola_A", "(3, 2, 31)", "(3, 2, 32)", "a different base model"]),
    "expert missing": (of_each_expert(lambda tensor: tensor[:-1].contiguous()), ["mola_A", "(2, 2, 32)", "(3, 2, 32)"]),
    "expert too many": (of_each_expert(lambda tensor: torch.cat([tensor, tensor[:1]])), ["(4, 2, 32)", "(3, 2, 32)"]),
    "tensor missing": (drop, ["layers.2.self_attn.q_proj.mola_router", "1 of 24", "incomplete"]),
    "newer version": (lambda folder: change_settings(folder, router_kind="x"), ["router_kind", "has no field"]),
    "older version": (lambda folder: change_settings(folder, top_k=None), ["top_k", "Copy the original file back"]),
    "settings": (lambda folder: cut_off(folder / "adapter_config.json", 0.5), ["adapter_config.json cannot be read"]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [{"instruction": f"Say {i}", "input": "", "output": "Answer: A.", "answer": "A"} for i in range(4)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def commands(base, adapter, data, folder):
    """Arguments of every command that reads an adapter of mola."""
    given = ["--base_model", str(base), "--adapter", str(adapter)]
    output = ["--base_model", str(base), "--output", str(folder / "out")]
    return {
        "convert": [str(adapter), "--to", "lora", "--r", "2", *output],
        "merge": [str(adapter), *output],
        "evaluate": [*given, "--task", "sample", "--data", str(data), "--output", str(folder / "result.json")],
        "generate": [*given, "--instruction", "Say 1"],
        "inspect": [*given, "--data", str(data), "--json", str(folder / "inspection.json")],
        "serve": [*given, "--port", "0"],
        "train": [*given, "--data", str(data), "--output", str(folder / "run"), "--dtype", "float32"],
    }


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        *(("generate", fault) for fault in FAULTS),
        *((command, "tensor missing") for command in ("train", "serve", "evaluate", "inspect", "convert", "merge")),
    ],
)
def test_commands_name_the_fault(command, fault, adapter, no_weights_dir, data, tmp_path, capsys):
    damage, words = FAULTS[fault]
    damage(adapter)
    assert main([command, *commands(no_weights_dir, adapter, data, tmp_path)[command]]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"mola {command}: error: ")
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "out").exists()


def test_trained_tokens_of_a_missing_module_are_refused(adapter, no_weights_dir, data, tmp_path, capsys):
    change_settings(adapter, trainable_token_indices={"nothing": [1]})
    assert main(["merge", *commands(no_weights_dir, adapter, data, tmp_path)["merge"]]) == 2
    assert "'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["one bit", "NaN", "shape", "tensor missing"])
def test_peft_names_the_fault(fault, adapter, tiny_model):
    damage, words = FAULTS[fault]
    damage(adapter)
    with pytest.raises(MolaError) as error:
        PeftModel.from_pretrained(tiny_model, adapter)
    assert [word for word in words if word not in str(error.value)] == []


REWRITING = {
    "convert": lambda adapter, output: ["convert", str(adapter), "--to", "published", "--output", str(output)],
    "reallocate": lambda adapter, output: [
        *("reallocate", "--adapter", str(adapter), "--num_experts", "2", "--output", str(output)),
    ],
}
# These commands read no base model, so their messages compare the tensors with the configuration.
REWRITING_FAULTS = {
    ("convert", "shape"): ["layers.2.self_attn.q_proj", "router for 32 features and experts for 31"],
    ("convert", "expert missing"): ["layers.2.self_attn.q_proj", "{'A': (2, 2)", "`num_experts` 3"],
    ("convert", "tensor missing"): [
        "layers.2.self_attn.q_proj",
        "the file has {'A': (3, 2), 'B': (3, 2)}",
        "incomplete",
    ],
    ("reallocate", "NaN"): ["layers.2.self_attn.q_proj.mola_B", "1 of 192"],
    ("reallocate", "tensor missing"): ["a module with 3 experts must have a router"],
}


@pytest.mark.parametrize(("command", "fault"), REWRITING_FAULTS)
def test_commands_that_rewrite_an_adapter_name_the_fault(command, fault, adapter, tmp_path, capsys):
    (damage, _), words = FAULTS[fault], REWRITING_FAULTS[command, fault]
    damage(adapter)
    assert main(REWRITING[command](adapter, tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"mola {command}: error: ")
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def other_models(tiny_model_dir, tmp_path_factory):
    """Another size, and another architecture whose linears have the same names and shapes."""
    other = tmp_path_factory.mktemp("other")
    small = save_tiny_llama(other / "small", hidden_size=16, intermediate_size=48, std=0.2)
    shutil.copytree(tiny_model_dir, other / "mistral")
    config = AutoConfig.from_pretrained(tiny_model_dir).to_dict()
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    mistral = AutoConfig.for_model("mistral", vocab_size=258, **{name: config[name] for name in kept})
    AutoModelForCausalLM.from_config(mistral).save_pretrained(other / "mistral")
    return {"size": small, "architecture": other / "mistral"}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("size", ["mola_A.default has shape (2, 2, 32)", "needs (2, 2, 16)", "a different base model"]),
        ("architecture", ["'mistral'", "'llama'", "Pass the adapter's own base model"]),
    ],
)
def test_another_base_model_is_refused(kind, words, adapter, other_models, capsys):
    base = other_models[kind]
    with pytest.raises(MolaError) as error:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert [word for word in words if word not in str(error.value)] == []
    (base / "model.safetensors").rename(base / "away")  # the error comes before the weights load
    try:
        assert main(["generate", "--base_model", str(base), "--adapter", str(adapter), "--instruction", "Say"]) == 2
    finally:
        (base / "away").rename(base / "model.safetensors")
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == []


def test_adapter_of_an_earlier_version_without_these_fields_loads(adapter, tiny_model_dir, other_models, caplog):
    change_settings(adapter, weights_sha256=None, base_model_type=None)
    load_model(tiny_model_dir, adapter, "float32", "cpu")
    load_model(other_models["architecture"], adapter, "float32", "cpu")
    assert "was trained on" in caplog.text


def test_every_flipped_bit_is_noticed(intact, adapter):
    size = 8 * (intact / WEIGHTS).stat().st_size
    for number in random.Random(0).sample(range(size), 20):
        flip_bit(adapter / WEIGHTS, number)
        with pytest.raises(MolaError, match=WEIGHTS):
            check_adapter(adapter)
        flip_bit(adapter / WEIGHTS, number)
    check_adapter(adapter)


def test_digest_follows_the_weights(adapter, tiny_model, tmp_path):
    """Loaded, trained on and saved again, into the same folder too."""
    model = PeftModel.from_pretrained(tiny_model, adapter, is_trainable=True)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.mola_B["default"].add_(1)
    for folder in (tmp_path / "elsewhere", adapter):
        model.save_pretrained(folder)
        check_adapter(folder)
    settings = [json.loads((f / "adapter_config.json").read_text()) for f in (adapter, tmp_path / "elsewhere")]
    assert settings[0]["weights_sha256"] == settings[1]["weights_sha256"]


# ---------------------------------------------------------------------- plain LoRA


LORA_A = PREFIX.removesuffix("mola_") + "lora_A.weight"


def in_lora(change):
    return lambda folder: change_tensors(folder, change)


LORA_FAULTS = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS]),
    "NaN": (in_lora(lambda tensors: tensors[LORA_A].view(-1)[3:4].fill_(float("nan"))), [LORA_A, "1 of 64"]),
    "shape": (
        in_lora(lambda tensors: tensors.update({LORA_A: tensors[LORA_A][:, 1:].contiguous()})),
        [LORA_A, "(2, 31)", "(2, 32)"],
    ),
    "whole numbers": (in_lora(lambda tensors: tensors.update({LORA_A: tensors[LORA_A].int()})), [LORA_A, "int32"]),
    "tensor missing": (in_lora(lambda tensors: tensors.pop(LORA_A)), [LORA_A, "missing"]),
    "tensor too many": (
        in_lora(lambda tensors: tensors.update({LORA_A.replace("2", "7"): torch.ones(2, 32)})),
        ["layers.7.self_attn.q_proj.lora_A.weight"],
    ),
    "rank": (lambda folder: change_settings(folder, r=2**31), ["(2147483648, "]),
    "targets": (lambda folder: change_settings(folder, target_modules="("), ["does not fit the base model"]),
}


@pytest.fixture(scope="module")
def intact_lora(tiny_model_dir, tmp_path_factory):
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return save_adapter(tiny_model_dir, tmp_path_factory.mktemp("lora") / "lora", config)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        *(("convert", fault) for fault in LORA_FAULTS),
        *(("merge", fault) for fault in ("shape", "tensor missing")),
    ],
)
def test_commands_that_read_loras_name_the_fault(command, fault, no_weights_dir, intact_lora, tmp_path, capsys):
    folder = Path(shutil.copytree(intact_lora, tmp_path / "lora"))
    damage, words = LORA_FAULTS[fault]
    damage(folder)
    more = ["--from", "lora", "--num_experts", "2,"] if command == "convert" else []
    words_of_both = ["--base_model", str(no_weights_dir), "--output", str(tmp_path / "out")]
    assert main([command, str(folder), *more, *words_of_both]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"mola {command}: error: ")
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- formats of other programs


@pytest.fixture
def published(intact, tmp_path):
    """The adapter in the format of the research code, a pickle in a zip archive."""
    assert main(REWRITING["convert"](intact, tmp_path / "published")) == 0
    return tmp_path / "published"


def not_finite(path):
    tensors = torch.load(path, weights_only=True)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    torch.save(tensors, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: cut_off(path, 0.9), "Copy it again"),
        (lambda path: flip_bit(path, 8 * 10_000), "checksum"),
        (not_finite, "lora_A_0"),
    ],
)
def test_faults_of_other_formats_are_named(damage, words, published, tiny_model_dir, tmp_path, capsys):
    more = ["--from", "published", "--base_model", str(tiny_model_dir), "--top_k", "1"]
    assert main(["convert", str(published), *more, "--output", str(tmp_path / "back")]) == 0
    check_adapter(tmp_path / "back")
    capsys.readouterr()
    damage(published / "adapter_model.bin")
    assert main(["convert", str(published), *more, "--output", str(tmp_path / "again")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "adapter_model.bin" in message
    assert not (tmp_path / "again").exists()


def test_flipped_bits_of_a_pickle_are_noticed_or_without_effect(published):
    """Some bits of an archive have no meaning, such as the space between its parts."""
    path = published / "adapter_model.bin"
    expected = read_tensors(published)
    noticed, count = 0, 20
    for number in random.Random(0).sample(range(8 * path.stat().st_size), count):
        flip_bit(path, number)
        try:
            assert same(read_tensors(published), expected)
        except MolaError:
            noticed += 1
        flip_bit(path, number)
    assert noticed > count / 2
