"""Read rows from files, saved datasets and the Hub, all at once or one by one.

Python's own modules read JSON and CSV, because values must stay as written: `datasets` turns the text "2020-01-01" into
a date and 007 in a CSV file into 7, and shifts the columns of a CSV line that has one value too many. `datasets` reads
Parquet files, saved datasets and the Hub.
"""

import contextlib
import csv
import gzip
import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mola.errors import MolaError
from mola.files.reading import first_repeated, read_json

FILE_ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+){0,2}")
_BATCH_SIZE = 1000
csv.field_size_limit(1 << 30)  # bytes of one value; Python's limit of 128 KiB is too low for long texts


def read_rows(path: str | Path, split: str | None = None, *, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """All rows of a data source.

    Args:
        path: a ``.json`` (array), ``.jsonl``, ``.csv`` (each also with ``.gz``) or ``.parquet`` file; a folder of such
            files, whose names say their splits, or one written by `save_to_disk` of Hugging Face datasets; or a Hub
            name ``owner/name``, with a configuration or a split or both as ``owner/name:configuration:split``.
        split: the split of a folder or a Hub dataset; ignored for a file, which has no splits.
        may_be_empty: accept a source without rows.

    Returns:
        The rows as dicts, in their order. CSV values are text.

    Raises:
        MolaError: the source is missing, unreadable or empty, a row is not a mapping, or the split does
            not exist or has to be chosen.
    """
    rows = list(stream_rows(path, split, is_stored=True))
    if not rows and not may_be_empty:
        part = f"split `{split}` of `{path}`" if split is not None and os.path.isdir(path) else f"`{path}`"
        raise MolaError(f"`data` must have at least one row: {part} has none. Choose a different source.")
    return rows


def stream_rows(
    path: str | Path, split: str | None = None, columns: Collection[str] | None = None, *, is_stored: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of `read_rows` one by one, so that they need not fit into memory; a ``.json`` array is read as a whole.

    Args:
        path: as in `read_rows`.
        split: as in `read_rows`.
        columns: the columns to read from a Parquet file, a saved dataset or a Hub dataset; columns that do not exist
            are left out. Other formats ignore this argument.
        is_stored: store a Hub dataset in the cache of `datasets`, instead of streaming it.

    Raises:
        MolaError: as in `read_rows`, except for a source without rows.
    """
    source, place = str(path), Path(os.path.expanduser(path))
    try:
        if place.is_dir():
            rows = _read_folder(place, split, columns)
        elif place.exists():
            rows = _read_file(place, columns)
        elif is_hub_name(source):
            rows = _read_hub(source, split, columns, is_stored)
        else:
            raise _missing(source)
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise MolaError(
                    f"`data` must hold one mapping per row: {row_name(number, source)} is a {type(row).__name__}. "
                    "Write each row as {column: value, ...}."
                )
            yield row
    except MolaError:
        raise
    except Exception as error:  # the libraries behind `datasets` have no common base class
        raise _unreadable(source, error) from error


def row_name(number: int, source: str | Path) -> str:
    """A row's place in a message: the line of a JSONL file, which editors count from 1, else its number from 0."""
    place = Path(os.path.expanduser(source))
    if place.name.removesuffix(".gz").endswith(".jsonl") and place.is_file():
        open_text: Any = gzip.open if place.suffix == ".gz" else open
        with open_text(place, "rb") as file:
            lines = [line for line, text in enumerate(file, start=1) if text.strip()]
        if number < len(lines):  # else the file has changed
            return f"line {lines[number]} of `{source}`"
    return f"row {number} of `{source}`"


def has_rows(path: str | Path, split: str | None = None) -> bool:
    """Whether the source has a row; raises the errors of `stream_rows`."""
    return next(stream_rows(path, split), None) is not None


def split_names(path: str | Path) -> list[str]:
    """Splits of a data source; empty for a single file and for a saved dataset without splits.

    Raises:
        MolaError: the source is missing or unreadable.
    """
    source, place = str(path), Path(os.path.expanduser(path))
    if place.is_dir():
        return _splits_of_folder(place) or []
    if place.exists():
        return []
    if not is_hub_name(source):
        raise _missing(source)
    import datasets

    try:
        names, split = _hub_dataset(source)
        return [] if split is not None else list(datasets.get_dataset_split_names(*names))
    except Exception as error:  # as in `stream_rows`
        raise _unreadable(source, error) from error


def check_split(option: str, split: str, default: str, data: str | Path) -> None:
    """Raise if `split` is neither the default nor train, but `data` has no splits, so that all rows would be read."""
    if split not in (default, "train") and os.path.exists(os.path.expanduser(data)) and not split_names(data):
        raise MolaError(f"`{option}` ({split!r}) must be left out: {str(data)!r} has no splits.")


def is_hub_name(source: str) -> bool:
    """Whether a string has the form of a Hub dataset, ``owner/name[:configuration]``, and no file extension."""
    name = source.partition(":")[0].removesuffix(".gz")
    return _HUB_NAME.fullmatch(source) is not None and not name.endswith((*FILE_ENDINGS, ".hf"))


def _hub_dataset(source: str) -> tuple[tuple[str, ...], str | None]:
    """``owner/name`` with the configuration if the source names one; and the split if it names one."""
    import datasets

    name, *parts = source.split(":")
    if len(parts) == 1 and parts[0] not in datasets.get_dataset_config_names(name):
        return (name,), parts[0]
    return (name, *parts[:1]), parts[1] if len(parts) == 2 else None


@dataclass(frozen=True)
class Source:
    """One table of rows: a file, or one split of a saved dataset or of a Hub dataset."""

    path: str
    split: str | None = None

    def rows(self, columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows from the first one on; see `stream_rows`."""
        return stream_rows(self.path, self.split, columns)


def source_splits(data: str) -> dict[str, Source]:
    """The table of every split; a single file and a saved dataset without splits are `train`.

    Args:
        data: a file, a folder, a Hub name, or files as ``train=A,validation=B,test=C``.

    Raises:
        MolaError: the source is missing or unreadable, or the list of files is malformed.
    """
    if "=" in data and not os.path.exists(os.path.expanduser(data)):
        files: dict[str, Source] = {}
        for part in data.split(","):
            name, _, path = (piece.strip() for piece in part.partition("="))
            if not name.isidentifier() or not path or name in files:
                raise MolaError(
                    f"`data` must be train=A,validation=B,test=C with different names: got {data!r}. Correct the "
                    f"part {part!r}."
                )
            files[name] = Source(path)
        return files
    return {name: Source(data, name) for name in split_names(data)} or {"train": Source(data)}


def check_exists(path: str | Path) -> None:
    """Raise if a data source can only be a path, and there is nothing at this path."""
    if not os.path.exists(os.path.expanduser(path)) and not is_hub_name(str(path)):
        raise _missing(str(path))


def _missing(source: str) -> MolaError:
    return MolaError(
        f"`data` must be an existing file or folder, or a Hub name such as owner/name: `{source}` does not "
        "exist. Check the path."
    )


def _unreadable(source: str, error: Exception) -> MolaError:
    reason = f"{type(error).__name__}: {error}"
    if os.path.exists(os.path.expanduser(source)):
        return MolaError(f"`data` `{source}` cannot be read ({reason}). Check that it is complete.")
    return MolaError(
        f"`data`: no file or folder `{source}` exists, and the Hub dataset of this name could not be loaded "
        f"({reason}). Check the path, or the name and the connection. For a dataset with several configurations pass "
        "owner/name:configuration."
    )


def _read_file(place: Path, columns: Collection[str] | None) -> Iterator[Any]:
    is_compressed = place.name.endswith(".gz")
    ending = Path(place.name.removesuffix(".gz")).suffix
    if ending not in FILE_ENDINGS or (ending == ".parquet" and is_compressed):
        raise MolaError(
            f"`data` must end in one of {', '.join(FILE_ENDINGS)} (.json, .jsonl and .csv also with .gz): "
            f"got `{place}`. Convert or rename the file."
        )
    if ending == ".parquet":
        import datasets

        # Streaming stores no copy in the cache of `datasets`.
        loaded = datasets.load_dataset("parquet", data_files=str(place), split="train", streaming=True)
        yield from _rows_of(loaded, columns)
        return
    read = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv}[ending]
    open_text: Any = gzip.open if is_compressed else open
    try:
        with open_text(place, "rt", encoding="utf-8-sig", newline="") as file:
            yield from read(file, place)
    except UnicodeDecodeError as error:
        with open_text(place, "rb") as file:
            number = next(number for number, line in enumerate(file, start=1) if not _is_utf8(line))
        raise MolaError(
            f"`data` file `{place}` must be text in UTF-8: line {number} is not ({error.reason}). Save it in UTF-8."
        ) from error


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_json(file: IO[str], place: Path) -> Iterator[Any]:
    text = file.read()
    try:
        rows = json.loads(text if text.strip() else "[]", object_pairs_hook=_distinct_columns)
    except json.JSONDecodeError as error:
        cure = "A file with one row per line must be called .jsonl." if error.msg == "Extra data" else "Correct it."
        raise MolaError(f"`data` file `{place}` is not valid JSON: line {error.lineno}: {error.msg}. {cure}") from error
    if not isinstance(rows, list):
        raise MolaError(
            f"`data` file `{place}` must hold a JSON array of rows: got a {type(rows).__name__}. Write "
            "[{...}, {...}], or one row per line in a .jsonl file."
        )
    yield from rows


def _read_json_lines(file: IO[str], place: Path) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line, object_pairs_hook=_distinct_columns)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise MolaError(
                f"`data` file `{place}` is not valid JSON: line {number}: {reason}. Correct it; each "
                "line must be one complete row."
            ) from error


def _distinct_columns(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := first_repeated(name for name, _ in pairs)) is not None:
        raise ValueError(f"the name {name!r} occurs twice in one object")
    return dict(pairs)


def _read_csv(file: IO[str], place: Path) -> Iterator[Any]:
    reader = csv.DictReader(file, strict=True)
    names = reader.fieldnames or ()
    if first_repeated(names) is not None:
        raise MolaError(f"`data` file `{place}` must have different column names: got {', '.join(names)}. Rename one.")
    for row in reader:
        # DictReader gives surplus values the key None, and missing columns the value None.
        if None in row or None in row.values():
            raise MolaError(
                f"`data` file `{place}` must have {len(names)} values in every line, as its "
                f"header: line {reader.line_num} has a different number. Correct the line, or quote its commas."
            )
        yield row


def _read_folder(place: Path, split: str | None, columns: Collection[str] | None) -> Iterator[Any]:
    import datasets

    files = _files_of_folder(place)
    if files:
        for path in files[_choose_split(list(files), split, str(place))]:
            yield from _read_file(path, columns)
        return
    splits = _splits_of_folder(place)
    part = place if splits is None else place / _choose_split(splits, split, str(place))
    yield from _rows_of(datasets.load_from_disk(str(part)), columns)


def _splits_of_folder(place: Path) -> list[str] | None:
    """Splits in a folder; None if the folder is one dataset without splits, written by `save_to_disk`."""
    if os.path.exists(index := place / "dataset_dict.json"):
        return list(read_json(index)["splits"])
    if os.path.exists(place / "state.json"):
        return None
    if files := _files_of_folder(place):
        return list(files)
    inside = ", ".join(sorted(os.listdir(place))[:8]) or "nothing"
    raise MolaError(
        f"`data` must be a file, a folder of {', '.join(FILE_ENDINGS)} files, or one written by `save_to_disk`: "
        f"`{place}` holds {inside}. Pass one of the files or folders inside."
    )


def _files_of_folder(place: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split; empty for a folder written by `save_to_disk`, and without data files.

    As on the Hub, the names of files or folders say the split, such as train.jsonl; else all files are `train`.
    """
    if os.path.exists(place / "dataset_dict.json") or os.path.exists(place / "state.json"):
        return {}
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    try:
        patterns = get_data_patterns(str(place))
    except EmptyDatasetError:
        return {}
    files: dict[str, list[Path]] = {}
    for split, found in patterns.items():
        paths: set[Path] = set()
        for pattern in found:
            with contextlib.suppress(FileNotFoundError):  # one of several ways to name a split
                paths |= {Path(path) for path in resolve_pattern(pattern, str(place))}
        data = sorted(path for path in paths if path.name.removesuffix(".gz").endswith(FILE_ENDINGS))
        if data:
            files[str(split)] = data
    return files


def _read_hub(source: str, split: str | None, columns: Collection[str] | None, is_stored: bool) -> Iterator[Any]:
    import datasets

    more: dict[str, Any] = {} if is_stored else {"streaming": True}
    names, named_split = _hub_dataset(source)
    split = named_split or split
    loaded = datasets.load_dataset(*names, split=split, **more)
    if isinstance(loaded, dict):  # without `split`, one dataset per split
        loaded = loaded[_choose_split(list(loaded), split, source)]
    return _rows_of(loaded, columns)


def _choose_split(names: list[str], split: str | None, source: str) -> str:
    """Name of the split to read: `split`, or the only split if `split` is None."""
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        folder = f", or pass its folder, such as {source}/{names[0]}" if os.path.isdir(source) else ""
        raise MolaError(f"`split` must be one of {', '.join(names)} for `{source}`: got {split!r}. Choose one{folder}.")
    return split


def _rows_of(dataset: Any, columns: Collection[str] | None) -> Iterator[dict[str, Any]]:
    """Rows of a `datasets.Dataset` or `IterableDataset` as Python values; images are not decoded."""
    import datasets

    if columns is not None and dataset.column_names is not None:
        names = [name for name in dataset.column_names if name in columns]
        dataset = dataset.select_columns(names) if names else dataset
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH_SIZE):
        # Without the metadata of `datasets`, an image is plain bytes, so it is not decoded. A column of mixed values
        # keeps its Arrow type, JSON, and is decoded.
        features = datasets.Features.from_arrow_schema(table.schema.remove_metadata())
        yield from map(features.decode_example, table.to_pylist())
