"""One integer per decoder layer, from any notation. Pure functions, no torch.

- Notations: one integer, a list, "2,2,4,4", "2468" or "2-4-6-8" (groups of layers), the name of a shape, a JSON file.
- `resolve_per_layer` needs the depth of the model, `check_notation` does not.
- `default_num_experts`: the experts per layer if the user sets nothing.
- `pattern_with`: numbers for single modules, which a JSON file may hold beside the numbers of the layers.
"""

from __future__ import annotations

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
DEFAULT_NUM_EXPERTS = "2468"
LARGEST_PLAIN_NUM_EXPERTS = 256

Notation: TypeAlias = int | str | Sequence[int]

_NUM_EXPERTS = "num_experts"  # the only field that may be digits or a shape
_PATTERN = "num_experts_pattern"  # a JSON file for `num_experts` may also hold this field
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_DIGITS = re.compile(r"[0-9]{3,}")
_TWO_DIGITS = re.compile(r"[1-9][0-9]")  # as a number of experts plausible, too
_GROUPS = re.compile(r"[0-9]{1,18}(-[0-9]{1,18})+")


@dataclass(frozen=True)
class _Parsed:
    """A notation before the depth is known: one value for all layers, one per group of layers, or one per layer."""

    values: tuple[int, ...]
    kind: str  # "same" | "groups" | "layers"
    pattern: Mapping[str, int] | None = None  # `num_experts_pattern` from a file


def resolve_per_layer(value: Notation, num_layers: int, name: str) -> list[int]:
    """One integer per decoder layer, lowest layer (nearest the input) first, from any notation.

    Every field may be an integer (for all layers), a list of `num_layers` integers, "2,2,4,4", "16," (16 for all
    layers) or the path of a JSON file that holds a list of integers, bare or under the key `name`.

    "num_experts" may also be three or more digits such as "2468", one per group of layers, integers between hyphens
    such as "8-16", or a name in `SHAPES`. With `L` layers and `G` groups every group has `L // G` layers, and the last
    `L % G` groups have one more: 30 layers in 4 groups are 7, 7, 8, 8. Two digits such as "16" are refused, because
    they could be one number or two groups. In other fields digits are one number: "16" is 16.

    Args:
        value: the notation.
        num_layers: decoder layers of the model.
        name: the field, e.g. "num_experts", "r" or "top_k".

    Returns:
        `num_layers` integers, each at least 1.

    Raises:
        MolaError: the notation is unknown or ambiguous, a number is below 1, or the entries are not as many as the
            layers.
    """
    if num_layers < 1:
        raise MolaError(f"`{name}` needs a model with decoder layers: this one has {num_layers}.")
    parsed = _parse(value, name)
    if parsed.kind == "same":
        return list(parsed.values) * num_layers
    if parsed.kind == "groups":
        return _spread_groups(parsed.values, num_layers)
    if len(parsed.values) != num_layers:
        raise MolaError(
            f"`{name}` needs one entry per decoder layer: got {_number_of(len(parsed.values), 'entry', 'entries')}, "
            f"the model has {_number_of(num_layers, 'layer')}. {_advice(name, _number_of(num_layers, 'integer'))}"
        )
    return list(parsed.values)


