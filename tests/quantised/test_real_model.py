"""SmolLM2 on NF4 and in 8 bits: memory of its weights, time of a step, a loss that falls; `-s` prints the figures."""

import time
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from mola import MolaConfig, load_model, load_tokenizer
from mola.models.quantization import prepare_for_training, weight_bytes
from tests.quantised.models import KINDS

SMOLLM2 = Path(__file__).resolve().parents[2] / ".cache" / "SmolLM2-135M-Instruct"
TEXT = "The sun is a star, and the planets go round it. " * 12

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.quant,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs the SmolLM2 weights that `make quickstart` converts"),
]


def measure(kind, steps=3):
    """MiB of the weights, CPU seconds of the fastest step of 512 tokens, losses."""
    tokenizer = load_tokenizer(SMOLLM2)
    ids = tokenizer([TEXT] * 4, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
    base = load_model(SMOLLM2, None, "bfloat16", "cpu", quantization=KINDS.get(kind))
    size = weight_bytes(base) / 2**20
    torch.manual_seed(0)
    config = MolaConfig(num_experts="2468", r=8, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(prepare_for_training(base), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seconds, losses = [], []
    for _ in range(steps):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
        losses.append(loss.item())
    print(
        f"\n{kind}: {size:.1f} MiB, {min(seconds):.1f} CPU seconds per step, loss {losses[0]:.2f} to {losses[-1]:.2f}"
    )
    return size, losses


def test_memory_of_the_weights_and_training(bitsandbytes):
    plain, expected = measure("bfloat16")
    for kind, largest in {"nf4": 0.45, "fp4-double": 0.45, "int8": 0.65}.items():
        size, losses = measure(kind)
        assert size < largest * plain
        assert losses[-1] < 0.8 * losses[0]
        assert losses[0] < 2 * expected[0]
