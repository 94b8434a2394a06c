"""The record of a comparison: every finished run with the mark of each answer or the loss of each row.

The record is one JSON file. The file alone is enough to resume: run folders may be missing, and a different machine may
continue.
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
BASE = "base model"  # used in place of a recipe name; recipe names cannot contain a space
_EARLIER_ONLY = ("test_every",)  # a setting of earlier versions that does not affect a training


@dataclass
class Result:
    """A finished run."""

    task: str
    recipe: str
    seed: int
    # Of questions; None for free text, which has the fields `loss`, `losses` and `tokens` below.
    accuracy: float | None  # share of correct answers
    correct: int | None  # number of correct answers
    total: int  # number of questions, or of rows of free text
    unanswered: int | None  # questions without an answer
    marks: str | None  # 1 for a correct answer and 0 for any other, in the order of the test data
    trainable_parameters: int
    num_experts: list[int]  # by layer
    eval_loss: float | None  # on the evaluation data; None without them
    seconds_training: float  # wall time
    seconds_testing: float  # wall time
    settings: dict[str, Any]  # see `mola.studies.comparison.checks.Run`
    fingerprints: dict[str, str]  # of the data
    versions: dict[str, str]  # of the software
    machine: dict[str, Any]  # cpu, gpu, threads
    # Records of earlier versions may lack the following fields.
    base_model: str = ""  # identity of the base weights, see `weights_identity` of `mola.models.base_model`
    dtype: str = ""  # dtype of the base model
    rule: str = ""  # rule of the task, see `mola.studies.comparison.checks.Run`
    steps: int = 0  # of the training
    diverged_at: int | None = None  # step after which loss or weights were not finite: all answers count as wrong
    curve: list[Any] = field(default_factory=list)  # tests during the training, which earlier versions made
    not_learnt: str | None = None  # what `mola train` has seen if the training has not learnt its data
    # Of free text; None after a training that diverged.
    loss: float | None = None  # nats per token
    losses: list[float] | None = None  # nats of each row, in the order of the test data
    tokens: list[int] | None = None  # tokens that contribute to the loss of each row

    @property
    def key(self) -> Key:
        """Task, recipe and seed of the run."""
        return Key(self.task, self.recipe, self.seed)

    @property
    def is_scored(self) -> bool:
        """Whether the outcome is the accuracy of answers; if not, it is the loss of free text."""
        return self.marks is not None


def read_results(path: Path) -> list[Result]:
    """The results in a record; empty if the file does not exist.

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
            marks = result.marks
            if marks is not None and (len(marks) != result.total or marks.count("1") != result.correct):
                raise ValueError(f"`marks` of {result.key} do not fit `correct` and `total`")
            if any(len(values) != result.total for values in (result.losses, result.tokens) if values is not None):
                raise ValueError(f"`losses` and `tokens` of {result.key} do not fit `total`")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MolaError(
            f"`record` must be a new file or the record of a comparison: {str(path)!r} cannot be read ({error}). "
            "Pass a different name."
        ) from error
    return results


def check_same(results: Sequence[Result], runs: Sequence[Run]) -> None:
    """Raise if a result comes from different options, data or weights than its run has now.

    Results of tasks, recipes or seeds that are not among `runs` are ignored.
    """
    # The base model is tested with the test options of a task's first run.
    wanted = {Key(run.key.task, BASE, 0): run for run in reversed(runs)} | {run.key: run for run in runs}
    for result in results:
        run = wanted.get(result.key)
        if run is None:
            continue
        identity = run.base_identity if result.recipe == BASE else run.identity
        if change := _first_change(_identity_of(result, identity), identity):
            raise MolaError(
                f"the result of {result.key} was made with a different {change}. Use the same value, rename the "
                "recipe, remove that entry from the `record`, or pass a different record."
            )


def _identity_of(result: Result, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The identity of a result. Values that a record of an earlier version lacks are filled in from `wanted`."""
    settings = {name: value for name, value in result.settings.items() if name not in _EARLIER_ONLY}
    return {
        "setting": wanted["setting"] if result.recipe == BASE and not settings else settings,
        "data": {name: result.fingerprints.get(name) for name in wanted["data"]},
        **{
            part: {name: getattr(result, name) or value for name, value in wanted[part].items()}
            for part in ("model", "task")
        },
    }


def begin_or_resume(place: Path, identity: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the run folder or result file `place` was begun with this identity, see `Run.identity`.

    The identity is in the file `NAME.begun.json` beside `place`, which is written if there is nothing in `place` yet.
    """
    path = place.with_name(f"{place.stem}.begun.json")
    if not (any(place.iterdir()) if place.is_dir() else place.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, identity)
        return
    begun = read_json_object(path)
    if not begun:
        raise MolaError(
            f"{str(place)!r} is not empty, and {path.name} beside it is missing. Delete {str(place)!r}, or pass a "
            "different `output_dir`."
        )
    begun["setting"] = {name: value for name, value in begun["setting"].items() if name not in _EARLIER_ONLY}
    if change := _first_change(begun, identity):
        raise MolaError(
            f"{str(place)!r} was begun with a different {change}. Use the same value, delete {str(place)!r}, or pass a "
            "different `output_dir`."
        )


def _first_change(old: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first difference between two identities, such as "setting `r`: 8, now 4"; None if there is none."""
    for part, values in json.loads(json.dumps(new)).items():  # JSON has lists for tuples
        before = old.get(part) or {}
        if (name := find_difference(before, values)) is not None:
            return f"{part} `{name}`: {before.get(name)!r}, now {values.get(name)!r}"
    return None
