"""What a comparison compares: the accuracy of answers, or the loss of free text. How each is written in tables."""

from collections.abc import Callable
from dataclasses import dataclass

from mola.evaluation.scoring import perplexity
from mola.reporting.formatting import nats, points

_INTERVALS = (
    "Intervals and verdicts hold for new seeds and new {questions}, and allow for the number of recipes: in 95 % of "
    "such studies, all verdicts for a task are correct, provided that results vary between new seeds no more than "
    "between these."
)


@dataclass(frozen=True)
class Outcome:
    """An outcome, and how it is written.

    Attributes:
        columns: headings of the values in the table.
        texts: one value as the texts of these columns.
        signed: a difference as text, with its sign.
        note: what the numbers of the table mean; `{reference}` stands for the recipe with which others are compared.
        diverged: what a training that diverges means for the outcome.
    """

    columns: tuple[str, ...]
    texts: Callable[[float], list[str]]
    signed: Callable[[float], str]
    note: str
    diverged: str


ACCURACY = Outcome(
    columns=("accuracy",),
    texts=lambda value: [points(value, "")],
    signed=points,
    note="Accuracy in per cent. Difference from {reference} in points, on the same questions with the same seeds. "
    + _INTERVALS.format(questions="questions"),
    diverged="all answers count as wrong",
)
LOSS = Outcome(
    columns=("loss", "perplexity"),
    texts=lambda value: [nats(value, ""), f"{perplexity(value):.4g}"],
    signed=nats,
    note="Loss in nats per token over all tokens of the test rows; the perplexity is exp(loss). Lower is better. "
    "Difference: loss of the recipe − loss of {reference}, on the same rows with the same seeds; a negative difference "
    "is a lower loss. " + _INTERVALS.format(questions="rows"),
    diverged="it has no loss, and its recipe no verdict",
)
