"""The marks of results as numbers: at the end of a training, or as the mean over it."""

from collections.abc import Sequence

import numpy as np

from mola.studies.comparison.curve import over_the_training
from mola.studies.comparison.record import Result


def marks_by_seed(results: Sequence[Result], over_training: bool = False) -> dict[int, np.ndarray]:
    """Seed -> marks of one recipe on one task; runs without tests on the way have no mean over the training."""
    if not over_training:
        return {each.seed: as_numbers(each.marks) for each in results}
    return {each.seed: over_the_training(curve_of(each)) for each in results if each.curve}


def curve_of(result: Result) -> list[tuple[int, np.ndarray]]:
    """Step and marks of all tests, the one at the end included."""
    return [*((step, as_numbers(marks)) for step, marks in result.curve), (result.steps, as_numbers(result.marks))]


def as_numbers(marks: str) -> np.ndarray:
    """`"10"` -> `[1.0, 0.0]`."""
    return np.array([float(mark) for mark in marks])
