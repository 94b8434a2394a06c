"""The LoRA of each row of a batch: hooks on the base model's linears add the LoRAs' outputs.

The hooks read tensors that are prepared once for each composition of a batch, not for each token:

- All rows ask the same skill: its tensors, computed exactly like PEFT's own LoRA.
- Rows ask different skills, or only some rows ask one: one tensor of stacked matrices per linear, computed by two
  batched products. Ranks are padded with zeros. A row that asks nobody has zeros, so its output does not change.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from mola.errors import MolaError
from mola.tuner.skills.loras import LinearLora, LoraStore

Row: TypeAlias = tuple[str, ...]  # the skills that a row asks, whose outputs are added; empty for the base model
Rows: TypeAlias = tuple[Row, ...]

# Prompts are read and answers continued in turns, so two compositions alternate.
_MAX_KEPT_COMPOSITIONS = 2


class RowLoras:
    """Adds the LoRAs of each row to the outputs of a model's linears.

    Args:
        store: the LoRAs of the model's skills.
    """

    def __init__(self, store: LoraStore) -> None:
        self.store = store
        self._hooked: set[str] = set()
        self._kept: OrderedDict[Any, dict[str, LinearLora]] = OrderedDict()
        # These are of the next forward pass.
        self._loras: dict[str, LinearLora] = {}  # stacks of matrices, unless all rows have the same skills
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
            rows: the skills of each row.
            num_tokens: number of tokens of each row in the next pass.

        Raises:
            MolaError: there is no such skill.
        """
        self._num_rows, self._num_tokens = len(rows), num_tokens
        if not any(rows):
            self._loras = {}
            return
        key = rows, self.store.placement()
        if key in self._kept:
            self.store.touch(name for row in rows for name in row)
        else:
            self._kept[key] = _compose(rows, self.store.get(name for row in rows for name in row))
            if len(self._kept) > _MAX_KEPT_COMPOSITIONS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        self._loras = self._kept[key]

    def clear_rows(self) -> None:
        """Leave all rows unchanged, until `set_rows` is called again."""
        self._loras = {}

    def forget(self) -> None:
        """Drop what was prepared, because skills have changed."""
        self._kept.clear()
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


def _compose(rows: Rows, skills: Mapping[str, Mapping[str, LinearLora]]) -> dict[str, LinearLora]:
    """The tensors of each linear: those of one LoRA if all rows ask the same skills, else one stack of matrices."""
    distinct = {row: _loras_of_row([skills[name] for name in row]) for row in dict.fromkeys(rows)}
    if len(distinct) == 1:
        return distinct[rows[0]]
    linears = dict.fromkeys(name for loras in distinct.values() for name in loras)
    return {name: _stack([distinct[row].get(name) for row in rows]) for name in linears}


def _loras_of_row(skills: Sequence[Mapping[str, LinearLora]]) -> dict[str, LinearLora]:
    """Linear -> LoRA of a row. The outputs of several skills are added: their matrices become one larger LoRA."""
    if len(skills) == 1:
        return dict(skills[0])
    found: dict[str, list[LinearLora]] = {}
    for loras in skills:
        for name, lora in loras.items():
            found.setdefault(name, []).append(lora)
    return {
        name: LinearLora(
            torch.cat([each.down for each in several]),
            torch.cat([each.up * each.scale for each in several], dim=1),
            1.0,
        )
        for name, several in found.items()
    }


def _stack(loras: Sequence[LinearLora | None]) -> LinearLora:
    """`down (rows, r, in)` and `up (rows, out, r)`, which includes the scale; zeros for rows without a LoRA."""
    given = [lora for lora in loras if lora is not None]
    rank = max(len(lora.down) for lora in given)
    padded = {
        id(lora): (
            F.pad(lora.down, (0, 0, 0, rank - len(lora.down))),
            F.pad(lora.up * lora.scale, (0, rank - len(lora.down))),
        )
        for lora in given
    }
    zeros = tuple(torch.zeros_like(each) for each in padded[id(given[0])])
    downs, ups = zip(*(zeros if lora is None else padded[id(lora)] for lora in loras), strict=True)
    return LinearLora(torch.stack(downs), torch.stack(ups), 1.0)
