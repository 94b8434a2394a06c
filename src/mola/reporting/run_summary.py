"""What a run was: the summary on top of the page, and how it was made at its end."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.models.base_model import model_name
from mola.reporting.document import Table
from mola.reporting.formatting import duration, number, percent
from mola.reporting.load_run import Run, step_of_weights

_LOSSES = {"eval_loss": "evaluation loss", "train_loss": "training loss"}


def summary(run: Run) -> dict[str, Any]:
    """The run in a sentence, the figures that matter most, then the base model, data and machine in words."""
    record, settings, config = run.record, run.record["settings"], run.adapter.config if run.adapter else {}
    allocation, machine = record.get("allocation") or {}, record.get("machine", {})
    method = config.get("peft_type", "MOLA")
    results = [(name, result) for name, result in (("before", run.before), ("after", run.after)) if result is not None]
    return {
        "is_mixture": method == "MOLA" and {"num_experts", "num_layers"} <= allocation.keys(),
        "is_even": not _has_own_experts(run),
        "method": method,
        "allocation": allocation,
        "base": model_name(str(settings["base_model"])),
        "samples": record.get("data", {}).get("train", {}).get("kept"),
        "results": results,
        "figures": _figures(run),
        "facts": [
            ("Base model", settings["base_model"]),
            ("Task", settings.get("task")),
            ("Data", settings.get("data")),
            ("Started from", settings.get("adapter")),
            ("Machine", machine.get("gpu") or machine.get("cpu")),
            ("Error", record.get("error")),
        ],
        "data": _data(record),
    }


def making_section(run: Run) -> dict[str, Any]:
    """The command, every setting, and the versions."""
    record = run.record
    machine = {key: value for key, value in record.get("machine", {}).items() if value is not None}
    program, *arguments = record.get("command") or [""]
    name = Path(program).name
    tables = {
        "Settings of the adapter": record.get("adapter_settings", {}),
        "All settings of the training": record["settings"],
        **({"Allocation": record["allocation"]} if record.get("allocation") else {}),
        "Versions and machine": {**record.get("versions", {}), **machine},
    }
    return {
        "program": name,
        "command": shlex.join([name, *arguments]) if name == "mola" else None,
        "processes": processes_said(record),
        "tables": [(title, _values(values)) for title, values in tables.items()],
    }


def processes_said(record: Mapping[str, Any]) -> str:
    """What goes in front of the command of a run that a launcher started, which is not part of it; empty of others."""
    processes = record.get("processes") or 1
    return f"Started in {processes} processes by a launcher such as torchrun; each ran:" if processes > 1 else ""


def _figures(run: Run) -> list[tuple[str, str | None, str | None]]:
    """Name, value, and what to add in small print; those without a value are not shown."""
    record, allocation = run.record, run.record.get("allocation", {})
    accuracies = [percent(result["accuracy"]) for result in (run.before, run.after) if result is not None]
    trained, base = record.get("trainable_parameters"), allocation.get("base_parameters")
    kept = step_of_weights(record)
    losses = [(label, _known(number, record.get("metrics", {}).get(name)), None) for name, label in _LOSSES.items()]
    return [
        ("accuracy", " → ".join(accuracies) if run.after is not None else None, None),
        ("status", record.get("status"), None),
        ("steps", _known(number, record.get("steps")), None),
        ("weights", f"of step {kept}" if kept not in (None, record.get("steps")) else None, "the best evaluation loss"),
        *losses,
        ("experts", None if _has_own_experts(run) else _known(number, allocation.get("num_experts")), None),
        (
            "trained values",
            _known(number, trained),
            f"{_share(trained / base)} of the base" if trained and base and 0 < trained < 1000 * base else None,
        ),
        ("time", _known(duration, record.get("seconds")), None),
    ]


def _share(value: float) -> str:
    """Of small ones two digits that count."""
    return percent(value) if value >= 0.001 else percent(value, min(9, 1 - math.floor(math.log10(100 * value))))


def _has_own_experts(run: Run) -> bool:
    """Whether modules differ in their number of experts, so that a layer's own says nothing about all of them."""
    config = run.adapter.config if run.adapter else run.record.get("adapter_settings", {})
    return bool(config.get("num_experts_pattern"))


def _data(record: Mapping[str, Any]) -> Table:
    digests = record.get("data_fingerprints", {})
    rows = [
        (part, *(number(counts[key]) for key in ("kept", "tokens", "trained_tokens")), digests.get(part))
        for part, counts in record.get("data", {}).items()
    ]
    return Table(("part", "samples", "tokens", "trained tokens", "sha256 of the samples"), rows, "Samples")


def _values(values: Mapping[str, Any]) -> Table:
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in values.items()
    ]
    return Table(("setting", "value"), rows)


def _known(said: Any, value: Any) -> str | None:
    return None if value is None else said(value)
