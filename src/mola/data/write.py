"""Write prepared splits: one JSON array per split and a saved Hugging Face dataset."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mola.errors import MolaError

DATASET_FOLDER = "dataset.hf"
PROMPT_COLUMNS = ("input", "instruction", "output")  # written last, in this order


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """All columns of the rows, in the order they first occur."""
    return list(dict.fromkeys(column for row in rows for column in row))


def write_splits(splits: Mapping[str, list[dict[str, Any]]], output_dir: Path) -> None:
    """Write ``<split>.json`` and `DATASET_FOLDER`; the folder appears complete or not at all.

    Args:
        splits: rows by split; a column that a row lacks is written as None.
        output_dir: folder to create; an existing one is replaced as a whole.

    Raises:
        MolaError: the folder cannot be written, or a column mixes kinds of values.
    """
    temporary = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_files(splits, temporary)
        if output_dir.exists():
            # A folder with files cannot be renamed over; the old one goes only when the new one is there.
            old = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.old")
            os.replace(output_dir, old)
            try:
                os.replace(temporary, output_dir)
            except OSError:
                os.replace(old, output_dir)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, output_dir)
    except OSError as error:
        raise MolaError(f"`output_dir` cannot be written: {error}. Choose another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(splits: Mapping[str, list[dict[str, Any]]], folder: Path) -> None:
    import datasets
    import pyarrow

    source = columns_of(row for rows in splits.values() for row in rows)
    names = [*(name for name in source if name not in PROMPT_COLUMNS), *PROMPT_COLUMNS]
    columns = {name: [row.get(name) for rows in splits.values() for row in rows] for name in names}
    try:
        # Types come from all splits together, or a column that is empty in one split would get another type.
        features = datasets.Dataset.from_dict(columns).features
        saved = {
            split: datasets.Dataset.from_dict(
                {name: [row.get(name) for row in rows] for name in names}, features=features
            )
            for split, rows in splits.items()
        }
    except (pyarrow.ArrowException, TypeError) as error:
        raise MolaError(
            f"`data` must have values of one kind in every column: {error}. Correct the column, or drop it."
        ) from error
    for split, rows in splits.items():
        full = [{name: row.get(name) for name in names} for row in rows]
        try:
            text = json.dumps(full)
        except TypeError as error:
            raise MolaError(f"`data` must hold JSON values: {error}. Drop the column from the source.") from error
        (folder / f"{split}.json").write_text(text, encoding="ascii")
    datasets.DatasetDict(saved).save_to_disk(str(folder / DATASET_FOLDER))
