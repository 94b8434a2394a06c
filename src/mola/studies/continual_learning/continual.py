"""`mola continual`: train on one task after another, and measure how much the model forgets earlier tasks.

- Every stage is a run of `mola train` that starts from the experts of the previous stage, or with `growth` skills one
  that trains a LoRA alone, which becomes a skill.
- After every stage, all tasks so far are tested like in `mola evaluate`.
- The same command resumes a stopped sequence; finished stages and tests are not repeated.
"""

import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.checkpoints.skills_folder import read_skills
from mola.files.atomic import atomic_write_json
from mola.files.digests import WEIGHTS_FILE, file_sha256, weights_sha256
from mola.files.environment import machine_description, software_versions
from mola.files.terminal import make_table_console
from mola.models.base_model import weights_identity
from mola.studies.continual_learning.metrics import (
    ContinualResult,
    overall_performance,
    performance_drop,
    result_table,
)
from mola.studies.continual_learning.record import (
    BASE_KEY,
    EVALUATION_FOLDER,
    START_FOLDER,
    START_KEY,
    check_same_sequence,
    clear_sequence,
    stage_entries,
)
from mola.studies.continual_learning.record_file import RECORD_FILE, read_record
from mola.studies.continual_learning.skills import Answers, asked, changed, settle_skills
from mola.studies.continual_learning.stages import ContinualOptions, Stage, check_stages
from mola.studies.train_and_test import evaluate_once, recorded, sigterm_as_interrupt, train_or_resume
from mola.training.checkpoints import has_finished
from mola.training.run_folder import check_start_is_kept, locked
from mola.training.run_record import without_token

__all__ = ["ContinualOptions", "ContinualResult", "continual", "main"]

logger = logging.getLogger(__name__)

_REPORTED = ("accuracy", "correct", "total", "unanswered", "interval_95")


def continual(options: ContinualOptions) -> ContinualResult:
    """Train on the tasks in their order and test after every stage.

    Args:
        options: see `ContinualOptions`.

    Returns:
        The result. `continual.json` in `options.output_dir` contains it, too, with the settings that produced it.

    Raises:
        MolaError: options or data of any stage are wrong (before the first is trained), the folder holds
            a different sequence, or a loss is not finite.
    """
    folder = Path(options.output_dir or "")
    read_record(folder, options.overwrite_output_dir)  # a wrong folder fails before the data are read
    stages = check_stages(options)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        sequence = _begin_or_resume(folder, options, stages)
        with sigterm_as_interrupt():
            return sequence.run()


def _begin_or_resume(folder: Path, options: ContinualOptions, stages: Sequence[Stage]) -> "_Sequence":
    """Compare the record of an earlier call with this one; with `overwrite_output_dir` delete what it left."""
    record = read_record(folder, options.overwrite_output_dir)
    if record is not None and options.overwrite_output_dir:
        if options.adapter is not None:
            check_start_is_kept(options.adapter, options.output_dir)
        clear_sequence(folder, record)
        record = None
    before: dict[str, Any] = record or {"stages": []}
    weights = {
        START_KEY: None if options.adapter is None else weights_sha256(options.adapter),
        BASE_KEY: weights_identity(stages[0].options.base_model or ""),
    }
    check_same_sequence(before, stages, folder, weights)
    weights[BASE_KEY] = weights[BASE_KEY] or before.get(BASE_KEY, "")
    if before.get(START_KEY) != weights[START_KEY] or before.get(BASE_KEY, weights[BASE_KEY]) != weights[BASE_KEY]:
        _clear_tests(folder / START_FOLDER)  # these tests measured different weights
    return _Sequence(options, stages, stage_entries(stages, record), weights)


def _clear_tests(folder: Path) -> None:
    """Delete the test results in the folder of a stage, or in that of the tests before the first stage."""
    shutil.rmtree(folder / EVALUATION_FOLDER, ignore_errors=True)


def main(options: ContinualOptions) -> int:
    """Run the command and print the table; the exit code is 130 after an interruption."""
    result = continual(options)
    if result.results or result.base is not None:
        make_table_console().print(result_table(result))
    record = Path(result.output_dir) / RECORD_FILE
    done = f"{len(result.results)} of {len(result.stages)} stages"
    print(f"{result.status} after {done}; all numbers are in {record}", file=sys.stderr)
    if result.status == "interrupted":
        again = " without --overwrite" if options.overwrite_output_dir else ""
        print(f"Resume with the same command{again}.", file=sys.stderr)
    return 0 if result.status == "finished" else 130


