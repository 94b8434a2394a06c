"""The result of a comparison in words: what differs, how sure that is, what more data would show, what to keep."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mola.evaluation.differences import MORE_QUESTIONS, Difference, more_seeds
from mola.files.digests import WEIGHTS_FILE
from mola.options.fields import parse_mapping, shown_name
from mola.options.parser import OptionsParser
from mola.reporting.formatting import nats, points
from mola.studies.comparison.default_recipes import with_rank
from mola.studies.comparison.drawn_rows import rows_missing_for_a_search
from mola.studies.comparison.options import CompareOptions, Key
from mola.studies.comparison.outcomes import LOSS, Outcome
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.tables import SAME_BUDGET, Row, unequal_sizes

_NO_GAIN = 0.95  # of the width of an interval: a larger share is no gain
_RATES = [0.0003, 0.001, 0.003]  # to search


def conclusion(options: CompareOptions, rows: Sequence[Row], results: Sequence[Result]) -> list[str]:
    """Sentences about each task; none for a task that has no difference yet.

    A recipe is named as the one to keep only if all recipes of the task have about the same size, each had a learning
    rate of its own from a search, and each run has learnt. Otherwise, the reasons and the next command are given.
    """
    lines, reference = [], str(options.reference)
    changes: dict[str, Any] = {}
    is_searched = any("learning_rate" in each for each in options.candidates.values())
    for task in options.tasks or {}:
        of_task = [row for row in rows if row.task == task]
        compared = [(row, row.difference) for row in of_task if row.difference is not None]
        if not compared:
            continue
        runs = [each for each in results if each.task == task and each.key in options.runs]
        where = f"{task}: on" if len(options.tasks or {}) > 1 else "On"
        condition = "" if is_searched else " at this learning_rate"
        lines += [f"{where} {_verdict(row, found, reference, runs[0].total, condition)}" for row, found in compared]
        lines.append(_what_more_would_show(compared, runs[0].total))
        reasons = []
        if text := unequal_sizes(of_task):
            reasons.append(text)
            changes |= _equal_sizes(options, task, of_task)
        lines.append(_rates(runs, is_searched))
        if not is_searched:
            reasons.append("One learning rate was tried, which may suit one recipe better than another.")
            changes |= _search(options, changes.get("recipes", options.recipes))
        if weak := [each for each in runs if each.not_learnt]:
            names = ", ".join(dict.fromkeys(each.recipe for each in weak))
            first = f"{weak[0].recipe} with seed {weak[0].seed}: {weak[0].not_learnt}"
            reasons.append(f"{len(weak)} of {len(runs)} runs have not learnt their data ({names}). {first}")
            changes |= _longer(options)
        if reasons:
            lines += ["No recipe is named as the one to keep:", *(f"- {each}" for each in reasons)]
        else:
            lines += _what_to_keep(options, task, of_task)
    return [*lines, *_next(options, changes)] if changes else lines


def _rates(runs: Sequence[Result], is_searched: bool) -> str:
    """The learning rate of each recipe, and where it is from."""
    rates = {each.recipe: each.settings.get("learning_rate", CompareOptions.learning_rate) for each in runs}
    values = ", ".join(f"{recipe} {rate:g}" for recipe, rate in rates.items())
    origin = "each the best that the search tried" if is_searched else "not searched"
    return f"Learning rates: {values} ({origin})."


def _equal_sizes(options: CompareOptions, task: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Changes that give smaller recipes the rank at which they have the size of the largest."""
    recipes, largest = parse_mapping("recipes", options.recipes), max(row.trainable_parameters for row in rows)
    for row in rows:
        run = options.runs.get(Key(task, row.recipe, (options.seeds or [0])[0]))
        r = "" if run is None else str(run.adapter_setting("r"))
        if run is not None and r.isdecimal() and row.trainable_parameters < (1 - SAME_BUDGET) * largest:
            rank = round(int(r) * largest / row.trainable_parameters)
            recipes[row.recipe] = {**recipes[row.recipe], **with_rank(run, rank)}
    return {"recipes": recipes}


def _search(options: CompareOptions, recipes: Any) -> dict[str, Any]:
    """Changes that search the learning rate of each recipe, which must then be set nowhere else."""
    parts = {"recipes": recipes, "tasks": options.given["tasks"] and options.tasks}
    without = {
        name: {key: {k: v for k, v in values.items() if k != "learning_rate"} for key, values in part.items()}
        for name, part in parts.items()
        if part and (name == "tasks" or not options.is_short)
    }
    tune = {**parse_mapping("tune", options.tune), "learning_rate": _RATES}
    return {**without, "learning_rate": None, "tune": tune}


def _longer(options: CompareOptions) -> dict[str, Any]:
    if options.max_steps > 0:
        return {"max_steps": 2 * options.max_steps}
    return {"num_train_epochs": f"{2 * options.num_train_epochs:g}"}


