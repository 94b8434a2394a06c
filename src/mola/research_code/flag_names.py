"""Messages of mola's commands, errors and log lines, in the words of the research code's scripts."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mola.errors import MolaError

# Commands to copy, columns of a row, fields of a file: these are no flags, whatever they are called.
_NO_FLAGS = re.compile(
    r"(\bmola [a-z-]+\b[^`]*|row `[^`]*`: `\w+`|`\w+`(?= (?:in|of) \S*adapter_config\.json))", re.DOTALL
)


@contextmanager
def flag_names(names: Mapping[str, str], phrases: Mapping[str, str] | None = None) -> Iterator[None]:
    """Errors, warnings and log lines of the block name the flags of a script.

    Args:
        names: option of a command -> flag of the script.
        phrases: other texts that a script has to say differently: pattern -> what comes in its place.
    """

    def translated(record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] == "mola":
            record.msg, record.args = _in_words(record.getMessage(), names, phrases or {}), ()
        return True

    handlers, show = [*logging.getLogger().handlers], warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        show(_in_words(str(message), names, phrases or {}), category, *place, **more)

    for handler in handlers:
        handler.addFilter(translated)
    warnings.showwarning = shown
    try:
        yield
    except MolaError as error:
        raise MolaError(_in_words(str(error), names, phrases or {})) from error
    finally:
        warnings.showwarning = show
        for handler in handlers:
            handler.removeFilter(translated)


def _in_words(text: str, names: Mapping[str, str], phrases: Mapping[str, str]) -> str:
    for pattern, other in phrases.items():
        text = re.sub(pattern, other, text)
    parts = _NO_FLAGS.split(text)  # every second one is such a text
    for name, flag in names.items():
        parts[::2] = [re.sub(rf"(?<=`){name}(?=`)|(?<=--){name}\b", flag, part) for part in parts[::2]]
    return "".join(parts)
