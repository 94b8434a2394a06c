"""Read a task from YAML, and check its keys before anything runs."""

import os
import re
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from mola.data.tasks.task import (
    BINARY_METRICS,
    EXAMPLE_KEYS,
    TRUTH,
    AnswerRule,
    FieldRule,
    StrataRule,
    Task,
    field_names,
)
from mola.data.templates import template_names
from mola.errors import MolaError
from mola.files.reading import parse_yaml

_TEXT_KEYS = ("name", "template", "output", "description", "input")
_OPTIONAL_TEXT_KEYS = ("instruction", "dataset", "answer_pattern", "metric")
_LIST_KEYS = ("columns", "groups", "more_metrics")
_Rule = TypeVar("_Rule", FieldRule, StrataRule)


def task_names() -> list[str]:
    """Names of the packaged tasks."""
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_task(name_or_path: str | Path) -> Task:
    """The packaged task of that name, or the task in the user's YAML file.

    Raises:
        MolaError: no such task or file exists, or the YAML is not a valid task; the message names the key.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name in task_names():
        text = resources.files(__package__).joinpath(f"{name}.yaml").read_text("utf-8")
    elif name.endswith((".yaml", ".yml")) and os.path.isfile(path):
        text = path.read_text(encoding="utf-8")
    else:
        raise MolaError(
            f"`task` must be one of {', '.join(task_names())}, or the path of an existing .yaml file: "
            f"got {name!r}. Check the spelling."
        )
    try:
        return _task_from_yaml(text)
    except MolaError as error:
        raise MolaError(f"task `{name}`: {error}") from error


def _task_from_yaml(text: str) -> Task:
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise MolaError(f"not valid YAML: {error}. Correct the file.") from error
    if not isinstance(data, dict):
        raise MolaError(f"must be a mapping of keys: got {type(data).__name__}. See the packaged tasks.")
    keys = [key.name for key in fields(Task)]
    for key, value in data.items():
        if key not in keys:
            raise MolaError(f"unknown key `{key}`. The keys are {', '.join(keys)}.")
        _check_kind(key, value)
    required = [key.name for key in fields(Task) if key.default is MISSING and key.default_factory is MISSING]
    for key in required:
        if key not in data:
            raise MolaError(f"the key `{key}` is missing. A task needs {', '.join(required)}.")
    data |= {key: tuple(data.get(key, ())) for key in _LIST_KEYS}
    layout = "{column: NAME}, optionally with `default: TEXT` and `strip: both` or `strip: end`"
    data["fields"] = {
        name: _column_rule(FieldRule, f"fields.{name}", rule, layout) for name, rule in data.get("fields", {}).items()
    }
    if data.get("answer") is not None:
        data["answer"] = _answer_rule(data["answer"])
    if data.get("strata") is not None:
        layout = "{column: NAME} or {column: NAME, until: TEXT}"
        data["strata"] = _column_rule(StrataRule, "strata", data["strata"], layout)
    task = Task(**data)
    _check_scoring(task)
    _check_names(task)
    return task


def _check_kind(key: str, value: Any) -> None:
    if key in _TEXT_KEYS:
        is_valid, kind = isinstance(value, str), "text"
    elif key in _OPTIONAL_TEXT_KEYS:
        is_valid, kind = value is None or isinstance(value, str), "text or null"
    elif key == "version":
        is_valid, kind = type(value) is int, "an integer"
    elif key in _LIST_KEYS:
        is_valid = isinstance(value, list) and all(isinstance(item, str) for item in value)
        kind = "a list of texts"
    else:
        is_valid = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        is_valid, kind = is_valid or (value is None and key in ("answer", "strata")), "a mapping with text keys"
    if not is_valid:
        raise MolaError(f"`{key}` must be {kind}: got {value!r}. Correct the value (quote text).")


def _column_rule(kind: type[_Rule], key: str, rule: Any, layout: str) -> _Rule:
    """Make a rule about a column, whose other values are text or null."""
    is_valid = isinstance(rule, dict) and set(rule) <= {each.name for each in fields(kind)}
    is_valid = is_valid and isinstance(rule.get("column"), str)
    is_valid = is_valid and all(value is None or isinstance(value, str) for value in rule.values())
    if not is_valid or rule.get("until") == "" or rule.get("strip", "both") not in ("both", "end"):
        raise MolaError(f"`{key}` must be {layout}: got {rule!r}. Correct the value.")
    return kind(**rule)


def _answer_rule(rule: dict[str, Any]) -> AnswerRule:
    words: Any = rule.get("words")
    choices: Any = rule.get("choices")
    has_choices = isinstance(choices, str) and words is None
    has_words = isinstance(words, dict) and len(words) > 1 and choices is None
    has_words = has_words and all(isinstance(word, str) and word for word in words.values())
    is_known = isinstance(rule.get("column"), str) and set(rule) <= {"column", "choices", "words"}
    if not is_known or not (has_choices or has_words):
        raise MolaError(
            "`answer` must be {column: NAME, choices: NAME} or {column: NAME, words: {LABEL: TEXT, ...}} "
            f"with at least two words, as quoted text: got {rule!r}."
        )
    if has_choices:
        return AnswerRule(column=rule["column"], choices=choices)
    labels = [TRUTH.get(str(label), str(label)) for label in words]
    if len(set(labels)) < len(labels):
        raise MolaError(
            f"`words` must have different labels: got {', '.join(map(repr, words))}, of which two are equal."
        )
    return AnswerRule(column=rule["column"], words=dict(zip(labels, words.values(), strict=True)))


def _check_scoring(task: Task) -> None:
    """Check the keys that determine how answers are scored."""
    for name in task.more_metrics:
        if name not in BINARY_METRICS or task.more_metrics.count(name) > 1:
            raise MolaError(
                f"`more_metrics` must hold names out of {', '.join(BINARY_METRICS)}, each once: got "
                f"{list(task.more_metrics)!r}. Correct the list."
            )
    if task.more_metrics and task.binary_labels is None:
        raise MolaError(
            f"`more_metrics` {list(task.more_metrics)!r} needs two different `words`, of the labels 0 and 1: "
            f"got the answer rule {task.answer!r}. Leave `more_metrics` out, or correct `answer`."
        )
    given = [task.answer is not None, task.answer_pattern is not None, task.metric is not None]
    if any(given) and not all(given):
        raise MolaError("`answer`, `answer_pattern` and `metric` depend on each other: set all three, or none.")
    if task.answer_pattern is None:
        return
    if task.metric != "accuracy":
        raise MolaError(f"`metric` must be 'accuracy': got {task.metric!r}.")
    try:
        groups = re.compile(task.answer_pattern).groups
    except re.error as error:
        raise MolaError(f"`answer_pattern` is not a regular expression: {error}. Correct it.") from error
    if groups != 1:
        raise MolaError(f"`answer_pattern` must have exactly one group: got {groups}. Use (?:...) for other groups.")


def _check_names(task: Task) -> None:
    """Check that names of columns, fields and the template exist, and that each has one meaning."""
    if task.template not in template_names():
        raise MolaError(f"`template` must be one of {', '.join(template_names())}: got {task.template!r}.")
    used = {rule.column for rule in task.fields.values()}
    given_by_answer: set[str] = set()
    if task.answer is not None:
        used |= {task.answer.column, task.answer.choices or task.answer.column}
        given_by_answer = {"answer", "options"} if task.answer.choices else {"answer"}
        for name in sorted(given_by_answer & ({*task.fields} | {*task.columns} - used)):
            raise MolaError(
                f"`{name}` is set by the `answer` rule: no field or other column can have this name. Rename it."
            )
    for column in sorted(used - set(task.columns)):
        raise MolaError(f"`columns` must list every column in use: `{column}` is missing. Add it.")
    available = {*task.columns, *task.fields, *given_by_answer}
    for key in ("instruction", "input", "output"):
        for name in field_names(getattr(task, key) or ""):
            if name not in available:
                raise MolaError(f"`{key}` uses {{{name}}}, but the fields are {', '.join(sorted(available))}.")
    for group in task.groups:
        if group in EXAMPLE_KEYS:
            raise MolaError(f"`groups` must not hold a name of the prepared form: got `{group}`. Rename it.")
