"""What the tables of a comparison mean, and what it cost, in sentences."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from mola.reporting.formatting import computers, duration
from mola.studies.comparison.record import BASE, Result
from mola.studies.comparison.summary import ALL_TASKS, AT_END, Row
from mola.studies.comparison.tuning import Found, Power

NOTE = (
    "Accuracy in per cent, differences to {reference} in points, on the same questions with the same seeds; their 95 % "
    "intervals are for other seeds and other questions. Joint intervals, p and verdict allow for the number of "
    "recipes: all verdicts of a table together are right in 95 % of such studies, as long as other seeds differ no "
    "more than these: what goes wrong with none of them is in no interval."
)
_FEW_SEEDS = 5
CONTRAST_NOTE = "Joint intervals, p and verdict allow for the number of pairs in a table."


def note_of(rows: Sequence[Row], reference: str, mark: str = "") -> str:
    """What the tables mean, with what these rows make necessary to say; `mark` stands around names of recipes."""
    sentences = [NOTE.format(reference=f"{mark}{reference}{mark}")]
    sentences += _equal_budgets(rows, reference, mark)
    diverged = [(row.task, row.recipe, row.diverged) for row in rows if row.measure == AT_END and row.task != ALL_TASKS]
    sentences += _diverged(diverged, mark)
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


def _diverged(runs: Iterable[tuple[str, str, Sequence[int]]], mark: str = "") -> list[str]:
    """One sentence about trainings that diverged, given as task, recipe and seeds; none if there is none."""
    named = [
        f"{mark}{recipe}{mark} on {task} with seed {', '.join(map(str, seeds))}"
        for task, recipe, seeds in runs
        if seeds
    ]
    return [f"Diverged, so that all answers count as wrong: {'; '.join(named)}."] if named else []


def search_note(found: Sequence[Found], mark: str = "") -> str:
    """What the table of a search means; `mark` stands around names of recipes."""
    sentence = (
        f"Accuracy {found[0].measure} in per cent, mean over the tuning seeds, on questions that are no part of the "
        "test. At the edge: of an option the lowest or highest value is the best, and one beyond may be better."
    )
    diverged = [(one.task, one.recipe + name, seeds) for one in found for name, seeds in one.diverged.items()]
    return " ".join([sentence, *_diverged(diverged, mark)])


def power_line(power: Power) -> str:
    """What a comparison can see, in a sentence."""
    needed = (
        f"it takes {power.needed} seeds"
        if power.needed
        else "1,000 seeds are not enough: it takes more of them, or more questions,"
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
