"""A tiny random model of every family in docs/reference/compatibility.md, and a batch it can be trained on.

Six layers in encoder-decoders (T5: three and three, BART: two and four), four in all others; float32, no dropout.
"""

from typing import Any, NamedTuple

import torch
import transformers
from peft import TaskType, get_peft_model

from mola import MolaConfig, MolaLinear

VOCABULARY = 64
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NO_GROUPS = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
SEVEN = (*QKVO, "gate_proj", "up_proj", "down_proj")
GEMMA3_TOKENS = {"boi_token_index": 60, "eoi_token_index": 61, "image_token_index": 62}


class Family(NamedTuple):
    """How to build a family, and which linears of a layer its two usual `target_modules` adapt."""

    config: str
    options: dict[str, Any]
    default: tuple[str, ...]
    all_linear: tuple[str, ...] = ()  # empty: as the default
    task: TaskType = TaskType.CAUSAL_LM


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
QWEN3_MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
QWEN2_MOE = {**QWEN3_MOE, "shared_expert_intermediate_size": 16}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
BART_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BERT_LINEARS = ("query", "key", "value", "dense")

FAMILIES = {
    "llama": Family("LlamaConfig", SMALL, SEVEN),
    "mistral": Family("MistralConfig", SMALL, SEVEN),
    "qwen3": Family("Qwen3Config", {**SMALL, "head_dim": 8}, SEVEN),
    "gemma2": Family("Gemma2Config", {**SMALL, "head_dim": 8}, SEVEN),
    "gemma3": Family("Gemma3TextConfig", {**SMALL, "head_dim": 8}, SEVEN),
    "gemma3-composite": Family(
        "Gemma3Config",
        {
            "text_config": {**SMALL, "head_dim": 8},
            "vision_config": {**VISION, "num_hidden_layers": 2},
            "mm_tokens_per_image": 4,
            **GEMMA3_TOKENS,
        },
        SEVEN,
        (*SEVEN, "out_proj", "fc1", "fc2"),
    ),
    "phi": Family(
        "PhiConfig",
        {**NO_GROUPS, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        QKVO[:3],
        (*QKVO[:3], "dense", "fc1", "fc2"),
    ),
    "phi3": Family("Phi3Config", SMALL, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gpt2": Family(
        "GPT2Config",
        {**GPT2, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
        ("c_attn",),
        ("c_attn", "c_proj", "c_fc"),
    ),
    "opt": Family(
        "OPTConfig",
        {**NO_GROUPS, **NO_DROPOUT, "ffn_dim": 48, "word_embed_proj_dim": 32},
        QKVO[:3],
        (*QKVO[:3], "out_proj", "fc1", "fc2"),
    ),
    # Adds in place to what a linear returns.
    "falcon": Family(
        "FalconConfig",
        {**NO_GROUPS, "parallel_attn": True},
        ("query_key_value",),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "mixtral": Family("MixtralConfig", {**SMALL, "num_local_experts": 4}, QKVO),
    "qwen2-moe": Family("Qwen2MoeConfig", {**SMALL, **QWEN2_MOE}, SEVEN, (*SEVEN, "shared_expert_gate")),
    "qwen3-moe": Family("Qwen3MoeConfig", {**SMALL, **QWEN3_MOE}, QKVO),
    "t5": Family(
        "T5Config",
        {**T5, "vocab_size": VOCABULARY, "dropout_rate": 0.0, "decoder_start_token_id": 0},
        ("q", "v"),
        ("q", "k", "v", "o", "wi", "wo"),
        TaskType.SEQ_2_SEQ_LM,
    ),
    "bart": Family(
        "BartConfig",
        {**TOKENS, **BART, **BART_HEADS, **NO_DROPOUT, "max_position_embeddings": 64, "forced_eos_token_id": None},
        QKVO[:3],
        (*QKVO[:3], "out_proj", "fc1", "fc2"),
        TaskType.SEQ_2_SEQ_LM,
    ),
    "sequence-classifier": Family("LlamaConfig", {**SMALL, "num_labels": 3}, SEVEN, task=TaskType.SEQ_CLS),
    "token-classifier": Family(
        "BertConfig",
        {**NO_GROUPS, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        ("query", "value"),
        BERT_LINEARS,
        TaskType.TOKEN_CLS,
    ),
}
AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "ModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "ModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "ModelForSequenceClassification",
    TaskType.TOKEN_CLS: "ModelForTokenClassification",
}
GENERATING = [name for name in FAMILIES if FAMILIES[name].task in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)]


def auto_class(family):
    """The class of Transformers that loads the family, such as `AutoModelForCausalLM`."""
    return getattr(transformers, "Auto" + AUTO_CLASSES[FAMILIES[family].task])


def build(family):
    """The family's base model in eval mode: the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, FAMILIES[family].config)(**FAMILIES[family].options)
        model = auto_class(family).from_config(config)
        # Larger than the usual 0.02: outputs that differ enough to tell models and tokens apart.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def adapt(base, family, **options):
    """The model with an adapter that already changes it: two experts in the lower layers, four in the upper ones."""
    defaults = {"num_experts": "2-4", "r": 4, "init_lora_weights": False, "task_type": FAMILIES[family].task}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(base, MolaConfig(**{**defaults, **options}))


def layers(model):
    """Name -> `MolaLinear`, without what PEFT puts in front of the names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, MolaLinear)}
    return {name.removeprefix("base_model.model."): module for name, module in found.items()}


def is_encoder_decoder(family):
    return FAMILIES[family].task == TaskType.SEQ_2_SEQ_LM


def batch(family, rows=2, length=9):
    """Inputs with labels, without padding; encoder-decoders get fewer tokens than they have to give."""
    generator = torch.Generator().manual_seed(3)
    task = FAMILIES[family].task
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == TaskType.CAUSAL_LM:
        inputs["labels"] = ids
    elif task == TaskType.SEQ_2_SEQ_LM:
        inputs = {name: value[:, : length - 2] for name, value in inputs.items()}
        inputs["labels"] = torch.randint(3, 60, (rows, length), generator=generator)
    else:
        shape = (rows,) if task == TaskType.SEQ_CLS else (rows, length)
        inputs["labels"] = torch.randint(0, 3, shape, generator=generator)
    if family == "gemma3-composite":  # tells text from images
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


@torch.no_grad()
def logits(model, family):
    """Logits of the batch in eval mode."""
    return model.eval()(**batch(family)).logits
