"""Read rows from whatever the user has: JSON, JSON lines, CSV, Parquet, a saved dataset, the Hub.

Values stay as the source has them; nothing is written next to the source.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import IO, Any

from mola.errors import MolaError

FILE_ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What the standard readers raise for damaged files; JSON and UTF-8 errors are ValueErrors.
_READ_ERRORS = (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error, csv.Error)


def read_rows(path: str | Path, split: str | None = None) -> list[dict[str, Any]]:
    """All rows of a data source.

    Args:
        path: a ``.json`` (array), ``.jsonl``, ``.csv`` (each also with ``.gz``) or ``.parquet`` file, a
            folder written by `save_to_disk` of Hugging Face datasets, or a Hub name ``owner/name``.
        split: which split of a folder or Hub dataset; a single file has no splits and ignores it.

    Returns:
        The rows as dicts, in their order. CSV values are text.

    Raises:
        MolaError: the source is missing, unreadable or empty, a row is not a mapping, or the split does
            not exist or has to be chosen.
    """
    source, place = str(path), Path(path).expanduser()
    if place.is_dir():
        rows = _select(_load_folder(place), split, source).to_list()
    elif place.exists():
        rows = _read_file(place)
    elif is_hub_name(source):
        rows = _select(_load_hub(source, split), split, source).to_list()
    else:
        raise _not_there(source)
    if not rows:
        raise MolaError(f"`data` must have at least one row: `{source}` has none. Choose another one.")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise MolaError(
                f"`data` must hold one mapping per row: row {index} of `{source}` is a "
                f"{type(row).__name__}. Write each row as {{column: value, ...}}."
            )
    return rows


def split_names(path: str | Path) -> list[str]:
    """Splits of a data source; an empty list for a single file or a saved dataset without splits.

    Raises:
        MolaError: the source is missing or unreadable.
    """
    source, place = str(path), Path(path).expanduser()
    if place.is_dir():
        loaded = _load_folder(place)
        return list(loaded) if isinstance(loaded, dict) else []
    if place.exists():
        return []
    if not is_hub_name(source):
        raise _not_there(source)
    import datasets

    try:
        return list(datasets.get_dataset_split_names(source))
    except Exception as error:  # the Hub client has no common base class
        raise _hub_error(source, error) from error


def is_hub_name(source: str) -> bool:
    """Whether a string that is no existing path looks like a dataset on the Hub, ``owner/name``."""
    name = source.removesuffix(".gz")
    return _HUB_NAME.fullmatch(source) is not None and not name.endswith((*FILE_ENDINGS, ".hf"))


def _not_there(source: str) -> MolaError:
    return MolaError(
        f"`data` must be an existing file or folder, or a Hub name such as owner/name: `{source}` does not "
        "exist. Check the path."
    )


def _hub_error(source: str, error: Exception) -> MolaError:
    return MolaError(
        f"`data`: no file or folder `{source}` exists, and the Hub dataset of this name could not be loaded "
        f"({type(error).__name__}: {error}). Check the path, or the name and the connection."
    )


def _load_folder(place: Path) -> Any:
    """Dataset or DatasetDict in a folder written by `save_to_disk`."""
    if not (place / "dataset_dict.json").exists() and not (place / "state.json").exists():
        inside = ", ".join(sorted(entry.name for entry in place.iterdir())[:8]) or "nothing"
        raise MolaError(
            f"`data` must be a file or a folder written by `save_to_disk`: `{place}` holds {inside}. "
            "Pass one of the files or folders inside."
        )
    import datasets
    import pyarrow

    try:
        return datasets.load_from_disk(str(place))
    except (*_READ_ERRORS, pyarrow.ArrowException) as error:
        raise _unreadable(place, error) from error


def _load_hub(source: str, split: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the Hub client has no common base class
        raise _hub_error(source, error) from error


def _select(loaded: Any, split: str | None, source: str) -> Any:
    """The one Dataset meant by `split`; a Dataset without splits is taken as it is."""
    if not isinstance(loaded, dict):
        return loaded
    names = list(loaded)
    if split is None and len(names) == 1:
        return loaded[names[0]]
    if split not in loaded:
        raise MolaError(f"`split` must be one of {', '.join(names)} for `{source}`: got {split!r}. Choose one.")
    return loaded[split]


def _unreadable(place: Path, error: BaseException) -> MolaError:
    return MolaError(f"`data` file `{place}` cannot be read: {error}. Check that it is complete.")


def _read_file(place: Path) -> list[Any]:
    ending = Path(place.name.removesuffix(".gz")).suffix
    if ending not in FILE_ENDINGS or (ending == ".parquet" and place.name.endswith(".gz")):
        raise MolaError(
            f"`data` must end in one of {', '.join(FILE_ENDINGS)} (.json, .jsonl and .csv also with .gz): "
            f"got `{place}`. Convert or rename the file."
        )
    if ending == ".parquet":
        return _read_parquet(place)
    reader = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv}[ending]
    try:
        with _open_text(place) as file:
            return reader(file, place)
    except MolaError:
        raise
    except _READ_ERRORS as error:
        raise _unreadable(place, error) from error


def _open_text(place: Path) -> IO[str]:
    if place.name.endswith(".gz"):
        return gzip.open(place, "rt", encoding="utf-8-sig", newline="")
    return place.open(encoding="utf-8-sig", newline="")


def _read_json(file: IO[str], place: Path) -> list[Any]:
    text = file.read()
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        cure = "Correct the line."
        if error.msg == "Extra data":
            cure = "A file with one row per line must be called .jsonl."
        raise MolaError(f"`data` file `{place}` is not valid JSON: line {error.lineno}: {error.msg}. {cure}") from error
    if not isinstance(rows, list):
        raise MolaError(
            f"`data` file `{place}` must hold a JSON array of rows: got a {type(rows).__name__}. Write "
            "[{...}, {...}], or one row per line in a .jsonl file."
        )
    return rows


def _read_json_lines(file: IO[str], place: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise MolaError(
                f"`data` file `{place}` is not valid JSON: line {number}: {error.msg}. Correct it; each "
                "line must be one complete row."
            ) from error
    return rows


def _read_csv(file: IO[str], place: Path) -> list[Any]:
    reader = csv.DictReader(file, strict=True)
    names = reader.fieldnames or ()
    if len(set(names)) < len(names):
        raise MolaError(f"`data` file `{place}` must have different column names: got {', '.join(names)}. Rename one.")
    rows = []
    for row in reader:
        # DictReader marks surplus values with the key None and missing ones with the value None.
        if None in row or None in row.values():
            raise MolaError(
                f"`data` file `{place}` must have {len(names)} values in every line, as its "
                f"header: line {reader.line_num} has another number. Correct the line, or quote its commas."
            )
        rows.append(row)
    return rows


def _read_parquet(place: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        # ParquetFile, not read_table: the latter turns parts of the path like `split=train` into columns.
        with pyarrow.parquet.ParquetFile(place) as file:
            return file.read().to_pylist()
    except (*_READ_ERRORS, pyarrow.ArrowException) as error:
        raise _unreadable(place, error) from error
