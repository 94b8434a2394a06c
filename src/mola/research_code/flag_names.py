"""Messages of mola's commands in the words of the research code's scripts."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mola.errors import MolaError


@contextmanager
def flag_names(names: Mapping[str, str], phrases: Mapping[str, str] | None = None) -> Iterator[None]:
    """Errors of the block name the flags of a script.

    Args:
        names: option of a command -> flag of the script.
        phrases: other texts that a script has to say differently.
    """
    try:
        yield
    except MolaError as error:
        text = str(error)
        for phrase, other in (phrases or {}).items():
            text = text.replace(phrase, other)
        for name, flag in names.items():
            text = re.sub(rf"(?<=`){name}(?=`)|(?<=--){name}\b", flag, text)
        raise MolaError(text) from error
