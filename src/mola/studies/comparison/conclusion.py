"""The result of a comparison in words: what differs, how sure that is, what more data would show, what to keep."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mola.evaluation.differences import MORE_QUESTIONS, Difference, more_seeds
from mola.files.digests import WEIGHTS_FILE
from mola.reporting.formatting import nats, points
from mola.studies.comparison.options import CompareOptions, Key
from mola.studies.comparison.outcomes import LOSS, Outcome
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.tables import Row

_NO_GAIN = 0.95  # of the width of an interval: a larger share is no gain


def conclusion(options: CompareOptions, rows: Sequence[Row], results: Sequence[Result]) -> list[str]:
    """Sentences about each task; none for a task that has no difference yet."""
    lines, reference = [], str(options.reference)
    is_untuned = options.is_short and not options.candidates
    condition = " at this learning_rate" if is_untuned else ""
    for task in options.tasks or {}:
        of_task = [row for row in rows if row.task == task]
        compared = [(row, row.difference) for row in of_task if row.difference is not None]
        if not compared:
            continue
        questions = next(each.total for each in results if each.task == task)
        where = f"{task}: on" if len(options.tasks or {}) > 1 else "On"
        lines += [f"{where} {_verdict(row, found, reference, questions, condition)}" for row, found in compared]
        lines.append(_what_more_would_show(compared, questions))
        lines += _what_to_keep(options, task, of_task)
    if lines and is_untuned:
        lines.append(
            f"All were trained with learning_rate {options.learning_rate:g}, which may suit one recipe better than "
            "another: --tune '{\"learning_rate\": [0.0003, 0.001, 0.003]}' gives each its own."
        )
    return lines


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
