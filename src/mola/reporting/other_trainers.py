"""What is known about the training of an adapter without `run.json`, such as one that TRL has saved."""

import math
from pathlib import Path
from typing import Any

from mola.files.digests import WEIGHTS_FILE, file_sha256
from mola.files.reading import read_json_object
from mola.reporting.adapter_weights import AdapterWeights, tensor_shapes

STATE_FILE = "trainer_state.json"  # Transformers' Trainer writes it into each checkpoint
_SETTINGS = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps", "save_steps")


def read_trainer_state(folder: Path) -> tuple[dict[str, Any], str]:
    """The `trainer_state.json` in a folder, else in its last checkpoint, and the file's name; empty without a file."""
    checkpoints = [path.name for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    last_first = sorted(checkpoints, key=lambda name: -int(name.removeprefix("checkpoint-")))
    for name in (STATE_FILE, *(f"{checkpoint}/{STATE_FILE}" for checkpoint in last_first)):
        if state := read_json_object(folder / name):
            # Python reads NaN in JSON. A loss that is not finite has no place in a curve.
            entries = state.get("log_history") or []
            state["log_history"] = [{key: value for key, value in each.items() if _is_known(value)} for each in entries]
            return state, name
    return {}, STATE_FILE


def _is_known(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def record_of_adapter(folder: Path, adapter: AdapterWeights, state: dict[str, Any]) -> dict[str, Any]:
    """The keys of a `run.json` that follow from an adapter's files, and from a `trainer_state.json` that may be empty.

    `learning_rate` is the highest one in the log.
    """
    settings = {"base_model": adapter.config.get("base_model_name_or_path") or "BASE_MODEL"}
    settings |= {name: state[name] for name in _SETTINGS if state.get(name) is not None}
    rates = [entry["learning_rate"] for entry in state.get("log_history", []) if "learning_rate" in entry]
    if rates:
        settings["learning_rate"] = max(rates)
    record: dict[str, Any] = {
        "settings": settings,
        "adapter_settings": {name: value for name, value in adapter.config.items() if value not in (None, {}, [])},
        "best_checkpoint": _best_checkpoint(folder, state),
        "steps": state.get("global_step"),
        "metrics": {"epoch": state["epoch"]} if state.get("epoch") is not None else {},
    }
    if adapter.layers:
        counts = [layer.num_experts for layer in adapter.layers if layer.layer_index is not None]
        record["allocation"] = {"num_experts": sum(counts), "num_layers": len(counts)}
    if (weights := folder / WEIGHTS_FILE).is_file():
        record["trainable_parameters"] = sum(math.prod(shape) for shape in tensor_shapes(weights).values())
    return record


def _best_checkpoint(folder: Path, state: dict[str, Any]) -> str | None:
    """The checkpoint with the best result if its weights are the adapter's; the state does not say which were saved."""
    name = Path(state.get("best_model_checkpoint") or "").name
    best, saved = folder / name / WEIGHTS_FILE, folder / WEIGHTS_FILE
    is_saved = name and best.is_file() and saved.is_file() and file_sha256(best) == file_sha256(saved)
    return name if is_saved else None
