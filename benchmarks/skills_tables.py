"""`python -m benchmarks.skills_tables`: the tables of `benchmarks.skills_study`, from its records alone.

    python -m benchmarks.skills_tables --kinds 5

LoRA and `2468` that learn five kinds one after the other are those of the study of forgetting, whose record is
`studies/forgetting.json`: data, base model, orders and seeds are the same, which is checked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.errors import in_one_line
from mola.errors import MolaError
from mola.evaluation.differences import Difference, paired_difference
from mola.files.reading import read_json
from mola.options.fields import option
from mola.options.parsing import parse
from mola.reporting.formatting import duration, machines_text, markdown_table, points

_PROJECT = Path(__file__).resolve().parents[1]
REFERENCE, OWN = "skills", "own"
WORDS = {
    "base": "base model",
    "skills": "skills folder",
    "own": "own LoRA, named by the caller",
    "from layer 0": "own LoRA of all layers",
    "from layer 20": "own LoRA from layer 20 on",
    "sum": "sum of the LoRAs",
    "mean": "mean of the LoRAs",
    "ties": "PEFT TIES, density 0.5",
    "dare": "PEFT DARE, density 0.5",
    "arrow": "PEFT Arrow, top 3",
    "converted": "`mola convert --from lora --data`",
    "text classifier": "text classifier names the LoRA",
    "joint": "LoRA r 43, all kinds at once",
    "replay": "LoRA r 43 in sequence, 5 % replay",
    "lora": "LoRA r 43 in sequence",
    "2468": "`2468` in sequence",
}
Methods = Mapping[str, Mapping[str, Any]]  # of one seed


@dataclass
class TableOptions:
    """Options of the tables."""

    kinds: int = option(5, "Kinds of questions: 5 or 12.")
    records: str = option(str(_PROJECT / "studies" / "skills"), "Folder of the records.")
    forgetting: str = option(str(_PROJECT / "studies" / "forgetting.json"), "Record of the study of forgetting.")


def read(options: TableOptions) -> list[dict[str, Any]]:
    """The records of all seeds, with the sequences of the study of forgetting."""
    paths = sorted(Path(options.records, f"{options.kinds}_kinds").glob("seed_*.json"))
    records = sorted((read_json(path) for path in paths), key=lambda record: int(record["seed"]))
    if not records:
        raise MolaError(f"`records` ({options.records!r}) must hold {options.kinds}_kinds/seed_N.json: none is there.")
    if options.kinds == 5:
        earlier = read_json(Path(options.forgetting))
        for record in records:
            if record["fingerprints"] != earlier["fingerprints"]:
                raise MolaError(f"`forgetting` ({options.forgetting!r}) has other data or another base model.")
            for run in earlier["runs"]:
                if run["recipe"] in ("lora", "2468") and not run["is_search"] and run["seed"] == record["seed"]:
                    record["methods"].setdefault(run["recipe"], _as_method(run, record["order"]))
    return records


def _as_method(run: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """A sequence of the study of forgetting, as this study records one."""
    if run["order"] != list(order):
        raise MolaError(f"seed {run['seed']} of `forgetting` has the order {run['order']}, not {list(order)}.")
    marks = dict(zip(order, run["marks"][-1], strict=True))
    return {"marks": marks, "stages": run["marks"], "op": run["op"], "pd": run["pd"], "is_earlier": True}


def tables(records: Sequence[Mapping[str, Any]]) -> str:
    """All tables in Markdown."""
    kinds = sorted(records[0]["order"])
    by_method = {name: {r["seed"]: r["methods"][name] for r in records if name in r["methods"]} for name in WORDS}
    orders = {record["seed"]: record["order"] for record in records}
    found = {name: seeds for name, seeds in by_method.items() if seeds}
    parts = [_state(records), _main_table(found, kinds), _kinds_table(found, kinds)]
    if REFERENCE in found:
        parts.append(_drop(found[REFERENCE], orders, kinds))
        parts.append(_decisions(found[REFERENCE], orders))
    return "\n\n".join(parts)


def _numbers(marks: Mapping[str, str], kinds: Sequence[str]) -> np.ndarray:
    return np.array([float(mark) for kind in kinds for mark in marks[kind]])


def _difference(
    ours: Mapping[int, Any], theirs: Mapping[int, Any], kinds: Sequence[str], comparisons: int
) -> Difference | None:
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    stacked = (np.stack([_numbers(each[seed]["marks"], kinds) for seed in seeds]) for each in (ours, theirs))
    return paired_difference(*stacked, comparisons)


def _main_table(found: Mapping[str, Mapping[int, Any]], kinds: Sequence[str]) -> str:
    """OP and PD of each method, and its distance to own LoRAs and to the skills folder."""
    # The base model and LoRAs that the caller names are no rivals: the joint intervals count the other methods.
    rivals = [name for name in found if name not in ("base", OWN, REFERENCE) and not name.startswith("from layer")]
    rows = []
    for name, seeds in found.items():
        op = fmean(float(_numbers(each["marks"], kinds).mean()) for each in seeds.values())
        drops = [each["pd"] for each in seeds.values() if each.get("pd") is not None]
        cells = [WORDS[name], str(len(seeds)), points(op, ""), points(fmean(drops)) if drops else ""]
        cells += _cells(found.get(OWN) if name != OWN else None, seeds, kinds, 1, sign=-1)
        cells += _cells(found.get(REFERENCE) if name in rivals else None, seeds, kinds, len(rivals))
        rows.append(cells)
    header = ("method", "seeds", "OP", "PD", "less own LoRA", "95 %", "skills less it", "joint 95 %")
    note = (
        "OP in per cent, the rest in points; PD is for what learns one kind after the other. Intervals are for other "
        f"seeds and other questions; the joint ones hold for all {len(rivals)} comparisons together (Bonferroni)."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def _cells(
    ours: Mapping[int, Any] | None, theirs: Mapping[int, Any], kinds: Sequence[str], comparisons: int, sign: int = 1
) -> list[str]:
    found = None if ours is None else _difference(ours, theirs, kinds, comparisons)
    if found is None:
        return ["", ""]
    ends = None if found.interval is None else sorted(sign * each for each in found.interval)
    return [points(sign * found.value), "one seed" if ends is None else " to ".join(points(each) for each in ends)]


def _kinds_table(found: Mapping[str, Mapping[int, Any]], kinds: Sequence[str]) -> str:
    rows = [
        [
            WORDS[name],
            *(points(fmean(_numbers(each["marks"], [kind]).mean() for each in seeds.values()), "") for kind in kinds),
        ]
        for name, seeds in found.items()
    ]
    return f"{markdown_table(('method', *kinds), rows)}\n\nAccuracy in per cent at the end, mean over the seeds."


def _drop(seeds: Mapping[int, Any], orders: Mapping[int, Sequence[str]], kinds: Sequence[str]) -> str:
    """PD of the skills folder with its interval: marks at the end less those after each kind's own stage."""
    last, own = [], []
    for seed, each in seeds.items():
        after = {kind: each["stages"][place][place] for place, kind in enumerate(orders[seed])}
        last.append(_numbers(each["marks"], kinds))
        own.append(_numbers(after, kinds))
    found, scale = paired_difference(np.stack(last), np.stack(own)), len(kinds) / (len(kinds) - 1)
    ends = "one seed" if found.interval is None else " to ".join(points(scale * each) for each in found.interval)
    return f"PD of the skills folder: {points(scale * found.value)} points (95 %: {ends})."


