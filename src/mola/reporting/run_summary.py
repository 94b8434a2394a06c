"""What a run was: the summary on top of the page, and how it was made at its end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.reporting.formatting import duration, number, percent
from mola.reporting.load_run import Run
from mola.reporting.markup import Element, code, command_box, element, folded, pairs, table

_LOSSES = {"eval_loss": "evaluation loss", "train_loss": "training loss"}


def lead(run: Run) -> Element:
    """The run in one or two sentences."""
    record, config = run.record, run.adapter.config if run.adapter else {}
    base = str(record["settings"]["base_model"]).rstrip("/").rpartition("/")[2]
    allocation = record.get("allocation") or {}
    is_mixture = config.get("peft_type", "MOLA") == "MOLA" and {"num_experts", "num_layers"} <= allocation.keys()
    experts = f"{allocation['num_experts']} LoRA experts" if is_mixture else f"A {config.get('peft_type')} adapter"
    kept = record.get("data", {}).get("train", {}).get("kept")
    text = f"{experts} per kind of module" if is_mixture else experts
    text += f" in {allocation['num_layers']} layers" if is_mixture else ""
    text += f" on {base}" + (f", trained on {kept:,} samples." if kept is not None else ".")
    measured = [
        f"{result['correct']:,} of {result['total']:,} answers were right {when}"
        for result, when in ((run.before, "before"), (run.after, "after"))
        if result is not None
    ]
    return element("p", text, f" {', '.join(measured)}." if measured else None, class_="lead")


def summary(run: Run) -> list[Element]:
    """The figures that matter most, then the base model, data and machine in words."""
    record, settings = run.record, run.record["settings"]
    figures: list[tuple[str, Any]] = [("status", record.get("status")), ("steps", _count(record.get("steps")))]
    if run.after is not None:
        old = f"{percent(run.before['accuracy'])} → " if run.before is not None else ""
        figures.insert(0, ("accuracy", f"{old}{percent(run.after['accuracy'])}"))
    figures += [(label, number(record["metrics"][name])) for name, label in _LOSSES.items() if _has(record, name)]
    figures.append(("experts", _count(record.get("allocation", {}).get("num_experts"))))
    figures.append(("trained values", _trained(record)))
    figures.append(("time", duration(record["seconds"]) if record.get("seconds") is not None else None))
    machine = record.get("machine", {})
    facts = [
        ("Base model", settings["base_model"]),
        ("Task", settings.get("task")),
        ("Data", settings.get("data")),
        ("Started from", settings.get("adapter")),
        ("Machine", machine.get("gpu") or machine.get("cpu")),
        ("Error", record.get("error")),
    ]
    return [pairs(figures, "figures"), pairs(facts), *_data(record)]


def making_section(run: Run) -> list[Element]:
    """The command, every setting, and the versions."""
    record = run.record
    machine = {key: value for key, value in record.get("machine", {}).items() if value is not None}
    allocation = record.get("allocation", {})
    return [
        *_command(record),
        folded("Settings of the adapter", _values(record.get("adapter_settings", {}))),
        folded("All settings of the training", _values(record["settings"])),
        folded("Allocation", _values(allocation)) if allocation else element("span"),
        folded("Versions and machine", _values({**record.get("versions", {}), **machine})),
    ]


def _command(record: Mapping[str, Any]) -> list[Element]:
    word, *rest = record.get("command") or [""]
    if not word:
        return []
    if Path(word).name == "mola":
        return [command_box(shlex.join(["mola", *rest]))]
    return [element("p", "Started from the program ", code(Path(word).name), ".")]


def _data(record: Mapping[str, Any]) -> list[Element]:
    prints = record.get("data_fingerprints", {})
    rows = [
        (part, *(f"{report[key]:,}" for key in ("kept", "tokens", "trained_tokens")), code(str(prints.get(part))))
        for part, report in record.get("data", {}).items()
    ]
    head = ("part", "samples", "tokens", "trained tokens", "sha256 of the samples")
    return [table(head, rows, "Samples")] if rows else []


def _values(values: Mapping[str, Any]) -> Element:
    rows = [(name, _written(value)) for name, value in values.items()]
    return table(("setting", "value"), rows, class_="settings")


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _trained(record: Mapping[str, Any]) -> Element | None:
    count, share = record.get("trainable_parameters"), record.get("allocation", {}).get("trainable_share")
    if count is None:
        return None
    return element("span", f"{count:,}", element("small", f" {percent(share)} of the base") if share else None)


def _has(record: Mapping[str, Any], name: str) -> bool:
    return record.get("metrics", {}).get(name) is not None


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
