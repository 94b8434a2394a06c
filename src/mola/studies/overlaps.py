"""Questions of a test that a training or a choice has seen, whatever they are called and wherever they stand."""

import functools
import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mola.data.read import split_names
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions
from mola.studies.train_and_test import TrainAndTestOptions
from mola.training.data import TrainingData

Questions = NDArray[np.uint64]  # see `mola.data.hashing.distinct_questions`

_warn_once = functools.cache(logging.getLogger(__name__).warning)


def holds_the_other(first: Questions, second: Questions) -> bool:
    """Whether one of two sets of questions is a part of the other, or both are the same."""
    fewer, more = sorted((first, second), key=len)
    return bool(np.isin(fewer, more).all())


def warn_of_seen(task: str, test: Questions, seen: Questions, what: str) -> None:
    """Say so, once, where some questions of a test are among those of something else."""
    if shared := int(np.isin(test, seen).sum()):
        _warn_once(
            "task `%s`: %d of the %d test questions are %s, too. Accuracies count them as if they were new.",
            *(task, shared, len(test), what),
        )


def check_seen(
    task: str,
    questions: Questions,
    test: EvaluateOptions,
    options: TrainAndTestOptions,
    data: TrainingData,
    is_search: bool = False,
    where: str = "",
) -> None:
    """Whether a training has seen the questions of a test that follows it.

    Args:
        task: that of the test in the warnings.
        questions: of the test.
        test: where they are from.
        options: of the training.
        data: of the training.
        is_search: a search may choose a checkpoint by its own questions, which are not those of the test.
        where: which training it is in the warnings, if it is not that of the task.

    Raises:
        MolaError: a checkpoint would be chosen by the rows that the test is of, or by those around a part of them.
    """
    warn_of_seen(task, questions, data.questions["train"], f"trained on{where}")
    if is_search or not options.load_best_model_at_end or "evaluation" not in data.questions:
        return
    evaluated = data.questions["evaluation"]
    place = _place(options.eval_data or options.data or "", options.eval_split)
    is_place = not options.validation_size and place == _place(test.data or "", test.split)
    if is_place or holds_the_other(evaluated, questions):
        raise MolaError(
            f"`load_best_model_at_end` would choose a checkpoint{where} by the questions of the test of `{task}`, "
            "which are the evaluation data, too. Pass --load_best_model_at_end false, or name other `eval_data`."
        )
    warn_of_seen(task, questions, evaluated, f"evaluation data, by which a checkpoint is chosen{where}")


def _place(source: str, split: str | None) -> tuple[str, str | None]:
    """Where rows are, however it is written: a file has no splits."""
    path = Path(os.path.expanduser(source))
    if not path.exists():  # a name on the Hub
        return source, split
    return str(path.resolve()), split if split_names(path) else None