def default_num_experts(num_layers: int) -> list[int]:
    """Experts per layer if the user sets nothing: `DEFAULT_NUM_EXPERTS`, spread over a model of any depth.

    | layers | experts |
    | --- | --- |
    | 1 | 5 |
    | 2 | 3, 7 |
    | 3 | 2, 4, 7 |
    | 4 or more | those of the notation "2468" |

    With fewer layers than digits, a layer gets the rounded-down mean of its share of the digits: with two layers,
    (2 + 4) / 2 and (6 + 8) / 2.
    """
    digits = [int(digit) for digit in DEFAULT_NUM_EXPERTS]
    if num_layers >= len(digits):
        return _spread_groups(digits, num_layers)
    result, start = [], 0
    for size in _shares(len(digits), num_layers):
        result.append(sum(digits[start : start + size]) // size)
        start += size
    return result


def check_notation(value: Notation, name: str) -> None:
    """Check a notation of the field `name` without knowing the depth of the model.

    Raises:
        MolaError: the value is of the wrong kind or ambiguous, has a number below 1 or a digit 0, or names an unknown
            shape or an unreadable JSON file.
    """
    _parse(value, name)


def list_length(value: Notation, name: str) -> int | None:
    """Number of entries of a notation with one entry per layer; None for notations that fit models of any depth."""
    parsed = _parse(value, name)
    return len(parsed.values) if parsed.kind == "layers" else None


def pattern_with(num_experts: Notation, given: Mapping[str, int] | None) -> Mapping[str, int] | None:
    """The `num_experts_pattern` in the JSON file that `num_experts` names, or else the given one.

    Raises:
        MolaError: both patterns exist and differ.
    """
    found = _parse(num_experts, _NUM_EXPERTS).pattern
    if found and given and found != given:
        raise MolaError(
            f"`{_PATTERN}` must not differ from the one in the file that `{_NUM_EXPERTS}` names: got {dict(given)!r} "
            f"beside {num_experts!r}. Leave it out, or remove it from the file."
        )
    return found or given


def unambiguous(num_experts: Any) -> Any:
    """A `num_experts` as it is written today: earlier versions read the two digits "24" as the groups "2-4"."""
    is_old = isinstance(num_experts, str) and _TWO_DIGITS.fullmatch(num_experts) and "0" not in num_experts
    return "-".join(num_experts) if is_old else num_experts


def _parse(value: Any, name: str) -> _Parsed:
    if isinstance(value, bool) or not isinstance(value, (Integral, str, list, tuple)):
        raise MolaError(
            f"`{name}` must be an integer, a list of integers or a string, got {value!r} "
            f"({type(value).__name__}). {_advice(name)}"
        )
    if isinstance(value, str):
        return _parse_text(value.strip(), name)
    if isinstance(value, Integral):
        return _Parsed((_checked_integer(int(value), name),), "same")
    return _Parsed(_checked_entries(value, name), "layers")


def _parse_text(text: str, name: str) -> _Parsed:
    """Parse a string: a JSON file's path, integers between commas or hyphens, digits, a shape, or one integer."""
    if text.lower().endswith(".json"):
        return _read_file(text, name)
    if "," in text:
        return _parse_commas(text, name)
    shape = text.lower().replace("-", "_")
    if name == _NUM_EXPERTS:
        if _TWO_DIGITS.fullmatch(text):
            raise _two_digits_error(text)
        if shape in SHAPES or _DIGITS.fullmatch(text):
            return _Parsed(_parse_digits(SHAPES.get(shape, text)), "groups")
        if _GROUPS.fullmatch(text):
            return _Parsed(_checked_entries([int(item) for item in text.split("-")], name), "groups")
    if _INTEGER.fullmatch(text):
        return _Parsed((_checked_integer(int(text), name),), "same")
    if os.path.isfile(text):
        return _read_file(text, name)
    if name != _NUM_EXPERTS:
        raise MolaError(f"`{name}` must be an integer, integers between commas or a JSON file, got {text!r}.")
    known = ", ".join(f"{key} ({digits})" for key, digits in SHAPES.items())
    raise MolaError(
        f"`{name}` must be an integer, integers between commas, digits, a JSON file or a known shape, "
        f"got {text!r}. Known shapes: {known}."
    )


def _two_digits_error(text: str) -> MolaError:
    first, second = text[0], text[1]
    everywhere = f"'{text},' (with the comma) is {text} experts in every layer"
    if second == "0":
        return MolaError(f"`{_NUM_EXPERTS}` {text!r} must be written with a comma: {everywhere}.")
    return MolaError(
        f"`{_NUM_EXPERTS}` {text!r} has two meanings. Write one of them: {everywhere}; '{first}-{second}' is "
        f"{first} in the lower half of the layers and {second} in the upper half."
    )


def _parse_commas(text: str, name: str) -> _Parsed:
    items = [item.strip() for item in text.split(",")]
    if items[-1] == "":  # a comma at the end, as in "16," or "2,4,"
        items.pop()
    wrong = [item for item in items if not _INTEGER.fullmatch(item)]
    if wrong:
        raise MolaError(
            f"`{name}` must be integers between commas, got {text!r}: {wrong[0]!r} is no integer. {_advice(name)}"
        )
    values = _checked_entries([int(item) for item in items], name)
    return _Parsed(values, "same" if len(values) == 1 else "layers")


def _parse_digits(text: str) -> tuple[int, ...]:
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
            f"`{name}` names a file that cannot be read: {path!r} ({error.strerror or error}). {_advice(name)}"
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
        pattern = content.get(_PATTERN) if name == _NUM_EXPERTS else None
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
        raise MolaError(f"`{name}` needs one entry per decoder layer: got an empty list{place}. {_advice(name)}")
    for position, value in enumerate(values):
        is_integer = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_integer or value < 1:
            raise MolaError(
                f"`{name}` must hold integers of at least 1: entry {position}{place} is {value!r}. {_advice(name)}"
            )
    return tuple(int(value) for value in values)


def _checked_integer(value: int, name: str) -> int:
    if value < 1:
        raise MolaError(f"`{name}` must be at least 1, got {value}. {_advice(name)}")
    if name == _NUM_EXPERTS and value > LARGEST_PLAIN_NUM_EXPERTS:
        raise MolaError(
            f"`{name}` as one integer is the number of experts in every layer, at most "
            f"{LARGEST_PLAIN_NUM_EXPERTS}: got {value}. If you meant a shape of digits, quote it "
            f"as a string: '{value}'. Otherwise write '{value},'."
        )
    return value


def _spread_groups(digits: Sequence[int], num_layers: int) -> list[int]:
    if len(digits) > num_layers:
        raise MolaError(
            f"`{_NUM_EXPERTS}` has more groups than there are decoder layers: {len(digits)} groups "
            f"({'-'.join(map(str, digits))!r}), the model has {_number_of(num_layers, 'layer')}. "
            f"Pass at most {_number_of(num_layers, 'group')}, or one integer."
        )
    sizes = _shares(num_layers, len(digits))
    return [digit for digit, size in zip(digits, sizes, strict=True) for _ in range(size)]


def _shares(total: int, parts: int) -> list[int]:
    """`total` divided into `parts` sizes that differ by one at most, the larger ones last: 30 by 4 is 7, 7, 8, 8."""
    size, remainder = divmod(total, parts)
    return [size + (part >= parts - remainder) for part in range(parts)]


def _advice(name: str, integers: str = "one integer per layer") -> str:
    if name == _NUM_EXPERTS:
        return f"Pass one integer, {integers}, or a shape such as 'inverted_triangle' or '2468'."
    return f"Pass one integer or {integers}."


def _number_of(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
