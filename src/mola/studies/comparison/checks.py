"""Checks all runs of a comparison before the first one is trained."""

import copy
import functools
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers import PretrainedConfig

from mola.data.encode import data_fingerprint
from mola.data.examples import distinct_questions
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions, check_evaluation
from mola.files.digests import weights_sha256
from mola.files.reading import read_json
from mola.models.base_model import max_positions, weights_identity
from mola.studies.comparison.options import Key
from mola.studies.overlaps import Questions, check_training, is_subset, warn_of_shared
from mola.studies.train_and_test import NOT_COMPARED, TrainAndTestOptions, evaluation_of
from mola.training.checks import check_steps
from mola.training.data import TrainingData, prepare_data
from mola.training.fields import ADAPTER_DEFAULTS
from mola.training.model import base_config, check_model_options, load_tokenizer_for

logger = logging.getLogger(__name__)

# Paths are not compared, so files may be moved. Their content is compared: `Run.fingerprints`, `Run.base_model`.
_PLACES = (*NOT_COMPARED, "data", "eval_data", "test_data", "base_model")
# These options are compared by the dtype that they lead to on this machine, `Run.dtype`.
_PRECISION = ("dtype", "bf16", "fp16")
# Options of a test that are paths, or that are in a different part of the identity.
_NOT_OF_A_TEST = ("adapter", "data", "base_model", "output", "overwrite", "device", "dtype")
# Options that affect neither the data nor the number of steps.
_OF_THE_ADAPTER = (*ADAPTER_DEFAULTS, "learning_rate", "weight_decay", "adapter")


@dataclass
class Run:
    """One training with its test.

    Attributes:
        key: task, recipe and seed.
        options: options of the training; `output_dir` is the run folder.
        settings: the training options that differ from their defaults. A result is kept only if they are unchanged.
        test: options of the evaluation; adapter and output file are filled in later.
        fingerprints: sha256 of the training, evaluation and test examples and of a starting adapter, by part.
        num_questions: number of test questions or rows.
        is_scored: whether the test measures the accuracy of answers; if not, the loss of free text.
        base_model: identity of the base weights, see `weights_identity` of `mola.models.base_model`.
        dtype: dtype of the base model.
        rule: sha256 of the task's template and of its rule for reading answers; for free text the template.
        questions: the test questions, see `mola.studies.overlaps`.
    """

    key: Key
    options: TrainAndTestOptions
    settings: dict[str, Any]
    test: EvaluateOptions
    fingerprints: dict[str, str]
    num_questions: int
    is_scored: bool
    base_model: str
    dtype: str
    rule: str
    questions: Questions = field(repr=False)

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """By part, the values that must be unchanged to resume the run."""
        model = {"base_model": self.base_model, "dtype": self.dtype}
        return {"setting": self.settings, "data": self.fingerprints, "model": model, "task": {"rule": self.rule}}

    @property
    def base_identity(self) -> dict[str, dict[str, Any]]:
        """By part, the values that must be unchanged to keep the base model's test on the run's task."""
        settings = {name: value for name, value in asdict(self.test).items() if name not in _NOT_OF_A_TEST}
        settings["template"] = self.options.template  # the one that was given, as in records of earlier versions
        return {**self.identity, "setting": settings, "data": {"test": self.fingerprints["test"]}}


def check_runs(runs_options: Mapping[Key, TrainAndTestOptions], fits_lengths: bool = False) -> list[Run]:
    """Check all runs without loading weights.

    Args:
        runs_options: the options of each run.
        fits_lengths: raise a `cutoff_len` that has its default value to the length of the longest sample.

    Raises:
        MolaError: a run is wrong (the message names task and recipe), or recipes have different test questions.
    """
    checked: set[str] = set()  # options whose model was checked
    data_of: dict[str, dict[str, Any]] = {}  # options that affect the data -> what `_check_data` has found
    runs = []
    for key, options in runs_options.items():
        try:
            runs.append(_check_run(key, options, checked, data_of, fits_lengths))
        except MolaError as error:
            raise MolaError(f"task `{key.task}`, recipe `{key.recipe}`: {error}") from error
    _check_same_questions(runs)
    return runs


def _check_run(
    key: Key, options: TrainAndTestOptions, checked: set[str], data_of: dict[str, dict[str, Any]], fits_lengths: bool
) -> Run:
    """Check one run. A check is not repeated for runs that differ only in options that the check does not read."""
    values = {name: value for name, value in options.to_dict().items() if name not in NOT_COMPARED or name == "adapter"}
    if not options.validation_size:  # with a `validation_size`, the seed chooses the evaluation rows
        del values["seed"]
    data_values = {name: value for name, value in values.items() if name not in _OF_THE_ADAPTER}
    all_options, data_options = (json.dumps(each, sort_keys=True, default=str) for each in (values, data_values))
    if all_options not in checked:
        base = base_config(options)
        check_model_options(options, base)
        if data_options not in data_of:
            logger.info("Checking %s on %s.", key.recipe, key.task)
            data_of[data_options] = _check_data(key, options, base, fits_lengths)
        checked.add(all_options)
    found = data_of[data_options]
    options = copy.copy(options)
    options.cutoff_len = found["cutoff_len"]
    values_of_run = {name: value for name, value in found.items() if name != "cutoff_len"}
    run = Run(key, options, _non_default_settings(options), **values_of_run)
    if options.adapter:
        run.fingerprints = {**run.fingerprints, "adapter": weights_sha256(options.adapter) or ""}
    return run


