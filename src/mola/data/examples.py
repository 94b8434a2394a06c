"""Make examples from rows, ready to be encoded or evaluated; find equal examples among millions by hashes."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mola.data.encode import EncodeReport
from mola.data.formats import find_format
from mola.data.read import read_rows, row_name
from mola.data.tasks import Task, example_id
from mola.data.write import PROMPT_COLUMNS, columns_of, reads_prompts
from mola.errors import MolaError

logger = logging.getLogger(__name__)

_SHOWN_VALUES = 12  # in a message
_Rows = list[tuple[int, dict[str, Any]]]  # (position in the source, row); missing ids are made from positions


@dataclass(frozen=True)
class LoadedData:
    """The examples of a data source, and what its rows are.

    Attributes:
        examples: see `load_examples`.
        task: the given task, or the one that scores rows with choices; None for free text.
        kind: what the examples are, in words such as "conversations".
        template: the template that fits the rows by default; None: the chat template of the tokenizer, else alpaca.
        path: the data source.
        left_out: number of rows that come after the first `limit` ones.
    """

    examples: list[dict[str, Any]]
    task: Task | None
    kind: str
    template: str | None
    path: str
    left_out: int = 0

    def summary(self, template: str, report: EncodeReport | None = None) -> str:
        """What was found, in one line for the log; `report` is about these examples, `template` describes theirs."""
        parts = [f"{self.path}: {len(self.examples):,} {self.kind}"]
        if chats := [example["messages"] for example in self.examples if "messages" in example]:
            answers = sum(message["role"] == "assistant" for chat in chats for message in chat)
            parts.append(f"{answers / len(chats):.1f} turns each")
        if report is not None and report.total > len(self.examples):
            parts.append(f"{report.total:,} samples (one for each answer: the chat template changes earlier turns)")
        parts.append(f"template {template}")
        if report is not None:
            parts.append(f"{report.trained_tokens / report.tokens:.0%} of {report.tokens:,} tokens trained")
        return ", ".join(parts)


def load_examples(
    path: str | Path,
    task: Task | None,
    split: str | None,
    limit: int | None = None,
    filters: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Examples of a data source, ready to be encoded or evaluated; see `load_data`."""
    return load_data(path, task, split, limit, filters).examples


def load_data(
    path: str | Path,
    task: Task | None,
    split: str | None,
    limit: int | None = None,
    filters: Mapping[str, Any] | None = None,
) -> LoadedData:
    """Examples of a data source, ready to be encoded or evaluated.

    Without a task the columns of the first row say what the rows are; see `mola.data.formats`. With a task, prepared
    rows, which have `instruction` and `output`, are used as they are; raw rows go through the task. If the task itself
    reads one of these columns, prepared rows must have `id` and `input` too, as `mola prepare` writes them.

    Args:
        path: anything that `read_rows` reads.
        task: how raw rows are turned into examples; None recognises the rows by their columns.
        split: split of a source that has several; also names the rows without an id.
        limit: keep only the first rows, after all filters.
        filters: column -> value, or list of values, that a row must have; on top of the task's own filters.

    Returns:
        The examples and what they are. An example is a dict with `id`, `instruction`, `input`, `output`, `answer` and
        `num_choices` (both None if unknown), and those of the task's group columns that the row has. A chat has
        `messages`, and `tools` if there are any; its `instruction` is None and its `output` is the last message.

    Raises:
        MolaError: the columns are not known, a value does not fit, an id occurs twice, or no row is left.
    """
    if limit is not None and limit < 1:
        raise MolaError(f"`limit` must be a positive integer: got {limit!r}. Leave it out to keep all rows.")
    rows = _apply_filters(list(enumerate(read_rows(path, split))), filters or {}, path)
    if task is None:
        data, num_rows = _recognised_data(rows[:limit], split, path), len(rows)
    else:
        examples, num_rows = _task_examples(rows, task, split, limit, path)
        data = LoadedData(examples, task, f"samples of the task {task.name}", task.template, str(path))
    data = replace(data, left_out=num_rows - len(data.examples))
    check_ids((example["id"] for example in data.examples), str(path))
    return data