def _next(options: CompareOptions, changes: Mapping[str, Any]) -> list[str]:
    """The command with `changes`, in a folder of its own."""
    new = {**changes, "output_dir": f"{options.output_dir}-2"}
    new |= dict.fromkeys(("record", "tables", "hub_token"))  # those of this comparison, or secret
    defaults = vars(OptionsParser(CompareOptions).parse_args([]))
    words = ["mola", "compare"]
    for each in sorted(fields(CompareOptions), key=lambda each: each.name not in ("base_model", "data")):
        value = new.get(each.name, options.given.get(each.name))
        if value not in (None, each.default, defaults.get(each.name)):
            texts = value if isinstance(value, list) else [value]
            words += [f"--{shown_name(each)}", *(v if isinstance(v, str) else json.dumps(v) for v in texts)]
    too_few = rows_missing_for_a_search(options) if "tune" in changes else []
    return [*too_few, f"Next: {shlex.join(words)}"]


def _verdict(row: Row, difference: Difference, reference: str, questions: int, condition: str) -> str:
    """One sentence: data, difference, interval and verdict."""
    outcome, found = row.outcome, difference.verdict
    noun, what, unit = ("rows", "loss", " nats per token") if outcome is LOSS else ("questions", "accuracy", " points")
    seeds = "1 seed" if difference.seeds == 1 else f"{difference.seeds} seeds"
    text = (
        f"{questions} test {noun} and {seeds}, the {what} of {row.recipe} "
        f"is {_size(difference.value, outcome)}{unit} {_side(difference.value)} than that of {reference}"
    )
    if difference.interval is None:
        return f"{text}: {found}."
    first, last = difference.interval
    side = "" if _side(first) == _side(last) else f" {_side(first)}"
    text += f" (joint 95 % interval: {_size(first, outcome)}{side} to {_size(last, outcome)} {_side(last)}): "
    is_clear = found in ("better", "worse")
    return f"{text}{row.recipe} is {found}{condition}." if is_clear else f"{text}not shown to differ, {found}."


def _size(value: float, outcome: Outcome) -> str:
    return nats(abs(value), "") if outcome is LOSS else points(abs(value), "")


def _side(value: float) -> str:
    return "lower" if value < 0 else "higher"


def _what_more_would_show(compared: Sequence[tuple[Row, Difference]], questions: int) -> str:
    """How wide the widest interval would be with more seeds, and with more questions."""
    halves = {}
    for row, found in compared:
        if found.interval is not None and found.with_more_seeds is not None and found.with_more_questions is not None:
            half = (found.interval[1] - found.interval[0]) / 2
            halves[half] = row, found.seeds, (half, found.with_more_seeds, found.with_more_questions)
    if not halves:
        return "There is no interval, and so no verdict, with one seed or one test row. Pass more --seeds."
    row, seeds, widths = halves[max(halves)]
    noun = "rows" if row.outcome is LOSS else "questions"
    more = f"{more_seeds(seeds)} seeds", f"{MORE_QUESTIONS * questions} test {noun}"
    # With few seeds that differ a lot, more questions lower the degrees of freedom: the interval would become wider.
    expected = " and ".join(
        f"about {_size(width, row.outcome)} with {data}" if width < _NO_GAIN * widths[0] else f"no less with {data}"
        for width, data in zip(widths[1:], more, strict=True)
    )
    return (
        f"More data: the interval of {row.recipe} reaches {_size(widths[0], row.outcome)} to each side. It would reach "
        f"{expected}."
    )


def _what_to_keep(options: CompareOptions, task: str, rows: Sequence[Row]) -> list[str]:
    """The best recipe that is shown to be better than the reference, else the reference; how to serve its adapter."""
    reference = str(options.reference)
    better = [row for row in rows if row.difference is not None and row.difference.verdict == "better"]
    kept = max(better, key=_goodness, default=next(row for row in rows if row.recipe == reference))
    why = f"it is better than {reference}" if better else "no recipe is shown to be better"
    lines = [f"Keep {kept.recipe}: {why}."]
    base = next((row for row in rows if row.recipe == BASE), None)
    if base is not None and _goodness(base) >= _goodness(kept):
        values = " and ".join(base.outcome.texts(row.value or 0.0)[0] for row in (base, kept))
        lines.append(
            f"But the training has not helped: {base.outcome.columns[0]} of the base model alone and of {kept.recipe}: "
            f"{values}. Train longer, or with a lower learning_rate."
        )
    folder = Path(options.output_dir or "") / str(Key(task, kept.recipe, (options.seeds or [0])[0]))
    if (folder / WEIGHTS_FILE).exists():
        lines.append(f"Serve it: {shlex.join(['mola', 'serve', str(folder)])}")
    return lines


def _goodness(row: Row) -> float:
    value = row.value or 0.0
    return -value if row.outcome is LOSS else value
