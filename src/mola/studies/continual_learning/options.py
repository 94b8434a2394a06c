"""`ContinualOptions`: the stages, with the options of `mola train` as defaults of all stages."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from mola.errors import MolaError
from mola.models.quantization import QUANTIZATION_OPTIONS
from mola.options.fields import START, Group, option, parse_named_mappings
from mola.options.parsing import convert
from mola.studies.train_and_test import TrainAndTestOptions
from mola.training.options import ADAPTER_DEFAULTS, TRAINING_ONLY

# All stages train one adapter on one base model in one dtype.
_SAME_IN_ALL_STAGES = (
    "base_model",
    *(name for name in ADAPTER_DEFAULTS if name not in TRAINING_ONLY),
    "dtype",
    *QUANTIZATION_OPTIONS,
    "bf16",
    "fp16",
    "use_cpu",
    "trust_remote_code",
)
_SET_BY_SEQUENCE = ("adapter", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
_EXAMPLE = '{"physics": {"task": "scienceqa", "data": "physics.json"}}'


@dataclass
class ContinualOptions(TrainAndTestOptions):
    """Options of `mola continual`: those below, and every option of `mola train` as the default of all stages.

    The options of the stages are made from the values given here; changing a field afterwards has no effect on
    them.

    Attributes:
        stage_options: options of each stage by name, in the order of training.

    Raises:
        MolaError: a value is outside its range, options contradict each other, or a stage is wrong.
    """

    _start: ClassVar = START
    stages: dict[str, Any] | str | None = option(
        None, "The tasks in the order of training: name -> options of that stage; a mapping, JSON."
    )

    _test: ClassVar = Group("test")
    evaluate_base: bool = option(
        False, "Also test all tasks before the first stage: the base model, or `adapter` if it is set."
    )

    def __post_init__(self) -> None:
        # TrainingArguments replaces some values, so the stages get them as they were given.
        given = {item.name: getattr(self, item.name) for item in fields(TrainAndTestOptions) if item.init}
        super().__post_init__()
        self.check_one_process("mola continual", ", or run `mola train --adapter` stage by stage")
        self.stages = parse_named_mappings("stages", self.stages, _EXAMPLE)
        self.stage_options: dict[str, TrainAndTestOptions] = {}
        for number, (name, values) in enumerate(self.stages.items(), start=1):
            try:
                before = [stage.output_dir for stage in self.stage_options.values()]
                changes = self._changes(name, values)
                chained = self._chained(before[-1] if before else None)
                folder = Path(self.output_dir or "") / f"{number:02d}-{name}"
                self.stage_options[name] = TrainAndTestOptions(
                    **{**given, "overwrite_output_dir": False, **chained, **changes, "output_dir": str(folder)}
                )
            except (ValueError, TypeError, ImportError) as error:  # MolaError, and TrainingArguments' own checks
                raise MolaError(f"stage `{name}`: {error}") from error

    def _changes(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The options that `stages` sets for one stage."""
        changes = convert(TrainAndTestOptions, values, f"stages.{name}")
        for key in changes:
            if key in _SAME_IN_ALL_STAGES:
                raise MolaError(f"`{key}` must be the same in all stages: set it beside `stages`, not inside.")
            if key in _SET_BY_SEQUENCE:
                raise MolaError(f"`{key}` cannot be set for one stage: it follows from the order of the stages.")
            if key in TRAINING_ONLY and self.adapter is not None and getattr(self, key) is None:
                raise MolaError(
                    f"`{key}` of one stage needs a value for all stages, since with `adapter` the default is "
                    "the value of the previous stage: set it beside `stages`, too."
                )
        return changes

    def _chained(self, previous: str | None) -> dict[str, Any]:
        """The options with which a stage starts from the previous stage's adapter, the folder `previous`."""
        if previous is None:
            return {}
        settings: dict[str, Any] = dict.fromkeys(ADAPTER_DEFAULTS)
        for name in TRAINING_ONLY:
            settings[name] = getattr(self, name) if self.adapter is not None else self.adapter_setting(name)
        return {**settings, "adapter": previous}