def _recognised_data(rows: _Rows, split: str | None, path: str | Path) -> LoadedData:
    """Examples of rows that are recognised by their columns."""
    form = find_format(rows[0][1], str(path))
    examples = []
    for index, row in rows:
        row_id = example_id(row, index, split)
        try:
            parts = form.example_parts(row)
        except MolaError as error:
            raise MolaError(f"{row_name(index, path)}: {error}") from error
        examples.append({"input": "", "answer": None, "num_choices": None, **parts, "id": row_id})
    is_prepared = {"id", *PROMPT_COLUMNS} <= rows[0][1].keys()
    if not is_prepared and (unread := form.unread_columns([row for _, row in rows])):
        logger.info("%s: %s are read, %s are not.", path, ", ".join(form.columns), ", ".join(unread))
    return LoadedData(examples, form.task, form.name, form.template, str(path))


def _task_examples(
    rows: _Rows, task: Task, split: str | None, limit: int | None, path: str | Path
) -> tuple[list[dict[str, Any]], int]:
    """Examples of prepared rows, or of raw rows that go through the task; and the number of rows without `limit`."""
    if all(_is_prepared(row, task) for _, row in rows):
        if reads_prompts(task):
            _check_task_filters(rows, task, path)
        return [_prepared_example(row, index, split, task) for index, row in rows[:limit]], len(rows)
    kept = [(index, row) for index, row in rows if task.keeps(row)]
    if not kept:
        raise MolaError(
            f"`data` must have rows for the task `{task.name}`: its filters left out all {len(rows)} rows of "
            f"`{path}`. Choose another source or split."
        )
    if len(kept) < len(rows):
        logger.info("%s: filters of the task left out %d of %d rows", path, len(rows) - len(kept), len(rows))
    return examples_of_rows(kept[:limit], task, split, path), len(kept)


def examples_of_rows(rows: _Rows, task: Task, split: str | None, source: str | Path) -> list[dict[str, Any]]:
    """Examples of raw rows.

    Args:
        rows: position in the source and content of each row.
        task: turns a row into an example.
        split: as in `load_examples`.
        source: name of the source, for messages.

    Raises:
        MolaError: a column is missing or a value does not fit; the message names the source and the row.
    """
    examples = []
    for index, row in rows:
        try:
            examples.append(task.example(row, index, split))
        except MolaError as error:
            raise MolaError(f"{row_name(index, source)}: {error}") from error
    return examples


def _apply_filters(rows: _Rows, filters: Mapping[str, Any], path: str | Path) -> _Rows:
    """Rows that have the wanted values; it is an error if no row has a column, or if no row is left."""
    all_rows = rows
    for column, wanted in filters.items():
        if not any(column in row for _, row in rows):
            raise MolaError(
                f"`filters` must name columns of the data: no row of `{path}` has `{column}`, its columns are "
                f"{', '.join(columns_of(row for _, row in rows))}. Correct the name."
            )
        values = wanted if isinstance(wanted, list) else [wanted]
        kept = [(index, row) for index, row in rows if row.get(column) in values]
        if not kept:
            found = list(dict.fromkeys(repr(row.get(column)) for _, row in rows))
            more = ", ..." if len(found) > _SHOWN_VALUES else ""
            raise MolaError(
                f"`filters` must leave rows: `{column}` is {wanted!r} in none of the "
                f"{len(rows)} rows left of `{path}`, but {', '.join(found[:_SHOWN_VALUES])}{more}. Choose one of these."
            )
        missing = [value for value in values if all(row.get(column) != value for _, row in all_rows)]
        if missing:  # no error: one split may lack values that a different split has
            logger.warning("`filters`: no row of %s has %s as `%s`.", path, ", ".join(map(repr, missing)), column)
        logger.info("%s: `filters` leave %d of %d rows by `%s`", path, len(kept), len(rows), column)
        rows = kept
    return rows


def _is_prepared(row: Mapping[str, Any], task: Task) -> bool:
    is_marked = not reads_prompts(task) or {"id", "input"} <= row.keys()
    return "instruction" in row and "output" in row and is_marked


