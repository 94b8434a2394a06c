"""Keys and values of a batch whose rows come and go.

Rows end at the same column, so shorter ones begin with columns that hold nothing of theirs and that the attention mask
hides. Every layer keeps all columns, those with a sliding window too: their masks do the rest.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

_COLUMNS = 64  # columns and rows are allocated so many at a time
_ROWS = 4


class _Layer(DynamicLayer):
    """One layer's keys and values, `(rows, heads, columns, head size)`: the used part of larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: torch.Tensor = torch.empty(0)
        self.values: torch.Tensor = torch.empty(0)
        self.rows = self.columns = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Called by the model: write the new columns, give all of them."""
        self.rows, start = len(key_states), self.columns
        self.columns += key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (each.new_zeros(0) for each in (key_states, value_states))
            self.is_initialized = True
        self._reserve(self.rows, self.columns, key_states, value_states)
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[: self.rows, :, start : self.columns] = new
        return self._used(self.keys), self._used(self.values)

    def get_seq_length(self, *args: Any) -> int:
        """Columns in use; called by the model."""
        return self.columns

    def make_room(self, other: "_Layer") -> None:
        """Allocate what `append` needs, to be called before."""
        if self.rows:
            rows, columns = self.rows + other.rows, max(self.columns, other.columns)
            self._reserve(rows, columns, other.keys, other.values)

    def append(self, other: "_Layer") -> None:
        """Put the rows of another cache below those here."""
        rows, columns = self.rows + other.rows, max(self.columns, other.columns)
        self._shift(columns - self.columns)
        for kept, new in ((self.keys, other.keys), (self.values, other.values)):
            # An answer that has ended may have left what is no number, which masks do not hide.
            kept[self.rows : rows, :, : columns - other.columns] = 0
            kept[self.rows : rows, :, columns - other.columns : columns] = other._used(new)
        self.rows, self.columns = rows, columns

    def drop(self, row: int) -> None:
        """Put the last row where another was."""
        if not self.rows:  # a layer that keeps nothing of its own
            return
        self.rows -= 1
        if row < self.rows:
            for kept in (self.keys, self.values):
                kept[row, :, : self.columns] = kept[self.rows, :, : self.columns]

    def trim(self, columns: int) -> None:
        """Drop the first columns, which no row needs."""
        if self.rows:
            self._shift(-columns)

    def bytes_per_token(self) -> int:
        """Memory that one token of a row takes."""
        return sum(each.shape[1] * each.shape[-1] * each.element_size() for each in (self.keys, self.values))

    def _shift(self, by: int) -> None:
        if by == 0:
            return
        source, target = slice(max(-by, 0), self.columns), slice(max(by, 0), self.columns + by)
        for kept in (self.keys, self.values):
            kept[: self.rows, :, target] = kept[: self.rows, :, source].clone()
        self.columns += by

    def _reserve(self, rows: int, columns: int, *like: torch.Tensor) -> None:
        had_rows, had_columns = (self.keys.shape[0], self.keys.shape[-2]) if self.keys.numel() else (0, 0)
        if rows <= had_rows and columns <= had_columns:
            return
        # What is needed now: the most rows times the most columns that there ever were could be far more.
        # More rows may come to those that are here, and none to prompts that are read.
        rows, columns = _rounded(rows, _ROWS) if rows > had_rows > 0 else rows, _rounded(columns, _COLUMNS)
        # Zeros: whatever lies in fresh memory could be no number, which masks do not hide.
        grown = [each.new_zeros(rows, each.shape[1], columns, each.shape[-1]) for each in like]
        if had_rows:
            used = slice(min(rows, had_rows)), slice(None), slice(min(columns, had_columns))
            for new, old in zip(grown, (self.keys, self.values), strict=True):
                new[used] = old[used]
        self.keys, self.values = grown

    def _used(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: self.rows, :, : self.columns]


class RowCache(Cache):
    """Cache of a model with `num_layers` layers; every method below is for all of them."""

    def __init__(self, num_layers: int) -> None:
        self._own = [_Layer() for _ in range(num_layers)]
        super().__init__(layers=[*self._own])

    @property
    def columns(self) -> int:
        """Columns in use: tokens of the longest row, at least."""
        return self._own[0].columns

    def make_room(self, other: "RowCache") -> None:
        """Allocate what `append` needs, to be called before: where memory does not suffice, no layer is changed."""
        for layer, more in zip(self._own, other._own, strict=True):
            layer.make_room(more)

    def append(self, other: "RowCache") -> None:
        """Put the rows of another cache below those here; both end at the same column then."""
        for layer, more in zip(self._own, other._own, strict=True):
            layer.append(more) if layer.rows else layer.__dict__.update(more.__dict__)

    def drop(self, row: int) -> None:
        """Put the last row where another was."""
        for layer in self._own:
            layer.drop(row)

    def trim(self, lengths: Sequence[int]) -> None:
        """Free the first columns once they are many; `lengths` are the tokens of each row."""
        unused = self.columns - max(lengths, default=0)
        if unused >= max(_COLUMNS, self.columns // 4):
            for layer in self._own:
                layer.trim(unused)

    def bytes_per_token(self) -> int:
        """Memory that one token of a row takes, once something was read."""
        return sum(layer.bytes_per_token() for layer in self._own if layer.is_initialized)


def _rounded(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit
