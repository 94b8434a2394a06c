"""The rows of a comparison as a table: in the terminal, as CSV and as Markdown."""

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean, median

from rich.markup import escape
from rich.table import Table

from mola.evaluation.differences import Difference
from mola.reporting.formatting import computers, duration, markdown_table
from mola.studies.comparison.contrasts import Contrast
from mola.studies.comparison.options import MARK
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.summary import AT_END, Row
from mola.studies.comparison.tuning import Found, Power

COLUMNS = (
    "recipe",
    "trained values",
    "seeds",
    "accuracy",
    "its 95 % over seeds",
    "difference",
    "its 95 %",
    "p",
    "verdict",
)
_CSV_COLUMNS = (
    "task",
    "measure",
    "recipe",
    "trainable_parameters",
    "budget_group",
    "seeds",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "difference",
    "difference_low",
    "difference_high",
    "difference_joint_low",
    "difference_joint_high",
    "p_adjusted",
    "verdict",
    "num_experts",
    "steps_to_target",
)
NOTE = (
    "Accuracy in per cent, differences to {reference} in points, on the same questions with the same seeds; their 95 % "
    "intervals are for other seeds and other questions. p and verdict allow for the number of recipes: all verdicts of "
    "a table together are right in 95 % of such studies."
)
_FEW_SEEDS = 5


CONTRAST_COLUMNS = ("recipe", "less", "seeds", "difference", "its 95 %", "p", "verdict")
CONTRAST_NOTE = "p and verdict allow for the number of pairs in a table."


def note_of(rows: Sequence[Row], reference: str, mark: str = "") -> str:
    """What the tables mean, with what these rows make necessary to say; `mark` stands around names of recipes."""
    sentences = [NOTE.format(reference=f"{mark}{reference}{mark}")]
    sentences += _equal_budgets(rows, reference, mark)
    return " ".join([*sentences, *few_seeds(row.difference.seeds for row in rows if row.difference)])


def few_seeds(seeds: Iterable[int]) -> list[str]:
    """A sentence, if one of these numbers of seeds is so low that intervals over them say too much."""
    if all(number >= _FEW_SEEDS for number in seeds):
        return []
    return [
        f"Fewer than {_FEW_SEEDS} seeds hardly tell how much seeds differ: intervals are too narrow, and verdicts "
        "too sure, in more than 5 % of such studies."
    ]


def _equal_budgets(rows: Sequence[Row], reference: str, mark: str) -> list[str]:
    """One sentence, or one for each task where they differ; none where all recipes are alike."""
    by_task: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.budget_group is not None:
            by_task.setdefault(row.task, {})[row.recipe] = row.budget_group
    lists = {}
    for task, groups in by_task.items():
        same = [f"{mark}{name}{mark}" for name, group in groups.items() if group == groups.get(reference)]
        lists[task] = "" if reference not in groups or len(same) == len(groups) else f"{', '.join(same)}."
    if len({*lists.values()}) == 1:
        lists = {"": next(iter(lists.values()))}
    return [
        f"Trained values within 5 % of the reference's{f' on {task}' if task else ''}: {names}"
        for task, names in lists.items()
        if names
    ]


def title_of(row: Row | Contrast) -> str:
    """Heading of the table that a row stands in."""
    return row.task if row.measure == AT_END else f"{row.task}, {row.measure}"


def terminal_tables(rows: Sequence[Row], reference: str, contrasts: Sequence[Contrast] = ()) -> list[Table]:
    """One table per task, with a line between groups of equal budget; then those of `contrasts`."""
    tables, note = [], note_of(rows, reference)
    for title, members in groupby(rows, key=title_of):
        table = Table(title=escape(title), caption=escape(note))
        ordered = by_budget(list(members))
        for column in columns_of(ordered):
            table.add_column(column, justify="left" if column in ("recipe", "verdict") else "right", overflow="fold")
        for _, group in groupby(ordered, key=lambda row: row.budget_group):
            for row in group:
                table.add_row(*map(escape, cells(row, reference) + steps_cell(row)))
            table.add_section()
        tables.append(table)
    for title, lines in contrast_tables(contrasts):
        table = Table(*CONTRAST_COLUMNS, title=escape(title), caption=CONTRAST_NOTE)
        for line in lines:
            table.add_row(*map(escape, line))
        tables.append(table)
    return tables


