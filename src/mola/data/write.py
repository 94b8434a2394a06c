"""Write prepared splits: one JSON array per split and a saved Hugging Face dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mola.errors import MolaError
from mola.files.atomic import complete_folder
from mola.files.digests import file_sha256

if TYPE_CHECKING:
    from mola.data.spool import Spool
    from mola.data.tasks import Task

DATASET_FOLDER = "dataset.hf"
_FINGERPRINT_LENGTH = 16  # as Datasets makes them
PROMPT_COLUMNS = ("input", "instruction", "output")  # written last, in this order


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """All columns of the rows, in the order they first occur."""
    return list(dict.fromkeys(column for row in rows for column in row))


def reads_prompts(task: Task) -> bool:
    """Whether a task reads columns that prepared rows have too: these then need an id, to be told from raw ones."""
    return bool({"instruction", "output"} & set(task.columns))


def written_columns(task: Task) -> set[str]:
    """Columns by which rows of `mola prepare` are known where the task reads one of them itself; else none."""
    if reads_prompts(task):
        return {"id", *PROMPT_COLUMNS}
    return {*PROMPT_COLUMNS} if "input" in task.columns else set()


def merged_row(row: Mapping[str, Any], example: Mapping[str, Any], with_id: bool = False) -> dict[str, Any]:
    """A source row with the answer as text, `with_id` with its id, and with prompt and output as its last columns."""
    new = {name: value for name, value in row.items() if name not in PROMPT_COLUMNS}
    if with_id:
        new = {"id": example["id"], **new}
    if example["answer"] is not None:
        new["answer"] = example["answer"]
    return {**new, **{name: example[name] for name in PROMPT_COLUMNS}}


class Merge:
    """`merged_row` for the rows of a source, all through one task; refuses rows that went through it before.

    Attributes:
        replaced: columns of the source that the task does not read and that were written over.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.replaced: set[str] = set()
        self._with_id, self._written = reads_prompts(task), written_columns(task)
        self._not_read = {*PROMPT_COLUMNS, "answer"} - {*task.columns}

    def __call__(self, row: Mapping[str, Any], example: Mapping[str, Any]) -> dict[str, Any]:
        """The merged row.

        Raises:
            MolaError: the task reads prompts, and the row has them as `mola prepare` writes them.
        """
        if self._written and self._written <= row.keys():
            names = ", ".join(f"`{name}`" for name in sorted(self._written))
            raise MolaError(
                f"`data` must be rows that did not go through the task `{self.task.name}` before: {example['id']!r} "
                f"has all of {names}, as `mola prepare` writes them. Pass the source; if this is it, rename or drop a "
                "column that the task does not read."
            )
        merged = merged_row(row, example, self._with_id)
        for name in self._not_read:
            if row.get(name) not in (None, "") and merged[name] != row[name]:
                self.replaced.add(name)
        return merged

    def say_replaced(self) -> None:
        """Print a warning, if a column was written over."""
        if self.replaced:
            names = ", ".join(f"`{name}`" for name in sorted(self.replaced))
            print(f"warning: {names} of the source is not kept: the task `{self.task.name}` writes its own")


def is_prepared_folder(folder: Path) -> bool:
    """Whether a folder holds what `mola prepare` writes, and nothing else."""
    try:
        splits = json.loads((folder / DATASET_FOLDER / "dataset_dict.json").read_text("utf-8"))["splits"]
        return {entry.name for entry in folder.iterdir()} <= {DATASET_FOLDER, *(f"{split}.json" for split in splits)}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_splits(splits: Mapping[str, list[dict[str, Any]]], output_dir: Path) -> None:
    """Write ``<split>.json`` and `DATASET_FOLDER`; the folder appears complete or not at all, replacing an earlier one.

    A column that a row lacks is written as None.

    Raises:
        MolaError: the folder cannot be written, or a column mixes kinds of values.
    """
    from mola.data.spool import Spool

    with (
        complete_folder(output_dir) as folder,
        TemporaryDirectory() as scratch,
        Spool(Path(scratch, "rows"), last=PROMPT_COLUMNS) as spool,
    ):
        numbers = {}
        for split, rows in splits.items():
            numbers[split] = range(len(spool), len(spool) + len(rows))
            for row in rows:
                spool.add(row)
        write_spooled(spool, numbers, folder, Path(scratch))


def write_spooled(spool: Spool, numbers: Mapping[str, Iterable[int]], folder: Path, scratch: Path) -> None:
    """Write ``<split>.json`` and `DATASET_FOLDER` of rows in a spool, by their numbers, into an existing folder."""
    for split, chosen in numbers.items():
        write_json(spool.rows(chosen), folder / f"{split}.json")
    save_dataset(spool, numbers, folder / DATASET_FOLDER, scratch)


def write_json(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write rows as one JSON array in ASCII, on one line; they need not be in memory."""
    with path.open("w", encoding="ascii") as file:
        file.write("[")
        for index, row in enumerate(rows):
            file.write((", " if index else "") + json.dumps(row))
        file.write("]")


def save_dataset(spool: Spool, numbers: Mapping[str, Iterable[int]], path: Path, scratch: Path) -> None:
    """Save rows of a spool, given by their numbers, as a DatasetDict; the same rows give the same bytes.

    Types come from all rows of the spool, so that splits cannot differ; `scratch` is for temporary files.
    """
    import datasets
    import pyarrow

    schema = spool.schema()
    splits = {}
    for split, chosen in numbers.items():
        place = scratch / f"{split}.arrow"
        with pyarrow.OSFile(str(place), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
            for table in spool.tables(chosen):
                stream.write_table(table)
        written = pyarrow.ipc.open_stream(pyarrow.memory_map(str(place))).read_all()
        splits[split] = datasets.Dataset(written, fingerprint=file_sha256(place)[:_FINGERPRINT_LENGTH])
    # Without a file of its own an empty split could not be loaded again.
    shards = {split: None if len(dataset) else 1 for split, dataset in splits.items()}
    datasets.DatasetDict(splits).save_to_disk(str(path), num_shards=shards)
