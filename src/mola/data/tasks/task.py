"""What a task does: make an example from a row, and find the answer in generated text."""

import hashlib
import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mola.errors import MolaError

LETTERS = string.ascii_uppercase
BINARY_METRICS = ("f1", "matthews")
EXAMPLE_KEYS = ("id", "instruction", "input", "output", "answer", "num_choices")
# CSV files have no truth values: the text "true" is the same label as a task's `true`, which Python writes as True.
TRUTH = {"true": "True", "false": "False"}


@dataclass(frozen=True)
class AnswerRule:
    """Where the answer of a row is.

    Attributes:
        column: column that holds the answer: an index or letter of `choices`, or a label of `words`.
        choices: column with the choices; None for a task with `words`.
        words: label -> the answer in words; None for a task with `choices`.
    """

    column: str
    choices: str | None = None
    words: Mapping[str, str] | None = None

    def resolve(self, row: Mapping[str, Any], row_id: str) -> tuple[str, str, int]:
        """The answer of one row, the text of its options and the number of choices.

        An answer rule with `words` has no options: their text is empty.
        """
        value = row[self.column]
        if self.words is not None:
            label = TRUTH.get(str(value), str(value))
            if label not in self.words:
                raise MolaError(
                    f"row `{row_id}`: `{self.column}` must be one of {', '.join(self.words)}: got {value!r}. "
                    "Correct the row, or add the label to `words` of the task."
                )
            return self.words[label], "", len(set(self.words.values()))
        choices = row[str(self.choices)]
        if (
            not isinstance(choices, (list, tuple))
            or not 2 <= len(choices) <= len(LETTERS)
            or not all(isinstance(choice, str) for choice in choices)
        ):
            raise MolaError(
                f"row `{row_id}`: `{self.choices}` must be a list of 2 to {len(LETTERS)} texts: "
                f"got {choices!r}. Correct or remove the row."
            )
        letters = LETTERS[: len(choices)]
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
        return self._letter(value, letters, row_id), options, len(choices)

    def _letter(self, value: Any, letters: str, row_id: str) -> str:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
            return letters[value]
        if isinstance(value, str) and len(value) == 1 and value in letters:
            return value
        raise MolaError(
            f"row `{row_id}`: `{self.column}` must be an index from 0 to {len(letters) - 1} or a letter from "
            f"A to {letters[-1]}, since the row has {len(letters)} choices: got {value!r}. "
            "Correct or remove the row."
        )


@dataclass(frozen=True)
class FieldRule:
    """A field whose text is in a column.

    Attributes:
        column: column that holds the text.
        default: the text if the column is empty; None makes an empty column an error.
        strip: remove blanks on `both` sides of the text, or at its `end` only.
    """

    column: str
    default: str | None = None
    strip: str = "both"

    def resolve(self, row: Mapping[str, Any], row_id: str) -> str:
        """The field's text in one row."""
        value = row[self.column]
        if value is not None and not isinstance(value, str):
            raise MolaError(f"row `{row_id}`: `{self.column}` must be text: got {value!r}. Correct or remove the row.")
        text = value or ""
        if text.strip():
            return text.strip() if self.strip == "both" else text.rstrip()
        if self.default is None:
            raise MolaError(
                f"row `{row_id}`: `{self.column}` must not be empty: got {value!r}. Correct or remove the row, or "
                "give the field a `default` in the task."
            )
        return self.default


@dataclass(frozen=True)
class StrataRule:
    """How rows are grouped when samples are drawn: by the value of `column`, or by its part before `until`."""

    column: str
    until: str | None = None

    def resolve(self, row: Mapping[str, Any], row_id: str) -> str:
        """The group of one row."""
        value = row.get(self.column)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            raise MolaError(
                f"row `{row_id}`: `{self.column}` must be text or an integer, since samples are drawn in groups by "
                f"it: got {value!r}. Correct or remove the row, or change `strata` of the task."
            )
        return str(value) if self.until is None else str(value).split(self.until, 1)[0]