def by_budget(rows: Sequence[Row]) -> list[Row]:
    """The base model first, then groups of equal budget, smallest first; within a group as given."""
    return sorted(rows, key=lambda row: -1 if row.budget_group is None else row.budget_group)


def cells(row: Row, reference: str) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    parameters = f"{row.trainable_parameters:,}" if row.trainable_parameters else "-"
    seeds = str(row.mean.seeds) if row.budget_group is not None else "-"
    start = [row.recipe, parameters, seeds, f"{100 * row.mean.value:.1f}", interval_cell(row.mean.interval_95, "")]
    other = row.difference
    if other is None:
        return [*start, *[""] * 3, "reference" if row.recipe == reference else ""]
    return [*start, f"{100 * other.value:+.1f}", interval_cell(other.both_95), p_cell(other.p_adjusted), other.verdict]


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Headings of one table."""
    return (*COLUMNS, "steps to target") if any(row.steps_to_target is not None for row in rows) else COLUMNS


def steps_cell(row: Row) -> list[str]:
    """Median number of steps to the accuracy asked for, and how many seeds have reached it; no cell if none was."""
    if row.steps_to_target is None:
        return []
    reached = sorted(step for step in row.steps_to_target if step is not None)
    seeds = len(row.steps_to_target)
    # A seed that does not reach it is later than all that do.
    is_known = len(reached) > seeds / 2
    middle = f"{median([*reached, *[float('inf')] * (seeds - len(reached))]):.0f}" if is_known else "later"
    return [f"{middle} ({len(reached)} of {seeds})"]


def contrast_tables(found: Sequence[Contrast]) -> list[tuple[str, list[list[str]]]]:
    """Title and lines of every table of recipes that are compared with each other."""
    return [
        (f"{title}: recipes with each other", [contrast_cells(each) for each in members])
        for title, members in groupby(found, key=title_of)
    ]


def contrast_cells(contrast: Contrast) -> list[str]:
    """A contrast as text, in the order of `CONTRAST_COLUMNS`."""
    found = contrast.difference
    start = [contrast.recipe, contrast.other, str(found.seeds), f"{100 * found.value:+.1f}"]
    return [*start, interval_cell(found.both_95), p_cell(found.p_adjusted), found.verdict]


def search_tables(found: Sequence[Found]) -> list[Table]:
    """What was tried, and chosen, for each recipe: one table per task."""
    tables = []
    for task, members in groupby(found, key=lambda each: each.task):
        tried = list(members)
        table = Table(title=escape(f"{task}: search"), caption=escape(search_note(tried)))
        lines = search_lines(tried)
        for column in lines[0]:
            table.add_column(column, overflow="fold")
        for line in lines[1:]:
            table.add_row(*map(escape, line))
        tables.append(table)
    return tables


def search_lines(found: Sequence[Found]) -> list[list[str]]:
    """Headings and cells of one task's search."""
    marks = list(found[0].accuracies)
    head = ["recipe", *(mark.lstrip(MARK) for mark in marks), "chosen"]
    return [
        head,
        *(
            [
                each.recipe,
                *(f"{100 * each.accuracies[mark]:.1f}" for mark in marks),
                each.chosen.lstrip(MARK) + (f" (at the edge: {', '.join(each.edges)})" if each.edges else ""),
            ]
            for each in found
        ),
    ]


def search_note(found: Sequence[Found]) -> str:
    """What the table of a search means."""
    return (
        f"Accuracy {found[0].measure} in per cent, mean over the tuning seeds, on questions that are no part of the "
        "test. At the edge: of an option the lowest or highest value is the best, and one beyond may be better."
    )


