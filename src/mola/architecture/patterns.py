"""Numbers for single modules by patterns of their names, as in PEFT's `rank_pattern`. Pure functions, no torch.

A key matches a module if it matches, as a regular expression, the whole name of the module or its end after a dot. The
first matching key counts.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from mola.errors import MolaError

Number = TypeVar("Number")


def check_pattern(pattern: Any, name: str, *, is_integer: bool = True, place: str = "") -> None:
    """Check the pattern in the field `name` without knowing the model. `place` says in messages where it was read from.

    Raises:
        MolaError: the value is not a mapping from regular expressions to positive numbers.
    """
    if pattern is None:
        return
    if not isinstance(pattern, Mapping):
        raise MolaError(
            f'`{name}` must map names of modules to numbers, such as {{"mlp.*": 8}}: got {pattern!r}{place}.'
        )
    for key, value in pattern.items():
        is_number = isinstance(value, Integral if is_integer else Real) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            kind = "an integer of at least 1" if is_integer else "a number above 0"
            raise MolaError(f"`{name}` must give {kind} for every key: got {value!r} for {key!r}{place}.")
        try:
            re.compile(key)
            _compile(key)  # also rejects flags, which are allowed only at the start of an expression
        except (re.error, TypeError) as error:
            raise MolaError(f"`{name}` has a key that is no regular expression{place}: {key!r}: {error}.") from error


def by_pattern(pattern: Mapping[str, Number] | None, module: str, default: Number) -> Number:
    """The number of the first key that matches the name of a module; the default if no key does."""
    return next((value for key, value in (pattern or {}).items() if _matches(key, module)), default)


def scaling_of(config: Mapping[str, Any], module: str, r: int) -> float:
    """Factor on the update of a module of rank `r`, given the parsed `adapter_config.json`."""
    alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def check_matches(pattern: Mapping[str, Any] | None, modules: Iterable[str], name: str) -> None:
    """Check that every key of the field `name` matches an adapted module.

    Raises:
        MolaError: a key matches no adapted module.
    """
    modules = list(modules)
    for key in pattern or {}:
        if not any(_matches(key, module) for module in modules):
            known = sorted({module.rpartition(".")[2] for module in modules})
            raise MolaError(
                f"`{name}` has a key that matches no adapted module: {key!r}. There are {', '.join(known)}."
            )


def _matches(key: str, module: str) -> bool:
    return _compile(key).match(module) is not None


@functools.lru_cache(maxsize=1 << 16)  # the cache of `re` is too small for every linear of a deep model
def _compile(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")
