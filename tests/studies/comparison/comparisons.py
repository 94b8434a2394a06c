"""Small comparisons for tests."""

import json
from pathlib import Path

SETTINGS = {
    "task": "sample",
    "max_steps": 4,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "lora_dropout": 0.0,
    "dtype": "float32",
    "scoring": "likelihood",
    "test_batch_size": 8,
    "disable_tqdm": True,
    "seeds": [0, 1],
}
RECIPES = {"lora": {"num_experts": "1", "r": "16"}, "2468": {"num_experts": "2468", "r": "4"}}
TASKS = {"physics": {"filters": {"topic": "physics"}}, "biology": {"filters": {"topic": "biology"}}}


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def numbers(results):
    """What must be equal in two comparisons of the same."""
    kept = ("task", "recipe", "seed", "marks", "num_experts", "trainable_parameters", "settings", "fingerprints")
    return sorted([getattr(each, name) for name in kept] for each in results)
