"""What the suite `growth` wrote, read back as the curves of a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mola.errors import MolaError

OVER = {"experts": "num_experts", "tokens": "tokens"}  # what grows -> the key of its number
FROZEN = "frozen"  # 1 by definition, so it is no curve
# Curves of different conditions would not be comparable.
_SAME_IN_ROWS = ("model", "num_layers", "dropout", "r", "optimizer")
_SAME_IN_RECORDS = ("cpu", "gpu", "device", "threads", "keep_memory", "environment", "versions", "top_k")


class Point(NamedTuple):
    """A measured time over that of the frozen base, at a number of experts or tokens."""

    x: int
    median: float
    p20: float
    p80: float


@dataclass
class Panel:
    """The curves of one dtype.

    Attributes:
        over: what grows: experts or tokens.
        dtype: of the frozen base.
        fixed: tokens of a step where experts grow, experts per module where tokens grow.
        curves: provider -> points in the order of x.
    """

    over: str
    dtype: str
    fixed: int
    curves: dict[str, list[Point]] = field(default_factory=dict)


class Growth(NamedTuple):
    """What a picture shows.

    Attributes:
        panels: one for everything that grows and every dtype, in the order of the files.
        setting: what was measured, as a sentence.
        conditions: processor, threads and versions, as a sentence.
    """

    panels: list[Panel]
    setting: str
    conditions: str


class _Source(NamedTuple):
    """A row and the file that holds it."""

    path: str
    row: Mapping[str, Any]


def read_growth(paths: Sequence[str], model: str | None = None) -> Growth:
    """Read the results of one or more runs made under the same conditions.

    Args:
        paths: JSON files of `python -m benchmarks`.
        model: whose rows; None where the files hold one model.

    Raises:
        MolaError: a file is missing or no such result, or files do not go together.
    """
    records = {path: _read(path) for path in paths}
    try:
        return _combine(records, model)
    except (KeyError, TypeError, AttributeError) as error:
        raise MolaError(
            f"`results` must be as this version of `python -m benchmarks` writes them: in {' or '.join(paths)} "
            f"something is missing or of another kind ({type(error).__name__}: {error}). Measure again."
        ) from error


def _combine(records: Mapping[str, dict[str, Any]], model: str | None) -> Growth:
    sources = [_Source(path, row) for path, record in records.items() for row in _rows(path, record)]
    sources = _of_model(sources, model)
    used = {path: records[path] for path in dict.fromkeys(source.path for source in sources)}
    conditions = {path: _conditions(record) for path, record in used.items()}
    _check_same(_SAME_IN_RECORDS, list(conditions.items()))
    _check_same(_SAME_IN_ROWS, sources)
    made_with = next(iter(conditions.values()))
    rounds = sorted({record["options"]["repeats"] for record in used.values()})
    return Growth(_panels(sources), _setting(sources[0].row, made_with, rounds), _made_with(made_with))


def _read(path: str) -> dict[str, Any]:
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MolaError(f"`results` cannot be read: {path!r} ({error.strerror or error}). Check the path.") from error
    except ValueError as error:
        raise MolaError(
            f"`results` must be JSON files of `python -m benchmarks`: {path!r} is no JSON ({error})."
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("results"), dict):
        raise MolaError(f"`results` must be JSON files of `python -m benchmarks`: {path!r} holds no results.")
    return record


def _rows(path: str, record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    rows = record["results"].get("growth")
    if not rows:
        has = ", ".join(suite for suite, rows in record["results"].items() if rows) or "no rows"
        raise MolaError(
            f"`results` must hold the suite growth: {path!r} has {has}. Measure with `python -m benchmarks --suite "
            "growth`."
        )
    for row in rows:
        if "ratio_to_frozen" not in row:
            raise MolaError(
                f"`results` must hold times over those of the frozen layers: {path!r} has none for "
                f"{row.get('provider')!r}. Measure again with {FROZEN} among --providers."
            )
        yield row


def _of_model(sources: Sequence[_Source], model: str | None) -> list[_Source]:
    models = list(dict.fromkeys(row.get("model") for _, row in sources))
    if model is None and len(models) > 1:
        raise MolaError(
            f"`model` must say whose curves to draw: the results hold {', '.join(map(str, models))}. "
            f"Pass for example --model {models[0]}."
        )
    if model is not None and model not in models:
        raise MolaError(f"`model` must be one of the results, {', '.join(map(str, models))}: got {model!r}.")
    return [source for source in sources if model is None or source.row["model"] == model]


def _conditions(record: Mapping[str, Any]) -> dict[str, Any]:
    machine = record["machine"]
    return {
        "cpu": machine["cpu"],
        "gpu": machine["gpu"],
        "device": record["device"],
        "threads": record["threads"],
        "versions": record["versions"],
        "keep_memory": record["options"].get("keep_memory", False),
        "environment": {name: value for name, value in record.get("environment", {}).items() if "MOLA" in name},
        "top_k": record["options"]["top_k"],  # rows have what was left of it with fewer experts
    }


def _check_same(names: Sequence[str], sources: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    (first_path, first), *others = sources
    for path, other in others:
        for name in names:
            if other[name] != first[name]:
                raise MolaError(
                    f"`results` must be measured under the same conditions: `{name}` is {first[name]!r} in "
                    f"{first_path!r} and {other[name]!r} in {path!r}. Draw them separately."
                )


def _panels(sources: Sequence[_Source]) -> list[Panel]:
    panels: dict[tuple[str, str], Panel] = {}
    for path, row in sources:
        over, dtype, name = row["over"], row["dtype"], row["provider"]
        fixed = row["tokens" if over == "experts" else "num_experts"]
        panel = panels.setdefault((over, dtype), Panel(over, dtype, fixed))
        if fixed != panel.fixed:
            raise MolaError(
                f"`results` that grow over {over} in {dtype} must agree in the rest: {path!r} has {fixed} where others "
                f"have {panel.fixed}. Draw them separately."
            )
        if name == FROZEN:
            continue
        points = panel.curves.setdefault(name, [])
        point = Point(row[OVER[over]], *(float(row["ratio_to_frozen"][key]) for key in ("median", "p20", "p80")))
        if point.x in {other.x for other in points}:
            raise MolaError(
                f"`results` must hold every point once: {name} in {dtype} with {point.x} {over} comes twice, the "
                f"second time in {path!r}. Leave a file out."
            )
        points.append(point)
    drawn = [panel for panel in panels.values() if panel.curves]
    if not drawn:
        raise MolaError(f"`results` must hold another provider than {FROZEN}. Measure again with mola.")
    for panel in drawn:
        for points in panel.curves.values():
            points.sort()
    return drawn


def _setting(row: Mapping[str, Any], conditions: Mapping[str, Any], rounds: Sequence[int]) -> str:
    count = " to ".join(str(number) for number in dict.fromkeys((rounds[0], rounds[-1])))
    count += " round" if count == "1" else " rounds"
    clock = "CPU" if conditions["device"] == "cpu" else "GPU"
    optimizer = ", steps of AdamW included" if row["optimizer"] else ""
    return (
        f"{row['num_layers']} random layers with the shapes of {Path(row['model']).name}, r {row['r']}, "
        f"top_k {conditions['top_k']}, dropout {row['dropout']:g}{optimizer}. "
        f"Ratios of {clock} seconds within a round: median and 20th to 80th percentile over {count}."
    )


def _made_with(conditions: Mapping[str, Any]) -> str:
    machine = conditions["cpu"]
    if conditions["device"] != "cpu":
        machine = f"{conditions['gpu']}, {machine}"
    threads = "1 thread" if conditions["threads"] == 1 else f"{conditions['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    return f"{machine}, {threads}; {versions}."
