"""The recipes for common models: two steps of each on its architecture, with random weights and small width."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from mola.cli import main

from .conftest import build_byte_tokenizer

ROOT = Path(__file__).parents[1]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
IMAGES = {"mm_tokens_per_image": 4, "boi_token_index": 255, "eoi_token_index": 256, "image_token_index": 257}
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ARCHITECTURES = {
    "qwen3": [("Qwen3Config", TEXT)],
    "llama3": [("LlamaConfig", TEXT)],
    "gemma3": [
        ("Gemma3TextConfig", TEXT),
        (
            "Gemma3Config",
            {"text_config": TEXT, "vision_config": {**VISION, "image_size": 28, "patch_size": 7}, **IMAGES},
        ),
    ],
    "smollm3": [("SmolLM3Config", TEXT)],
}


def save_base(folder, config_class, options):
    """A base model with random weights, and a tokenizer that has a chat template."""
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, config_class)(**options)
    config.get_text_config().vocab_size = len(tokenizer)
    torch.manual_seed(0)
    has_images = config_class == "Gemma3Config"
    model_class = transformers.AutoModelForImageTextToText if has_images else transformers.AutoModelForCausalLM
    model_class.from_config(config).save_pretrained(folder)


def write_chats(path):
    turns = [(f"{number} and {number}?", f"It is {2 * number}.") for number in range(40)]
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in turns]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    return path


def train(name, base, tmp_path, **options):
    """Two steps with the recipe; its settings that need a GPU or the real model are overridden."""
    flags = {
        "config": ROOT / "recipes" / f"{name}.yaml",
        "base_model": base,
        "data": write_chats(tmp_path / "chats.jsonl"),
        "output": tmp_path / "run",
        "max_steps": 2,
        "device": "cpu",
        "disable_tqdm": "true",
        "logging_steps": 1,
        **options,
    }
    assert main(["train", *(f"--{key}={value}" for key, value in flags.items())]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    recipe = yaml.safe_load(flags["config"].read_text(encoding="utf-8"))
    assert (record["status"], record["steps"], record["template"]) == ("finished", 2, "chat")
    assert record["settings"]["r"] == str(recipe["r"])
    assert record["data"]["evaluation"]["kept"] == 2
    return record


@pytest.mark.parametrize(
    ("name", "config_class", "options"),
    [(name, *each) for name, all_sizes in ARCHITECTURES.items() for each in all_sizes],
    ids=[each[0] for all_sizes in ARCHITECTURES.values() for each in all_sizes],
)
def test_two_steps_of_the_recipe(name, config_class, options, tmp_path):
    save_base(tmp_path / "base", config_class, options)
    record = train(name, tmp_path / "base", tmp_path, dtype="float32", gradient_accumulation_steps=1)
    assert record["allocation"]["num_experts"] == 2 + 4 + 6 + 8


@pytest.mark.slow
@pytest.mark.real_model
def test_two_steps_on_smollm2(tmp_path):
    if not (model := ROOT / ".cache" / "SmolLM2-135M-Instruct").is_dir():
        pytest.skip("needs the SmolLM2 weights that `make quickstart` converts")
    record = train("smollm2", model, tmp_path, gradient_accumulation_steps=1)
    assert record["trainable_parameters"] == 13_305_600
