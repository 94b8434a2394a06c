"""Stacks of a batch whose rows come and go are those of the batch made anew."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mola.tuner.skills.loras import LinearLora
from mola.tuner.skills.stacks import Stacks, highest_rank

SIZES = {"q": (4, 6), "v": (4, 2)}  # inputs and outputs


def make_lora(seed, rank, linears):
    draw = torch.Generator().manual_seed(seed)
    return {
        name: LinearLora(
            torch.randn(rank, SIZES[name][0], generator=draw), torch.randn(SIZES[name][1], rank, generator=draw), 0.5
        )
        for name in linears
    }


LORAS = {"a": make_lora(0, 2, "qv"), "b": make_lora(1, 3, "q"), "c": make_lora(2, 1, "v")}
BATCHES = st.lists(st.lists(st.sampled_from([None, *LORAS]), min_size=1, max_size=4), min_size=1, max_size=6)


@given(BATCHES)
def test_changed_stacks_are_those_made_anew(batches):
    stacks = Stacks(4, highest_rank(LORAS))
    for number, rows in enumerate(batches):
        changed = {rows[index] for index in stacks.changed(rows)}
        with torch.inference_mode(number % 2 == 0):
            found = stacks.set_rows(rows, {row: LORAS[row] for row in changed if row is not None})
        for name, (size_in, size_out) in SIZES.items():
            expected = [
                lora.up @ lora.down * lora.scale if (lora := LORAS.get(row, {}).get(name)) else torch.zeros(1)
                for row in rows
            ]
            products = found[name].up @ found[name].down if name in found else torch.zeros(len(rows), 1, 1)
            for product, wanted in zip(products, expected, strict=True):
                torch.testing.assert_close(
                    product.expand(size_out, size_in), wanted.expand(size_out, size_in), rtol=1e-5, atol=1e-6
                )
