"""Options that `mola continual` adds to those of a training and its test. This module imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mola.checkpoints.recorded_base import base_model_of
from mola.options.fields import START, Group, option, parse_named_mappings
from mola.studies.continual_learning.record_file import read_record
from mola.studies.fields import TestFields

STAGES_EXAMPLE = '{"physics": {"task": "scienceqa", "data": "physics.json"}}'


@dataclass
class ContinualFields(TestFields):
    """The own options of `mola continual`."""

    _start: ClassVar = START
    stages: dict[str, Any] | str | None = option(
        None, "The tasks in the order of training: name -> options of that stage; a mapping, JSON."
    )
    growth: str = option(
        "adapter", "What grows: adapter (every stage trains the same one further) or skills (each adds a skill)."
    )

    _test: ClassVar = Group("test")
    evaluate_base: bool = option(
        False, "Also test all tasks before the first stage: the base model, or `adapter` if it is set."
    )

    def check(self) -> None:
        """`settle`, and check the stages' names, the base model and the folder."""
        self.base_model = base_model_of(self.base_model, [] if self.adapter is None else [self.adapter])
        self.layer = None  # which only a skill has
        self.settle()
        parse_named_mappings("stages", self.stages, STAGES_EXAMPLE)
        read_record(Path(self.output_dir or ""), self.overwrite_output_dir)
