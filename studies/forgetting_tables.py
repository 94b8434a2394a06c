"""The tables of `studies.forgetting`, from its record alone: means, paired differences, what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mola.evaluation.differences import Difference, Part, paired_difference, t_interval
from mola.reporting.formatting import computers, duration, markdown_table, points
from mola.studies.comparison.marks import as_numbers
from mola.studies.comparison.notes import few_seeds
from mola.studies.comparison.tables import interval_cell, p_cell

NO_RESULT = "There is no result yet."
MEASURES = {"op": "OP", "pd": "PD"}
_LEAST = {"op": 0.0, "pd": -1.0}  # of a sequence; the most is 1
Runs = dict[int, Mapping[str, Any]]  # of one recipe, by seed, which has an order of its own


class Comparison(NamedTuple):
    """A recipe minus another in one measure, over the sequences with the same seed and order."""

    measure: str  # "op" or "pd"
    recipe: str
    other: str
    difference: Difference  # its `seeds` are the sequences


def tables(record: Mapping[str, Any]) -> str:
    """All tables in Markdown."""
    if not record["runs"]:
        return NO_RESULT
    settings, runs = record["settings"], _runs(record)
    parts = [_search_table(record)] if settings["rates"] else []
    if any(runs.values()):
        parts += [_state(record), _means_table(runs), _places_table(runs), _sequences_table(settings, runs)]
        parts.append(_comparison_table(record))
    return "\n\n".join(parts)


def is_finished(record: Mapping[str, Any]) -> bool:
    """Whether every sequence of the study is done, so that its page may say what came out."""
    settings = record.get("settings")
    return bool(settings) and _num_done(record) == len(settings["recipes"]) * len(settings["seeds"])


def _num_done(record: Mapping[str, Any]) -> int:
    return sum(map(len, _runs(record).values()))


def comparisons(record: Mapping[str, Any]) -> list[Comparison]:
    """Every recipe against the reference, then those that are compared with each other, in both measures."""
    runs, settings = _runs(record), record["settings"]
    pairs = [(name, settings["reference"]) for name in settings["recipes"] if name != settings["reference"]]
    pairs += [pair for pair in map(tuple, settings["contrasts"]) if pair not in pairs]
    wanted = [(measure, recipe, other) for measure in MEASURES for recipe, other in pairs]
    shared = [sorted(runs[recipe].keys() & runs[other].keys()) for _, recipe, other in wanted]
    found = []
    for (measure, recipe, other), seeds in zip(wanted, shared, strict=True):
        if seeds:
            ours, theirs = (
                np.stack([by_question(runs[name][seed], measure) for seed in seeds]) for name in (recipe, other)
            )
            parts = [Part(ours.shape[1], 1 - _LEAST[measure])]
            difference = paired_difference(ours, theirs, sum(map(bool, shared)), parts)
            found.append(Comparison(measure, recipe, other, difference))
    return found


def by_question(run: Mapping[str, Any], measure: str) -> np.ndarray:
    """What every question adds to OP or PD, whose mean it is; kinds in one order for all sequences.

    With `T` kinds of `n` questions, a question's mark `m` in the end and `m_own` after the stage of its kind:
        OP: `m`        PD: `(m - m_own) T / (T - 1)`, of the last kind 0
    """
    parts, order = {}, run["order"]
    for stage, kind in enumerate(order):
        last = as_numbers(run["marks"][-1][stage])
        change = (last - as_numbers(run["marks"][stage][stage])) * len(order) / (len(order) - 1)
        parts[kind] = last if measure == "op" else change
    return np.concatenate([parts[kind] for kind in sorted(parts)])


def chosen_rate(record: Mapping[str, Any], recipe: str) -> float | None:
    """The rate with the best mean OP on validation questions, the lowest of equals; None if not all are measured."""
    settings, searched = record["settings"], [run for run in record["runs"] if run["is_search"]]
    found = {
        rate: [run["op"] for run in searched if (run["recipe"], run["learning_rate"]) == (recipe, rate)]
        for rate in sorted(settings["rates"])
    }
    if any(len(values) < len(settings["tuning_seeds"]) for values in found.values()):
        return None
    # Means of as many right answers differ in their last digits.
    return max(found, key=lambda rate: round(float(np.mean(found[rate])), 9))


def _choice(rate: float | None, rates: Sequence[float]) -> str:
    if rate is None:
        return ""
    return f"{rate:g}{' (at the edge)' if len(rates) > 1 and rate in (min(rates), max(rates)) else ''}"


def _runs(record: Mapping[str, Any]) -> dict[str, Runs]:
    """Finished sequences of the study, without those of the search."""
    found: dict[str, Runs] = {name: {} for name in record["settings"]["recipes"]}
    for run in record["runs"]:
        if not run["is_search"]:
            found[run["recipe"]][run["seed"]] = run
    return found


def _state(record: Mapping[str, Any]) -> str:
    settings, done = record["settings"], _num_done(record)
    wanted = len(settings["recipes"]) * len(settings["seeds"])
    seconds = sum(run["seconds_training"] + run["seconds_testing"] for run in record["runs"])
    text = f"{done} of {wanted} sequences are finished{'' if done == wanted else ': the tables will change'}. "
    text += f"All sequences{', those of the search too,' if settings['rates'] else ''} took {duration(seconds)} of "
    machines = computers(run["machine"] for run in record["runs"])
    return f"{text}training and testing. Machine of each process: {machines}."


def _means_table(runs: Mapping[str, Runs]) -> str:
    header = ("recipe", "trained values", "learning rate", "sequences", "own stage", "OP", "95 %", "PD", "95 %")
    header += ("earlier kinds, own stage", "at the end")
    rows = []
    for recipe, found in runs.items():
        if found:
            every = list(found.values())
            own = np.array([np.mean([row[-1] for row in run["matrix"]]) for run in every])
            cells = [recipe, f"{every[0]['trained']:,}", f"{every[0]['learning_rate']:g}", len(every)]
            cells.append(points(own.mean(), ""))
            for measure, sign in (("op", ""), ("pd", "+")):
                values = np.array([run[measure] for run in every])
                interval = t_interval(values, _LEAST[measure], 1.0) if len(values) > 1 else None
                cells += [points(values.mean(), sign), interval_cell(interval, sign)]
            earlier = [[np.mean(ends[:-1]) for ends in _stages(run)] for run in every]
            rows.append([*cells, *(points(value, "") for value in np.mean(earlier, axis=0))])
    note = (
        "OP and accuracies in per cent, PD in points, means over the sequences. Own stage: on each kind after its own "
    )
    note += "stage. The earlier kinds are all but the last: what they lose from there to the end is PD."
    return f"### Means\n\n{markdown_table(header, rows)}\n\n{note}"


def _stages(run: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Accuracies by kind, in their order: each after its own stage, and all after the last."""
    return [row[-1] for row in run["matrix"]], run["matrix"][-1]


