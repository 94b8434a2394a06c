"""What is made from an adapter is asked as that was trained: its folder says how, a merged model's tokenizer too."""

import json
import logging
import shutil

import pytest
from peft import LoraConfig
from transformers import AutoTokenizer, GenerationConfig

from mola import MolaConfig
from mola.models.prompts import Chat, hand_on_prompts, own_chat, trained_template
from tests.exporting.conftest import saved
from tests.grids import slow

TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


def chats(folder, end_token="<s>"):
    """What TRL leaves beside an adapter."""
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end_token}), encoding="utf-8")
    return folder


def test_a_lora_and_the_merged_model_keep_the_chat_template_of_the_mixture(tiny_model_dir, mixture, tmp_path, run):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    # Sampling values without sampling, as older models have them: Transformers saves them as they were only.
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}
    (base / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    words = ["--base_model", base, "--output"]
    run("convert", chats(mixture), "--to", "lora", "--r", 4, *words, tmp_path / "lora")
    assert own_chat(tmp_path / "lora") == Chat(TEMPLATE, "<s>")
    assert trained_template(tmp_path / "lora") is None
    run("merge", tmp_path / "lora", *words, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<s>"
    before = AutoTokenizer.from_pretrained(tiny_model_dir)
    merged = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert merged.eos_token_id == [tokenizer.eos_token_id, before.eos_token_id]
    assert (merged.temperature, merged.top_p) == (0.9, 0.6)


def test_a_reallocated_adapter_keeps_the_template_of_its_training(tiny_model_dir, tmp_path, run):
    config = MolaConfig(num_experts=2, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = saved(tiny_model_dir, tmp_path / "mixture", config)
    chats(folder)
    (folder / "run.json").write_text('{"template": "alpaca_short"}', encoding="utf-8")
    moved = tmp_path / "moved"
    run("reallocate", "--adapter", folder, "--num_experts", "3,", "--base_model", tiny_model_dir, "--output", moved)
    assert trained_template(moved) == "alpaca_short"
    assert own_chat(moved) is None  # the tokenizer's template beside it was not trained in


@pytest.mark.parametrize("is_one_way", [True, *slow(False)])
def test_a_mixture_of_loras_keeps_their_common_chat_template(tiny_model_dir, tmp_path, run, is_one_way):
    folders = []
    for seed, name in enumerate("ab"):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        folders.append(chats(saved(tiny_model_dir, tmp_path / name, config, seed=seed)))
    if not is_one_way:
        (folders[1] / "chat_template.jinja").write_text(TEMPLATE.replace("<", "["), encoding="utf-8")
    new = tmp_path / "new"
    said = run(
        "convert", *folders, "--from", "lora", "--num_experts", "2,", "--base_model", tiny_model_dir, "--output", new
    )
    assert own_chat(new) == (Chat(TEMPLATE, "<s>") if is_one_way else None)
    assert ("trained with different prompts" in said) is not is_one_way


def test_an_unknown_template_is_not_handed_on(tmp_path, caplog):
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    hand_on_prompts(tmp_path / "source", tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