def _check_data(key: Key, options: TrainAndTestOptions, base: PretrainedConfig, fits_lengths: bool) -> dict[str, Any]:
    """Check training and test data, and the number of steps; `cutoff_len`, and the values of a `Run` that follow."""
    data, cutoff_len = _training_data(options, base, fits_lengths)
    check_steps(options, data)
    test = evaluation_of(options)
    if options.task is None:
        test.template = data.template  # the base model has no training, whose template it could use
    checked = check_evaluation(test)
    questions = distinct_questions(checked.examples)
    check_training(key.task, questions, test, options, data, is_search=bool(key.candidate))
    end = "" if options.add_eos_token else ", no end token"
    return {
        "cutoff_len": cutoff_len,
        "test": test,
        "fingerprints": {**data.fingerprints, "test": data_fingerprint(checked.examples)},
        "num_questions": len(checked.examples),
        "is_scored": checked.task is not None,
        "base_model": weights_identity(options.base_model or ""),
        "dtype": options.base_dtype,
        "rule": f"loss, template {data.template}{end}" if checked.task is None else checked.task.fingerprint(),
        "questions": questions,
    }


def _training_data(
    options: TrainAndTestOptions, base: PretrainedConfig, fits_lengths: bool
) -> tuple[TrainingData, int]:
    """The training data, and the `cutoff_len` of the run."""
    trial, longest_of_model = copy.copy(options), max_positions(base) or sys.maxsize
    is_free = fits_lengths and options.truncation == "error" and options.cutoff_len == TrainAndTestOptions.cutoff_len
    if is_free:  # nothing is cut if no sample is longer than the model can read, and otherwise it is an error
        trial.cutoff_len, trial.truncation = longest_of_model, "right"
    data = prepare_data(trial, load_tokenizer_for(options, base), base)
    longest = max(report.longest for report in data.reports.values())
    if not is_free:
        return data, options.cutoff_len
    if longest > longest_of_model:
        raise MolaError(
            f"`data` must have samples of at most {longest_of_model} tokens, the longest sequence that the base model "
            f"can read: one has {longest}. Shorten it, leave it out, or set `cutoff_len` and `truncation`."
        )
    if longest > options.cutoff_len:
        logger.info(
            "The longest sample has %d tokens: `cutoff_len` is raised to it from %d.", longest, options.cutoff_len
        )
    return data, max(longest, options.cutoff_len)


def _non_default_settings(options: TrainAndTestOptions) -> dict[str, Any]:
    """The options of a training that differ from their defaults, without paths and dtypes."""
    defaults, values = _defaults(options.use_cpu), options.to_dict()
    names = {item.name for item in fields(TrainAndTestOptions) if item.init} & values.keys() - {*_PLACES, *_PRECISION}
    changed = {name: values[name] for name in sorted(names) if values[name] != defaults[name]}
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if values[name] != (options.base_dtype == dtype):  # mixed precision that the dtype does not imply
            changed[name] = values[name]
    if os.path.isfile(str(options.num_experts or "")):  # written by `mola allocate`: record its numbers, not its path
        allocation = read_json(str(options.num_experts))
        changed["num_experts"] = [allocation.get(name) for name in ("num_experts", "num_experts_pattern")]
    return changed


@functools.cache
def _defaults(use_cpu: bool) -> dict[str, Any]:
    return TrainAndTestOptions(output_dir="-", use_cpu=use_cpu).to_dict()


def _check_same_questions(runs: Sequence[Run]) -> None:
    """Raise if recipes have different test questions: recipes are compared answer by answer."""
    firsts: dict[str, Run] = {}
    for run in runs:
        first = firsts.setdefault(run.key.task, run)
        if run.fingerprints["test"] != first.fingerprints["test"]:
            raise MolaError(
                f"task `{run.key.task}`: the recipes {first.key.recipe!r} and {run.key.recipe!r} must have the same "
                f"test questions, got {first.num_questions} and {run.num_questions}. Set the options that choose "
                "questions (`filters`, `task`, `test_limit`...) in `tasks`."
            )
        if not run.is_scored and run.rule != first.rule:
            raise MolaError(
                f"task `{run.key.task}`: the recipes {first.key.recipe!r} and {run.key.recipe!r} must have the same "
                f"`template` and `add_eos_token`, so that they are measured on the same tokens, got {first.rule!r} and "
                f"{run.rule!r}. Set these options in `tasks`."
            )


def check_search(searched: Sequence[Run], runs: Sequence[Run]) -> None:
    """Raise if the search uses all test questions, or only test questions; warn if it uses some of them."""
    tests = {(run.key.task, run.key.recipe): run for run in runs}
    for run in searched:
        tested = tests[run.key.task, run.key.plain_recipe]
        if is_subset(run.questions, tested.questions):
            raise MolaError(
                f"task `{run.key.task}`, recipe `{run.key.plain_recipe}`: `tuning_split` ({run.test.split!r}) has the "
                f"test questions ({tested.test.data!r}, split {tested.test.split!r}). Tuning on them would bias the "
                "result: name a different split."
            )
        warn_of_shared(run.key.task, tested.questions, run.questions, f"in `tuning_split` ({run.test.split!r})")
