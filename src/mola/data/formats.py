"""Recognise by its columns what a row is: a chat, a question with its answer, text, or a pair of answers.

Formats in the order in which they are looked for:

    messages, conversations             a chat; `tools` and `system` may stand beside it
    chosen, rejected                    a preference, which TRL's trainers read
    instruction + output                a request and its answer; `input`, `system` and `history` may stand beside them
    question + choices + answer         a question with choices, scored by the letter of the answer
    prompt + completion                 a text and how it continues, or the two parts of a chat
    a request + an answer               under other names: see `REQUESTS` and `ANSWERS`
    text                                text that is trained as a whole
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mola.data.messages import CHAT_COLUMNS, parse_json_text, read_messages, read_tools
from mola.data.tasks import Task, load_task
from mola.errors import MolaError

REQUESTS = ("instruction", "question", "query", "problem", "prompt", "input")
ANSWERS = ("output", "response", "answer", "solution", "completion")
_CONTEXTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
_QUESTIONS, _CHOICES, _LETTERS = ("question", "question_stem"), ("choices", "options"), ("answer", "answerKey")
_CHOICES_TASK = "commonsenseqa"  # its columns are question, choices and answer

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """What the rows of a data source are.

    Attributes:
        name: words for one line of the log, such as "conversations".
        columns: columns that every row must have.
        optional: columns that are read where a row has them.
        read: makes the parts of an example from a row: `instruction`, `input`, `output`, and for a chat `messages` and
            `tools`.
        template: the template that fits by default; None: the chat template of the tokenizer, else alpaca.
        task: the task that scores the answers; None for free text.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]
    template: str | None = None
    task: Task | None = None

    def example_parts(self, row: Row) -> dict[str, Any]:
        """The parts of one row's example.

        Raises:
            MolaError: the row lacks a column, or a value does not fit.
        """
        if missing := [name for name in self.columns if name not in row]:
            raise MolaError(
                f"it has no column `{missing[0]}`, but the first row has: its columns are {', '.join(row)}. Give all "
                "rows the same columns, or split the data into one file for each kind of rows."
            )
        if chat := next((name for name in CHAT_COLUMNS if name not in self.columns and row.get(name)), None):
            raise MolaError(
                f"it has a value in `{chat}`, and the first row has none. Drop the column, or split the data into one "
                "file for each kind of rows."
            )
        return self.read(row)

    def unread_columns(self, rows: list[Row]) -> list[str]:
        """Columns with a value that are not read, in their order."""
        known = {*self.columns, *self.optional, "id"}
        return list(dict.fromkeys(name for row in rows for name, value in row.items() if name not in known and value))


def find_format(row: Row, source: str) -> Format:
    """The format of a data source, from its first row.

    Raises:
        MolaError: the columns are not known; the message lists them and the names that would do.
    """
    columns = {name for name, value in row.items() if value not in (None, "")}
    for find in (_chat, _preference, _request_and_output, _choices, _prompt_and_completion, _request, _text):
        if (found := find(columns, row)) is not None:
            return found
    raise MolaError(
        f"`data` has columns of no known format: `{source}` has {', '.join(row) or 'none'}. Rename them to `messages` "
        "(a list of `role` and `content`), to `prompt` and `completion`, to `instruction`, `input` and `output`, to "
        "`question`, `choices` and `answer`, or to `text`; or name a `task` that reads these columns."
    )


