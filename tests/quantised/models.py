"""Quantised models for these tests."""

import torch
from transformers import AutoModelForCausalLM

from mola.models.quantization import Quantization, finish_loading, loading_arguments

KINDS = {
    "nf4": Quantization(load_in_4bit=True),
    "fp4-double": Quantization(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "int8": Quantization(load_in_8bit=True),
}


def quantised(folder, kind, dtype=torch.float32, auto_class=AutoModelForCausalLM, llm_int8_skip_modules=None):
    """A saved model, packed while it loads."""
    arguments = loading_arguments(KINDS[kind], dtype)
    arguments["quantization_config"].llm_int8_skip_modules = llm_int8_skip_modules
    model = auto_class.from_pretrained(folder, dtype=dtype, device_map={"": "cpu"}, **arguments)
    finish_loading(model)
    return model.eval()


def packed_layers(model):
    """Name -> linear of bitsandbytes."""
    return {name: m for name, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes")}