@dataclass(frozen=True)
class Task:
    """One task: how rows are turned into examples and how answers are read from generated text.

    Attributes:
        name: the task's name.
        version: an integer that is raised whenever a score can change.
        template: name of the prompt template.
        columns: columns that every source row must have.
        instruction: format string over `columns`, `fields`, ``{answer}`` and ``{options}``; None for text
            without a prompt.
        output: format string of the text to be learned, over the same names.
        description: one line for help texts.
        dataset: Hub name of the source, if there is one.
        input: format string of additional context, usually empty.
        filters: column -> value that a row must have to be kept; an absent column counts as None.
        fields: name -> rule for the text of an additional field.
        answer: where the answer is; None for free text.
        answer_pattern: regular expression with one group that finds the answer in generated text.
        metric: `accuracy`, or None for free text.
        more_metrics: `f1` and `matthews`; both need an answer with `words` for the labels 0 and 1.
        groups: columns by which a score is broken down.
        strata: groups that keep their shares when samples are drawn; None for a single group.
    """

    name: str
    version: int
    template: str
    columns: tuple[str, ...]
    instruction: str | None
    output: str
    description: str = ""
    dataset: str | None = None
    input: str = ""
    filters: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, FieldRule] = field(default_factory=dict)
    answer: AnswerRule | None = None
    answer_pattern: str | None = None
    metric: str | None = None
    more_metrics: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    strata: StrataRule | None = None

    @property
    def binary_labels(self) -> tuple[str, str] | None:
        """The words of the labels 0 and 1 (the positive class); None if the task has other labels or no words."""
        words = None if self.answer is None else self.answer.words
        if words is None or set(words) != {"0", "1"} or words["0"] == words["1"]:
            return None
        return words["0"], words["1"]

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether the row passes `filters`."""
        return all(row.get(column) == value for column, value in self.filters.items())

    def missing_columns(self, row: Mapping[str, Any]) -> list[str]:
        """Required columns that the row does not have."""
        return [column for column in self.columns if column not in row]

    def blank_column(self, row: Mapping[str, Any]) -> str | None:
        """The first column that `instruction` or `output` needs and that is blank in this row, or None."""
        for layout in (self.instruction, self.output):
            for name in field_names(layout or ""):
                rule = self.fields.get(name, FieldRule(name))
                if rule.default is not None or rule.column not in self.columns:
                    continue
                value = row.get(rule.column)
                if value is None or (isinstance(value, str) and not value.strip()):
                    return rule.column
        return None

    def example(self, row: Mapping[str, Any], index: int, split: str | None = None) -> dict[str, Any]:
        """Prompt, output and answer of one source row.

        Args:
            row: the source row; the task's definition names the columns that are read.
            index: position in the source; becomes part of the id if the row has no id.
            split: name of the split, for the same purpose.

        Returns:
            `id`, `instruction`, `input`, `output`, `answer` and `num_choices` (None for free text), and
            those columns of `groups` that are not empty in this row.

        Raises:
            MolaError: a column is missing or a value does not fit; the message names the row.
        """
        row_id = example_id(row, index, split)
        if missing := self.missing_columns(row):
            raise MolaError(
                f"row `{row_id}` has no column `{missing[0]}`, which the task `{self.name}` needs: "
                f"its columns are {', '.join(row)}. Add or rename the column, or choose another task."
            )
        values = {column: row[column] for column in self.columns}
        for name, rule in self.fields.items():
            values[name] = rule.resolve(row, row_id)
        answer = num_choices = None
        if self.answer is not None:
            answer, options, num_choices = self.answer.resolve(row, row_id)
            values["answer"] = answer
            if self.answer.choices is not None:  # without `choices`, `options` may be a column of the source
                values["options"] = options
        return {
            "id": row_id,
            "instruction": None if self.instruction is None else _fill(self.instruction, values, row_id),
            "input": _fill(self.input, values, row_id),
            "output": _fill(self.output, values, row_id),
            "answer": answer,
            "num_choices": num_choices,
            **self.group_values(row),
        }

    def group_values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Columns of `groups` that have a value in this row."""
        return {group: row[group] for group in self.groups if row.get(group) is not None}

    def fingerprint(self) -> str:
        """Sha256 (hex) of the parts of the task that can change a score even if the examples stay the same."""
        words = None if self.answer is None else self.answer.words
        rules = [self.template, self.answer_pattern, words, self.more_metrics]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    def extract_answer(self, text: str, num_choices: int | None = None) -> str | None:
        """The answer in generated text: the first match of `answer_pattern`.

        A letter is case-sensitive. A word counts in any case that the pattern allows ("yes" for "Yes"), unless the
        task has two words that differ only in case.

        Args:
            text: the generated text without the prompt.
            num_choices: number of options of this question; a letter beyond them counts as no answer.

        Returns:
            The letter or the word; None if the text has no answer.

        Raises:
            MolaError: the task has no answers.
        """
        if self.answer is None or self.answer_pattern is None:
            raise MolaError(f"`task` must have an answer to extract: `{self.name}` is free text. Choose another task.")
        match = re.search(self.answer_pattern, text)
        found = match.group(1) if match else None
        if found is None:
            return None
        options = {*LETTERS[:num_choices]} if self.answer.words is None else {*self.answer.words.values()}
        if found in options or self.answer.words is None:
            return found if found in options else None
        equal_but_case = [word for word in options if word.casefold() == found.casefold()]
        return equal_but_case[0] if len(equal_but_case) == 1 else None


def example_id(row: Mapping[str, Any], index: int, split: str | None = None) -> str:
    """The row's own id as text; without one ``<split>-<index>``, or ``row-<index>`` without a split."""
    value = row.get("id")
    if value is None:
        return f"{split or 'row'}-{index}"
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise MolaError(
            f"row {index}: `id` must be text or an integer: got {value!r}. Correct it, or drop the column to "
            "have ids made from the row's position."
        )
    return str(value)


def _fill(layout: str, values: Mapping[str, Any], row_id: str) -> str:
    for name in field_names(layout):
        if not isinstance(values[name], str):
            raise MolaError(f"row `{row_id}`: `{name}` must be text: got {values[name]!r}. Correct or remove the row.")
    return layout.format_map(values)


@lru_cache(maxsize=256)
def field_names(layout: str) -> tuple[str, ...]:
    """Names of the fields in a format string; only plain ``{name}`` is allowed."""
    try:
        parts = list(string.Formatter().parse(layout))
    except ValueError as error:
        raise MolaError(f"{layout!r} is not a format string: {error}. Write a literal brace twice.") from error
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise MolaError(f"{layout!r} may only hold plain fields such as {{question}}: got {{{name}}}.")
    return tuple(name for _, name, _, _ in parts if name is not None)
