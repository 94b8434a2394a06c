"""Conversations, a tokenizer that knows how to write them, and what every trainer's run must leave behind."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback

from mola import MolaConfig

# What the assistant says, with its end, is between {% generation %} marks: the part that can be trained alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}U:{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="needs the extra 'trl': pip install 'mola-peft[trl]'")


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    tiny_tokenizer.padding_side = "right"
    tiny_tokenizer.chat_template = CHAT_TEMPLATE
    return tiny_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def config(**options):
    """Experts that matter from the start."""
    return MolaConfig(**{"num_experts": "2-4", "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options})


@pytest.fixture
def base_and_config(tiny_model_dir):
    """Model and configuration as a trainer takes them: `start` is "config", or "ready" for a finished PeftModel."""

    def build(start: str, **options):
        torch.manual_seed(0)
        base = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        if start == "config":
            return base, config(**options)
        return get_peft_model(base, config(**options)), None

    return build


def settings(folder, **options):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **options,
    }


class KeepGradients(TrainerCallback):
    """The gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def frozen(model):
    """Copies of all tensors but those of the adapter that is trained."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not (".mola_" in name and name.endswith(".default"))
    }


def assert_only_the_adapter_was_trained_and_saved(trainer, before, folder):
    """`before` are the copies from `frozen`, made when the trainer was."""
    after = dict(trainer.model.named_parameters())
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    trained = {name for name, parameter in after.items() if parameter.requires_grad}
    assert trained == after.keys() - before.keys()
    trainer.save_model(str(folder))
    assert not list(folder.glob("model*.safetensors"))
    saved = load_file(folder / "adapter_model.safetensors")
    assert {f"{name}.default" for name in saved} == trained
    for name, tensor in saved.items():
        assert torch.equal(after[f"{name}.default"], tensor), name


def assert_same_gradients(ours, expected, tolerance=1e-4):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (ours[name] - gradient).abs().max() / scale < tolerance, name