def _places_table(runs: Mapping[str, Runs]) -> str:
    """How much is left of each kind, by its place in the order."""
    last = {
        recipe: np.mean([run["matrix"][-1] for run in found.values()], axis=0)
        for recipe, found in runs.items()
        if found
    }
    rows = [[recipe, *(points(value, "") for value in values)] for recipe, values in last.items()]
    places = ["first", "second", "third", "fourth", "last"]
    note = "Accuracy after the last stage in per cent, mean over the sequences; the kinds are others in each."
    return f"### What is left of the kind learnt first to last\n\n{markdown_table(('recipe', *places), rows)}\n\n{note}"


def _sequences_table(settings: Mapping[str, Any], runs: Mapping[str, Runs]) -> str:
    rows = []
    for seed in settings["seeds"]:
        found = [by_seed.get(seed) for by_seed in runs.values()]
        if order := next((", ".join(run["order"]) for run in found if run), None):
            cells = (f"{points(run['op'], '')}, {points(run['pd'])}" if run else "" for run in found)
            rows.append([seed, order, *cells])
    return f"### Every sequence\n\n{markdown_table(['seed', 'order', *runs], rows)}\n\nOP in per cent, PD in points."


def _comparison_table(record: Mapping[str, Any]) -> str:
    header = ("measure", "recipe", "less", "pairs", "points", "95 %", "joint 95 %", "p", "verdict")
    rows, every = [], comparisons(record)
    for measure, recipe, other, found in every:
        cells = [MEASURES[measure], recipe, other, found.seeds, points(found.value)]
        cells += [interval_cell(found.both_95), interval_cell(found.joint_95), p_cell(found.p_adjusted)]
        cells.append(found.verdict if found.seeds > 1 else "too few pairs")
        rows.append(cells)
    note = (
        "Differences of sequences with the same seed and order; intervals for other sequences and other questions. p "
        f"and the joint interval count all {len(rows)} comparisons (Bonferroni). A higher OP is better, and so is "
        "a higher PD: less is forgotten."
    )
    note = " ".join([note, *few_seeds(each.difference.seeds for each in every if each.difference.seeds > 1)])
    return f"### Differences\n\n{markdown_table(header, rows)}\n\n{note}"


def _search_table(record: Mapping[str, Any]) -> str:
    settings, searched = record["settings"], [run for run in record["runs"] if run["is_search"]]
    if not searched:
        return "The search for learning rates has not begun."
    rows = []
    for recipe, values in settings["recipes"].items():
        if values.get("learning_rate") is None:
            found = [
                [run["op"] for run in searched if (run["recipe"], run["learning_rate"]) == (recipe, rate)]
                for rate in settings["rates"]
            ]
            cells = [recipe, *(points(np.mean(ops), "") if ops else "" for ops in found)]
            rows.append([*cells, _choice(chosen_rate(record, recipe), settings["rates"])])
    header = ("recipe", *(f"rate {rate:g}" for rate in settings["rates"]), "chosen")
    seeds, order = ", ".join(map(str, settings["tuning_seeds"])), ", ".join(searched[0]["order"])
    note = (
        f"OP on validation questions in per cent, with seed {seeds} and the order {order}. At the edge: the lowest or "
        "highest rate is the best, and one beyond may be better."
    )
    return f"### Search for the learning rate\n\n{markdown_table(header, rows)}\n\n{note}"
