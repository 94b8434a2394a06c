"""The stages of a sequence: their options, and their checks before the first stage is trained."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mola.checkpoints.recorded_base import base_model_of
from mola.data.encode import data_fingerprint
from mola.data.examples import distinct_questions
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions
from mola.models.options import QUANTIZATION_OPTIONS
from mola.options.fields import parse_named_mappings
from mola.options.parsing import convert
from mola.studies.continual_learning.fields import STAGES_EXAMPLE, ContinualFields
from mola.studies.continual_learning.record_file import SKILLS_FOLDER
from mola.studies.overlaps import Questions, check_training
from mola.studies.train_and_test import NOT_COMPARED, TrainAndTestOptions, check_questions, evaluation_of
from mola.training.checks import check_steps
from mola.training.data import prepare_data
from mola.training.fields import ADAPTER_DEFAULTS, TRAINING_ONLY
from mola.training.model import (
    base_config,
    changed_config,
    check_losses,
    check_model_options,
    load_tokenizer_for,
)

logger = logging.getLogger(__name__)

GROWTHS = ("adapter", "skills")
_SAME_IN_ALL_STAGES = (
    "base_model",
    "layer",
    "dtype",
    *QUANTIZATION_OPTIONS,
    "bf16",
    "fp16",
    "use_cpu",
    "train_device",
    "trust_remote_code",
)
_OF_ONE_ADAPTER = tuple(name for name in ADAPTER_DEFAULTS if name not in TRAINING_ONLY)
_SET_BY_SEQUENCE = ("adapter", "skill", "into", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")


@dataclass
class ContinualOptions(ContinualFields, TrainAndTestOptions):
    """Options of `mola continual`: those of `ContinualFields`, and of `mola train` as the default of all stages.

    The options of the stages are made from the values given here; changing a field afterwards has no effect on
    them.

    Attributes:
        stage_options: options of each stage by name, in the order of training.

    Raises:
        MolaError: a value is outside its range, options contradict each other, or a stage is wrong.
    """

    def __post_init__(self) -> None:
        # TrainingArguments replaces some values, so the stages get them as they were given.
        given = {item.name: getattr(self, item.name) for item in fields(TrainAndTestOptions) if item.init}
        # Later stages start from adapters that do not exist yet.
        given["base_model"] = base_model_of(self.base_model, [] if self.adapter is None else [self.adapter])
        self._check_growth()
        layer, self.layer = self.layer, None  # only a skill has it
        super().__post_init__()
        self.layer = layer
        self.check_one_process("mola continual", ", or run `mola train --adapter` stage by stage")
        self.stages = parse_named_mappings("stages", self.stages, STAGES_EXAMPLE)
        self.stage_options: dict[str, TrainAndTestOptions] = {}
        for number, (name, values) in enumerate(self.stages.items(), start=1):
            try:
                before = [stage.output_dir for stage in self.stage_options.values()]
                changes = self._changes(name, values)
                chained = self._chained(name, before[-1] if before else None)
                folder = Path(self.output_dir or "") / f"{number:02d}-{name}"
                self.stage_options[name] = TrainAndTestOptions(
                    **{**given, "overwrite_output_dir": False, **chained, **changes, "output_dir": str(folder)}
                )
            except (ValueError, TypeError, ImportError) as error:  # MolaError, and TrainingArguments' own checks
                raise MolaError(f"stage `{name}`: {error}") from error

    def _check_growth(self) -> None:
        if self.growth not in GROWTHS:
            raise MolaError(f"`growth` must be one of {', '.join(GROWTHS)}: got {self.growth!r}.")
        for option in ("skill", "into"):
            if (value := getattr(self, option)) is not None:
                raise MolaError(f"`{option}` ({value!r}) follows from the stages. Leave it out; pass --growth skills.")
        if self.layer is not None and self.growth != "skills":
            raise MolaError(f"`layer` ({self.layer}) has no effect without --growth skills. Leave it out.")

    @property
    def skills_folder(self) -> Path:
        """The skills folder of the sequence, with `growth` skills."""
        return Path(self.output_dir or "") / SKILLS_FOLDER

    def _changes(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options that `stages` sets for one stage."""
        changes = convert(TrainAndTestOptions, values, f"stages.{name}")
        for key in changes:
            if key in _SAME_IN_ALL_STAGES or (key in _OF_ONE_ADAPTER and self.growth == "adapter"):
                raise MolaError(f"`{key}` must be the same in all stages: set it beside `stages`, not inside.")
            if key in _SET_BY_SEQUENCE:
                raise MolaError(f"`{key}` cannot be set for one stage: it follows from the order of the stages.")
            if key in TRAINING_ONLY and self.adapter is not None and getattr(self, key) is None:
                raise MolaError(
                    f"`{key}` of one stage needs a value for all stages, since with `adapter` the default is "
                    "the value of the previous stage: set it beside `stages`, too."
                )
        return changes

    def _chained(self, name: str, previous: str | None) -> dict[str, Any]:
        """The options with which a stage becomes a skill, or starts from the adapter in the folder `previous`."""
        if self.growth == "skills":
            return {"skill": name, "into": str(self.skills_folder)}
        if previous is None:
            return {}
        settings: dict[str, Any] = dict.fromkeys(ADAPTER_DEFAULTS)
        for name in TRAINING_ONLY:
            settings[name] = getattr(self, name) if self.adapter is not None else self.adapter_setting(name)
        return {**settings, "adapter": previous}


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
    """The stages in the order of training. Checks data, lengths, steps, allocation and tests; loads no weights.

    Raises:
        MolaError: a stage is wrong; the message names the stage and the fault.
    """
    first = next(iter(options.stage_options.values()))
    base = base_config(first)
    grows_skills = options.growth == "skills"
    config: Any = None
    if not grows_skills:
        config, _ = check_model_options(first, base)
    tokenizer = load_tokenizer_for(first, base)
    stages: list[Stage] = []
    tests: dict[str, tuple[Questions, EvaluateOptions]] = {}
    for number, (name, stage_options) in enumerate(options.stage_options.items(), start=1):
        logger.info("Checking stage %d of %d, %s.", number, len(options.stage_options), name)
        try:
            if grows_skills:
                check_model_options(stage_options, base)
            elif number > 1:  # the stage continues the adapter of the previous stage
                config = changed_config(stage_options, config)
                check_losses(stage_options, config, base)
            test = evaluation_of(stage_options)
            _, test_examples = check_questions(test)
            data = prepare_data(stage_options, tokenizer, base)
            check_steps(stage_options, data)
            tests[name] = distinct_questions(test_examples), test
            for task, (questions, source) in tests.items():  # earlier tasks are tested again
                where = "" if task == name else f" in stage `{name}`"
                check_training(task, questions, source, stage_options, data, stage=where)
        except MolaError as error:
            raise MolaError(f"stage `{name}`: {error}") from error
        fingerprints = {**data.fingerprints, "test": data_fingerprint(test_examples)}
        settings = {name: value for name, value in stage_options.to_dict().items() if name not in NOT_COMPARED}
        if number == 1:  # later stages start from the previous stage, so their `adapter` is only a path
            settings["adapter"] = stage_options.adapter
        stages.append(Stage(name, stage_options, test, settings, fingerprints))
    return stages
