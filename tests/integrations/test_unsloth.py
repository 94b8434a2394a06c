"""unsloth on a CPU: a mixture made with PEFT trains in its trainer; what unsloth cannot do with one is refused."""

import json

import pytest

import mola
from tests.integrations.environments import run, venv

pytestmark = pytest.mark.slow
REQUIREMENTS = ["unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "torch==2.13.0", "torchvision==0.28.0"]
COEFFICIENT = 0.1
SCRIPT = """
import json, sys
from unsloth import FastLanguageModel
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer
from mola import MolaConfig

base, out, coefficient = sys.argv[1], sys.argv[2], float(sys.argv[3])
said = {}

def load(name=base):
    return FastLanguageModel.from_pretrained(name, max_seq_length=128, dtype=torch.float32, load_in_4bit=False)

def error(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

config = dict(num_experts="2468", r=4, init_lora_weights=False, task_type="CAUSAL_LM")
said["unsloth's own"] = error(lambda: FastLanguageModel.get_peft_model(load()[0], num_experts="2468"))
model, tokenizer = load()
tokenizer.pad_token = tokenizer.eos_token
rows = [tokenizer(f"{i} + {i}? {2 * i}")["input_ids"] for i in range(20)]
data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])
for name, coefficient in (("without", 0.0), ("with", coefficient)):
    torch.manual_seed(0)
    mixture = get_peft_model(load()[0], MolaConfig(**config, router_aux_loss_coef=coefficient))
    before = {key: value.detach().clone() for key, value in mixture.named_parameters() if "mola_" in key}
    arguments = SFTConfig(
        out, max_steps=10, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, fp16=False, dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(model=mixture, processing_class=tokenizer, train_dataset=data, args=arguments)
    trainer.train()
    said[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    said["unmoved"] = [key for key, value in mixture.named_parameters() if "mola_" in key and value.equal(before[key])]
trainer.save_model(out)
said["merged"] = error(lambda: mixture.save_pretrained_merged(out + "/merged", tokenizer))
said["gguf"] = error(lambda: mixture.save_pretrained_gguf(out + "/gguf", tokenizer))
loaded = load(out)[0].eval()
batch = tokenizer("7 + 7? ", return_tensors="pt")
with torch.no_grad():
    said["the same"] = torch.equal(loaded(**batch).logits, mixture.eval()(**batch).logits)
json.dump(said, open(out + "/said.json", "w"))
"""


def test_a_mixture_trains_in_its_trainer_on_a_cpu(tiny_model_dir, tmp_path):
    python = venv("unsloth", REQUIREMENTS)
    out = tmp_path / "out"
    run(python, "-c", SCRIPT, tiny_model_dir, out, str(COEFFICIENT), cwd=tmp_path)
    said = json.loads((out / "said.json").read_text())
    assert "num_experts" in said["unsloth's own"]
    assert said["unmoved"] == []
    assert said["without"][-1] < said["without"][0] - 0.5
    # 1 is the balance loss of routers that are perfectly even.
    assert 1 <= (said["with"][0] - said["without"][0]) / COEFFICIENT < 3
    assert said["the same"]
    for name in ("merged", "gguf"):
        assert said[name].startswith("MolaError: A merged or GGUF file cannot hold a mixture")
        assert not (out / name).exists()
    model = mola.load_model(tiny_model_dir, out, device="cpu", dtype="float32")
    layers = model.base_model.model.model.layers
    assert [layer.mlp.up_proj.num_experts["default"] for layer in layers] == [2, 4, 6, 8]
