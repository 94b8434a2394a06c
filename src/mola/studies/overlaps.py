"""Test questions that a training or a choice has used, recognised by their text in any file and split."""

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

Questions = NDArray[np.uint64]  # one hash for each question, see `mola.data.examples.distinct_questions`

_warn_once = functools.cache(logging.getLogger(__name__).warning)


def is_subset(first: Questions, second: Questions) -> bool:
    """Whether one of two sets of questions contains all of the other."""
    fewer, more = sorted((first, second), key=len)
    return bool(np.isin(fewer, more).all())


def warn_of_shared(task: str, test: Questions, used: Questions, use: str) -> None:
    """Warn once if some test questions have also been used otherwise; `use` says how, such as "trained on"."""
    if shared := int(np.isin(test, used).sum()):
        _warn_once(
            "task `%s`: %d of the %d test questions are %s, too. Accuracies count them as if they were new.",
            *(task, shared, len(test), use),
        )


def check_training(
    task: str,
    questions: Questions,
    test: EvaluateOptions,
    options: TrainAndTestOptions,
    data: TrainingData,
    is_search: bool = False,
    stage: str = "",
) -> None:
    """Check that a training does not use the questions of a test that follows it.

    Args:
        task: of the test, for messages.
        questions: of the test.
        test: where the questions come from.
        options: of the training.
        data: of the training.
        is_search: the test belongs to a search, which may choose a checkpoint by its own questions.
        stage: which training it is, for messages, if it is not that of the task: " in stage `words`".

    Raises:
        MolaError: a checkpoint would be chosen by the questions of the test, or by a part of them.
    """
    warn_of_shared(task, questions, data.questions["train"], f"trained on{stage}")
    if is_search or not options.load_best_model_at_end or "evaluation" not in data.questions:
        return
    evaluated = data.questions["evaluation"]
    source = _source(options.eval_data or options.data or "", options.eval_split)
    is_same_split = not options.validation_size and source == _source(test.data or "", test.split)
    if is_same_split or is_subset(evaluated, questions):
        raise MolaError(
            f"`load_best_model_at_end` would choose a checkpoint{stage} by the questions of the test of `{task}`, "
            "which are the evaluation data, too. Pass --load_best_model_at_end false, or name other `eval_data`."
        )
    warn_of_shared(task, questions, evaluated, f"evaluation data, by which a checkpoint is chosen{stage}")


def _source(data: str, split: str | None) -> tuple[str, str | None]:
    """File or folder and split, comparable however the path is written; a file without splits has None."""
    path = Path(os.path.expanduser(data))
    if not path.exists():  # a name on the Hub
        return data, split
    return str(path.resolve()), split if split_names(path) else None
