"""Read rows from whatever the user has: files, a saved dataset, the Hub. All at once or as a stream.

Values stay as the source has them; nothing is written next to the source.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from mola.data.file_formats import FILE_ENDINGS, READ_ERRORS, iterate_file, rows_of, unreadable
from mola.errors import MolaError
from mola.files.reading import read_json

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_BATCH_SIZE = 1000


def read_rows(path: str | Path, split: str | None = None, *, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """All rows of a data source.

    Args:
        path: a ``.json`` (array), ``.jsonl``, ``.csv`` (each also with ``.gz``) or ``.parquet`` file, a
            folder written by `save_to_disk` of Hugging Face datasets, or a Hub name ``owner/name``, of
            one with several configurations ``owner/name:configuration``.
        split: which split of a folder or Hub dataset; a single file has no splits and ignores it.
        may_be_empty: take a source without rows.

    Returns:
        The rows as dicts, in their order. CSV values are text.

    Raises:
        MolaError: the source is missing, unreadable or empty, a row is not a mapping, or the split does
            not exist or has to be chosen.
    """
    rows = list(_iterate(path, split, None))
    if not rows and not may_be_empty:
        part = f"split `{split}` of `{path}`" if split is not None and os.path.isdir(path) else f"`{path}`"
        raise MolaError(f"`data` must have at least one row: {part} has none. Choose another one.")
    return rows


def stream_rows(
    path: str | Path, split: str | None = None, columns: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of `read_rows` one after the other, possibly none, without having all of them in memory.

    A ``.json`` array is the exception: it is read as a whole. A Hub dataset is streamed, not stored. `columns` are what
    is needed: Parquet files, saved datasets and the Hub leave out the rest. One that there is not is not in the rows.

    Raises:
        MolaError: as `read_rows`, except for a source without rows.
    """
    return _iterate(path, split, columns, is_stream=True)


def has_rows(path: str | Path, split: str | None = None) -> bool:
    """Whether there is a row; raises as `stream_rows`."""
    return next(stream_rows(path, split), None) is not None


def _iterate(
    path: str | Path, split: str | None, columns: Collection[str] | None, is_stream: bool = False
) -> Iterator[dict[str, Any]]:
    source, place = str(path), Path(os.path.expanduser(path))
    if os.path.isdir(place):
        rows = _read_folder(place, split, columns)
    elif os.path.exists(place):
        rows = iterate_file(place, columns)
    elif is_hub_name(source):
        rows = _read_hub(source, split, columns, is_stream)
    else:
        raise _not_there(source)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise MolaError(
                f"`data` must hold one mapping per row: row {index} of `{source}` is a "
                f"{type(row).__name__}. Write each row as {{column: value, ...}}."
            )
        yield row


def _batches(dataset: Any, columns: Collection[str] | None) -> Iterator[Any]:
    """Rows of a Dataset or IterableDataset, straight from Arrow: images are not decoded."""
    if columns is not None and dataset.column_names is not None:
        names = [name for name in dataset.column_names if name in columns]
        dataset = dataset.select_columns(names) if names else dataset
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH_SIZE):
        table.validate(full=True)  # Arrow itself trusts a file, and would read beyond its end
        yield from rows_of(table)


def split_names(path: str | Path) -> list[str]:
    """Splits of a data source; an empty list for a single file or a saved dataset without splits.

    Raises:
        MolaError: the source is missing or unreadable.
    """
    source, place = str(path), Path(os.path.expanduser(path))
    if os.path.isdir(place):
        return _splits_in(place) or []
    if os.path.exists(place):
        return []
    if not is_hub_name(source):
        raise _not_there(source)
    import datasets

    try:
        return list(datasets.get_dataset_split_names(*hub_dataset(source)))
    except Exception as error:  # the Hub client has no common base class
        raise _hub_error(source, error) from error


def check_split(option: str, split: str, default: str, data: str | Path) -> None:
    """Refuse a split that is asked for where the data have none, so that all rows would be read.

    Raises:
        MolaError: `split` is neither the option's default nor train, as a single file is called in `mola prepare`, and
            `data` is a file, or a saved dataset without splits.
    """
    if split not in (default, "train") and os.path.exists(os.path.expanduser(data)) and not split_names(data):
        raise MolaError(f"`{option}` ({split!r}) must be left out: {str(data)!r} has no splits.")


def is_hub_name(source: str) -> bool:
    """Whether a string that is no existing path looks like a dataset on the Hub, ``owner/name[:configuration]``."""
    name = source.partition(":")[0].removesuffix(".gz")
    return _HUB_NAME.fullmatch(source) is not None and not name.endswith((*FILE_ENDINGS, ".hf"))


def hub_dataset(source: str) -> tuple[str, ...]:
    """``owner/name``, and the configuration if the source names one."""
    return tuple(source.split(":"))


def _not_there(source: str) -> MolaError:
    return MolaError(
        f"`data` must be an existing file or folder, or a Hub name such as owner/name: `{source}` does not "
        "exist. Check the path."
    )


def _hub_error(source: str, error: Exception) -> MolaError:
    return MolaError(
        f"`data`: no file or folder `{source}` exists, and the Hub dataset of this name could not be loaded "
        f"({type(error).__name__}: {error}). Check the path, or the name and the connection. Of a dataset with "
        "several configurations pass owner/name:configuration."
    )


def _splits_in(place: Path) -> list[str] | None:
    """Splits in a folder written by `save_to_disk`; None: it is one dataset without splits."""
    if os.path.exists(index := place / "dataset_dict.json"):
        try:
            return [str(name) for name in read_json(index)["splits"]]
        except READ_ERRORS as error:
            raise unreadable(place, error) from error
    if os.path.exists(place / "state.json"):
        return None
    try:
        inside = ", ".join(sorted(os.listdir(place))[:8]) or "nothing"
    except OSError as error:
        raise unreadable(place, error) from error
    raise MolaError(
        f"`data` must be a file or a folder written by `save_to_disk`: `{place}` holds {inside}. "
        "Pass one of the files or folders inside."
    )


def _read_folder(place: Path, split: str | None, columns: Collection[str] | None) -> Iterator[Any]:
    splits = _splits_in(place)
    part = place if splits is None else place / _choose(splits, split, str(place))
    import datasets
    import pyarrow

    try:
        yield from _batches(datasets.load_from_disk(str(part)), columns)
    except (*READ_ERRORS, pyarrow.ArrowException) as error:
        raise unreadable(place, error) from error


def _read_hub(source: str, split: str | None, columns: Collection[str] | None, is_stream: bool) -> Iterator[Any]:
    import datasets

    more: dict[str, Any] = {"streaming": True} if is_stream else {}
    try:
        loaded = datasets.load_dataset(*hub_dataset(source), split=split, **more)
        yield from _batches(_select(loaded, split, source), columns)
    except MolaError:
        raise
    except Exception as error:  # the Hub client has no common base class; also a connection that breaks later
        raise _hub_error(source, error) from error


def _select(loaded: Any, split: str | None, source: str) -> Any:
    """The one Dataset meant by `split`; a Dataset without splits is taken as it is."""
    return loaded[_choose(list(loaded), split, source)] if isinstance(loaded, dict) else loaded


def _choose(names: Sequence[str], split: str | None, source: str) -> str:
    """The split that is meant: the only one needs no name."""
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        folder = f", or pass its folder, such as {source}/{names[0]}" if os.path.isdir(source) else ""
        raise MolaError(f"`split` must be one of {', '.join(names)} for `{source}`: got {split!r}. Choose one{folder}.")
    return split
