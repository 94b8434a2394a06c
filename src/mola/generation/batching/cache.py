"""Keys and values of a batch whose rows come and go.

All rows end at the same column. Shorter rows begin with unused columns, which the attention mask hides. Every layer
keeps all columns, even a layer with a sliding window: its mask hides the columns outside the window.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

_COLUMN_BLOCK = 64  # memory grows by this many columns
_ROW_BLOCK = 4  # memory grows by this many rows


class _Layer(DynamicLayer):
    """Keys and values of one layer, `(rows, heads, columns, head size)`: the used part of larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: torch.Tensor = torch.empty(0)
        self.values: torch.Tensor = torch.empty(0)
        self.rows = self.columns = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write the new columns and return all columns; called by the model."""
        self.rows, start = len(key_states), self.columns
        self.columns += key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = (states.new_zeros(0) for states in (key_states, value_states))
            self.is_initialized = True
        self._reserve(self.rows, self.columns, key_states, value_states)
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored[: self.rows, :, start : self.columns] = new
        return self._used(self.keys), self._used(self.values)

    def get_seq_length(self, *args: Any) -> int:
        """Number of columns in use; called by the model."""
        return self.columns

    def make_room(self, other: "_Layer") -> None:
        """Allocate the memory that `append` will need for the rows of the other layer."""
        if self.rows:
            rows, columns = self.rows + other.rows, max(self.columns, other.columns)
            self._reserve(rows, columns, other.keys, other.values)

    def append(self, other: "_Layer") -> None:
        """Add the rows of the other layer below the rows of this one."""
        rows, columns = self.rows + other.rows, max(self.columns, other.columns)
        self._shift(columns - self.columns)
        for stored, new in ((self.keys, other.keys), (self.values, other.values)):
            # A removed answer may have left NaN in the unused columns, and masks do not hide NaN.
            stored[self.rows : rows, :, : columns - other.columns] = 0
            stored[self.rows : rows, :, columns - other.columns : columns] = other._used(new)
        self.rows, self.columns = rows, columns

    def remove(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        if not self.rows:  # this layer uses the keys and values of a different layer
            return
        self.rows -= 1
        if row < self.rows:
            for stored in (self.keys, self.values):
                stored[row, :, : self.columns] = stored[self.rows, :, : self.columns]

    def trim(self, columns: int) -> None:
        """Remove the first columns, which no row uses."""
        if self.rows:
            self._shift(-columns)

    def bytes_per_token(self) -> int:
        """Memory that one token of one row needs in this layer."""
        return sum(stored.shape[1] * stored.shape[-1] * stored.element_size() for stored in (self.keys, self.values))

    def _shift(self, num_columns: int) -> None:
        """Move all columns to the right by `num_columns`; to the left if the number is negative."""
        if num_columns == 0:
            return
        source = slice(max(-num_columns, 0), self.columns)
        target = slice(max(num_columns, 0), self.columns + num_columns)
        for stored in (self.keys, self.values):
            stored[: self.rows, :, target] = stored[: self.rows, :, source].clone()
        self.columns += num_columns

    def _reserve(self, rows: int, columns: int, *like: torch.Tensor) -> None:
        """Allocate larger tensors if these rows and columns do not fit."""
        old_rows, old_columns = (self.keys.shape[0], self.keys.shape[-2]) if self.keys.numel() else (0, 0)
        if rows <= old_rows and columns <= old_columns:
            return
        # Allocate for the present need: the most rows ever times the most columns ever could be far larger.
        # Only a batch that already grew gets spare rows. A group that reads prompts never grows.
        rows = _round_up(rows, _ROW_BLOCK) if rows > old_rows > 0 else rows
        columns = _round_up(columns, _COLUMN_BLOCK)
        # Zeros, because unused memory could hold NaN, which masks do not hide.
        grown = [states.new_zeros(rows, states.shape[1], columns, states.shape[-1]) for states in like]
        if old_rows:
            used = slice(min(rows, old_rows)), slice(None), slice(min(columns, old_columns))
            for new, old in zip(grown, (self.keys, self.values), strict=True):
                new[used] = old[used]
        self.keys, self.values = grown

    def _used(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[: self.rows, :, : self.columns]


class RowCache(Cache):
    """The cache of a model with `num_layers` layers. Each method acts on all layers."""

    def __init__(self, num_layers: int) -> None:
        self._own = [_Layer() for _ in range(num_layers)]
        super().__init__(layers=[*self._own])

    @property
    def columns(self) -> int:
        """Number of columns in use, at least the length of the longest row."""
        return self._own[0].columns

    def make_room(self, other: "RowCache") -> None:
        """Allocate the memory for `append`. Call this first, so that no layer has changed if memory runs out."""
        for layer, more in zip(self._own, other._own, strict=True):
            layer.make_room(more)

    def append(self, other: "RowCache") -> None:
        """Add the rows of the other cache below the rows of this one. Afterwards all rows end at the same column."""
        for layer, more in zip(self._own, other._own, strict=True):
            if layer.rows:
                layer.append(more)
            else:
                layer.__dict__.update(more.__dict__)

    def remove(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        for layer in self._own:
            layer.remove(row)

    def trim(self, lengths: Sequence[int]) -> None:
        """Free the first columns if many are unused; `lengths` are the numbers of tokens in each row."""
        num_unused = self.columns - max(lengths, default=0)
        if num_unused >= max(_COLUMN_BLOCK, self.columns // 4):
            for layer in self._own:
                layer.trim(num_unused)

    def bytes_per_token(self) -> int:
        """Memory of one token of one row, known after the first forward pass."""
        return sum(layer.bytes_per_token() for layer in self._own if layer.is_initialized)


def _round_up(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit
