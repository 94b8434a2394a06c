"""Which loss curves count as learnt."""

import pytest

from mola.reporting.learning import not_learnt

# 60 chats, SmolLM2-135M-Instruct, three epochs at 3e-4, logged at every step; the answers were wrong.
SHORT = [4.17, 3.95, 4.02, 3.90, 3.78, 3.57, 3.09, 2.86, 2.61, 2.36, 2.18, 2.06]
SHORT += [1.93, 1.83, 1.59, 1.52, 1.42, 1.27, 1.23, 1.14, 1.12, 1.06, 1.09, 0.95]


def curve(values, every=1):
    return [(every * number, loss) for number, loss in enumerate(values, 1)]


def falling(start, end, entries, half_life=0.15):
    """A loss that falls fast first, then slowly."""
    return [end + (start - end) * 0.5 ** (number / (half_life * entries)) for number in range(entries)]


@pytest.mark.parametrize(
    ("losses", "epochs", "words"),
    [
        (curve(SHORT), 3, "still falling when the run ended: 1.59, then 1.10"),
        ([(10, 3.43), (20, 1.74)], 3, "still falling"),  # few log entries
        (curve([4.1, 4.1, 4.0, 4.1, 4.0, 4.0, 3.9, 4.0] * 3), 3, "hardly fallen: from 4.1"),  # far too low a rate
        (curve(falling(4.1, 3.5, 40), 10), 20, "hardly fallen"),  # each sample was seen twenty times
        (curve(falling(4.2, 0.02, 48)), 6, None),
        ([(10, 2.3), (20, 0.4), (30, 0.04), (40, 0.02)], 6, None),
        (curve(falling(1.5, 1.2, 300), 10), 1, None),  # many samples, each seen once
        (curve(falling(2.3, 2.25, 300), 10), 1, None),
        (curve([1.45, 1.4] * 10 + [1.2, 1.15] * 10 + [0.9, 0.85] * 10, 10), 3, None),  # it falls with every pass
        (curve(falling(1.5, 0.9, 60)), 3, None),
        ([(10, 3.9)], 3, None),
        ([], 3, None),
    ],
)
def test_what_counts_as_learnt(losses, epochs, words):
    found = not_learnt(losses, epochs)
    assert (found is not None) == (words is not None)
    if found is not None:
        assert words in found.seen


def test_the_advice_has_values():
    assert not_learnt(curve(SHORT), 3, 3e-4).change == (
        "Pass --learning_rate 0.0009 (0.0003 now), or --num_train_epochs 6 (3 now)."
    )
    assert not_learnt(curve(SHORT), 3, 3e-3, max_steps=24).change == "Pass --max_steps 48."
