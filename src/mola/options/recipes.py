"""YAML recipes: a mapping from option names to values, whose numbers know how they were written."""

import math
from typing import Any

import yaml

from mola.errors import MolaError
from mola.files.reading import BoundedLoader, parse_yaml, read_text


class _Int(int):
    """A number that knows how it was written: for an option that takes text, 007 is no 7."""

    written: str


class _Float(float):
    """As `_Int`."""

    written: str


class _RecipeLoader(BoundedLoader):
    """Numbers know how they were written."""

    def _int(self, node: yaml.ScalarNode) -> int:
        number = _Int(node.value)
        number.written = node.value
        return number

    def _float(self, node: yaml.ScalarNode) -> float:
        number = _Float(self.construct_yaml_float(node))
        if math.isfinite(number):  # YAML's .inf is no number on the command line
            number.written = node.value
        return number


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _RecipeLoader._int)
_RecipeLoader.add_constructor("tag:yaml.org,2002:float", _RecipeLoader._float)


def read_recipe(path: str) -> dict[str, Any]:
    """Read a YAML recipe: a mapping from option names to values.

    Raises:
        MolaError: not there, no YAML, or no mapping.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise MolaError(f"`config` cannot be read: {path!r} ({error}).") from error
    try:
        recipe = parse_yaml(text, _RecipeLoader)
    except ValueError as error:
        raise MolaError(f"`config` is no YAML: {path!r}: {error}. Correct the file.") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise MolaError(f"`config` must be a mapping from option names to values: {path!r} holds {recipe!r}.")
    return recipe
