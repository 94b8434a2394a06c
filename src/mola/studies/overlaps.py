"""Finds test questions that were also used for training or tuning; questions are recognised by their text."""

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
    """Whether the larger of two sets of questions contains all of the smaller one."""
    fewer, more = sorted((first, second), key=len)
    return bool(np.isin(fewer, more).all())


def warn_of_shared(task: str, test: Questions, used: Questions, use: str) -> None:
    """Warn once if some test questions are also among the `used` questions; `use` says how, such as "trained on"."""
    if shared := int(np.isin(test, used).sum()):
        _warn_once(
            "task `%s`: %d of the %d test questions are also %s. The result counts them as if they were new.",
            task,
            shared,
            len(test),
            use,
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
    """Warn if a run trains on questions of its test; raise if it would choose a checkpoint by them.

    Args:
        task: name of the tested task, for messages.
        questions: the test questions.
        test: the options of the test, which say where the questions come from.
        options: the options of the training run.
        data: the data of the training run.
        is_search: whether the test belongs to a search for options, which may choose a checkpoint by its questions.
        stage: text that names the stage in messages, such as " in stage `words`"; empty if the run trains `task`.

    Raises:
        MolaError: the evaluation data that choose a checkpoint are the test questions, or a subset of them.
    """
    warn_of_shared(task, questions, data.questions["train"], f"trained on{stage}")
    if is_search or not options.load_best_model_at_end or "evaluation" not in data.questions:
        return
    evaluated = data.questions["evaluation"]
    source = _source(options.eval_data or options.data or "", options.eval_split)
    is_same_split = not options.validation_size and source == _source(test.data or "", test.split)
    if is_same_split or is_subset(evaluated, questions):
        raise MolaError(
            f"`load_best_model_at_end` would choose a checkpoint{stage} by the test questions of `{task}`, "
            "which are also the evaluation data. Pass --load_best_model_at_end false, or different `eval_data`."
        )
    warn_of_shared(task, questions, evaluated, f"evaluation data, by which a checkpoint is chosen{stage}")


def _source(data: str, split: str | None) -> tuple[str, str | None]:
    """The absolute path of the data and the split, for comparison; the split is None for a file without splits."""
    path = Path(os.path.expanduser(data))
    if not path.exists():  # a name on the Hub
        return data, split
    return str(path.resolve()), split if split_names(path) else None
