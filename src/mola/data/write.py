"""Write prepared splits: one JSON array per split and a saved Hugging Face dataset."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from mola.data.tasks import Task
from mola.errors import MolaError
from mola.files.atomic import write_folder

DATASET_FOLDER = "dataset.hf"
PROMPT_COLUMNS = ("input", "instruction", "output")  # the last columns of a prepared row
_BATCH_SIZE = 1000
Rows = Sequence[Mapping[str, Any]]


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """All columns of the rows, in the order in which they first occur."""
    return list(dict.fromkeys(column for row in rows for column in row))


def reads_prompts(task: Task) -> bool:
    """Whether a task reads `instruction` or `output`, which prepared rows have too; an `id` marks prepared ones."""
    return bool({"instruction", "output"} & set(task.columns))


def merged_row(row: Mapping[str, Any], example: Mapping[str, Any], with_id: bool = False) -> dict[str, Any]:
    """A prepared row: the source row, then `input`, `instruction` and `output` of its example.

    A column `answer` becomes the text of the answer; `with_id` puts the example's id first.
    """
    new = {name: value for name, value in row.items() if name not in PROMPT_COLUMNS}
    if with_id:
        new = {"id": example["id"], **new}
    if example["answer"] is not None:
        new["answer"] = example["answer"]
    return {**new, **{name: example[name] for name in PROMPT_COLUMNS}}


class RowMerger:
    """Makes the prepared rows of one task with `merged_row`.

    Attributes:
        replaced: columns of the source whose values the task has replaced by its own.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.replaced: set[str] = set()
        # Columns that together mark a prepared row, which the task must not prepare again. A task that reads no column
        # that it writes needs no mark: it prepares a row twice with the same result.
        self._marks = set(PROMPT_COLUMNS) if "input" in task.columns else set()
        if reads_prompts(task):
            self._marks = {"id", *PROMPT_COLUMNS}

    def merge(self, row: Mapping[str, Any], example: Mapping[str, Any]) -> dict[str, Any]:
        """The prepared row for a source row and its example.

        Raises:
            MolaError: the row is prepared already.
        """
        if self._marks and self._marks <= row.keys():
            raise MolaError(
                f"`data` must be rows that did not go through the task `{self.task.name}` before: {example['id']!r} "
                f"has the columns {', '.join(sorted(self._marks))}, as `mola prepare` writes them. Pass the source. If "
                "these rows are the source, rename or drop one of the columns that the task does not read."
            )
        merged = merged_row(row, example, with_id=reads_prompts(self.task))
        for name in {*PROMPT_COLUMNS, "answer"} - {*self.task.columns}:
            if row.get(name) not in (None, "") and merged[name] != row[name]:
                self.replaced.add(name)
        return merged

    def print_replaced(self) -> None:
        """Print a warning if a column of the source was replaced."""
        if self.replaced:
            names = ", ".join(f"`{name}`" for name in sorted(self.replaced))
            print(f"warning: {names} of the source is not kept: the task `{self.task.name}` writes its own")


def is_prepared_folder(folder: Path) -> bool:
    """Whether a folder holds only files that `mola prepare` writes."""
    try:
        splits = json.loads((folder / DATASET_FOLDER / "dataset_dict.json").read_text("utf-8"))["splits"]
        return {entry.name for entry in folder.iterdir()} <= {DATASET_FOLDER, *(f"{split}.json" for split in splits)}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_splits(splits: Mapping[str, Rows], output_dir: Path) -> None:
    """Write ``<split>.json`` and `DATASET_FOLDER`; the folder replaces an earlier one, completely or not at all.

    A column that a row lacks is written as None.

    Raises:
        MolaError: the folder cannot be written, or a column has values of different kinds.
    """
    schema = schema_of(splits, last=PROMPT_COLUMNS)
    with write_folder(output_dir) as folder:
        for split, rows in splits.items():
            write_json(rows, schema.names, folder / f"{split}.json")
        save_dataset(splits, schema, folder / DATASET_FOLDER)


def schema_of(
    splits: Mapping[str, Rows],
    *,
    first: Sequence[str] = (),
    last: Sequence[str] = (),
    empty_types: Mapping[str, pyarrow.DataType] | None = None,
) -> pyarrow.Schema:
    """Columns and types that fit the rows of all splits, so that all splits have the same.

    Args:
        splits: the rows.
        first: columns that come before all others, whether or not a row has them.
        last: columns that come after all others, whether or not a row has them.
        empty_types: types of columns that hold nothing but None; by default such columns have Arrow's null type.

    Raises:
        MolaError: a column has values of different kinds.
    """
    rows = [row for part in splits.values() for row in part]
    names = dict.fromkeys([*first, *(name for name in columns_of(rows) if name not in last), *last])
    fields = []
    for name in names:
        try:
            kind = pyarrow.array([row.get(name) for row in rows]).type
        except (pyarrow.ArrowException, TypeError, OverflowError) as error:
            raise MolaError(
                f"`data` must have values of one kind in every column: `{name}`: {error}. Correct the column, or drop "
                "it."
            ) from error
        fields.append((name, (empty_types or {}).get(name, kind) if pyarrow.types.is_null(kind) else kind))
    return pyarrow.schema(fields)


def write_json(rows: Rows, columns: Sequence[str], path: Path) -> None:
    """Write rows as one JSON array in ASCII, on one line, each with all `columns`."""
    texts = []
    for number, row in enumerate(rows):
        try:
            texts.append(json.dumps({name: row.get(name) for name in columns}, allow_nan=False))
        except (ValueError, TypeError) as error:  # NaN, dates, bytes
            raise MolaError(
                f"`data` must hold JSON values: row {number} of {path.name}: {error}. Write null instead, or drop "
                "the column."
            ) from error
    path.write_text(f"[{', '.join(texts)}]", encoding="ascii")


def save_dataset(splits: Mapping[str, Rows], schema: pyarrow.Schema, path: Path) -> None:
    """Save the rows as a `DatasetDict`; equal rows give equal bytes."""
    saved = {split: _make_dataset(rows, schema) for split, rows in splits.items()}
    # An empty split could not be loaded again without a file of its own.
    shards = {split: None if len(dataset) else 1 for split, dataset in saved.items()}
    datasets.DatasetDict(saved).save_to_disk(str(path), num_shards=shards)


def _make_dataset(rows: Rows, schema: pyarrow.Schema) -> datasets.Dataset:
    """The rows as a dataset whose fingerprint depends on its content only."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, schema) as stream:
        for start in range(0, len(rows), _BATCH_SIZE):
            stream.write_table(pyarrow.Table.from_pylist(list(rows[start : start + _BATCH_SIZE]), schema))
    content = sink.getvalue()
    fingerprint = hashlib.sha256(content).hexdigest()[:16]  # as long as the fingerprints that `datasets` makes
    return datasets.Dataset(pyarrow.ipc.open_stream(content).read_all(), fingerprint=fingerprint)
