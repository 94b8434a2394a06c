"""Finished samples of an unfinished run, so that an interrupted evaluation goes on where it stopped.

One JSON object per line: first what identifies the run, then one record per finished sample.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mola.errors import MolaError
from mola.files.atomic import append_lines, check_writable
from mola.files.locks import held
from mola.files.reading import check_regular, parse_json

logger = logging.getLogger(__name__)


class PartialResults:
    """Journal `<output>.partial.jsonl` next to a result file, at `path`.

    `identity` are settings and fingerprints; records are only reused by a run with the same ones.
    """

    def __init__(self, output: str | os.PathLike[str], identity: Mapping[str, Any]):
        self.path = check_writable(f"{os.fspath(output)}.partial.jsonl")
        # Through JSON once, so that tuples and lists compare equal after reading.
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The journal is one evaluation's alone within the block.

        Raises:
            MolaError: another one is at work on it.
        """
        lock = self.path.with_name(f".{self.path.name}.lock")
        with held(lock, waits=False) as is_mine:
            if not is_mine:
                raise MolaError(
                    f"`output` must be one evaluation's alone: another one is writing {str(self.path)!r}. Wait for its "
                    "end, or pass another `output`."
                )
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(lock)

    def read(self, discard_other: bool = False) -> list[dict[str, Any]]:
        """Records of an earlier run; empty without one, or if that had another identity and `discard_other` says so.

        Raises:
            MolaError: the journal is from a run with another identity, or damaged.
        """
        if not os.path.exists(self.path):
            return []
        try:
            lines = self._complete_lines()
            if not lines:
                return []
            header, *records = [parse_json(line) for line in lines]
            if not all(isinstance(entry, dict) for entry in (header, *records)):
                raise ValueError("a line is no JSON object")
        except (OSError, ValueError) as error:
            raise MolaError(f"`{self.path}` is damaged ({error}). Delete it to start again.") from error
        differing = [
            f"{key} {header.get(key)!r} there, {self.identity.get(key)!r} now"
            for key in sorted({*header, *self.identity})
            if header.get(key) != self.identity.get(key)
        ]
        if differing and discard_other:
            logger.warning("%s: discarding %d samples made with other settings.", self.path, len(records))
            self.remove()
            return []
        if differing:
            raise MolaError(
                f"`{self.path}` holds {len(records)} samples of an unfinished run with other settings: "
                f"{'; '.join(differing)}. Use the same settings to go on with it, another `output`, or "
                "`overwrite` to discard it."
            )
        return records

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add finished samples; the first call writes what identifies the run."""
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        entries = [self.identity, *records] if is_new else records
        append_lines(self.path, (json.dumps(entry, ensure_ascii=False) for entry in entries))

    def remove(self) -> None:
        """Delete the journal if there is one."""
        self.path.unlink(missing_ok=True)

    def _complete_lines(self) -> list[str]:
        """Lines of the journal; a last line cut off by the interruption is removed from the file."""
        data = check_regular(self.path).read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            logger.warning("%s: dropping a half-written last line.", self.path)
            os.truncate(self.path, end)
        # Not `splitlines`: model output may hold other characters that Unicode counts as line ends.
        return data[:end].decode("utf-8").split("\n")[:-1]
