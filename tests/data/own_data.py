"""Rows as people have them, in the layouts of other tools, with words of our own."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

WORDS = ["river", "lamp", "garden", "violin", "bridge", "clock", "harbour", "ladder", "meadow", "kettle"]


def _question(number: int) -> str:
    return f"How many letters has {WORDS[number % 10]}, times {number}?"


def _answer(number: int) -> str:
    return f"It has {len(WORDS[number % 10]) * number}."


def messages(number: int) -> dict:
    """OpenAI's fine-tuning files, TRL, axolotl's `chat_template`."""
    return {
        "messages": [
            {"role": "system", "content": "You count letters."},
            {"role": "user", "content": _question(number)},
            {"role": "assistant", "content": _answer(number)},
            {"role": "user", "content": "And once more?"},
            {"role": "assistant", "content": _answer(number)},
        ]
    }


def conversations(number: int) -> dict:
    """ShareGPT, as LLaMA-Factory and axolotl read it."""
    turns = [{"from": "human", "value": _question(number)}, {"from": "gpt", "value": _answer(number)}]
    return {"conversations": turns, "system": "You count letters.", "tools": ""}


def prompt_completion(number: int) -> dict:
    """TRL's prompt and completion as text."""
    return {"prompt": f"Word {number} is {WORDS[number % 10]} and its number", "completion": f" is {number}."}


def prompt_completion_chat(number: int) -> dict:
    """TRL's prompt and completion as messages."""
    return {
        "prompt": [{"role": "user", "content": _question(number)}],
        "completion": [{"role": "assistant", "content": _answer(number)}],
    }


def text(number: int) -> dict:
    """TRL's language modelling, axolotl's `completion`."""
    return {"text": f"{_question(number)} {_answer(number)}"}


def instruction(number: int) -> dict:
    """Alpaca, as LLaMA-Factory has it."""
    row = {"instruction": _question(number), "input": "", "output": _answer(number), "system": ""}
    if number % 2:
        row |= {"input": "Count twice.", "history": [["Can you count?", "I can."]]}
    return {"history": [], **row}


def response(number: int) -> dict:
    """An instruction with a context and a response."""
    return {"instruction": _question(number), "context": "Letters only.", "response": _answer(number), "category": "qa"}


def question_answer(number: int) -> dict:
    return {"question": _question(number), "answer": _answer(number)}


def choices(number: int) -> dict:
    return {"question": _question(number), "choices": [f"{number}", f"{number + 1}", "none"], "answer": number % 3}


def answer_key(number: int) -> dict:
    """Questions with choices as data sets of the Hub have them."""
    options = {"label": ["1", "2", "3"], "text": [f"{number}", f"{number + 1}", "none"]}
    return {
        "id": f"q{number}",
        "question_stem": _question(number),
        "choices": options,
        "answerKey": str(number % 3 + 1),
    }


# format -> a row by its number, ending of the file
FORMATS = {
    "messages": (messages, ".jsonl"),
    "conversations": (conversations, ".json"),
    "prompt and completion": (prompt_completion, ".csv"),
    "prompt and completion as messages": (prompt_completion_chat, ".parquet"),
    "text": (text, ".parquet"),
    "instruction, input, output": (instruction, ".json"),
    "instruction, context, response": (response, ".jsonl"),
    "question and answer": (question_answer, ".csv"),
    "question, choices, answer": (choices, ".jsonl"),
    "question, choices, answerKey": (answer_key, ".parquet"),
}


def write(folder: Path, name: str, count: int) -> Path:
    """A file of `count` rows in a format of `FORMATS`."""
    make, ending = FORMATS[name]
    rows = [make(number) for number in range(count)]
    path = folder / f"rows{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if ending == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return path
