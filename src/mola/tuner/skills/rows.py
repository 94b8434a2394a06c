"""The LoRA of each row of a batch: hooks on the base model's linears add the LoRAs' outputs.

The hooks read tensors that are prepared when rows change, not for each token:

- All rows ask the same skill: its tensors, computed exactly like PEFT's own LoRA.
- Rows ask different skills, or only some rows ask one: one tensor of stacked matrices per linear, computed by two
  batched products. Ranks are padded with zeros. A row that asks nobody has zeros, so its output does not change.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from mola.errors import MolaError
from mola.tuner.skills.loras import LinearLora, LoraStore
from mola.tuner.skills.stacks import Row, Stacks, highest_rank

Rows: TypeAlias = tuple[Row, ...]

# Prompts are read and answers continued in turns, so two batches alternate.
_MAX_KEPT = 2
_ROW_BLOCK = 4  # stacks have room for a multiple of this number of rows


class RowLoras:
    """Adds the LoRAs of each row to the outputs of a model's linears.

    Args:
        store: the LoRAs of the model's skills.
    """

    def __init__(self, store: LoraStore) -> None:
        self.store = store
        self._hooked: set[str] = set()
        self._kept: OrderedDict[str, dict[str, LinearLora]] = OrderedDict()
        self._stacks: list[Stacks] = []  # least recently used first
        self._placement: Any = None
        # These are of the next forward pass.
        self._loras: Mapping[str, LinearLora] = {}  # stacks of matrices, unless all rows ask the same skill
        self._num_rows = self._num_tokens = 0

    def adapt(self, linears: Iterable[str]) -> None:
        """Put hooks on linears that have none yet."""
        for name in linears:
            if name not in self._hooked:
                self._hooked.add(name)
                self.store.linears[name].register_forward_hook(functools.partial(self._add_lora, name))

    def set_rows(self, rows: Rows, num_tokens: int) -> None:
        """Give each row of the next forward passes its LoRAs.

        Args:
            rows: the skill of each row.
            num_tokens: number of tokens of each row in the next pass.

        Raises:
            MolaError: there is no such skill.
        """
        self._num_rows, self._num_tokens = len(rows), num_tokens
        if self._placement != (placement := self.store.placement()):
            self.forget()
            self._placement = placement
        asked = [name for name in dict.fromkeys(rows) if name is not None]
        self.store.touch(asked)
        if not asked:
            self._loras = {}
        elif len(set(rows)) == 1:
            self._loras = self._of_all(asked[0])
        else:
            self._loras = self._stacked(rows)

    def _of_all(self, name: str) -> Mapping[str, LinearLora]:
        """The LoRA of rows that all ask one skill."""
        if name not in self._kept:
            self._kept[name] = self.store.get([name])[name]
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        return self._kept[name]

    def _stacked(self, rows: Rows) -> Mapping[str, LinearLora]:
        """The stacks of rows that differ: those that are most like them already, changed where they differ."""
        if torch.is_grad_enabled():  # a backward pass reads the stacks later, so nothing may change them
            loras = self._read(rows)
            return Stacks(len(rows), highest_rank(loras)).set_rows(rows, loras)
        fitting = [each for each in self._stacks if len(rows) <= each.capacity]
        stacks = min(fitting, key=lambda each: len(each.changed(rows)), default=None)
        changed = range(len(rows)) if stacks is None else stacks.changed(rows)
        loras = self._read(rows[index] for index in changed)
        has_room = len(self._stacks) < _MAX_KEPT
        if stacks is None or highest_rank(loras) > stacks.rank or (changed and has_room):
            loras = self._read(rows)
            stacks = Stacks(-(-len(rows) // _ROW_BLOCK) * _ROW_BLOCK, highest_rank(loras))
        others = [each for each in self._stacks if each is not stacks]
        self._stacks = [*others[1 - _MAX_KEPT :], stacks]
        return stacks.set_rows(rows, loras)

    def _read(self, rows: Iterable[Row]) -> dict[str, dict[str, LinearLora]]:
        """The LoRAs of rows by skill and linear; none for rows that ask the base model."""
        return self.store.get(name for name in rows if name is not None)

    def clear_rows(self) -> None:
        """Leave all rows unchanged, until `set_rows` is called again."""
        self._loras = {}

    def forget(self) -> None:
        """Drop what was prepared, because skills have changed."""
        self._kept.clear()
        self._stacks = []
        self.clear_rows()

    def _add_lora(self, name: str, linear: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        """Forward hook of a linear: the output with the LoRAs of the rows, or None to leave it unchanged."""
        lora = self._loras.get(name)
        if lora is None:
            return None
        x = args[0].to(lora.down.dtype)
        if lora.down.dim() == 2:
            # The same operations in the same order as in PEFT, so that the result is the same to the last bit.
            return (output + F.linear(F.linear(x, lora.down), lora.up) * lora.scale).to(output.dtype)
        # Some models pass a linear all tokens of all rows in one dimension.
        if len(x) not in (self._num_rows, self._num_rows * self._num_tokens):
            raise MolaError(
                f"the rows of this batch ask different skills, and {name!r} reads {len(x)} rows in place of "
                f"{self._num_rows}. Ask one skill per batch, or train the skills without this linear."
            )
        rows = x.reshape(self._num_rows, -1, x.shape[-1])
        added = torch.bmm(torch.bmm(rows, lora.down.mT), lora.up.mT)
        return (output + added.view_as(output)).to(output.dtype)
