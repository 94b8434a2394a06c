"""Agreement of modules: Cramér's V against scipy's, over batches, and where it has to be 1 or 0."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats.contingency import association

from mola.insight.agreement import AgreementCounter
from mola.insight.recorder import ModuleGates


def modules(choices, widths):
    """Gates of 0.75 for the first choice and 0.25 for another expert."""
    found = []
    for number, (column, width) in enumerate(zip(choices, widths, strict=True)):
        gates = 0.75 * torch.nn.functional.one_hot(column, width) + 0.25 * torch.nn.functional.one_hot(
            (column + 1) % width, width
        )
        found.append(ModuleGates(f"module {number}", number, gates, torch.zeros(len(column))))
    return found


def measured(choices, widths, cut=None):
    counter = AgreementCounter()
    for part in (slice(cut), slice(cut, None)) if cut is not None else (slice(None),):
        counter.add(modules([column[part] for column in choices], widths))
    return counter.cramers_v()


@given(st.integers(2, 60), st.lists(st.integers(2, 8), min_size=2, max_size=4), st.integers(0, 2**31), st.data())
def test_cramers_v_equals_scipys_for_any_batches(num_tokens, widths, seed, data):
    generator = torch.Generator().manual_seed(seed)
    choices = [torch.randint(width, (num_tokens,), generator=generator) for width in widths]
    choices[1] = torch.where(torch.rand(num_tokens, generator=generator) < 0.5, choices[0] % widths[1], choices[1])
    ours = measured(choices, widths, data.draw(st.integers(0, num_tokens)))
    assert torch.equal(ours, ours.t())
    for one, first in enumerate(choices):
        for other, second in enumerate(choices):
            table = np.array(
                [[int(((first == i) & (second == j)).sum()) for j in second.unique()] for i in first.unique()]
            )
            if one == other:
                assert ours[one, other] == 1
            elif min(table.shape) == 1:
                assert ours[one, other] == 0
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert ours[one, other].item() == pytest.approx(association(table, method="cramer"), abs=1e-7)


def test_renumbered_experts_agree():
    choice = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    renamed = torch.tensor([2, 0, 1])[choice]
    coarser = (choice == 2).long()
    values = measured([choice, renamed, coarser, torch.zeros(7, dtype=torch.long)], [3, 3, 2, 2])
    torch.testing.assert_close(
        values,
        torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.float64),
    )


def test_no_modules():
    counter = AgreementCounter()
    counter.add([])
    assert counter.cramers_v().tolist() == []


def test_calls_of_one_module_are_counted_together():
    first = [torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 0])]
    second = [torch.tensor([2, 2, 1, 0]), torch.tensor([0, 1, 0, 1])]
    counter = AgreementCounter()
    counter.add([*modules(first, [3, 2]), *modules(second, [3, 2])])
    assert counter.modules == ["module 0", "module 1"]
    together = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    assert torch.equal(counter.cramers_v(), measured(together, [3, 2]))


def test_modules_with_another_number_of_tokens_are_left_out():
    """As the experts of a base model's own, whatever it was in the first pass."""
    first = [torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 1, 0])]
    second = [torch.tensor([2, 2, 1, 0, 1]), torch.tensor([0, 1]), torch.tensor([0, 1, 0, 1, 1])]
    counter = AgreementCounter()
    counter.add(modules(first, [3, 2, 2]))
    counter.add(modules(second, [3, 2, 2]))
    counter.add([each for each in modules(first, [3, 2, 2]) if each.module != "module 1"])
    assert counter.modules == ["module 0", "module 2"]
    together = [torch.cat([first[place], second[place], first[place]]) for place in (0, 2)]
    assert torch.equal(counter.cramers_v(), measured(together, [3, 2]))