def _first(names: tuple[str, ...], columns: set[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _chat(columns: set[str], row: Row) -> Format | None:
    name = _first(CHAT_COLUMNS, columns)
    if name is None:
        return None

    def read(row: Row) -> dict[str, Any]:
        system = next((row[each] for each in _SYSTEMS if row.get(each)), None)
        return _chat_parts(read_messages(row[name], system), row.get("tools"))

    return Format("conversations", (name,), (*_SYSTEMS, "tools"), read)


def _preference(columns: set[str], row: Row) -> Format | None:
    if not {"chosen", "rejected"} <= columns:
        return None
    raise MolaError(
        "`data` has pairs of a `chosen` and a `rejected` answer, which this command does not read. TRL trains on them: "
        "python -m mola.integrations.trl_command dpo --model_name_or_path MODEL --dataset_name FOLDER --output_dir RUN "
        "(see docs/guides/trl.md). To train on the chosen answers alone, rename `chosen` to `messages` or "
        "`completion`."
    )


def _request_and_output(columns: set[str], row: Row) -> Format | None:
    if not {"instruction", "output"} <= row.keys():
        return None
    # Rows without a prompt, as `mola prepare` writes them for some tasks, have an instruction of None.
    template = "plain" if row["instruction"] is None else None
    return replace(_pair("instruction", "output", "instructions", columns), template=template)


def _choices(columns: set[str], row: Row) -> Format | None:
    question, choices, letter = (_first(names, columns) for names in (_QUESTIONS, _CHOICES, _LETTERS))
    if question is None or choices is None or letter is None or not isinstance(row[choices], (list, tuple, Mapping)):
        return None
    task = load_task(_CHOICES_TASK)

    def read(row: Row) -> dict[str, Any]:
        options, answer = row[choices], row[letter]
        if isinstance(options, Mapping):  # texts and labels, as in data sets of the Hub
            texts, labels = options.get("text"), options.get("label")
            if not isinstance(texts, (list, tuple)) or not isinstance(labels, (list, tuple)) or answer not in labels:
                raise MolaError(f"`{letter}` must be one of the labels of `{choices}`: got {answer!r} and {options!r}.")
            options, answer = texts, list(labels).index(answer)
        return task.example({"question": row[question], "choices": options, "answer": answer}, 0)

    return Format("questions with choices", (question, choices, letter), (), read, task=task)


def _prompt_and_completion(columns: set[str], row: Row) -> Format | None:
    if not {"prompt", "completion"} <= columns:
        return None
    if not isinstance(row["prompt"], str):

        def read_chat(row: Row) -> dict[str, Any]:
            prompt, completion = row["prompt"], row["completion"]
            if not isinstance(prompt, (list, tuple)) or not isinstance(completion, (list, tuple)):
                raise MolaError(
                    "`prompt` and `completion` must both be lists of messages, like those of the first row."
                )
            messages = read_messages([*prompt, *completion])
            before = [
                {**each, "weight": 0} if each["role"] == "assistant" else each for each in messages[: len(prompt)]
            ]
            return _chat_parts([*before, *messages[len(prompt) :]], row.get("tools"))

        return Format("conversations", ("prompt", "completion"), ("tools",), read_chat)

    def read(row: Row) -> dict[str, Any]:
        return {name: _read_text(row, column) for name, column in (("instruction", "prompt"), ("output", "completion"))}

    return Format("prompts with their completions", ("prompt", "completion"), (), read, template="plain")


def _request(columns: set[str], row: Row) -> Format | None:
    request, answer = _first(REQUESTS, columns), _first(ANSWERS, columns)
    return None if request is None or answer is None else _pair(request, answer, "questions with answers", columns)


def _pair(request: str, answer: str, name: str, columns: set[str]) -> Format:
    context = _first(tuple(each for each in _CONTEXTS if each != request), columns)
    optional = (*_SYSTEMS, "history", *([] if context is None else [context]))

    def read(row: Row) -> dict[str, Any]:
        parts = {
            "instruction": None if row[request] is None else _read_text(row, request),
            "input": "" if context is None or row.get(context) is None else _read_text(row, context),
            "output": _read_text(row, answer),
        }
        question = "\n\n".join(part for part in (parts["instruction"], parts["input"]) if part)
        system = next((row[each] for each in _SYSTEMS if row.get(each)), None)
        is_new = isinstance(system, str) and system not in question
        history = row.get("history") or []
        if isinstance(history, str):
            history = parse_json_text(history)
        if not all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in history):
            raise MolaError(f"`history` must hold pairs of a request and its answer: got {history!r:.80}. Correct it.")
        if not (is_new or history):
            return parts
        turns = [text for turn in history for text in turn] + [question, parts["output"]]
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
        return _chat_parts(read_messages(messages, system if is_new else None), None)

    return Format(name, (request, answer), optional, read)


def _text(columns: set[str], row: Row) -> Format | None:
    if "text" not in columns:
        return None

    def read(row: Row) -> dict[str, Any]:
        text = _read_text(row, "text")
        if not text.strip():
            raise MolaError("`text` must not be empty. Remove the row.")
        return {"instruction": None, "output": text}

    return Format("texts", ("text",), (), read, template="plain")


def _chat_parts(messages: list[dict[str, Any]], tools: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {"instruction": None, "output": messages[-1]["content"], "messages": messages}
    found = read_tools(tools)
    return parts if found is None else {**parts, "tools": found}


def _read_text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise MolaError(f"`{column}` must be text: got {row[column]!r}. Correct it.")
    return row[column]
