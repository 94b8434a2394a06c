"""The record of a comparison: every finished run with a mark for every answer, in one JSON file.

The file alone is enough to go on: run folders may be gone, and another machine may continue.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.reading import read_json, read_json_object
from mola.options.fields import find_difference
from mola.studies.comparison.checks import Run
from mola.studies.comparison.options import Key

FORMAT = 1
BASE = "base model"  # stands in the place of a recipe; no recipe can have a space in its name
_EARLIER_ONLY = ("test_every",)  # a setting that earlier versions had, and that changes nothing of a training


@dataclass
class Result:
    """A finished run."""

    task: str
    recipe: str
    seed: int
    accuracy: float  # share of right answers
    correct: int  # number of right answers
    total: int  # number of questions
    unanswered: int  # questions without an answer
    marks: str  # a 1 for every right answer and a 0 for every other, in the order of the test data
    trainable_parameters: int
    num_experts: list[int]  # by layer
    eval_loss: float | None  # on the evaluation data, if there are some
    seconds_training: float  # wall time
    seconds_testing: float  # wall time
    settings: dict[str, Any]  # see `mola.studies.comparison.checks.Run`
    fingerprints: dict[str, str]  # of the data
    versions: dict[str, str]  # of the software
    machine: dict[str, Any]  # cpu, gpu, threads
    # Records of earlier versions may lack what follows.
    base_model: str = ""  # which weights, see `mola.models.identity`
    dtype: str = ""  # of the base
    rule: str = ""  # of the task, see `mola.studies.comparison.checks.Run`
    steps: int = 0  # of the training
    diverged_at: int | None = None  # step after which loss or weights were not finite: all answers count as wrong
    curve: list[Any] = field(default_factory=list)  # tests during the training, which earlier versions made

    @property
    def key(self) -> Key:
        """What names the run."""
        return Key(self.task, self.recipe, self.seed)


def read_results(path: Path) -> list[Result]:
    """The results in a record; none if there is no file.

    Raises:
        MolaError: the file cannot be written, or is no record of a comparison.
    """
    check_writable(path)
    if not path.exists():
        return []
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise ValueError(f"its `format` is {content['format']!r}, not {FORMAT}")
        results = [Result(**entry) for entry in content["runs"]]
        for result in results:
            if len(result.marks) != result.total or result.marks.count("1") != result.correct:
                raise ValueError(f"`marks` of {result.key} do not fit `correct` and `total`")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MolaError(
            f"`record` must be a new file or the record of a comparison: {str(path)!r} cannot be read ({error}). "
            "Pass another name."
        ) from error
    return results


def check_same(results: Sequence[Result], runs: Sequence[Run]) -> None:
    """Raise if a result comes from other options, data or weights than the run of its name has now.

    Results of other tasks, recipes or seeds are kept and not looked at.

    Raises:
        MolaError: names the run and the first difference.
    """
    # The base model is tested with the options of a task's first run.
    wanted = {Key(run.key.task, BASE, 0): run for run in reversed(runs)} | {run.key: run for run in runs}
    for result in results:
        run = wanted.get(result.key)
        if run is None:
            continue
        identity = run.base_identity if result.recipe == BASE else run.identity
        if change := _first_change(_identity_of(result, identity), identity):
            raise MolaError(
                f"the result of {result.key} was made with another {change}. Use the same, rename the recipe, take "
                "that entry out of the `record`, or pass another one."
            )


def _identity_of(result: Result, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The identity of a result; what a record of an earlier version does not have is taken from `wanted`."""
    settings = {name: value for name, value in result.settings.items() if name not in _EARLIER_ONLY}
    return {
        "setting": wanted["setting"] if result.recipe == BASE and not settings else settings,
        "data": {name: result.fingerprints.get(name) for name in wanted["data"]},
        **{
            part: {name: getattr(result, name) or value for name, value in wanted[part].items()}
            for part in ("model", "task")
        },
    }


def begin_or_go_on(place: Path, identity: Mapping[str, Mapping[str, Any]]) -> None:
    """Write down with what a run folder or a result file is begun, or compare it with what is there.

    The file is `NAME.begun.json` beside `place`.

    Args:
        place: the run folder, or the file of a result.
        identity: see `Run.identity`.

    Raises:
        MolaError: what is there was begun with something else, or its file is gone.
    """
    path = place.with_name(f"{place.stem}.begun.json")
    if not (any(place.iterdir()) if place.is_dir() else place.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, identity)
        return
    begun = read_json_object(path)
    if not begun:
        raise MolaError(
            f"{str(place)!r} is not empty, and {path.name} beside it is missing. Delete it, or pass another "
            "`output_dir`."
        )
    begun["setting"] = {name: value for name, value in begun["setting"].items() if name not in _EARLIER_ONLY}
    if change := _first_change(begun, identity):
        raise MolaError(
            f"{str(place)!r} was begun with another {change}. Use the same, delete it, or pass another `output_dir`."
        )


def _first_change(old: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first difference of two identities, such as "setting `r`: 8, now 4"; None if there is none."""
    for part, values in json.loads(json.dumps(new)).items():  # JSON has lists for tuples
        before = old.get(part) or {}
        if (name := find_difference(before, values)) is not None:
            return f"{part} `{name}`: {before.get(name)!r}, now {values.get(name)!r}"
    return None
