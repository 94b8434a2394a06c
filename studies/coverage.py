"""`python -m studies.coverage`: how often are verdicts of a table wrong, where no two recipes differ?

- Answers to questions are drawn at random for recipes that are equally good: a question has a difficulty, each recipe
  finds some easier than others, each seed of a recipe is a little better or worse, and the rest is chance.
- A study is wrong if any verdict of its table says better or worse; that may happen in 5 % of studies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from mola.evaluation.differences import paired_differences

SEEDS = (3, 5, 6, 8, 10)
RECIPES = (1, 3, 13)  # compared with the reference
SPREADS = (0.1, 0.3, 1.0)  # of seeds, in logits: some 2, 5 and 15 points of accuracy, besides chance
QUESTIONS = 200
_DIFFICULTY, _TASTE = 1.5, 0.3  # spread of questions, and of each recipe's own view of them


def answers(generator: np.random.Generator, recipes: int, seeds: int, questions: int, spread: float) -> np.ndarray:
    """Marks `(recipes, seeds, questions)` of recipes that are equally good."""
    logits = generator.normal(1.0, _DIFFICULTY, questions) + generator.normal(0.0, _TASTE, (recipes, 1, questions))
    logits = logits + generator.normal(0.0, spread, (recipes, seeds, 1))
    return (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)


def share_wrong(recipes: int, seeds: int, spread: float, studies: int, questions: int = QUESTIONS) -> float:
    """Share of studies with a verdict that says better or worse."""
    generator = np.random.default_rng([recipes, seeds, round(100 * spread)])
    wrong = 0
    for _ in range(studies):
        reference, *others = answers(generator, recipes + 1, seeds, questions, spread)
        found = paired_differences({str(number): marks for number, marks in enumerate(others)}, reference)
        wrong += any(each.verdict in ("better", "worse") for each in found.values())
    return wrong / studies


def table(seeds: Sequence[int], studies: int) -> list[str]:
    """Lines of Markdown: the largest share over the spreads, in per cent."""
    head = ["seeds", *(f"{number} compared" if number > 1 else "1 compared" for number in RECIPES)]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for number in seeds:
        worst = [max(share_wrong(recipes, number, spread, studies) for spread in SPREADS) for recipes in RECIPES]
        lines.append(" | ".join([str(number), *(f"{100 * each:.1f}" for each in worst)]))
    return [f"| {line} |" for line in lines]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m studies.coverage", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="Seeds of every recipe.")
    parser.add_argument("--studies", type=int, default=600, help="Studies drawn for each number.")
    options = parser.parse_args()
    print("\n".join(table(options.seeds, options.studies)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
