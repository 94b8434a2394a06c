"""Read JSON, JSON lines and YAML."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mola.errors import MolaError


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, is not JSON or holds something else."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file, one at a time; none if the file is missing.

    An incomplete last line is skipped: a run is still writing it, or was killed.

    Raises:
        MolaError: a line other than an incomplete last one is not a JSON object.
    """
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                yield entry
            elif line.endswith(b"\n"):
                raise MolaError(f"{os.fspath(path)!r}: line {number} is not a JSON object. Remove the line.")


def select_lines(path: Path, is_wanted: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Lines of a JSON lines file whose object is wanted; none if the file is missing.

    Incomplete lines are left out, and lines for which `is_wanted` raises a ValueError, KeyError or TypeError.
    """
    selected = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            if is_wanted(json.loads(line)):
                selected.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return selected


def first_repeated(names: Iterable[str]) -> str | None:
    """The earliest name that occurs more than once, or None."""
    counts = Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)


class _Loader(yaml.SafeLoader):
    """Reads `no`, `off`, dates and `12:30` as text, and `1e-4` as a number; a repeated key is an error.

    PyYAML implements YAML 1.1, in which `no` is false, `12:30` is 750 and `1e-4` is text. It keeps the last value of a
    repeated key.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping, whose keys must differ."""
        node = super().compose_mapping_node(anchor)
        repeated = first_repeated(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated is not None:
            raise yaml.composer.ComposerError(None, None, f"the key {repeated!r} occurs twice", node.start_mark)
        return node


_BOOL, _INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _INT, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile("^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: the text is not YAML, or a key occurs twice in a mapping.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
