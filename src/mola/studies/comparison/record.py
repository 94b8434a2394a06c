"""The record of a comparison: every finished run with the answers' marks, in one JSON file.

The file alone is enough to go on: run folders may be gone, and a comparison can be continued on another machine. So it
holds the allocations that were made, too: one from a probe could not be made again without the probe's adapter.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mola.errors import MolaError
from mola.files.atomic import check_writable
from mola.files.reading import read_json
from mola.files.schema import ANYTHING, INTEGER, NUMBER, TEXT, check_form
from mola.studies.comparison.begun import first_change
from mola.studies.comparison.checks import Run
from mola.studies.comparison.options import Key

FORMAT = 1
BASE = "base model"  # stands in the place of a recipe; no recipe can have a space in its name


_RUN = {
    **dict.fromkeys(("task", "recipe", "marks"), TEXT),
    **dict.fromkeys(("seed", "correct", "total", "unanswered", "trainable_parameters"), INTEGER),
    **dict.fromkeys(("accuracy", "seconds_training", "seconds_testing"), NUMBER),
    **{name: {str: ANYTHING} for name in ("settings", "versions", "machine")},
    "num_experts": [INTEGER],
    "eval_loss": (NUMBER, None),
    "fingerprints": {str: ANYTHING},
    **dict.fromkeys(("base_model?", "dtype?", "rule?"), TEXT),
    "steps?": INTEGER,
    "curve?": [[ANYTHING, ANYTHING]],
    "diverged_at?": (INTEGER, None),
}
_ALLOCATIONS = {
    str: {
        "num_experts": [INTEGER],
        "num_experts_pattern?": ANYTHING,
        "settings": {str: ANYTHING},
        "made_from?": {str: TEXT},
    }
}


@dataclass
class Result:
    """A finished run."""

    task: str  # name of the task
    recipe: str  # name of the recipe
    seed: int  # the seed
    accuracy: float  # share of right answers
    correct: int  # number of right answers
    total: int  # number of questions
    unanswered: int  # of these without an answer
    marks: str  # a 1 for every right answer and a 0 for every other, in the order of the test data
    trainable_parameters: int  # trained values
    num_experts: list[int]  # experts by layer
    eval_loss: float | None  # loss on the evaluation data, if there were some
    seconds_training: float  # wall time
    seconds_testing: float  # wall time, of tests on the way too
    settings: dict[str, Any]  # see `mola.studies.comparison.checks.Run`
    fingerprints: dict[str, str]  # of the data
    versions: dict[str, str]  # of the software
    machine: dict[str, Any]  # cpu, gpu, threads
    # Records of earlier versions lack what follows.
    base_model: str = ""  # which weights, see `mola.models.identity`
    dtype: str = ""  # of the base
    rule: str = ""  # of the task, see `mola.studies.comparison.checks.Run`
    steps: int = 0  # of the training
    curve: list[tuple[int, str]] = field(default_factory=list)  # step and marks of the tests on the way
    diverged_at: int | None = None  # step after which the training had no numbers any more: answers count as wrong

    @property
    def key(self) -> Key:
        """What names the run."""
        return Key(self.task, self.recipe, self.seed)


class Record(NamedTuple):
    """What an earlier call, or another process, has written."""

    results: list[Result]
    allocations: dict[str, dict[str, Any]]  # see `mola.studies.comparison.allocations.Allocations`


def read_results(path: Path) -> list[Result]:
    """The results in a record; none if there is no file. Raises as `read_record`."""
    return read_record(path).results


def read_record(path: Path) -> Record:
    """The record of a comparison; an empty one if there is no file.

    Raises:
        MolaError: the file cannot be written, or is no record of a comparison.
    """
    check_writable(path)
    if not path.exists():
        return Record([], {})
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise ValueError(f"its `format` is {content['format']!r}, not {FORMAT}")
        results = [Result(**entry) for entry in content["runs"]]
        allocations = content.get("allocations", {})
        check_form(content["runs"], [_RUN], str(path), "Restore it.")
        check_form(allocations, _ALLOCATIONS, str(path), "Restore it.")
        for result in results:
            if any(len(marks) != result.total or step < 1 for step, marks in result.curve):
                raise ValueError(f"`curve` of {result.key} does not fit `total`")
            if len(result.marks) != result.total or result.marks.count("1") != result.correct:
                raise ValueError(f"`marks` of {result.key} do not fit `correct` and `total`")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MolaError(
            f"`record` must be a new file or the record of a comparison: {str(path)!r} cannot be read ({error}). "
            "Pass another name."
        ) from error
    return Record(results, allocations)


def _part(result: Result, part: str, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a result says of a part of a run's identity; what is wanted, if a record of an earlier version does not."""
    if part == "setting":
        return wanted if result.recipe == BASE and not result.settings else result.settings
    if part == "data":
        return {name: result.fingerprints.get(name) for name in wanted}
    return {name: getattr(result, name) or value for name, value in wanted.items()}


def check_same(results: Sequence[Result], runs: Sequence[Run]) -> None:
    """Refuse to go on with results that other options, data or weights have given; the message names the difference."""
    # The base model is tested with the options of a task's first run.
    wanted = {Key(run.key.task, BASE, 0): run for run in reversed(runs)} | {run.key: run for run in runs}
    for result in results:
        run = wanted.get(result.key)
        if run is None:
            continue  # of another task, recipe or seed: it is kept
        identity = json.loads(json.dumps(run.base_identity if result.recipe == BASE else run.identity))
        if change := first_change({part: _part(result, part, new) for part, new in identity.items()}, identity):
            raise MolaError(
                f"the result of {result.key} was made with another {change}. Use the same, rename the recipe, take "
                "that entry out of the `record`, or pass another one."
            )
