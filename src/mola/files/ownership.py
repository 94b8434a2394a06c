"""Text files that mola may replace: their last line holds the sha256 of the text above it.

A file that was changed by hand, or that somebody else wrote, has no such line or another sum.
"""

import hashlib
import re
from pathlib import Path

_MARK = re.compile(r"\n<!-- Written by mola; sha256 of the text above: ([0-9a-f]{64}) -->\n\Z")


def with_mark(text: str) -> str:
    """Text with the line that says it is mola's own; a comment in Markdown and HTML."""
    return f"{text}\n<!-- Written by mola; sha256 of the text above: {_digest(text)} -->\n"


def is_own_file(path: Path) -> bool:
    """Whether a file is as `with_mark` made it; one that cannot be read is somebody else's."""
    try:
        # Bytes: line ends are part of what was summed up.
        text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    except OSError:
        return False
    found = _MARK.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
