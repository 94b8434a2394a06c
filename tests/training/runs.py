"""What a run left behind, and the same computed without the trainer."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mola.data.encode import encode_examples
from mola.data.examples import load_examples
from mola.data.templates import get_template
from mola.models.tokenizer import load_tokenizer
from mola.training.model import base_config, build_model, check_model_options

WEIGHTS = "adapter_model.safetensors"
NO_EVALUATION = {"eval_strategy": "no", "save_strategy": "no"}


def built(options):
    """The model of a run, before its first step."""
    config = base_config(options)
    return build_model(options, config, check_model_options(options, config)[0])


def read_record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def read_metrics(folder: Path) -> list[dict]:
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step; a step that occurs twice fails."""
    entries = [(entry["step"], entry["loss"]) for entry in read_metrics(folder) if "loss" in entry]
    assert len(entries) == len(dict(entries))
    return dict(entries)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two folders hold the same adapter, to the last bit."""
    one, two = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def evaluation_loss(folder: Path, base: Path, data: Path, rows: slice, **encoding) -> float:
    """Mean loss per trained token, one sample at a time and without the trainer."""
    tokenizer = load_tokenizer(base, "right")
    examples = load_examples(data, None, None)[rows]
    encoded, _ = encode_examples(examples, tokenizer, get_template("meta"), cutoff_len=512, **encoding)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    total, count = 0.0, 0
    for sample in encoded:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count
