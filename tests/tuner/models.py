"""Tiny random models for the tuner's tests."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mola import MolaConfig

VOCABULARY = 64


def tiny_llama(num_layers=4, seed=0, **options):
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options}))


def random_config(**options):
    """A configuration whose experts are not zero at the start, so that they matter."""
    defaults = {"num_experts": "2-4", "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return MolaConfig(**{**defaults, **options})


def token_batch(rows=3, length=9, padding=0, seed=1, prompt=0):
    """Right-padded ids with labels; `padding` tokens less in the last row, `prompt` tokens ignored."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -padding:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def clone(model):
    return copy.deepcopy(model)
