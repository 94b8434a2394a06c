"""What a skills folder holds, as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table
from safetensors import safe_open

from mola.checkpoints.plain_lora import describe_lora
from mola.checkpoints.skills_folder import SkillsFolder
from mola.files.digests import WEIGHTS_FILE


@dataclass(frozen=True)
class SkillSummary:
    """One skill.

    Attributes:
        name: its name.
        rank: the largest rank of an adapted linear.
        layers: the adapted layers, 0 = nearest the input.
        rows: number of prompts that its statistics were measured on.
        lora_bytes: size of its LoRA.
        statistics_bytes: size of its statistics.
    """

    name: str
    rank: int
    layers: list[int]
    rows: int
    lora_bytes: int
    statistics_bytes: int


def summarize(folder: SkillsFolder) -> list[SkillSummary]:
    """All skills of a folder, by name."""
    found = []
    for name in folder.names:
        path = folder.path / name / WEIGHTS_FILE
        with safe_open(path, "np") as file:
            lora = describe_lora({key: file.get_slice(key).get_shape() for key in file.keys()}, path.parent)  # noqa: SIM118
        statistics = sum(each.nbytes for each in folder.statistics[name].values())
        entry = folder.skills[name]
        found.append(SkillSummary(name, lora.rank, lora.layers, entry.rows, path.stat().st_size, statistics))
    return found


def summary_table(skills: list[SkillSummary]) -> Table:
    """The skills as a table."""
    table = Table()
    table.add_column("skill")
    for column in ("rank", "layers", "prompts", "LoRA", "statistics"):
        table.add_column(column, justify="right")
    for each in skills:
        sizes = (f"{size / 1000:,.0f} kB" for size in (each.lora_bytes, each.statistics_bytes))
        table.add_row(escape(each.name), str(each.rank), _ranges(each.layers), str(each.rows), *sizes)
    return table


def describe(folder: SkillsFolder) -> str:
    """The base model of the folder, and how the folder decides."""
    threshold = f"threshold {folder.threshold:.3f}{_how_set(folder)}"
    return f"Base model: {folder.base_model}. The decision reads the input of layer {folder.layer}; {threshold}."


def _how_set(folder: SkillsFolder) -> str:
    """How the threshold was set, see `suggest_threshold`."""
    if folder.reject_rate is None:
        return ""
    held_out = sum(len(each["held_out"]) for each in folder.statistics.values())
    lowest = f": the lowest margin of {held_out} held-out prompts" if folder.reject_rate * (held_out + 1) < 1 else ""
    return f" (reject rate {folder.reject_rate:g}{lowest})"


def summary_dict(folder: SkillsFolder, skills: list[SkillSummary]) -> dict[str, Any]:
    """The folder's settings and its skills, as plain values for JSON."""
    settings = ("base_model", "base_digest", "layer", "threshold", "reject_rate")
    return {
        **{name: getattr(folder, name) for name in settings},
        "skills": {each.name: {key: value for key, value in vars(each).items() if key != "name"} for each in skills},
    }


def _ranges(layers: list[int]) -> str:
    """Such as "10-29" or "3, 5-7"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
