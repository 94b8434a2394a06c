"""Tests during a training: the learning curve of a run, its mean, and when it reaches an accuracy."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import trapezoid
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mola.data.tasks import load_task
from mola.evaluation.core import evaluate_examples
from mola.evaluation.evaluate import EvaluateOptions, check_evaluation
from mola.files.atomic import append_lines, atomic_write_text
from mola.files.reading import read_json_lines, select_lines
from mola.generation.predicting import base_of
from mola.training.callbacks import ask_for_averages, check_weights

logger = logging.getLogger(__name__)

CURVE_FILE = "curve.jsonl"  # in the run folder: step, marks and seconds of every test
Curve = list[tuple[int, str]]  # step and marks, as of a result


class TestsOnTheWay(TrainerCallback):
    """Tests after every `every` steps but the last, as the test that follows the training does.

    Answers of the model as it is: nothing of the training changes by it, its random numbers included. A resumed run
    keeps the tests up to its step.
    """

    __test__ = False  # no test of pytest

    def __init__(self, test: EvaluateOptions, every: int, folder: Path) -> None:
        self.test = test
        self.every = every
        self.path = folder / CURVE_FILE
        self.examples = check_evaluation(test)[1]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop tests that the resumed part of the run will do again."""
        kept = select_lines(self.path, lambda line: 0 < line["step"] <= state.global_step)
        atomic_write_text(self.path, "".join(line + "\n" for line in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Test, and write the marks down at once.

        Raises:
            NotFiniteError: a trained weight is NaN or infinite.
        """
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        start, model = time.perf_counter(), kwargs["model"]
        ask_for_averages(kwargs.get("optimizer"))
        check_weights(args, state, model)  # of which a loss that is not logged yet would tell too late
        # A packed base that was prepared for training has norms in float32 beside stacked experts that are not.
        is_packed = getattr(base_of(model), "is_quantized", False)
        mixed: Any = getattr(args, "mixed_dtype", None)
        with torch.autocast(args.device.type, mixed, enabled=is_packed and mixed is not None):
            result = evaluate_examples(
                model,
                kwargs["processing_class"],
                load_task(self.test.task),
                self.examples,
                template=self.test.template,
                scoring=self.test.scoring,
                batch_size=self.test.batch_size,
                max_new_tokens=self.test.max_new_tokens,
                show_progress=False,
            )
        seconds = round(time.perf_counter() - start, 1)
        logger.info("Step %d: %.1f %% of %d answers are right.", state.global_step, 100 * result.accuracy, result.total)
        entry = {"step": state.global_step, "marks": marks_of(result.samples), "seconds": seconds}
        append_lines(self.path, [json.dumps(entry)])


def marks_of(samples: Sequence[dict[str, Any]]) -> str:
    """A 1 for every right answer and a 0 for every other."""
    return "".join("1" if sample["correct"] else "0" for sample in samples)


def read_curve(folder: Path) -> tuple[Curve, float]:
    """The tests of a run on the way, in the order of steps, and their seconds."""
    lines = list(read_json_lines(folder / CURVE_FILE))
    return [(line["step"], line["marks"]) for line in lines], sum(line["seconds"] for line in lines)


def over_the_training(curve: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    r"""Mean of the marks over the steps between the first test and the last, for every question.

    Trapezoids: `sum_k (m_k + m_{k+1}) (t_{k+1} - t_k) / (2 (t_K - t_1))`, the area under the curve by its width.

    Args:
        curve: step and marks of at least two tests, in the order of steps.
    """
    steps = np.array([step for step, _ in curve], dtype=float)
    marks = np.stack([values for _, values in curve])
    return np.asarray(trapezoid(marks, steps, axis=0) / (steps[-1] - steps[0]))


def steps_to(target: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """Where the line through the accuracies first reaches a value; None if it does not."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value >= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (target - before[1]) / (value - before[1])
        before = step, value
    return None
