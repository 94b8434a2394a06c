"""One integer per decoder layer from any notation. Pure functions, no torch.

- Notations: one integer, a list, "2,2,4,4", "2468" (groups of layers), a shape's name, a JSON file.
- `resolve_per_layer` needs the depth of the model, `check_notation` does not.
- `pattern_with` finds the numbers of single modules that a JSON file holds beside those of the layers.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

from mola.architecture.patterns import check_pattern
from mola.errors import MolaError
from mola.files.reading import read_json

SHAPES = {
    "inverted_triangle": "2468",
    "triangle": "8642",
    "hourglass": "8228",
    "rectangle": "5555",
    "diamond": "2882",
}

Notation: TypeAlias = int | str | Sequence[int]

_GROUPED = "num_experts"  # the only field that knows digit groups and shapes
_PATTERN = "num_experts_pattern"  # what its file may hold besides
LARGEST_PLAIN_NUM_EXPERTS = 256
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_DIGITS = re.compile(r"[0-9]{2,}")


@dataclass(frozen=True)
class _Parsed:
    """A notation before the depth is known: one value, one value per group, or one per layer."""

    values: tuple[int, ...]
    kind: str  # "same" | "groups" | "layers"
    pattern: Mapping[str, int] | None = None  # of `num_experts_pattern`, from a file


def resolve_per_layer(value: Notation, num_layers: int, name: str) -> list[int]:
    """One integer per decoder layer, lowest layer (nearest the input) first, from any notation.

    For every field: an integer (the same everywhere), a list of `num_layers` integers, "2,2,4,4",
    "16," (16 everywhere) or the path of a JSON file that holds such a list, bare or under the key `name`.
    For "num_experts" only: digits such as "2468", one per group of layers, and the names in `SHAPES`.
    With `L` layers and `G` groups every group has `L // G` layers and the last `L % G` groups one more:
    30 layers in 4 groups are 7, 7, 8, 8. For other fields digits are a number: "16" is 16.

    Args:
        value: the notation.
        num_layers: decoder layers of the model.
        name: field the value was given for, e.g. "num_experts", "r" or "top_k"; used in messages.

    Returns:
        `num_layers` integers, each at least 1.

    Raises:
        MolaError: the notation is none of the above, a number is below 1, or the count does not fit.
    """
    if num_layers < 1:
        raise MolaError(f"`{name}` needs a model with decoder layers: this one has {num_layers}.")
    parsed = _parse(value, name)
    if parsed.kind == "same":
        return list(parsed.values) * num_layers
    if parsed.kind == "groups":
        return _expand_groups(parsed.values, num_layers, name)
    if len(parsed.values) != num_layers:
        entries = _count(len(parsed.values), "entry", "entries")
        raise MolaError(
            f"`{name}` needs one entry per decoder layer: got {entries}, the model has "
            f"{_count(num_layers, 'layer')}. Pass one integer{_or_list(name, num_layers)}."
        )
    return list(parsed.values)


def check_notation(value: Notation, name: str) -> None:
    """Check what can be checked before the depth of the model is known.

    Args:
        value: the notation, see `resolve_per_layer`.
        name: field the value was given for.

    Raises:
        MolaError: wrong kind, a number below 1, a digit 0, an unknown shape, an unreadable JSON file.
    """
    _parse(value, name)


def layers_named(value: Notation, name: str) -> int | None:
    """Of how many decoder layers a notation has an entry each; None if it fits any number of them."""
    parsed = _parse(value, name)
    return len(parsed.values) if parsed.kind == "layers" else None


def smallest(value: Notation, name: str) -> int:
    """The lowest number that a notation gives to any layer."""
    return min(_parse(value, name).values)


def pattern_with(num_experts: Notation, given: Mapping[str, int] | None) -> Mapping[str, int] | None:
    """`num_experts_pattern` that belongs to a value of `num_experts`: what its JSON file holds, else what is given.

    Raises:
        MolaError: both say something, and not the same.
    """
    found = _parse(num_experts, _GROUPED).pattern
    if found and given and found != given:
        raise MolaError(
            f"`{_PATTERN}` must not differ from that in the file that `{_GROUPED}` names: got {dict(given)!r} beside "
            f"{num_experts!r}. Leave it out, or take it out of the file."
        )
    return found or given


def _parse(value: Any, name: str) -> _Parsed:
    if isinstance(value, bool) or not isinstance(value, (Integral, str, list, tuple)):
        raise MolaError(
            f"`{name}` must be an integer, a list of integers or a string, got {value!r} "
            f"({type(value).__name__}). {_cure(name)}"
        )
    if isinstance(value, str):
        return _parse_text(value.strip(), name)
    if isinstance(value, Integral):
        return _Parsed((_checked_plain(int(value), name),), "same")
    return _Parsed(_checked_entries(value, name), "layers")


def _parse_text(text: str, name: str) -> _Parsed:
    if text.lower().endswith(".json"):
        return _read_file(text, name)
    if "," in text:
        return _parse_commas(text, name)
    if name == _GROUPED and _DIGITS.fullmatch(text):
        return _Parsed(_digits(text), "groups")
    if _INTEGER.fullmatch(text):
        return _Parsed((_checked_plain(int(text), name),), "same")
    shape = text.lower().replace("-", "_")
    if shape in SHAPES:
        if name == _GROUPED:
            return _Parsed(_digits(SHAPES[shape]), "groups")
        raise MolaError(f"`{name}` cannot be a shape, only `num_experts` can: got {text!r}. {_cure(name)}")
    if os.path.isfile(text):
        return _read_file(text, name)
    raise MolaError(_unknown_text(text, shape, name))


def _unknown_text(text: str, shape: str, name: str) -> str:
    if name != _GROUPED:
        rule = "an integer, integers between commas or a JSON file"
        return f"`{name}` must be {rule}, got {text!r}. {_cure(name)}"
    close = difflib.get_close_matches(shape, SHAPES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    known = ", ".join(f"{key} ({digits})" for key, digits in SHAPES.items())
    return (
        f"`{name}` must be an integer, integers between commas, digits, a JSON file or a known shape, "
        f"got {text!r}.{hint} Known shapes: {known}."
    )


def _parse_commas(text: str, name: str) -> _Parsed:
    items = [item.strip() for item in text.split(",")]
    if items[-1] == "":  # "16," and "2,4,": a last comma only says that this is a list
        items.pop()
    wrong = [item for item in items if not _INTEGER.fullmatch(item)]
    if wrong:
        raise MolaError(
            f"`{name}` must be integers between commas, got {text!r}: {wrong[0]!r} is no integer. {_cure(name)}"
        )
    values = _checked_entries([int(item) for item in items], name)
    return _Parsed(values, "same" if len(values) == 1 else "layers")


def _digits(text: str) -> tuple[int, ...]:
    if "0" in text:
        raise MolaError(
            f"`num_experts` as digits needs 1 to 9 experts in every group of layers, got {text!r}. "
            "For a number that is the same in every layer add a comma: '10,' is ten experts everywhere."
        )
    return tuple(int(digit) for digit in text)


def _read_file(path: str, name: str) -> _Parsed:
    try:
        content = read_json(path)
    except OSError as error:
        raise MolaError(
            f"`{name}` names a file that cannot be read: {path!r} ({error.strerror or error}). {_cure(name)}"
        ) from error
    except ValueError as error:
        raise MolaError(f"`{name}` names a file that is not valid JSON: {path!r} ({error}).") from error
    pattern = None
    if isinstance(content, dict):
        if name not in content:
            raise MolaError(
                f"`{name}` names the file {path!r}, whose object must have the key {name!r}: "
                f"it has {sorted(content)}. Add the key, with a list of integers."
            )
        pattern = content.get(_PATTERN) if name == _GROUPED else None
        check_pattern(pattern, _PATTERN, place=f" in {path!r}")
        content = content[name]
    if not isinstance(content, list):
        raise MolaError(
            f"`{name}` names the file {path!r}, which must hold a list of integers, one per decoder layer, "
            f"bare or under the key {name!r}: got {content!r}."
        )
    return _Parsed(_checked_entries(content, name, f" in {path!r}"), "layers", pattern)


def _checked_entries(values: Sequence[Any], name: str, place: str = "") -> tuple[int, ...]:
    if not values:
        raise MolaError(f"`{name}` needs one entry per decoder layer: got an empty list{place}. {_cure(name)}")
    for position, value in enumerate(values):
        is_integer = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_integer or value < 1:
            raise MolaError(
                f"`{name}` must hold integers of at least 1: entry {position}{place} is {value!r}. {_cure(name)}"
            )
    return tuple(int(value) for value in values)


def _checked_plain(value: int, name: str) -> int:
    if value < 1:
        raise MolaError(f"`{name}` must be at least 1, got {value}. {_cure(name)}")
    if name == _GROUPED and value > LARGEST_PLAIN_NUM_EXPERTS:
        raise MolaError(
            f"`{name}` as one integer is the number of experts in every layer, at most "
            f"{LARGEST_PLAIN_NUM_EXPERTS}: got {value}. Was the digit shape meant? Then quote it "
            f"as a string: '{value}'. If not, write '{value},'."
        )
    return value


def _expand_groups(digits: Sequence[int], num_layers: int, name: str) -> list[int]:
    groups = len(digits)
    if groups > num_layers:
        raise MolaError(
            f"`{name}` has more groups than there are decoder layers: {groups} digits "
            f"({''.join(map(str, digits))!r}), the model has {_count(num_layers, 'layer')}. "
            f"Pass at most {num_layers} digits, or one integer."
        )
    size, remainder = divmod(num_layers, groups)
    result: list[int] = []
    for group, digit in enumerate(digits):
        result += [digit] * (size + (group >= groups - remainder))
    return result


def _cure(name: str) -> str:
    return f"Pass one integer{_or_list(name, None)}."


def _or_list(name: str, num_layers: int | None) -> str:
    integers = "one integer per layer" if num_layers is None else _count(num_layers, "integer")
    if name != _GROUPED:
        return f" or {integers}"
    return f", {integers}, or a shape such as 'inverted_triangle' or '2468'"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
