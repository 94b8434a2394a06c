"""Rows on disk: put in one after the other, read in any order. In memory are 8 bytes per row and the types."""

import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow

from mola.errors import MolaError

_BATCH_SIZE = 1000


class Spool(AbstractContextManager):
    """Rows as JSON lines in a scratch file, and the columns and types that fit all of them.

    Args:
        path: the scratch file, which must not exist.
        first: columns that every row has, if need be empty, before all others.
        last: the same, after all others.
        types: types of columns that hold nothing but nulls; without one such a column has Arrow's null type.
    """

    def __init__(
        self,
        path: Path,
        first: Sequence[str] = (),
        last: Sequence[str] = (),
        types: Mapping[str, pyarrow.DataType] | None = None,
    ) -> None:
        self._file = path.open("x+b")
        self._starts = array("Q")
        self._end = 0
        self._first, self._last = tuple(first), tuple(last)
        self._types: dict[str, pyarrow.DataType] = dict.fromkeys(self._first, pyarrow.null())
        self._empty_types = dict(types or {})
        self._batch: list[Mapping[str, Any]] = []

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, row: Mapping[str, Any]) -> None:
        """Put in one row; a column that it lacks is null.

        Raises:
            MolaError: it has a value that JSON does not know, or of another kind than other rows.
        """
        try:
            line = json.dumps(row, allow_nan=False).encode("ascii")
        except ValueError as error:
            raise MolaError(
                f"`data` must hold JSON values: {error} in {_not_finite(row)}. Write null there."
            ) from error
        except TypeError as error:
            raise MolaError(f"`data` must hold JSON values: {error}. Drop the column from the source.") from error
        self._file.write(line + b"\n")
        self._starts.append(self._end)
        self._end += len(line) + 1
        self._batch.append(row)
        if len(self._batch) == _BATCH_SIZE:
            self._learn_types()

    def _learn_types(self) -> None:
        for name in dict.fromkeys(column for row in self._batch for column in row):
            known = self._types.get(name, pyarrow.null())
            with _one_kind(name):
                found = pyarrow.array([row.get(name) for row in self._batch]).type
                schemas = [pyarrow.schema([(name, kind)]) for kind in (known, found)]
                self._types[name] = pyarrow.unify_schemas(schemas, promote_options="permissive").field(name).type
        self._batch = []

    def schema(self) -> pyarrow.Schema:
        """Columns in the order they first occurred, those named first and last in their places, and their types."""
        self._learn_types()
        types = {**self._types, **{name: self._types.get(name, pyarrow.null()) for name in self._last}}
        names = [*(name for name in types if name not in self._last), *self._last]
        return pyarrow.schema(
            [
                (name, self._empty_types.get(name, types[name]) if pyarrow.types.is_null(types[name]) else types[name])
                for name in names
            ]
        )

    def rows(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Rows by their numbers, counted from 0, with all columns of the schema."""
        names = self.schema().names
        self._file.flush()
        for number in numbers:
            self._file.seek(self._starts[number])
            row = json.loads(self._file.readline())
            yield {name: row.get(name) for name in names}
        self._file.seek(0, 2)

    def tables(self, numbers: Iterable[int]) -> Iterator[pyarrow.Table]:
        """The same rows in Arrow's form, by a thousand."""
        schema, rows = self.schema(), self.rows(numbers)
        while batch := list(itertools.islice(rows, _BATCH_SIZE)):
            columns = []
            for field in schema:
                with _one_kind(field.name):
                    columns.append(pyarrow.array([row[field.name] for row in batch], field.type))
            yield pyarrow.Table.from_arrays(columns, schema=schema)

    def __exit__(self, *exception: object) -> None:
        self._file.close()


@contextmanager
def _one_kind(column: str) -> Iterator[None]:
    try:
        yield
    except UnicodeError as error:
        raise MolaError(f"`data` must hold valid text: `{column}`: {error}. Correct the column, or drop it.") from error
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        raise MolaError(
            f"`data` must have values of one kind in every column: `{column}`: {error}. Correct the column, or drop it."
        ) from error


def _not_finite(row: Mapping[str, Any]) -> str:
    """The column that holds NaN or an infinite number."""
    for name, value in row.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            return f"column `{name}`"
    return "a row"
