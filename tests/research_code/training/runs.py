"""The two training scripts, and what a run of them left behind."""

import json

import torch

from mola import load_model
from mola.data.encode import encode_examples
from mola.data.examples import load_examples
from mola.data.templates import get_template
from mola.models.tokenizer import load_tokenizer

TRAIN, INSTRUCTION = "mola_training.py", "mola_training_instruction.py"


def record(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def adapter_config(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def log_entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def loss_on(adapter, base, data, cutoff_len=512):
    """Mean loss of the training rows, prompt included."""
    tokenizer = load_tokenizer(base, "right")
    examples = load_examples(data, None, "train")
    encoded, _ = encode_examples(
        examples, tokenizer, get_template("alpaca"), cutoff_len=cutoff_len, train_on_inputs=True
    )
    model = load_model(base, adapter, dtype="float32", device="cpu")
    with torch.no_grad():
        losses = [model(input_ids=(ids := torch.tensor([row])), labels=ids).loss for row in encoded["input_ids"]]
    return float(torch.stack(losses).mean())
