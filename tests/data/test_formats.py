"""Rows are recognised by their columns; wrong rows are named."""

import json

import pytest

from mola import MolaError
from mola.data.encode import encode_examples
from mola.data.examples import load_data
from mola.data.templates import get_template
from mola.models.prompts import choose_template
from tests.conftest import build_byte_tokenizer
from tests.data.own_data import FORMATS, write
from tests.data.test_chats import CHATML, tokenizer_of

KINDS = {
    "messages": "conversations, 2.0 turns each",
    "conversations": "conversations, 1.0 turns each",
    "prompt and completion": "prompts with their completions",
    "prompt and completion as messages": "conversations, 1.0 turns each",
    "text": "texts",
    "instruction, input, output": "instructions, 2.0 turns each",
    "instruction, context, response": "questions with answers",
    "question and answer": "questions with answers",
    "question, choices, answer": "questions with choices",
    "question, choices, answerKey": "questions with choices",
}


@pytest.mark.parametrize("has_chat_template", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognised_and_trained(name, has_chat_template, tmp_path):
    data = load_data(write(tmp_path, name, 6), None, None)
    tokenizer = tokenizer_of(CHATML) if has_chat_template else build_byte_tokenizer()
    template = choose_template(None, data, tokenizer)
    plain = name in ("prompt and completion", "text")
    is_chat = "messages" in data.examples[-1]
    assert template.name == ("plain" if plain else "chat" if has_chat_template or is_chat else "alpaca")
    dataset, report = encode_examples(data.examples, tokenizer, template, cutoff_len=9999)
    line = data.summary(template.description, report)
    assert f": 6 {KINDS[name]}, template {template.description}, " in line
    assert (data.task is not None) is ("choices" in name)
    for row in dataset:
        trained = tokenizer.decode([label for label in row["labels"] if label != -100], skip_special_tokens=True)
        prompt = tokenizer.decode(row["input_ids"], skip_special_tokens=True).replace(trained, "", 1)
        assert ("How many" in trained) is (name == "text")
        assert ("How many" in prompt) is not plain
        if "choices" in name:
            assert trained.startswith("Answer: The answer is ")
    assert report.total == 6


def test_rows_of_choices_have_their_answers(tmp_path):
    for name in ("question, choices, answer", "question, choices, answerKey"):
        examples = load_data(write(tmp_path, name, 3), None, None).examples
        assert [example["answer"] for example in examples] == ["A", "B", "C"]
        assert "(A) 1 (B) 2 (C) none" in examples[1]["instruction"]
    assert [example["id"] for example in examples] == ["q0", "q1", "q2"]


def test_columns_that_are_not_read_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    load_data(write(tmp_path, "instruction, context, response", 2), None, None)
    assert "instruction, response are read, category are not." in caplog.text


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
FINE = {"messages": [USER, ANSWER]}


def chat(*messages):
    return json.dumps({"messages": list(messages)})


WRONG = {
    "no messages": (chat(), "a conversation must be a list of messages"),
    "messages of a wrong kind": ('{"messages": 3}', "a conversation must be a list of messages: got 3"),
    "messages as text": ('{"messages": "hello"}', "a conversation must be a list of messages: got 'hello'"),
    "messages as broken JSON": ('{"messages": "[1"}', "is not valid JSON"),
    "a message as text": (chat(USER, "So."), "message 1 must have `role` and `content`"),
    "no role": (chat(USER, {"content": "So."}), "message 1 has the role None"),
    "an unknown role": (chat(USER, {"role": "robot", "content": "So."}), "message 1 has the role 'robot'"),
    "an answer first": (chat(ANSWER), "message 0 of the role assistant follows nothing"),
    "two questions": (chat(USER, USER, ANSWER), "message 1 of the role user follows the role user"),
    "two answers": (chat(USER, ANSWER, ANSWER), "message 2 of the role assistant follows the role assistant"),
    "a late system": (chat(USER, {"role": "system", "content": "x"}, ANSWER), "message 1 of the role system"),
    "a tool without a call": (chat(USER, {"role": "tool", "content": "2"}, ANSWER), "message 1 of the role tool"),
    "no answer": (chat(USER), "must have an answer of the assistant"),
    "content null": (chat(USER, {**ANSWER, "content": None}), "content of message 1 must be one text: got None"),
    "no content": (chat(USER, {"role": "assistant"}), "content of message 1 must be one text: got None"),
    "empty content": (chat(USER, {**ANSWER, "content": " "}), "content of message 1 must not be empty"),
    "a number as content": (chat({**USER, "content": 3}, ANSWER), "content of message 0 must be one text: got 3"),
    "parts": (
        chat({**USER, "content": [{"type": "text", "text": "a"}] * 2}, ANSWER),
        "content of message 0 must be one",
    ),
    "an image": (chat({**USER, "content": [{"type": "image_url"}]}, ANSWER), "content of message 0 must be one text"),
    "a broken call": (chat(USER, {"from": "function_call", "value": "{"}, ANSWER), "is not valid JSON"),
    "no chat": ('{"prompt": "Why?", "completion": "So."}', "it has no column `messages`, but the first row has"),
    "other columns": ('{"ask": "Why?", "reply": "So."}', "it has no column `messages`"),
    "a broken line": ('{"messages": [', "line 2: "),
    "a list": ("[1]", "must hold one mapping per row: line 2 .* is a list"),
    "two columns of one name": ('{"messages": [], "messages": []}', "line 2: the name 'messages' occurs twice"),
    "another encoding": (b'{"messages": "\xe4"}', "must be text in UTF-8: line 2"),
    "tools of a wrong kind": (json.dumps({**FINE, "tools": 3}), "`tools` must be a list of descriptions: got 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_chats_are_named_by_file_and_row(name, tmp_path):
    line, message = WRONG[name]
    path = tmp_path / "chats.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(FINE).encode() + b"\n" + line + b"\n")
    with pytest.raises(MolaError, match=message) as error:
        load_data(path, None, None)
    assert "chats.jsonl" in str(error.value)
    assert "line 2" in str(error.value)


OTHERS = {
    "an empty text": ('{"text": "a"}', '{"text": " "}', "`text` must not be empty"),
    "a number": ('{"text": "a"}', '{"text": 3}', "`text` must be text: got 3"),
    "a chat among pairs": (
        '{"prompt": "a", "completion": "b"}',
        '{"prompt": [], "completion": []}',
        "`prompt` must be text",
    ),
    "text among chats": (
        json.dumps({"prompt": [USER], "completion": [ANSWER]}),
        '{"prompt": "a", "completion": "b"}',
        "must both be lists of messages",
    ),
    "a label of no choice": (
        '{"question": "a", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}',
        '{"question": "a", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "E"}',
        "`answerKey` must be one of the labels of `choices`: got 'E'",
    ),
    "an index beyond the choices": (
        '{"question": "a", "choices": ["x", "y"], "answer": 0}',
        '{"question": "a", "choices": ["x", "y"], "answer": 2}',
        "must be an index from 0 to 1",
    ),
    "a history as broken JSON": (
        '{"instruction": "a", "output": "b"}',
        '{"instruction": "a", "output": "b", "history": "[1"}',
        "is not valid JSON",
    ),
    "a history without pairs": (
        '{"instruction": "a", "output": "b"}',
        '{"instruction": "a", "output": "b", "history": ["ab"]}',
        "`history` must hold pairs",
    ),
    "an answer of a wrong kind": (
        '{"question": "a", "answer": "b"}',
        '{"question": "a", "answer": ["b"]}',
        "`answer` must be text",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_wrong_rows_of_other_formats_are_named(name, tmp_path):
    first, second, message = OTHERS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{first}\n{second}\n", encoding="utf-8")
    with pytest.raises(MolaError, match=f"line 2 of .*rows.jsonl.*: .*{message}"):
        load_data(path, None, None)


def test_preferences_are_for_trl(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}), encoding="utf-8")
    with pytest.raises(MolaError, match="`chosen` and a `rejected` answer.*trl_command dpo"):
        load_data(path, None, None)


@pytest.mark.slow  # a tokenizer of single bytes takes its time
def test_a_row_of_ten_megabytes_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a"}}\n{{"text": "{"long " * 2_000_000}"}}\n', encoding="utf-8")
    data, tokenizer = load_data(path, None, None), build_byte_tokenizer()
    assert len(data.examples[1]["output"]) == 10_000_000
    with pytest.raises(MolaError, match="1 of 2 samples would lose tokens. The longest, `row-1`, has 1000"):
        encode_examples(data.examples, tokenizer, get_template("plain"), cutoff_len=512)