def _check_task_filters(rows: _Rows, task: Task, path: str | Path) -> None:
    """Raise for raw rows that only look prepared: a prepared row would have passed the task's filters."""
    filters = {name: value for name, value in task.filters.items() if name not in (*PROMPT_COLUMNS, "answer")}
    for index, row in rows:
        for name, value in filters.items():
            if row.get(name) != value:
                raise MolaError(
                    f"`data` must be rows as `mola prepare` writes them, or raw ones. Row {index} of `{path}` has "
                    f"the columns of a prepared row, but its `{name}` is {row.get(name)!r}, which the filters of the "
                    f"task `{task.name}` reject. If the row is raw, rename or drop its column `id`."
                )
    logger.info("%s is taken as prepared: its rows have `id`, `input`, `instruction` and `output`", path)


def _prepared_example(row: Mapping[str, Any], index: int, split: str | None, task: Task) -> dict[str, Any]:
    row_id = example_id(row, index, split)
    text = {"instruction": row["instruction"], "input": row.get("input"), "output": row["output"]}
    answer = row.get("answer")
    if not isinstance(answer, str) and task.answer is None:
        answer = None  # the source has a column of this name, which is not used
    for name, value in {**text, "answer": answer}.items():
        if not isinstance(value, str) and (value is not None or name == "output"):
            raise MolaError(
                f"row `{row_id}`: `{name}` must be text: got {value!r}. Correct it, or run `mola prepare` on "
                "the raw data."
            )
    choices = row.get(task.answer.choices) if task.answer and task.answer.choices else None
    return {
        "id": row_id,
        **text,
        "input": text["input"] or "",
        "answer": answer,
        "num_choices": len(choices) if isinstance(choices, (list, tuple)) else None,
        **task.group_values(row),
    }


def check_ids(ids: Iterable[str], source: str) -> None:
    """Raise if an id occurs twice."""
    seen: set[str] = set()
    for row_id in ids:
        if row_id in seen:
            raise MolaError(
                f"`id` must be different in every row: `{row_id}` occurs twice in `{source}`. Correct the "
                "ids, or drop the column to have ids made from the row's position."
            )
        seen.add(row_id)


def hash_text(text: str) -> int:
    """A hash of a text in 8 bytes, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def hash_example(example: Mapping[str, Any]) -> int:
    """A hash of all that an example trains, in 8 bytes."""
    messages = [example["messages"]] if "messages" in example else []
    return hash_text(json.dumps([example["instruction"], example["input"], example["output"], *messages]))


def hash_instruction(example: Mapping[str, Any]) -> int:
    """A hash of what is asked, in 8 bytes: of a chat all before its last answer. 0 for text without a prompt."""
    if "messages" in example:
        answers = [index for index, message in enumerate(example["messages"]) if message["role"] == "assistant"]
        return hash_text(json.dumps(example["messages"][: answers[-1]]))
    instruction = example["instruction"]
    return 0 if instruction is None else hash_text(json.dumps([instruction, example["input"]]))


def trained_bytes(example: Mapping[str, Any]) -> int:
    """Length in UTF-8 bytes of the text that training would train on: the output, or the answers of a chat."""
    if "messages" not in example:
        return len(example["output"].encode())
    answers = (each for each in example["messages"] if each["role"] == "assistant" and each.get("weight") != 0)
    return sum(len(each["content"].encode()) for each in answers)


def distinct_questions(examples: Iterable[Mapping[str, Any]]) -> NDArray[np.uint64]:
    """The distinct hashes of the instructions, sorted; an example without instruction is hashed as a whole."""
    hashes = (hash_instruction(example) or hash_example(example) for example in examples)
    return np.unique(np.fromiter(hashes, np.uint64))


def count_shared(splits: Iterable[NDArray[np.uint64]]) -> int:
    """Number of hashes other than 0 that occur in more than one split."""
    values, counts = np.unique(np.concatenate([np.unique(part) for part in splits]), return_counts=True)
    return int(((counts > 1) & (values != 0)).sum())
