"""`python -m benchmarks.false_verdicts`: how often `mola compare` on free text finds a difference that does not exist.

Each simulated study has a reference and two recipes, all equally good. The loss per token of recipe `r` with seed `s`
on row `q`, without the part that all share, is

    row[r,q] + seed[r,s] + rest[r,s,q]

`row` and `rest` have standard deviation 1. `row` is Student's t with 3 degrees of freedom, so that a few rows differ
much. `seed` is normal. Its standard deviation is a multiple of the uncertainty of a recipe's loss that comes from
`row`. A row's number of tokens is log-normal, and varies by a factor of two (one standard deviation).
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from benchmarks.errors import in_one_line
from mola.evaluation.differences import paired_loss_difference

SEEDS, ROWS = (2, 3, 5), (24, 200)
SPREADS = (0.0, 0.5, 1.0, 3.0)  # standard deviation between seeds, over the uncertainty from the rows
RECIPES = 2  # that are compared with the reference


def simulate_losses(
    generator: np.random.Generator, seeds: int, rows: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """One study: nats `(reference and recipes, seeds, rows)`, and the tokens of the rows `(rows,)`."""
    tokens = np.ceil(100 * 2 ** generator.standard_normal(rows))
    models = 1 + RECIPES
    row = generator.standard_t(3, (models, 1, rows)) / np.sqrt(3)  # the variance of t with 3 degrees of freedom is 3
    uncertainty = np.sqrt((tokens**2).sum()) / tokens.sum()
    seed = spread * uncertainty * generator.standard_normal((models, seeds, 1))
    return tokens * (row + seed + generator.standard_normal((models, seeds, rows))), tokens


def false_verdicts(seeds: int, rows: int, spread: float, studies: int) -> float:
    """The share of simulated studies in which some recipe is called better or worse."""
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(studies):
        (reference, *recipes), tokens = simulate_losses(generator, seeds, rows, spread)
        found = (paired_loss_difference(losses, reference, tokens, RECIPES) for losses in recipes)
        wrong += any(each.verdict in ("better", "worse") for each in found)
    return wrong / studies


@in_one_line("benchmarks.false_verdicts")
def main(arguments: list[str] | None = None) -> int:
    """Print the table, in per cent."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.false_verdicts", description=__doc__)
    parser.add_argument("--studies", type=int, default=600, help="number of studies for each number")
    options = parser.parse_args(arguments)
    print("| seeds | rows |" + "".join(f" {spread:g} |" for spread in SPREADS))
    print("| --- | --- |" + " --- |" * len(SPREADS))
    for seeds in SEEDS:
        for rows in ROWS:
            shares = (false_verdicts(seeds, rows, spread, options.studies) for spread in SPREADS)
            print(f"| {seeds} | {rows} |" + "".join(f" {100 * share:.1f} |" for share in shares), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
