"""The summary at the top of a run's page, and the section at its end on how the run was made."""

import json
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mola.checkpoints.recorded_base import model_name
from mola.reporting.document import Table
from mola.reporting.findings import find_training_fault
from mola.reporting.formatting import LOSS_NAMES, duration, number, percent
from mola.reporting.load_run import Run, step_of_weights


def summarize_run(run: Run) -> dict[str, Any]:
    """The run in one sentence, its most important figures, then base model, data and machine."""
    record, settings = run.record, run.record["settings"]
    allocation, machine = record.get("allocation") or {}, record.get("machine", {})
    method = (run.adapter.config if run.adapter else {}).get("peft_type", "MOLA")
    return {
        "is_mixture": method == "MOLA" and {"num_experts", "num_layers"} <= allocation.keys(),
        "is_even": not run.has_experts_pattern,
        "method": method,
        "allocation": allocation,
        "base": model_name(str(settings["base_model"])),
        "samples": record.get("data", {}).get("train", {}).get("kept"),
        "results": list(run.accuracies.items()),
        "figures": run_figures(run),
        "facts": [
            ("Base model", settings["base_model"]),
            ("Task", settings.get("task")),
            ("Data", settings.get("data")),
            ("Started from", settings.get("adapter")),
            ("Machine", machine.get("gpu") or machine.get("cpu")),
            ("Error", record.get("error")),
            ("Warning", find_training_fault(run)),
        ],
        "data": data_table(record),
    }


def run_figures(run: Run) -> list[tuple[str, str | None, str | None]]:
    """Name, value and remark of each figure; the page omits figures without a value."""
    record, allocation = run.record, run.record.get("allocation", {})
    accuracies = [percent(result["accuracy"]) for result in run.accuracies.values()]
    losses = [number(result["loss"]) for result in run.losses.values()]
    trained, base = record.get("trainable_parameters"), allocation.get("base_parameters")
    saved_step = step_of_weights(record)
    has_same_experts = run.has_routers and not run.has_experts_pattern
    return [
        ("accuracy", " → ".join(accuracies) if "after" in run.accuracies else None, None),
        ("loss on free text", " → ".join(losses) if "after" in run.losses else None, "nats per token"),
        ("status", record.get("status"), None),
        ("steps", _text(number, record.get("steps")), None),
        (
            "weights",
            f"of step {saved_step}" if saved_step not in (None, record.get("steps")) else None,
            "the best evaluation loss",
        ),
        *(
            (label, _text(number, record.get("metrics", {}).get(name)), None)
            for name, label in reversed(LOSS_NAMES.items())
        ),
        ("experts", _text(number, allocation.get("num_experts")) if has_same_experts else None, None),
        (
            "trainable parameters",
            _text(number, trained),
            f"{small_percent(trained / base)} of the base" if trained and base else None,
        ),
        ("time", _text(duration, record.get("seconds")), None),
    ]


def _text(format_value: Callable[[Any], str], value: Any) -> str | None:
    return None if value is None else format_value(value)


def small_percent(share: float) -> str:
    """A share in per cent; a share below 0.1 % has two significant digits."""
    return percent(share) if share >= 0.001 else percent(share, min(9, 1 - math.floor(math.log10(100 * share))))


def data_table(record: Mapping[str, Any]) -> Table:
    """Number of samples and tokens, and digest, of each part of the data."""
    digests = record.get("data_fingerprints", {})
    rows = [
        (part, *(number(counts[key]) for key in ("kept", "tokens", "trained_tokens")), digests.get(part))
        for part, counts in record.get("data", {}).items()
    ]
    return Table(("part", "samples", "tokens", "tokens in the loss", "sha256 of the samples"), rows, "Samples")


def making_section(run: Run) -> dict[str, Any]:
    """The command, every setting, and the versions."""
    record = run.record
    machine = {key: value for key, value in record.get("machine", {}).items() if value is not None}
    program, *arguments = record.get("command") or [""]
    name = Path(program).name
    tables = {
        "Settings of the adapter": record.get("adapter_settings", {}),
        "All settings of the training" if run.has_record else "Known settings of the training": record["settings"],
        "Allocation": record.get("allocation"),
        "Versions and machine": {**record.get("versions", {}), **machine},
    }
    return {
        "program": name,
        "command": shlex.join([name, *arguments]) if name == "mola" else None,
        "processes": launcher_sentence(record),
        "tables": [(title, _settings_table(values)) for title, values in tables.items() if values],
    }


def launcher_sentence(record: Mapping[str, Any]) -> str:
    """A sentence before the command of a run in several processes, if the command itself did not start them."""
    processes = record.get("processes") or 1
    if processes == record.get("settings", {}).get("nproc", 1):
        return ""
    return f"Started in {processes} processes by a launcher such as torchrun; each ran:"


def _settings_table(values: Mapping[str, Any]) -> Table:
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in values.items()
    ]
    return Table(("setting", "value"), rows)
