"""The layer follows the module names of any decoder: one training step, saving, loading, generating."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from mola import MolaConfig, MolaLinear

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {name: SMALL[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
FAMILIES = {
    "llama": ("LlamaConfig", SMALL, 7),
    "mistral": ("MistralConfig", SMALL, 7),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 8}, 7),
    "gemma2": ("Gemma2Config", {**SMALL, "head_dim": 8}, 7),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "head_dim": 8}, 7),
    "phi": ("PhiConfig", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, 3),
    "gpt2": ("GPT2Config", {**TOKENS, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}, 1),
    "opt": (
        "OPTConfig",
        {
            **TOKENS,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        3,
    ),
    "falcon": (  # adds in place to what a linear returns
        "FalconConfig",
        {
            **TOKENS,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "parallel_attn": True,
        },
        1,
    ),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 2}, 4),
}


def build(name):
    config_class, options, modules = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    return AutoModelForCausalLM.from_config(config), modules


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, tmp_path):
    base, modules_per_layer = build(name)
    base.save_pretrained(tmp_path / "base")
    config = MolaConfig(
        num_experts="24", r=4, router_aux_loss_coef=0.01, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).train()
    layers = [module for module in model.modules() if isinstance(module, MolaLinear)]
    assert [module.num_experts["default"] for module in layers] == [2] * 2 * modules_per_layer + [
        4
    ] * 2 * modules_per_layer

    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        generated = again.generate(input_ids=ids, attention_mask=batch["attention_mask"], max_new_tokens=3)
    assert generated.shape[1] > ids.shape[1]
