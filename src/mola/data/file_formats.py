"""Rows of one file, by its ending: JSON, JSON lines, CSV, Parquet. All but JSON are read piece by piece."""

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mola.errors import MolaError
from mola.files.reading import first_repeated

FILE_ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
# What the standard readers raise for damaged files; JSON and UTF-8 errors are ValueErrors.
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    zlib.error,
    csv.Error,
)
_BATCH_SIZE = 1000
csv.field_size_limit(1 << 30)  # of the process: a text of more than the 128 KiB that Python allows is none the worse


def unreadable(place: Path, error: BaseException) -> MolaError:
    """The error for a damaged file or folder."""
    return MolaError(f"`data` file `{place}` cannot be read: {error}. Check that it is complete.")


def iterate_file(place: Path, columns: Collection[str] | None = None) -> Iterator[Any]:
    """The rows of a file, read as its ending says; what a row is, is not checked.

    `columns` are read of a Parquet file, as far as it has them, or all if it has none; other formats ignore it.

    Raises:
        MolaError: the ending is none of `FILE_ENDINGS`, or the file is damaged.
    """
    ending = Path(place.name.removesuffix(".gz")).suffix
    if ending not in FILE_ENDINGS or (ending == ".parquet" and place.name.endswith(".gz")):
        raise MolaError(
            f"`data` must end in one of {', '.join(FILE_ENDINGS)} (.json, .jsonl and .csv also with .gz): "
            f"got `{place}`. Convert or rename the file."
        )
    if ending == ".parquet":
        yield from _read_parquet(place, columns)
        return
    reader = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv}[ending]
    try:
        with _open_text(place) as file:
            yield from reader(file, place)
    except MolaError:
        raise
    except READ_ERRORS as error:
        raise unreadable(place, error) from error


def _open_text(place: Path) -> IO[str]:
    if place.name.endswith(".gz"):
        return gzip.open(place, "rt", encoding="utf-8-sig", newline="")
    return place.open(encoding="utf-8-sig", newline="")


def _read_json(file: IO[str], place: Path) -> list[Any]:
    text = file.read()
    if not text.strip():
        return []
    try:
        rows = json.loads(text, object_pairs_hook=_different_keys)
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


def _read_json_lines(file: IO[str], place: Path) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line, object_pairs_hook=_different_keys)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise MolaError(
                f"`data` file `{place}` is not valid JSON: line {number}: {reason}. Correct it; each "
                "line must be one complete row."
            ) from error


def _read_csv(file: IO[str], place: Path) -> Iterator[Any]:
    reader = csv.DictReader(file, strict=True)
    names = reader.fieldnames or ()
    _check_names(names, place)
    for row in reader:
        # DictReader marks surplus values with the key None and missing ones with the value None.
        if None in row or None in row.values():
            raise MolaError(
                f"`data` file `{place}` must have {len(names)} values in every line, as its "
                f"header: line {reader.line_num} has another number. Correct the line, or quote its commas."
            )
        yield row


def _different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := first_repeated(name for name, _ in pairs)) is not None:
        raise ValueError(f"the name {name!r} is there twice in one object")
    return dict(pairs)


def _check_names(names: Sequence[str], place: Path) -> None:
    if len(set(names)) < len(names):
        raise MolaError(f"`data` file `{place}` must have different column names: got {', '.join(names)}. Rename one.")


def rows_of(table: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow table or batch.

    Values of mixed kinds, which Datasets stores as JSON text, are what they were before.
    """
    rows = table.to_pylist()
    for field in table.schema:
        if _holds_json(field.type):
            for row in rows:
                row[field.name] = _decoded(row[field.name], field.type)
    return rows


def _holds_json(kind: Any) -> bool:
    return _is_json(kind) or any(_holds_json(kind.field(place).type) for place in range(kind.num_fields))


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"


def _decoded(value: Any, kind: Any) -> Any:
    if value is None or not _holds_json(kind):
        return value
    if _is_json(kind):
        return json.loads(value)
    if isinstance(value, dict):
        return {name: _decoded(each, kind.field(name).type) for name, each in value.items()}
    return [_decoded(each, kind.field(0).type) for each in value]


def _read_parquet(place: Path, columns: Collection[str] | None) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        # ParquetFile, not read_table: the latter turns parts of the path like `split=train` into columns.
        with pyarrow.parquet.ParquetFile(place, buffer_size=1 << 20) as file:
            _check_names(file.schema_arrow.names, place)
            names = [name for name in file.schema_arrow.names if columns is None or name in columns]
            for batch in file.iter_batches(batch_size=_BATCH_SIZE, columns=names or None):
                yield from rows_of(batch)
    except MolaError:
        raise
    except (*READ_ERRORS, pyarrow.ArrowException) as error:
        raise unreadable(place, error) from error
