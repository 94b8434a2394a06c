"""Train and test one run of a comparison, and collect its result for the record."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mola.errors import NotFiniteError
from mola.files.digests import WEIGHTS_FILE
from mola.files.environment import machine_description, software_versions
from mola.files.reading import read_json_object
from mola.reporting.findings import NOT_LEARNT, find_training_fault
from mola.reporting.load_run import load_run
from mola.studies.comparison.checks import Run
from mola.studies.comparison.record import BASE, Result, begin_or_resume
from mola.studies.train_and_test import evaluate_once, free_memory, train_or_resume
from mola.training.checkpoints import RUN_FILE, checkpoints_in, has_finished

_TEST_FILE = "test.json"
_LARGE_FILES = (WEIGHTS_FILE, "tokenizer.json")


def train_and_test(run: Run) -> Result | None:
    """Train and test a run, or finish it if it was begun. None if a signal stopped the training.

    A training that diverges also gives a result: all answers count as wrong, and on free text there is no loss.
    """
    folder = Path(run.options.output_dir or "")
    begin_or_resume(folder, run.identity)
    try:
        if not has_finished(folder):
            (folder / _TEST_FILE).unlink(missing_ok=True)  # that test measured different weights
            if not train_or_resume(run.options):
                return None
        tested = evaluate_once(replace(run.test, adapter=str(folder), output=str(folder / _TEST_FILE)))
    except NotFiniteError as error:
        if error.was_interrupted:
            return None
        tested = None
    free_memory()
    record, fault = read_json_object(folder / RUN_FILE), find_training_fault(load_run(str(folder)))
    config = read_json_object(folder / "adapter_config.json")
    experts = config.get("num_experts", record.get("num_experts", 1))  # LoRA has no such field
    return Result(
        *run.key,
        **_outcome(run, tested),
        trainable_parameters=record["trainable_parameters"],
        num_experts=experts if isinstance(experts, list) else [experts] * record["allocation"].get("num_layers", 1),
        eval_loss=None if tested is None else record["metrics"].get("eval_loss"),
        seconds_training=round(record["seconds"], 1),
        settings=run.settings,
        steps=record["steps"],
        diverged_at=record["steps"] if tested is None else None,
        not_learnt=None if fault is None or fault.name != NOT_LEARNT else fault.seen,
    )


def evaluate_base_model(run: Run, path: Path) -> Result:
    """Test the base model on a run's task; `path` is the result file."""
    begin_or_resume(path, run.base_identity)
    tested = evaluate_once(replace(run.test, output=str(path)))
    return Result(
        run.key.task,
        BASE,
        0,
        **_outcome(run, tested),
        trainable_parameters=0,
        num_experts=[],
        eval_loss=None,
        seconds_training=0.0,
        settings=run.base_identity["setting"],
    )


def remove_weights(run: Run) -> None:
    """Delete adapter and tokenizer of a finished run."""
    for name in _LARGE_FILES:
        (Path(run.options.output_dir or "") / name).unlink(missing_ok=True)


def remove_checkpoints(run: Run) -> None:
    """Delete the checkpoints of a finished run, which are several times as large as its adapter."""
    for checkpoint in checkpoints_in(Path(run.options.output_dir or "")):
        shutil.rmtree(checkpoint)


def _outcome(run: Run, tested: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of a `Result` about its test. `tested` is None after a training that diverged."""
    return {
        **(_answers(run.num_questions, tested) if run.is_scored else _losses(tested)),
        "total": run.num_questions,
        "seconds_testing": 0.0 if tested is None else round(tested["seconds"], 1),
        "fingerprints": run.fingerprints,
        "base_model": run.base_model,
        "dtype": run.dtype,
        "rule": run.rule,
        "versions": software_versions(),
        "machine": machine_description(),
    }


def _answers(total: int, tested: Mapping[str, Any] | None) -> dict[str, Any]:
    """If `tested` is None, all answers count as wrong."""
    if tested is None:
        return {"accuracy": 0.0, "correct": 0, "unanswered": total, "marks": "0" * total}
    marks = "".join("1" if sample["correct"] else "0" for sample in tested["samples"])
    return {**{name: tested[name] for name in ("accuracy", "correct", "unanswered")}, "marks": marks}


def _losses(tested: Mapping[str, Any] | None) -> dict[str, Any]:
    """If `tested` is None, there is no loss."""
    no_answers = dict.fromkeys(("accuracy", "correct", "unanswered", "marks"))
    if tested is None:
        return no_answers
    losses, tokens = ([sample[name] for sample in tested["samples"]] for name in ("loss", "tokens"))
    return {**no_answers, "loss": tested["loss"], "losses": losses, "tokens": tokens}
