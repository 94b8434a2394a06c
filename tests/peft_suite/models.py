"""Tiny random models under the names that PEFT's tests ask the hub for, in the layout of the hub's local cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import PretrainedConfig, PreTrainedModel

REVISION = "0" * 40
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000}
_DENSE = {**_SIZES, "intermediate_size": 37, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 1000, **_ENDS}
_ENCODER = {**_SIZES, "intermediate_size": 37, "max_position_embeddings": 128, "type_vocab_size": 2}
_OPT = {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_BART = {
    "d_model": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
    **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
       (("layers", 2), ("attention_heads", 4), ("ffn_dim", 37))},
}  # fmt: skip

# Name on the hub -> class of the model and what its configuration sets.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _DENSE),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _DENSE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _DENSE),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {**_T5, "vocab_size": 1000, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", {**_OPT, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _DENSE),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        {**_SIZES, "intermediate_size": 37, "max_position_embeddings": 128},
    ),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT2),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", {**_T5, "vocab_size": 1000}),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _ENCODER),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        _ENCODER,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**_DENSE, "pad_token_id": 0},
    ),
}


def write_models(hub: Path) -> None:
    """Make every model of `MODELS` and save it where an offline `from_pretrained(name)` looks for it.

    Args:
        hub: folder to be named by `HF_HUB_CACHE`.
    """
    for name, (class_name, settings) in MODELS.items():
        folder = hub / ("models--" + name.replace("/", "--"))
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        # Larger than usual, so that an adapter's effect is seen through norms and softmax. PEFT's own model of the
        # other name has small weights, and its tests allow for them.
        std = 0.02 if "qwen2" in name else 0.2
        model = _random_model(getattr(transformers, class_name), settings, std)
        model.save_pretrained(folder / "snapshots" / REVISION)
    # Configurations of other methods are read too, from a branch of this name.
    folder = hub / "models--peft-internal-testing--tiny-opt-lora-revision"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "test").write_text(REVISION)
    LoraConfig().save_pretrained(str(folder / "snapshots" / REVISION))


def _random_model(model_class: type[PreTrainedModel], settings: dict[str, Any], std: float) -> PreTrainedModel:
    config: PretrainedConfig = model_class.config_class(**settings)  # type: ignore[misc]
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model
