"""Reading text, JSON and YAML that anybody may have written: what is wrong with it is an OSError or a ValueError.

- `check_regular`, `read_text`: a pipe or a device is refused, it might never end.
- `parse_json`, `read_json`, `json_lines`: deep nesting and half characters are refused too.
- `read_json_object`: what a record says, if it is there and readable.
- `parse_yaml`: as well as references that would grow without end, and values that are not what their tag says.
"""

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from mola.errors import MolaError

_TOO_DEEP = "it is nested too deeply"
_HALF_CHARACTER = "it holds half a surrogate pair, which is no Unicode text"
_MOST_BRACKETS = 100
_MOST_YAML_VALUES = 1_000_000  # after following references
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F]"
# Pairs, which are the usual case, are passed over; what is found may still be a backslash before plain text.
_MAYBE_HALF = re.compile(rf"{_HIGH}(?!{_LOW})|(?<!\\u[dD][89abAB]..){_LOW}|\\{_LOW}|\\{_HIGH}")


def check_regular(path: str | os.PathLike[str]) -> Path:
    """Refuse what is no regular file before it is opened: opening a pipe waits, reading a device may never end.

    Raises:
        OSError: it is not there, or no regular file.
        ValueError: no file can have this name.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return Path(path)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a regular file in UTF-8.

    Raises:
        OSError: it is not there, no regular file, or may not be read.
        ValueError: it is no UTF-8, or no file can have this name.
    """
    return check_regular(path).read_text(encoding="utf-8")


def parse_json(
    text: str,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    *,
    half_characters: bool = False,
) -> Any:
    """The value of a JSON text.

    `half_characters` accepts half of a surrogate pair, which JSON can write and no encoding can.

    Raises:
        ValueError: it is no JSON (then a `json.JSONDecodeError`), nested too deeply, or holds half a character.
    """
    try:
        content = json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if not half_characters and _MAYBE_HALF.search(text):
        try:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(_HALF_CHARACTER) from None
    return content


def read_json(path: str | os.PathLike[str], *, half_characters: bool = False) -> Any:
    """The value of a JSON file; errors are those of `read_text` and `parse_json`."""
    return parse_json(read_text(path), half_characters=half_characters)


def json_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file, one at a time; none if it is not there.

    Raises:
        MolaError: it cannot be read, or a line is no JSON object. The last one may be cut off: a run that was killed or
            goes on.
    """
    if not os.path.isfile(path):
        return
    try:
        opened = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise MolaError(f"{os.fspath(path)!r} cannot be read: {error}.") from error
    with opened as file:
        for index, line in enumerate(file, 1):
            try:
                entry = parse_json(line.decode("utf-8"))
            except ValueError:
                entry = None
            if isinstance(entry, dict):
                yield entry
            elif line.endswith(b"\n"):
                raise MolaError(
                    f"{os.fspath(path)!r} must hold one JSON object per line: line {index} is none. Remove that line."
                )


class BoundedLoader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which only the last would count.

    Also brackets in brackets beyond any use: PyYAML's time grows with the square of their depth. Values are those of
    YAML 1.2 where 1.1 surprises: `no` and `12:30` are words, `1e-4` is a number, `010` is ten.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: set[yaml.Node] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put in what `<<` refers to. A key that is written beside `<<` replaces that of the mapping referred to."""
        if node not in self._checked:  # later it holds the keys of both
            self._checked.add(node)
            keys = [self._key(key) for key, _ in node.value]
            counts = Counter(key for key in keys if isinstance(key, Hashable))  # PyYAML refuses others
            for key, count in counts.items():
                if count > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} occurs twice", node.start_mark
                    )
        super().flatten_mapping(node)

    def _key(self, node: yaml.Node) -> Any:
        is_merge = node.tag == "tag:yaml.org,2002:merge"
        return node.value if is_merge else self.construct_object(node, deep=True)

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Begin a list or a mapping in brackets."""
        if self.flow_level >= _MOST_BRACKETS:
            raise yaml.YAMLError(_TOO_DEEP)
        super().fetch_flow_collection_start(TokenClass)


_REPLACED_TAGS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
BoundedLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
BoundedLoader.add_implicit_resolver(
    _REPLACED_TAGS[0], re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
BoundedLoader.add_implicit_resolver(
    _REPLACED_TAGS[1],
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$"
    ),
    list("-+.0123456789"),
)
BoundedLoader.add_implicit_resolver(_REPLACED_TAGS[2], re.compile("^[-+]?[0-9]+$"), list("-+0123456789"))
BoundedLoader.add_constructor(_REPLACED_TAGS[2], lambda loader, node: int(node.value))


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that is there twice: plain JSON would keep the last of two equal keys in silence."""
    counts = Counter(names)
    return next((name for name, count in counts.items() if count > 1), None)


def kept_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[str]:
    """Lines of a JSON lines log whose entries `keep` wants when a run goes on; none of a file that is not there.

    Half a line, as a killed run leaves it, does not stay, nor does one for which `keep` fails on a value or key.
    """
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            if keep(parse_json(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def parse_yaml(text: str, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """The value of a YAML text, by a loader that runs no code.

    Raises:
        ValueError: it is no YAML, nested too deeply, a value contradicts its tag, or references (`*name`) make it
            endless or larger than a million values.
    """
    try:
        reader = loader(text)
        try:
            node = reader.get_single_node()
            if node is None:
                return None
            _count(node, {}, set())
            return reader.construct_document(node)
        finally:
            reader.dispose()
    except UnicodeEncodeError:
        raise ValueError(_HALF_CHARACTER) from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # PyYAML lets these through where a value is not what its tag or its form promises, such as the date 2024-13-45.
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError, ArithmeticError) as error:
        raise ValueError(f"a value is not what its tag says ({type(error).__name__}: {error})") from error


def _count(node: yaml.Node, counted: dict[int, int], above: set[int]) -> int:
    """Number of values below a node with every reference followed."""
    if isinstance(node, yaml.ScalarNode):
        node.value.encode("utf-8")  # fails for half a character, which an escape can write
        return 1
    if id(node) in above:
        raise ValueError("a reference (`*name`) lies inside of what it refers to")
    if id(node) not in counted:
        above.add(id(node))
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        total = 1 + sum(_count(part, counted, above) for part in parts)
        above.remove(id(node))
        if total > _MOST_YAML_VALUES:
            raise ValueError(f"with its references (`*name`) it holds more than {_MOST_YAML_VALUES} values")
        counted[id(node)] = total
    return counted[id(node)]


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object; empty if there is no readable one."""
    try:
        content = read_json(path, half_characters=True)  # text of a model may hold them
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
