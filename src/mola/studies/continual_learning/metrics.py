"""How well all tasks so far are known, and how much of the earlier ones was lost.

R[t][i] is the accuracy on task i after training stage t, for i <= t; both count from 1 here.
"""

from collections.abc import Sequence


def overall_performance(matrix: Sequence[Sequence[float]]) -> float:
    """Mean accuracy on the tasks seen so far, after the last stage of `matrix`.

        OP_t = (1 / t) * sum over i <= t of R[t][i]

    Args:
        matrix: R up to stage t: one row per stage, the first with one accuracy, the second with two, ...

    Returns:
        OP_t, a fraction of 1.

    Source: the average accuracy of Chaudhry et al. 2018.
    """
    return sum(matrix[-1]) / len(matrix)


def performance_drop(matrix: Sequence[Sequence[float]]) -> float | None:
    """Mean change on the earlier tasks since each was trained, after the last stage of `matrix`.

        PD_t = (1 / (t - 1)) * sum over i < t of (R[t][i] - R[i][i])

    Negative: forgotten. Positive: later tasks helped.

    Args:
        matrix: as of `overall_performance`.

    Returns:
        PD_t, between -1 and 1; None for t = 1, where there is no earlier task.

    Source: after the forgetting measure of Chaudhry et al. 2018, which compares with the best accuracy of any
    earlier stage instead of the one right after the task's own.
    """
    earlier = len(matrix) - 1
    if earlier == 0:
        return None
    return sum(matrix[-1][i] - matrix[i][i] for i in range(earlier)) / earlier
