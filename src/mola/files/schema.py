"""Forms of JSON content: what a file that an earlier command wrote must look like before it is used.

A form is one of

- `TEXT`, `INTEGER`, `NUMBER` (finite), `FLAG`, `ANYTHING`,
- `[form]`: a list of such values; `[form, form]`: a list of just so many,
  `[form, ...]`: of at least one,
- `{"key": form, ...}`: a mapping that has these keys; those that end in "?" may be missing. Others are free,
- `{str: form}`: a mapping from any text to such values,
- `(form, None)`: such a value or null.
"""

import math
from typing import Any, NamedTuple

from mola.errors import MolaError

_LONGEST_ECHO = 80


class Kind(NamedTuple):
    """A kind of plain values and what to call it."""

    word: str
    types: tuple[type, ...]


TEXT = Kind("text", (str,))
INTEGER = Kind("an integer", (int,))
NUMBER = Kind("a finite number", (int, float))
FLAG = Kind("true or false", (bool,))
ANYTHING = Kind("anything", (object,))


def check_form(content: Any, form: Any, source: str, cure: str) -> None:
    """Check that the content of a file has a form.

    Args:
        content: what JSON has given.
        form: see above.
        source: name of the file, for the message.
        cure: what to do about it, a sentence.

    Raises:
        MolaError: it has not; names the place, the rule and the value.
    """
    problem = _problem(content, form, "")
    if problem:
        raise MolaError(f"{problem}, in {source!r}. {cure}")


def _problem(value: Any, form: Any, place: str) -> str:
    if isinstance(form, tuple) and not isinstance(form, Kind):
        return "" if value is None else _problem(value, form[0], place)
    if isinstance(form, Kind):
        return "" if _is_kind(value, form) else _wrong(value, form.word, place)
    if isinstance(form, list):
        if not isinstance(value, list):
            return _wrong(value, "a list", place)
        if form[-1] is ... and not value:
            return _wrong(value, "a list with something in it", place)
        if form[-1] is not ... and len(form) > 1 and len(value) != len(form):
            return _wrong(value, f"a list of {len(form)}", place)
        problems = (_problem(item, form[0], f"{place}[{index}]") for index, item in enumerate(value))
    elif not isinstance(value, dict):
        return _wrong(value, "a mapping", place)
    elif str in form:
        problems = (_problem(item, form[str], _below(place, key)) for key, item in value.items())
    else:
        missing = next((key for key in form if not key.endswith("?") and key not in value), None)
        if missing is not None:
            return f"`{_below(place, missing)}` is missing"
        names = ((key.removesuffix("?"), part) for key, part in form.items())
        problems = (_problem(value[key], part, _below(place, key)) for key, part in names if key in value)
    return next((problem for problem in problems if problem), "")


def _is_kind(value: Any, kind: Kind) -> bool:
    if isinstance(value, bool) and kind in (INTEGER, NUMBER):
        return False
    if kind in (INTEGER, NUMBER) and isinstance(value, (int, float)):
        try:
            if not math.isfinite(value):
                return False
        except OverflowError:  # an integer beyond what a float can hold
            return False
    return isinstance(value, kind.types)


def _wrong(value: Any, rule: str, place: str) -> str:
    shown = repr(value)
    if len(shown) > _LONGEST_ECHO:
        shown = f"{shown[:_LONGEST_ECHO]}..."
    return f"`{place or 'content'}` must be {rule}: got {shown}"


def _below(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
