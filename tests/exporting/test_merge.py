"""`mola merge`: an ordinary model folder, with the same logits; what does not merge is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

from mola import MolaConfig, MolaError, load_tokenizer
from mola.generation.generate import GenerateOptions, _Prompts
from mola.models.prompts import template_for, template_of, warn_of_other_template
from tests.damage import change_tensors
from tests.exporting.conftest import base, load, logits, saved
from tests.grids import slow


def test_exported_lora_merges_into_a_model_folder(tiny_model_dir, mixture, tmp_path, run):
    run("convert", mixture, "--to", "lora", "--r", 4, "--base_model", tiny_model_dir, "--output", tmp_path / "lora")
    words = ["--base_model", tiny_model_dir, "--dtype", "float32", "--output", tmp_path / "merged"]
    assert "written to" in run("merge", tmp_path / "lora", *words)
    expected = logits(load(tiny_model_dir, tmp_path / "lora"))
    torch.testing.assert_close(logits(base(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32)])
def test_the_merged_model_has_the_dtype_of_its_base(tiny_model_dir, lora, tmp_path, run, dtype):
    base(tiny_model_dir).to(dtype).save_pretrained(tmp_path / "base")
    for file in tiny_model_dir.glob("*token*"):
        shutil.copy(file, tmp_path / "base")
    run("merge", lora("a"), "--base_model", tmp_path / "base", "--output", tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype is dtype
    assert next(iter(load_file(tmp_path / "merged" / "model.safetensors").values())).dtype is dtype


def test_one_expert_everywhere_merges(tiny_model_dir, tmp_path, run):
    config = MolaConfig(num_experts=1, top_k=1, r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    folder = saved(tiny_model_dir, tmp_path / "one", config)
    run("merge", folder, "--dtype", "float32", "--output", tmp_path / "merged")  # the adapter records its base model
    expected = logits(load(tiny_model_dir, folder))
    torch.testing.assert_close(logits(base(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # of PEFT, when it saves
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "rank_pattern": {"down_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
        {"modules_to_save": ["lm_head"], "bias": "all"},
        {"trainable_token_indices": [3, 5]},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_loras_that_experts_cannot_express_merge(tiny_model_dir, lora, tmp_path, run, settings):
    folder = lora("a", **settings)

    def train(tensors):
        for name, tensor in tensors.items():
            if "lora_" not in name:  # what begins as the base has it
                tensor.add_(0.1)

    if settings.keys() & {"modules_to_save", "trainable_token_indices"}:
        change_tensors(Path(folder), train)
    run("merge", folder, "--base_model", tiny_model_dir, "--dtype", "float32", "--output", tmp_path / "merged")
    expected = logits(load(tiny_model_dir, folder))
    torch.testing.assert_close(logits(base(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def tied_dir(tiny_model_dir, tmp_path):
    """The tiny model with a head that is its embeddings."""
    folder = tmp_path / "tied"
    shutil.copytree(tiny_model_dir, folder)
    config = AutoConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_into_shared_weights_is_refused(target, tied_dir, tmp_path, refusal):
    settings = {"target_modules": ["q_proj", target], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    configs = [LoraConfig(**settings)]
    if target == "lm_head":
        configs.append(MolaConfig(num_experts=1, top_k=1, r=2, **settings))
    for number, config in enumerate(configs):
        folder = saved(tied_dir, tmp_path / f"adapter{number}", config)
        (tied_dir / "model.safetensors").rename(tmp_path / "kept")  # known before weights are loaded
        message = refusal("merge", folder, "--base_model", tied_dir, "--output", tmp_path / "merged")
        (tmp_path / "kept").rename(tied_dir / "model.safetensors")
        assert "which shares its weight with" in message
        assert not (tmp_path / "merged").exists()
    if target == "lm_head":
        with pytest.raises(MolaError, match="which shares its weight with"):
            load(tied_dir, folder).merge_adapter()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (LoraConfig, {"trainable_token_indices": [3, 5]}),
        (MolaConfig, {"modules_to_save": ["lm_head"]}),
        *slow((LoraConfig, {}), (LoraConfig, {"modules_to_save": ["lm_head"]}), (MolaConfig, {})),
        *slow((MolaConfig, {"trainable_token_indices": [3, 5]})),
    ],
    ids=str,
)
def test_other_modules_of_a_tied_model_merge(kind, more, tied_dir, tmp_path, run):
    one = {} if kind is LoraConfig else {"num_experts": 1, "top_k": 1}
    config = kind(target_modules=["q_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM", **one, **more)
    folder = saved(tied_dir, tmp_path / "others", config)
    change_tensors(folder, lambda tensors: [tensor.add_(0.1) for tensor in tensors.values()])
    run("merge", folder, "--base_model", tied_dir, "--dtype", "float32", "--output", tmp_path / "merged")
    torch.testing.assert_close(logits(base(tmp_path / "merged")), logits(load(tied_dir, folder)), atol=1e-4, rtol=1e-4)
    merged = base(tmp_path / "merged")
    is_tied = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] == is_tied


def test_the_tokenizer_is_that_of_the_base(tiny_model_dir, lora, tmp_path, run):
    run("merge", lora("a"), "--base_model", tiny_model_dir, "--output", tmp_path / "merged")
    before, after = (
        json.loads((f / "tokenizer_config.json").read_text()) for f in (tiny_model_dir, tmp_path / "merged")
    )
    assert {"pad_token", "padding_side"} & {*after} == {"pad_token", "padding_side"} & {*before}
    assert "pad_token" not in after


def test_a_method_that_does_not_merge_is_refused_before_the_weights_are_read(
    tiny_model, no_weights_dir, tmp_path, refusal
):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(tiny_model, config).save_pretrained(tmp_path / "prompt")
    flags = ["--base_model", no_weights_dir, "--output", tmp_path / "merged"]
    assert "must be of a method that merges" in refusal("merge", tmp_path / "prompt", *flags)


@pytest.mark.filterwarnings("ignore:.*no bias. This means that merging", "ignore:Adapter 'default'")  # of PEFT
def test_lora_biases_without_a_bias_in_the_base_are_refused(tiny_model_dir, tmp_path, refusal):
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    folder = saved(tiny_model_dir, tmp_path / "biased", config)
    message = refusal("merge", folder, "--base_model", tiny_model_dir, "--output", tmp_path / "merged")
    assert "`adapter` cannot be merged" in message
    assert not (tmp_path / "merged").exists()


def test_what_peft_cannot_merge_is_refused(tiny_model_dir, lora, tmp_path, refusal):
    folder = lora("a", alora_invocation_tokens=[1, 2])
    message = refusal("merge", folder, "--base_model", tiny_model_dir, "--output", tmp_path / "merged")
    assert "`adapter` cannot be merged" in message
    assert not (tmp_path / "merged").exists()


def test_a_mixture_is_refused_with_advice(tiny_model_dir, no_weights_dir, mixture, tmp_path, refusal):
    message = refusal("merge", mixture, "--base_model", no_weights_dir, "--output", tmp_path / "merged")
    assert "mola convert ADAPTER --to lora" in message
    assert not (tmp_path / "merged").exists()
    with pytest.raises(MolaError, match="mola convert ADAPTER --to lora"):
        load(tiny_model_dir, mixture).merge_and_unload()


def test_a_quantised_base_is_refused(no_weights_dir, lora, tmp_path, refusal):
    path = no_weights_dir / "config.json"
    text = path.read_text()
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(text), "quantization_config": settings}))
    try:
        message = refusal("merge", lora("a"), "--base_model", no_weights_dir, "--output", tmp_path / "merged")
    finally:
        path.write_text(text)
    assert "`base_model` must not be quantised" in message


def test_the_merged_model_uses_the_prompts_of_the_adapter(tiny_model_dir, lora, tmp_path, run):
    adapter = lora("a")
    Path(adapter, "prompts.json").write_text('{"template": "meta"}', encoding="utf-8")
    run("merge", adapter, "--base_model", tiny_model_dir, "--output", tmp_path / "merged")
    merged, tokenizer = str(tmp_path / "merged"), load_tokenizer(tiny_model_dir)
    assert _Prompts(GenerateOptions(base_model=merged), tokenizer)._template_name(None) == "meta"
    assert _Prompts(GenerateOptions(base_model=merged, template="vigogne"), tokenizer)._template_name(None) == "vigogne"
    assert _Prompts(GenerateOptions(base_model=str(tiny_model_dir)), tokenizer)._template_name(None) == "alpaca"
    tokenizer.chat_template = "{{ messages }}"
    assert _Prompts(GenerateOptions(base_model=str(tiny_model_dir)), tokenizer)._template_name(None) == "chat"


def test_tokens_of_chats_that_the_base_does_not_have_are_named(tiny_model_dir, tmp_path, caplog):
    """As of an adapter whose tokenizer got tokens for which the base has spare rows."""
    tokenizer = load_tokenizer(tiny_model_dir)
    names = ["<|im_start|>", "<|im_end|>", "<|unused|>", "</s>"]
    content = {"added_tokens": [{"content": name} for name in names]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}', encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}</s>", encoding="utf-8")
    template_for("chat", tokenizer, tmp_path)
    assert "writes chats with <|im_start|>, <|im_end|>, which the base model's tokenizer does not have" in caplog.text
    assert template_of(tmp_path) == "chat"
    warn_of_other_template(tmp_path, "alpaca_short")
    assert "does not name its prompt template but has a chat template" in caplog.text
