"""What a folder or file of a comparison was begun with, in `NAME.begun.json` beside it: to go on takes the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.reading import read_json_object
from mola.options.fields import first_difference


def begin_or_go_on(place: Path, identity: Mapping[str, Mapping[str, Any]]) -> None:
    """Write down what is begun, or compare it with what is there.

    Args:
        place: a run folder, or the file of a result.
        identity: by part, such as "setting" or "data", what must be equal.

    Raises:
        MolaError: what is there was begun with something else, or nothing says with what.
    """
    path = place.with_name(f"{place.stem}.begun.json")
    wanted = json.loads(json.dumps(identity))
    if not (any(place.iterdir()) if place.is_dir() else place.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, wanted)
        return
    found = read_json_object(path)
    if not found:
        raise MolaError(
            f"{str(place)!r} is not empty, and no readable {path.name} beside it says what it was begun with. Delete "
            "it, or pass another `output_dir`."
        )
    if change := first_change(found, wanted):
        raise MolaError(
            f"{str(place)!r} was begun with another {change}. Use the same, delete it, or pass another `output_dir`."
        )


def first_change(old: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first difference of two identities as text, such as "setting `r`: 8, now 4"; None if there is none."""
    for part, values in new.items():
        before = old.get(part) or {}
        if (name := first_difference(before, values)) is not None:
            return f"{part} `{name}`: {before.get(name)!r}, now {values.get(name)!r}"
    return None