def _reported(tests: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the record has of the tests: task -> accuracy and counts."""
    return {task: {name: test[name] for name in _REPORTED} for task, test in tests.items()}


class _Sequence:
    """Does the stages that are left and keeps the record up to date."""

    def __init__(
        self,
        options: ContinualOptions,
        stages: Sequence[Stage],
        entries: list[dict[str, Any]],
        weights: Mapping[str, str | None],
    ) -> None:
        self.options = options
        self.stages = stages
        self.entries = entries  # what the record says about each stage
        self.weights = weights
        self.folder = Path(options.output_dir or "")
        self.grows_skills = options.growth == "skills"
        self.answers: Answers = {}  # samples of the last stage's tests
        self.start = time.perf_counter()
        self.result = ContinualResult(str(self.folder), "running", [stage.name for stage in stages], None, [], 0.0)

    def run(self) -> ContinualResult:
        """Train and test until the end or a signal."""
        self._write(recorded(self._do_all, self._write))
        return self.result

    def _do_all(self) -> bool:
        """Do all stages; returns False if a signal stopped a training."""
        if self.options.evaluate_base:
            answers = self._test(self.stages, self.options.adapter, self.folder / START_FOLDER)
            self.result.base = _reported(answers)
            self._write("running")
        for number, stage in enumerate(self.stages, start=1):
            logger.info("Stage %d of %d: %s.", number, len(self.stages), stage.name)
            if not has_finished(stage.folder):
                if self.grows_skills:
                    settle_skills(self.options.skills_folder, self.stages[: number - 1])
                if not train_or_resume(stage.options):
                    return False
            self._record_weights(stage, self.entries[number - 1])
            so_far = self.stages[:number]
            adapter = self._skills_after(so_far) if self.grows_skills else stage.folder
            self._add_row(stage, self._test(so_far, str(adapter), stage.folder))
            self._write("running")
        return True

    def _record_weights(self, stage: Stage, entry: dict[str, Any]) -> None:
        """Record the checksum of the stage's adapter; delete its tests if they measured a different adapter."""
        checksum = file_sha256(stage.folder / WEIGHTS_FILE)
        if entry["adapter_sha256"] != checksum:
            _clear_tests(stage.folder)  # before the record has the new checksum, so that a kill in between is harmless
            entry["adapter_sha256"] = checksum
        self._write("running")

    def _skills_after(self, stages: Sequence[Stage]) -> Path:
        """The skills folder as it is after these stages, if a test of the last one is missing or its skill is."""
        folder, last = self.options.skills_folder, stages[-1]
        names = read_skills(folder).names if is_skills_folder(folder) else []
        if last.name not in names or not all(self._test_file(last.folder, stage).exists() for stage in stages):
            settle_skills(folder, stages)
        return folder

    def _test_file(self, folder: Path, stage: Stage) -> Path:
        return folder / EVALUATION_FOLDER / f"{1 + self.stages.index(stage):02d}-{stage.name}.json"

    def _test(self, stages: Sequence[Stage], adapter: str | None, folder: Path) -> dict[str, dict[str, Any]]:
        """Test one adapter, or a skills folder, on the tasks of `stages`; task -> result."""
        return {
            stage.name: evaluate_once(replace(stage.test, adapter=adapter, output=str(self._test_file(folder, stage))))
            for stage in stages
        }

    def _add_row(self, stage: Stage, tests: dict[str, dict[str, Any]]) -> None:
        row = _reported(tests)
        rows = [*(list(result["tasks"].values()) for result in self.result.results), list(row.values())]
        matrix = [[task["accuracy"] for task in tasks] for tasks in rows]
        self.result.results.append(
            {
                "stage": len(matrix),
                "name": stage.name,
                "tasks": row,
                "overall_performance": overall_performance(matrix),
                "performance_drop": performance_drop(matrix),
                **self._skills_row({task: test["samples"] for task, test in tests.items()}),
            }
        )

    def _skills_row(self, answers: Answers) -> dict[str, Any]:
        """With skills, who was asked and which old answers changed."""
        if not self.grows_skills:
            return {}
        before, self.answers = self.answers, answers
        return {"asked": asked(answers), "changed": changed(before, answers)}

    def _write(self, status: str, **more: Any) -> None:
        self.result.status = status
        self.result.seconds = time.perf_counter() - self.start
        content = {
            **asdict(self.result),
            **more,
            "stages": self.entries,
            **self.weights,
            "command": without_token(sys.argv, self.options.hub_token),
            "settings": self.options.to_dict(),
            "versions": software_versions(),
            "machine": machine_description(),
        }
        atomic_write_json(self.folder / RECORD_FILE, content)