def power_line(power: Power) -> str:
    """What a comparison can see, in a sentence."""
    needed = (
        f"it takes {power.needed} seeds"
        if power.needed
        else "no number of seeds up to 1,000 is enough: it takes more questions"
    )
    return (
        f"{power.task}: to see a difference of {power.margin:g} points {power.measure} with a probability of 80 %, "
        f"{needed} on {power.questions} questions (between seeds a difference varies by "
        f"{power.seed_deviation:.1f} points, by the search); there are {power.seeds}."
    )


def effort_line(results: Sequence[Result]) -> str:
    """What a comparison has cost, in a sentence or two; empty before the first run."""
    runs = [each for each in results if each.recipe != BASE]
    if not runs:
        return ""
    search = ", those of the search included," if any(each.key.candidate for each in runs) else ""
    return (
        f"{len(runs)} trainings{search} took {duration(sum(each.seconds_training for each in runs))}, their tests "
        f"{duration(sum(each.seconds_testing for each in runs))}. "
        f"Machine of each process: {computers(each.machine for each in runs)}."
    )


def time_left(results: Sequence[Result], left: int) -> str:
    """What `left` more runs cost if they are like those so far, for a log line; empty before the first."""
    seconds = [each.seconds_training + each.seconds_testing for each in results if each.recipe != BASE]
    return f" (about {duration(fmean(seconds) * left)} of computing left)" if seconds else ""


def markdown(rows: Sequence[Row], reference: str, contrasts: Sequence[Contrast] = ()) -> str:
    """A table per task under a heading, then those of `contrasts`."""
    parts: list[str] = []
    for title, members in groupby(rows, key=title_of):
        ordered = by_budget(list(members))
        lines = [cells(row, reference) + steps_cell(row) for row in ordered]
        parts += [f"### {title}", markdown_table(columns_of(ordered), lines)]
    parts.append(note_of(rows, reference, "`"))
    for title, lines in contrast_tables(contrasts):
        parts += [f"### {title}", markdown_table(CONTRAST_COLUMNS, lines)]
    return "\n\n".join([*parts, *([CONTRAST_NOTE] if contrasts else [])]) + "\n"


def search_markdown(found: Sequence[Found], powers: Sequence[Power]) -> str:
    """The search and what it says about the number of seeds; empty without one."""
    parts = []
    for task, members in groupby(found, key=lambda each: each.task):
        head, *lines = search_lines(list(members))
        parts += [f"### {task}: search", markdown_table(head, lines)]
    if parts:
        parts += [search_note(found), *map(power_line, powers)]
    return "".join(f"{part}\n\n" for part in parts)


def comma_separated(rows: Sequence[Row], contrasts: Sequence[Contrast] = ()) -> str:
    """All numbers unrounded, one line per task and recipe, then one per contrast, as recipe `A - B`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row in rows:
        low, high = row.mean.interval_95 or ("", "")
        line = [row.task, row.measure, row.recipe, row.trainable_parameters, row.budget_group, row.mean.seeds]
        line += [row.mean.value, low, high]
        line += [""] * 7 if row.difference is None else _numbers(row.difference)
        experts = " ".join("-".join(map(str, each)) for each in row.num_experts)
        steps = " ".join("never" if each is None else f"{each:g}" for each in row.steps_to_target or ())
        writer.writerow([*line, experts, steps])
    for each in contrasts:
        name, seeds = f"{each.recipe} - {each.other}", each.difference.seeds
        writer.writerow([each.task, each.measure, name, "", "", seeds, "", "", "", *_numbers(each.difference), "", ""])
    return text.getvalue()


def _numbers(found: Difference) -> list[float | str]:
    ends = [*(found.both_95 or ("", "")), *(found.joint_95 or ("", ""))]
    return [found.value, *ends, "" if found.p_adjusted is None else found.p_adjusted, found.verdict]


def interval_cell(interval: tuple[float, float] | None, sign: str = "+") -> str:
    """Ends of an interval in points or per cent; empty where there is none."""
    return "" if interval is None else f"{100 * interval[0]:{sign}.1f} to {100 * interval[1]:{sign}.1f}"


def p_cell(value: float | None) -> str:
    """A p-value with three digits; empty where there is none."""
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
