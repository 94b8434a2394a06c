"""Data, a first adapter and a run of `mola train` to which a trainer's run is compared, and looks at adapters."""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mola
from mola import MolaConfig
from mola.cli import main

TORCH = f"torch=={version('torch')}"
STEPS = 20
ROWS = [{"instruction": f"Say {i}", "input": "", "output": f"{i} {i * i % 7}"} for i in range(16)]


def first_adapter(base: Path, folder: Path, **settings) -> Path:
    """A mixture "2468" as it is before training."""
    torch.manual_seed(0)
    config = MolaConfig(num_experts="2468", r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def losses_of_mola_train(base: Path, adapter: Path, folder: Path, **options) -> list[float]:
    """Loss of each step of `mola train` on `ROWS` in their order, four at a time."""
    folder.mkdir(parents=True)
    data = folder / "rows.json"
    data.write_text(json.dumps([{"id": str(i), "answer": "", **row} for i, row in enumerate(ROWS)]), encoding="utf-8")
    settings = {
        "base_model": base,
        "adapter": adapter,
        "data": data,
        "output_dir": folder / "run",
        "template": "meta",
        "dtype": "float32",
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": "true",
        **options,
    }
    assert main(["train", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def losses_of_trainer(checkpoint: Path) -> list[float]:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_trained_mixture(base: Path, folder: Path) -> None:
    """2, 4, 6 and 8 experts in the four layers; experts and routers have moved from where they began."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    layers = model.base_model.model.model.layers
    assert [layer.mlp.up_proj.num_experts["default"] for layer in layers] == [2, 4, 6, 8]
    assert [layer.self_attn.q_proj.mola_A["default"].shape[0] for layer in layers] == [2, 4, 6, 8]
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "mola_B" in name)


def has_moved(first: Path, second: Path) -> dict[str, bool]:
    """For experts and routers: whether each of their tensors differs between two adapters."""
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    parts = ("mola_A", "mola_B", "mola_router")
    return {part: all(not torch.equal(one[name], two[name]) for name in one if part in name) for part in parts}


def answers_of_mola(base: Path, adapter: Path | None, instructions: list[str]) -> list[str]:
    """The likeliest 8 tokens after each, in the trainers' bare form, as text."""
    model, tokenizer = mola.load_model(base, adapter, dtype="float32"), mola.load_tokenizer(str(base))
    return [mola.generate_text(model, tokenizer, f"{text}\n\n", max_new_tokens=8) for text in instructions]
