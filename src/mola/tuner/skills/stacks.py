"""Stacked LoRAs of the rows of a batch, which change where rows change.

In a running batch rows come and go between two tokens. Only the matrices of a row that has changed are copied: in a
batch of ten rows, stacking all of them anew takes more than half of the time of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from mola.tuner.skills.loras import LinearLora

Row: TypeAlias = str | None  # the skill that a row asks; None for the base model
_UNKNOWN: Row = ""


class Stacks:
    """The matrices of up to `capacity` rows, by linear: `down (rows, r, in)` and `up (rows, out, r)` with the scale.

    A row without a LoRA of a linear has zeros, and smaller ranks are padded with zeros.
    """

    def __init__(self, capacity: int, rank: int) -> None:
        self.capacity, self.rank = capacity, rank
        self._rows: list[Row] = [None] * capacity
        self._stacks: dict[str, LinearLora] = {}
        self._views: tuple[int, dict[str, LinearLora]] = 0, {}  # number of rows, and their part of the stacks

    def changed(self, rows: Sequence[Row]) -> list[int]:
        """The indices of those of `rows` that differ from the present ones."""
        return [index for index, row in enumerate(rows) if self._rows[index] != row]

    def set_rows(self, rows: Sequence[Row], loras: Mapping[str, Mapping[str, LinearLora]]) -> Mapping[str, LinearLora]:
        """Make the stacks those of `rows`.

        Args:
            rows: the rows, at most `capacity`.
            loras: LoRAs by skill and linear of the rows that have changed, with ranks up to `rank`.

        Returns:
            Linear -> stacked matrices of the rows.
        """
        # In inference mode PyTorch makes tensors that nothing may change outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for index in self.changed(rows):
                self._rows[index] = _UNKNOWN  # in case the copy fails
                self._fill(index, {} if (name := rows[index]) is None else loras[name])
                self._rows[index] = rows[index]
        if self._views[0] != len(rows):
            parts = {name: (lora.down[: len(rows)], lora.up[: len(rows)]) for name, lora in self._stacks.items()}
            self._views = len(rows), {name: LinearLora(*part, 1.0) for name, part in parts.items()}
        return self._views[1]

    def _fill(self, index: int, loras: Mapping[str, LinearLora]) -> None:
        for name, lora in loras.items():
            if name not in self._stacks:
                down = lora.down.new_zeros(self.capacity, self.rank, lora.down.shape[1])
                up = lora.up.new_zeros(self.capacity, len(lora.up), self.rank)
                self._stacks[name] = LinearLora(down, up, 1.0)
                self._views = 0, {}
        for name, stack in self._stacks.items():
            down, up = stack.down[index], stack.up[index]
            if name not in loras:
                down.zero_()
                up.zero_()
                continue
            lora, rank = loras[name], len(loras[name].down)
            down[:rank] = lora.down
            torch.mul(lora.up, lora.scale, out=up[:, :rank])
            if rank < self.rank:
                down[rank:] = 0
                up[:, rank:] = 0


def highest_rank(loras: Mapping[str, Mapping[str, LinearLora]]) -> int:
    """The highest rank of some LoRAs, by skill and linear; 0 without any."""
    return max((len(lora.down) for each in loras.values() for lora in each.values()), default=0)
