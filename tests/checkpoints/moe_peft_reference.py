"""Checkpoints as MoE-PEFT writes them, and what its model computes with them, in plain PyTorch.

An independent statement of the format: nothing of mola is imported here.
"""

import json
import math

import torch
import torch.nn.functional as F

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LLAMA_SIZES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 16),
    "self_attn.v_proj": (32, 16),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (32, 48),
    "mlp.up_proj": (32, 48),
    "mlp.down_proj": (48, 32),
}


def make_settings(names=(*ATTENTION, *MLP), **changes):
    settings = {
        "bias": "none",
        "peft_type": "MOLA",
        "r": 3,
        "lora_alpha": 7,
        "lora_dropout": 0.05,
        "target_modules": list(names),
        "routing_strategy": "mola",
        "num_experts": 4,
        "top_k": 2,
        "base_model_name_or_path": "owner/tiny",
        "task_type": "CAUSAL_LM",
        **changes,
    }
    return {name: value for name, value in settings.items() if value is not ...}


def make_tensors(settings, num_layers=4, sizes=LLAMA_SIZES, seed=0):
    """Random experts and gates; saved as parameters, as MoE-PEFT does."""
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape, size=1.0):
        return torch.nn.Parameter(size * torch.randn(*shape, generator=generator) / math.sqrt(shape[-1]))

    tensors = {}
    for layer in range(num_layers):
        for name, (n_in, n_out) in sizes.items():
            if name.rpartition(".")[2] not in settings["target_modules"]:
                continue
            key = f"mola.layers.{layer}.{name}"
            tensors[f"{key}.moe_gate.weight"] = parameter(settings["num_experts"], n_in)
            for expert in range(settings["num_experts"]):
                tensors[f"{key}.experts.{expert}.lora_A.weight"] = parameter(settings["r"], n_in)
                tensors[f"{key}.experts.{expert}.lora_B.weight"] = parameter(n_out, settings["r"], size=0.1)
    return tensors


def write(folder, settings, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=4))
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


class Llama:
    """The forward pass of a small LLaMA from its state dict, in float64, one token at a time through every mixture.

    Args:
        weights: of the base model, as in Transformers.
        heads: attention heads, heads of keys and values.
        settings: the adapter's, None for the base model alone.
        tensors: the adapter's, in MoE-PEFT's layout.
    """

    def __init__(self, weights, heads, settings=None, tensors=None, rope_theta=10000.0, epsilon=1e-6):
        self.weights = {key: value.double() for key, value in weights.items()}
        self.settings, self.tensors = settings, {key: value.double() for key, value in (tensors or {}).items()}
        self.heads, self.key_heads = heads
        self.rope_theta, self.epsilon = rope_theta, epsilon
        self.layers = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("model.layers."))

    def logits(self, ids):
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.layers):
            x = x + self.attention(layer, self.norm(x, f"model.layers.{layer}.input_layernorm.weight"))
            x = x + self.mlp(layer, self.norm(x, f"model.layers.{layer}.post_attention_layernorm.weight"))
        return self.norm(x, "model.norm.weight") @ self.weights["lm_head.weight"].t()

    def linear(self, layer, name, x):
        y = x @ self.weights[f"model.layers.{layer}.{name}.weight"].t()
        key = f"mola.layers.{layer}.{name}"
        if f"{key}.moe_gate.weight" not in self.tensors:
            return y
        update = torch.stack([self.mixture(key, token) for token in x.reshape(-1, x.shape[-1])])
        return y + update.view_as(y)

    def mixture(self, key, token):
        scaling = self.settings["lora_alpha"] / self.settings["r"]
        if self.settings.get("use_rslora"):
            scaling = self.settings["lora_alpha"] / self.settings["r"] ** 0.5
        probabilities = torch.softmax(self.tensors[f"{key}.moe_gate.weight"] @ token, dim=0)
        best = probabilities.argsort(descending=True)[: self.settings["top_k"]]
        result = 0
        for expert in best.tolist():
            lora_A, lora_B = (self.tensors[f"{key}.experts.{expert}.lora_{part}.weight"] for part in "AB")
            result = result + probabilities[expert] / probabilities[best].sum() * scaling * (lora_B @ (lora_A @ token))
        return result

    def norm(self, x, name):
        return self.weights[name] * x / (x.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt()

    def attention(self, layer, x):
        q, k, v = (self.linear(layer, f"self_attn.{name}_proj", x) for name in "qkv")
        rows, length, _ = x.shape
        q = q.view(rows, length, self.heads, -1).transpose(1, 2)
        k, v = (t.view(rows, length, self.key_heads, -1).transpose(1, 2) for t in (k, v))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.linear(layer, "self_attn.o_proj", mixed.transpose(1, 2).reshape(rows, length, -1))

    def rotate(self, x):
        half = x.shape[-1] // 2
        frequencies = self.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(x.shape[2])[:, None] * frequencies
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def mlp(self, layer, x):
        gate = F.silu(self.linear(layer, "mlp.gate_proj", x))
        return self.linear(layer, "mlp.down_proj", gate * self.linear(layer, "mlp.up_proj", x))
