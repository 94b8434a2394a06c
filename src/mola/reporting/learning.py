"""Whether a run has learnt, by its training losses alone."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

_SHORT = 100  # optimiser steps below which a run may be too short for its learning rate
_TRIAL = 10  # optimiser steps below which a run is a trial of the set-up
_STEEP = 0.05  # fall from one quarter of the steps to the next, as a share of the first loss
_FALL_PER_PASS = 0.05  # share of the first loss that each further pass over the same samples takes off
_MOST_EXPECTED = 0.5
_LEARNT = 0.1  # share of the first loss: what is lower has been learnt
_HIGHEST_RATE = 3e-3  # a rate that the advice does not exceed

Curve = Sequence[tuple[float, float]]  # step and loss of each log entry


class NotLearnt(NamedTuple):
    """Why a run has not learnt, and what to change."""

    seen: str
    change: str


def not_learnt(
    losses: Curve, epochs: float, learning_rate: float | None = None, max_steps: int = -1
) -> NotLearnt | None:
    """Say why a run has not learnt its data; None if it has, or if the losses cannot tell.

    L is the mean loss of the last quarter of the steps, L' that of the quarter before, F the first loss (the highest
    of the first entry and the mean of the first quarter). A run has not learnt in two cases:

    - The training stopped too early: a run of fewer than 100 steps ends while the loss still falls steeply,
      L' - L > 5 % of F and twice the noise of the log.
    - The loss has hardly fallen although the same samples were seen again: L > (1 - s) F, where s is 5 % for each
      pass over the data after the first, at most 50 %.

    A loss below 10 % of F counts as learnt. A long run with one pass over its data is never reported, since the loss of
    new samples may fall as little as from 1.5 to 1.4. Neither is a run with fewer than two log entries or ten steps.
    The training loss does not say whether answers are right: a low loss may be memory, a high one the best possible.

    Args:
        losses: training loss by step, in the order of the steps.
        epochs: passes over the data.
        learning_rate: highest rate of the run, for the advice.
        max_steps: the option of this name, for the advice.
    """
    if len(losses) < 2 or losses[-1][0] < _TRIAL:
        return None
    steps, values = losses[-1][0], [loss for _, loss in losses]
    end, before = _mean(losses, 0.75, 1), _mean(losses, 0.5, 0.75)
    first = max(values[0], _mean(losses, 0, 0.25))
    if end < _LEARNT * first:
        return None
    expected = first * min(_MOST_EXPECTED, _FALL_PER_PASS * (epochs - 1))
    noise = median(abs(one - next_one) for one, next_one in pairwise(values)) * (8 / len(values)) ** 0.5
    if steps < _SHORT and before - end > max(_STEEP * first, 2 * noise if len(values) >= 8 else 0):
        seen = f"The training loss was still falling when the run ended: {before:.2f}, then {end:.2f}"
    elif epochs > 1 and first - end < expected:
        seen = f"The training loss has hardly fallen: from {first:.2f} to {end:.2f}"
    else:
        return None
    ways = [
        f"--max_steps {2 * steps:g}" if max_steps > 0 else f"--num_train_epochs {2 * epochs:.3g} ({epochs:.3g} now)"
    ]
    if learning_rate is not None and learning_rate < _HIGHEST_RATE:
        ways.insert(0, f"--learning_rate {min(_HIGHEST_RATE, 3 * learning_rate):.1g} ({learning_rate:g} now)")
    return NotLearnt(f"{seen} (means over a quarter of {steps:g} steps).", f"Pass {', or '.join(ways)}.")


def _mean(losses: Curve, start: float, stop: float) -> float:
    """Mean loss of a part of the steps; if it has no entry, the last loss before its end, else the first of all."""
    last = losses[-1][0]
    found = [loss for step, loss in losses if start * last < step <= stop * last]
    return fmean(found or [[loss for step, loss in losses if step <= stop * last or step == losses[0][0]][-1]])
