"""The names of the options in Transformers' `TrainingArguments`, read from its source: importing it takes seconds."""

import ast
from dataclasses import dataclass, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mola.options.fields import option


def with_trainer_names(own: type) -> type | None:
    """A dataclass with the options of `own`, and each option of `TrainingArguments` by name, whose value is any words.

    `--help` and a wrong flag need no more. None if the names cannot be read from the source of Transformers.
    """
    fields = _read_fields()
    if fields is None:
        return None
    # `--no_NAME` exists for options that are on by default.
    every = [
        (name, bool, option(True, "")) if is_on else (name, str | None, option(None, "", nargs="*"))
        for name, is_on in fields.items()
    ]
    base = make_dataclass("TrainingArguments", every)
    return dataclass(type(own.__name__, (own, base), {"__annotations__": {}}))


def _read_fields() -> dict[str, bool] | None:
    """The name of each field, and whether it is true by default."""
    package = find_spec("transformers")
    folder = next(iter(package.submodule_search_locations or ()), None) if package else None
    try:
        tree = ast.parse(Path(folder or "", "training_args.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    classes = [each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == "TrainingArguments"]
    if len(classes) != 1 or classes[0].bases:
        return None
    return {
        each.target.id: ast.unparse(each.annotation) == "bool" and _default(each) is True
        for each in classes[0].body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and "ClassVar" not in ast.unparse(each)
    }


def _default(field: ast.AnnAssign) -> Any:
    """The default of a field as a literal; None for any other default."""
    if isinstance(field.value, ast.Call):
        values = [each.value for each in field.value.keywords if each.arg == "default"]
        return values[0].value if values and isinstance(values[0], ast.Constant) else None
    return field.value.value if isinstance(field.value, ast.Constant) else None
