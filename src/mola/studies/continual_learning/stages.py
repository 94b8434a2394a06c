"""The stages of a sequence. All are checked before the first is trained: data, lengths, steps, allocation, tests."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mola.data.encode import data_fingerprint
from mola.data.examples import distinct_questions
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions, check_evaluation
from mola.studies.continual_learning.options import ContinualOptions
from mola.studies.overlaps import Questions, check_training
from mola.studies.train_and_test import NOT_COMPARED, TrainAndTestOptions, evaluation_of
from mola.training.checks import check_steps
from mola.training.data import prepare_data
from mola.training.model import (
    adapter_config,
    base_config,
    check_losses,
    check_model_options,
    continued_config,
    load_tokenizer_for,
    training_changes,
)

logger = logging.getLogger(__name__)


@dataclass
class Stage:
    """One stage, ready to run."""

    name: str  # as the user gave it
    options: TrainAndTestOptions  # options of the training; `output_dir` is the run folder
    test: EvaluateOptions  # options of the evaluation; adapter and output file are set for each evaluation
    settings: dict[str, Any]  # options that must stay the same to resume the stage
    fingerprints: dict[str, str]  # sha256 of training, evaluation and test examples, by part

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.options.output_dir or "")


def check_stages(options: ContinualOptions) -> list[Stage]:
    """Check all stages without loading weights.

    Returns:
        The stages in the order of training.

    Raises:
        MolaError: a stage is wrong; the message names the stage and the fault.
    """
    first = next(iter(options.stage_options.values()))
    base = base_config(first)
    check_model_options(first, base)
    config: Any = adapter_config(first) if first.adapter is None else continued_config(first, first.adapter)
    tokenizer = load_tokenizer_for(first, base)
    stages: list[Stage] = []
    tests: dict[str, tuple[Questions, EvaluateOptions]] = {}
    for number, (name, stage_options) in enumerate(options.stage_options.items(), start=1):
        logger.info("Checking stage %d of %d, %s.", number, len(options.stage_options), name)
        try:
            if number > 1:  # the stage continues the adapter of the previous stage
                changes = training_changes(stage_options)
                config = replace(config, **changes) if changes else config
                check_losses(stage_options, config, base)
            test = evaluation_of(stage_options)
            _, test_examples, _ = check_evaluation(test)
            data = prepare_data(stage_options, tokenizer, base)
            check_steps(stage_options, data)
            tests[name] = distinct_questions(test_examples), test
            for task, (questions, source) in tests.items():  # earlier tasks are tested again
                where = "" if task == name else f" in stage `{name}`"
                check_training(task, questions, source, stage_options, data, stage=where)
        except MolaError as error:
            raise MolaError(f"stage `{name}`: {error}") from error
        fingerprints = {**data.fingerprints, "test": data_fingerprint(test_examples)}
        stages.append(Stage(name, stage_options, test, _settings_to_compare(stage_options, number == 1), fingerprints))
    return stages


def _settings_to_compare(options: TrainAndTestOptions, is_first: bool) -> dict[str, Any]:
    """The options of a stage that must stay the same to resume it."""
    values = {name: value for name, value in options.to_dict().items() if name not in NOT_COMPARED}
    # Later stages start from the previous stage, so their `adapter` is only a path.
    return {**values, "adapter": options.adapter} if is_first else values
