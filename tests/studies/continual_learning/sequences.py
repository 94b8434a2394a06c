"""A short sequence of three stages, its command line, and what it left behind."""

import json
from pathlib import Path

from tests.training.runs import same_weights

STAGES = {
    "physics": {"filters": {"topic": "physics"}},
    "biology": {"filters": {"topic": "biology"}, "learning_rate": 0.01},
    "words": {"filters": {"topic": ["verbs", "grammar"]}, "max_steps": 5},
}
FIRST_TWO = {name: STAGES[name] for name in ("physics", "biology")}
FOLDERS = ["01-physics", "02-biology", "03-words"]
SETTINGS = {
    "task": "sample",
    "num_experts": "1,2,2,2",
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "lora_dropout": 0.1,
    "dtype": "float32",
    "save_total_limit": 3,
    "scoring": "likelihood",
    "test_batch_size": 4,
    "disable_tqdm": True,
}


def flags(values):
    def text(value):
        return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)

    return ["continual", *(f"--{name}={text(value)}" for name, value in values.items())]


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_end(folder, whole, stages=3):
    """Adapters and numbers of the first stages are those of the uninterrupted sequence, to the last bit."""
    assert [name for name in FOLDERS[:stages] if not same_weights(folder / name, whole[0] / name)] == []
    assert read(folder / "continual.json")["results"] == whole[1].results[:stages]
