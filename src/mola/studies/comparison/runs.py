"""One run of a comparison: whether it is finished, and what goes into the record of it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.digests import WEIGHTS_FILE
from mola.files.environment import machine_description, software_versions
from mola.files.reading import read_json_object
from mola.studies.comparison.checks import Run
from mola.studies.comparison.curve import TestsOnTheWay, marks_of, read_curve
from mola.studies.comparison.record import BASE, Result
from mola.studies.train_and_test import evaluate_once, train_or_go_on
from mola.training.checkpoints import RUN_FILE, checkpoints_in, has_finished

_TEST_FILE = "test.json"
_LARGE = (WEIGHTS_FILE, "tokenizer.json")


def train_and_test(run: Run) -> Result | None:
    """What is not done yet of a run; None if a signal stopped the training.

    Raises:
        NotFiniteError: the training diverged, or the answers are no numbers.
    """
    folder = Path(run.options.output_dir or "")
    if not is_finished(run):
        (folder / _TEST_FILE).unlink(missing_ok=True)  # of weights that will be others
        on_the_way = [TestsOnTheWay(run.test, run.test_every, folder)] if run.test_every else []
        if not train_or_go_on(run.options, on_the_way):
            return None
    test = replace(run.test, adapter=str(folder), output=str(folder / _TEST_FILE))
    return result_of(run, evaluate_once(test, run.fingerprints["test"]))


def is_finished(run: Run) -> bool:
    """Whether the run's folder holds its finished training.

    Raises:
        MolaError: it has other tests on the way.
    """
    folder = Path(run.options.output_dir or "")
    if not has_finished(folder):
        return False
    if [step for step, _ in read_curve(folder)[0]] != _test_steps(run, read_json_object(folder / RUN_FILE)["steps"]):
        raise MolaError(
            f"{str(folder)!r} holds a run without the tests on the way that `test_every` {run.test_every} asks for. "
            "Delete that folder, or pass another `output_dir`."
        )
    return True


def _test_steps(run: Run, steps: int) -> list[int]:
    """After which steps there is a test on the way."""
    return list(range(run.test_every, steps, run.test_every)) if run.test_every else []


def result_of(run: Run, tested: Mapping[str, Any]) -> Result:
    """What the record keeps of a run whose folder holds the adapter; `tested` is the content of its result file."""
    folder = Path(run.options.output_dir or "")
    record, config = (read_json_object(folder / name) for name in (RUN_FILE, "adapter_config.json"))
    curve, seconds_of_curve = read_curve(folder)
    return Result(
        *run.key,
        **_tested(run, tested, seconds_of_curve),
        trainable_parameters=record["trainable_parameters"],
        num_experts=_experts_by_layer(config.get("num_experts", 1), record),  # LoRA has no such field
        eval_loss=record["metrics"].get("eval_loss"),
        seconds_training=round(record["seconds"] - seconds_of_curve, 1),
        settings=json.loads(json.dumps(run.settings)),
        steps=record["steps"],
        curve=curve,
    )


def diverged_result_of(run: Run) -> Result:
    """What the record keeps of a run whose training has diverged: all answers are wrong, from there on.

    Tests on the way before it count as they are.
    """
    folder = Path(run.options.output_dir or "")
    record = read_json_object(folder / RUN_FILE)
    before, seconds_of_curve = read_curve(folder)
    wrong = "0" * run.num_questions
    # A training that ended with numbers to the last has no `max_steps`; one that had nothing left to do has 0.
    steps = max(record.get("max_steps", 0), record["steps"])
    config = read_json_object(folder / "adapter_config.json")  # older records have no `num_experts`
    later = _test_steps(run, steps)[len(before) :]
    return Result(
        *run.key,
        accuracy=0.0,
        correct=0,
        total=run.num_questions,
        unanswered=run.num_questions,
        marks=wrong,
        **_conditions(run),
        trainable_parameters=record["trainable_parameters"],
        num_experts=_experts_by_layer(record.get("num_experts", config.get("num_experts", 1)), record),
        eval_loss=None,
        seconds_training=round(record["seconds"] - seconds_of_curve, 1),
        seconds_testing=round(seconds_of_curve, 1),
        settings=json.loads(json.dumps(run.settings)),
        steps=steps,
        curve=[*before, *((step, wrong) for step in later)],
        diverged_at=record["steps"],
    )


def _experts_by_layer(value: int | list[int], record: Mapping[str, Any]) -> list[int]:
    """Of an adapter's `num_experts`; an adapter trained on may not tell the number of layers."""
    return value if isinstance(value, list) else [value] * record["allocation"].get("num_layers", 1)


def base_result_of(run: Run, tested: Mapping[str, Any]) -> Result:
    """What the record keeps of the base model on the task of a run."""
    return Result(
        run.key.task,
        BASE,
        0,
        **_tested(run, tested),
        trainable_parameters=0,
        num_experts=[],
        eval_loss=None,
        seconds_training=0.0,
        settings=json.loads(json.dumps(run.base_identity["setting"])),
    )


def remove_weights(folder: Path) -> None:
    """Take adapter, checkpoints and tokenizer out of a run folder."""
    for name in _LARGE:
        (folder / name).unlink(missing_ok=True)
    for checkpoint in checkpoints_in(folder):
        shutil.rmtree(checkpoint)


def _tested(run: Run, tested: Mapping[str, Any], seconds_before: float = 0.0) -> dict[str, Any]:
    return {
        **{name: tested[name] for name in ("accuracy", "correct", "total", "unanswered")},
        "marks": marks_of(tested["samples"]),
        "seconds_testing": round(seconds_before + tested["seconds"], 1),
        **_conditions(run),
    }


def _conditions(run: Run) -> dict[str, Any]:
    return {
        "fingerprints": run.fingerprints,
        "base_model": run.base_model,
        "dtype": run.dtype,
        "rule": run.rule,
        "versions": software_versions(),
        "machine": machine_description(),
    }
