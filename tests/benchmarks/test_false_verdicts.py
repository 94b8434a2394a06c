"""The simulation of false verdicts: its studies, and its command at a small size."""

import numpy as np
import pytest
from benchmarks.false_verdicts import ROWS, SEEDS, main, simulate_losses

from mola.evaluation.differences import loss_values


def test_all_recipes_are_equally_good_and_seeds_differ_as_much_as_asked():
    studies = [simulate_losses(np.random.default_rng(number), 2, 100, 3.0) for number in range(300)]
    by_seed = np.array([loss_values(losses[1], losses[0], tokens).mean(1) for losses, tokens in studies])
    assert abs(by_seed.mean()) < 4 * by_seed.mean(1).std() / np.sqrt(300)
    uncertainty = np.array([np.sqrt((tokens**2).sum()) / tokens.sum() for _, tokens in studies])
    # Half the difference between two seeds has the variance of one recipe's seeds. The rest adds that of the rows.
    spread = ((by_seed[:, 0] - by_seed[:, 1]) / 2 / uncertainty).var()
    assert spread == pytest.approx(3.0**2 + 1, rel=0.3)


def test_the_command_prints_a_row_for_each_number_of_seeds_and_rows(capsys):
    assert main(["--studies", "2"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| seeds | rows | 0 | 0.5 | 1 | 3 |"
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [(int(seeds), int(rows)) for seeds, rows, *_ in cells] == [(one, two) for one in SEEDS for two in ROWS]
    assert {float(share) for _, _, *shares in cells for share in shares} <= {0.0, 50.0, 100.0}
