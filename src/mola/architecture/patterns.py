"""Numbers for single modules, by patterns of their names as in PEFT's `rank_pattern`. Pure functions, no torch."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from mola.errors import MolaError

Number = TypeVar("Number")


def check_pattern(pattern: Any, name: str, whole: bool = True, place: str = "") -> None:
    """Check what can be checked without a model.

    Args:
        pattern: the value of the field, None for none.
        name: the field.
        whole: whether numbers must be integers.
        place: where it stands, for messages.

    Raises:
        MolaError: no mapping from regular expressions to positive numbers.
    """
    if pattern is None:
        return
    if not isinstance(pattern, Mapping):
        raise MolaError(
            f'`{name}` must map names of modules to numbers, such as {{"mlp.*": 8}}: got {pattern!r}{place}.'
        )
    for key, value in pattern.items():
        number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf"):
            kind = "an integer of at least 1" if whole else "a number above 0"
            raise MolaError(f"`{name}` must give {kind} for every key: got {value!r} for {key!r}{place}.")
        try:
            re.compile(key)
            _compiled(key)  # behind another expression, where flags may not stand
        except (re.error, TypeError) as error:
            raise MolaError(f"`{name}` has a key that is no regular expression{place}: {key!r}: {error}.") from error


def by_pattern(pattern: Mapping[str, Number] | None, module: str, default: Number) -> Number:
    """The number of the first key that the end of a module's name matches, from a dot on; else the default."""
    return next((value for key, value in (pattern or {}).items() if _matches(key, module)), default)


def scaling_of(config: Mapping[str, Any], module: str, r: int) -> float:
    """What the update of a module of rank `r` is multiplied by, after an `adapter_config.json`."""
    alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def check_matches(pattern: Mapping[str, Any] | None, modules: Iterable[str], name: str) -> None:
    """Check that every key is for some adapted module.

    Raises:
        MolaError: one is for none.
    """
    modules = list(modules)
    for key in pattern or {}:
        if not any(_matches(key, module) for module in modules):
            known = sorted({module.rpartition(".")[2] for module in modules})
            raise MolaError(
                f"`{name}` has a key that matches no adapted module: {key!r}. There are {', '.join(known)}."
            )


def _matches(key: str, module: str) -> bool:
    return _compiled(key).match(module) is not None


@functools.lru_cache(maxsize=1 << 16)
def _compiled(key: str) -> re.Pattern[str]:
    """Kept: a pattern may name every linear of a deep model, more than `re` itself keeps."""
    return re.compile(rf"(.*\.)?({key})$")