def _decisions(seeds: Mapping[int, Any], orders: Mapping[int, Sequence[str]]) -> str:
    """Who was asked after the last stage, and the old answers that changed."""
    rows = []
    for seed, each in seeds.items():
        asked = each["asked"][-1]
        total = sum(sum(counts.values()) for counts in asked.values())
        right = sum(counts.get(kind, 0) for kind, counts in asked.items())
        base = sum(counts.get("base", 0) for counts in asked.values())
        changed = "; ".join(_changes(each["changed"])) or "none"
        shares = points(right / total, ""), points(base / total, "")
        rows.append([str(seed), ", ".join(orders[seed]), points(each["op"], ""), points(each["pd"]), *shares, changed])
    header = ("seed", "order", "OP", "PD", "asked right", "asked base", "old answers that changed")
    return markdown_table(header, rows)


def _changes(stages: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    for number, changes in enumerate(stages, start=1):
        for each in changes:
            old, new = (f"{state['predicted']} ({state['asked']})" for state in (each["before"], each["now"]))
            yield f"stage {number}: {each['task']} {each['id']} {old} to {new}"


def _state(records: Sequence[Mapping[str, Any]]) -> str:
    own = [method for record in records for method in record["methods"].values() if not method.get("is_earlier")]
    seconds = sum(method["seconds"] for method in own)
    return (
        f"{len(records)} seeds are begun. Training and testing took {duration(seconds)}. Machine of each process: "
        f"{machines_text(method['machine'] for method in own)}."
    )


@in_one_line("skills_tables")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 0, or 2 for wrong input."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(TableOptions, words, prog="benchmarks.skills_tables", summary=str(__doc__).partition("\n")[0])
    print(tables(read(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
