"""What `data` of a preparation names: one table of rows, or a table for every split."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from mola.data.read import split_names, stream_rows
from mola.errors import MolaError


@dataclass(frozen=True)
class Source:
    """One table of rows: a file, or one split of a saved dataset or of a Hub dataset."""

    path: str
    split: str | None = None

    def rows(self, columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Its rows, from the first one on; see `stream_rows`."""
        return stream_rows(self.path, self.split, columns)


def source_splits(data: str) -> dict[str, Source]:
    """A table for every split; a file alone, or a saved dataset without splits, is `train`.

    Args:
        data: a file, a folder, a Hub name, or files as ``train=A,validation=B,test=C``.

    Raises:
        MolaError: the source is missing or unreadable, or the list of files is malformed.
    """
    if "=" in data and not os.path.exists(os.path.expanduser(data)):
        return {name: Source(path) for name, path in _named_files(data).items()}
    return {name: Source(data, name) for name in split_names(data)} or {"train": Source(data)}


def single_source(data: str, *, may_take_all: bool = True) -> Source:
    """The table that samples are drawn from: a file, the split `train`, or the only split.

    `may_take_all` says whether the command could also take all splits, without `num_samples`; for the message.

    Raises:
        MolaError: there are several files, or several splits without a `train`.
    """
    splits = source_splits(data)
    if "=" in data and len(splits) > 1 and all(source.split is None for source in splits.values()):
        otherwise = ", or leave `num_samples` out to take the splits as they are" if may_take_all else ""
        raise MolaError(
            f"`data` must be a single source to draw samples from: got the files {data!r}. Name one of them{otherwise}."
        )
    if len(splits) > 1 and "train" not in splits:
        raise MolaError(
            f"`data` must have a split `train` to draw samples from: `{data}` has {', '.join(splits)}. Pass a single "
            "file, or the folder of one split."
        )
    return splits.get("train") or next(iter(splits.values()))


def _named_files(data: str) -> dict[str, str]:
    files: dict[str, str] = {}
    for part in data.split(","):
        name, _, path = (piece.strip() for piece in part.partition("="))
        if not name.isidentifier() or not path or name in files:
            raise MolaError(
                f"`data` must be train=A,validation=B,test=C with different names: got {data!r}. Correct the "
                f"part {part!r}."
            )
        files[name] = path
    return files
