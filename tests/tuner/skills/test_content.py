"""The user's content among the tokens of a prompt."""

import pytest

from mola.data.templates import get_template
from mola.errors import MolaError
from mola.tuner.skills.content import ContentFinder, chat_layouts, template_layouts

CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<s>system\nBe kind.</s>\n' }}"
    "{% endif %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
QUESTION = "Which of them? Apples, or: pears"


@pytest.fixture
def content(tiny_tokenizer):
    """A function: the text of a prompt's content, by layouts of all templates."""
    finder = ContentFinder(tiny_tokenizer, [*template_layouts(tiny_tokenizer), *chat_layouts(tiny_tokenizer, CHAT)])

    def find(prompt, adds_special_tokens=True):
        ids = tiny_tokenizer(prompt, add_special_tokens=adds_special_tokens)["input_ids"]
        return tiny_tokenizer.decode(finder.content(ids), skip_special_tokens=True)

    return find


def conversation(tokenizer, *contents, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    for index, text in enumerate(contents):
        messages.append({"role": "assistant" if index % 2 else "user", "content": text})
    return tokenizer.apply_chat_template(messages, chat_template=CHAT, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", ["alpaca", "alpaca_legacy", "alpaca_short", "vigogne", "meta", "plain"])
def test_templates_leave_the_content(content, name):
    assert content(get_template(name).prompt(QUESTION)) == QUESTION


@pytest.mark.parametrize("name", ["alpaca", "alpaca_legacy", "alpaca_short", "vigogne"])
def test_instruction_and_input_are_content(content, name):
    assert content(get_template(name).prompt(QUESTION, "red, green")) == QUESTION + "\nred, green"


def test_last_turn_of_a_chat(content, tiny_tokenizer):
    for prompt in (
        conversation(tiny_tokenizer, QUESTION),
        conversation(tiny_tokenizer, QUESTION, system="Answer in one word."),
        conversation(tiny_tokenizer, "What is red?", "Pears are.", QUESTION),
    ):
        assert content(prompt, adds_special_tokens=False) == QUESTION


def test_without_a_layout_all_but_special_tokens_count(content):
    assert content("USER: " + QUESTION + "</s>") == "USER: " + QUESTION


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("WHICH IS IT? THE CAT.\n(A) ONE", "Which is it? The cat.\n(a) one"),
        ("which is it\nthe cat", "Which is it\nThe cat"),
        ("Which is IT?", "Which is IT?"),
        ("17 + 4 =", "17 + 4 ="),
    ],
)
def test_text_of_one_case_is_read_as_sentences(content, text, read):
    assert content(text) == read


def test_some_token_is_read_of_an_empty_question(tiny_tokenizer):
    finder = ContentFinder(tiny_tokenizer, chat_layouts(tiny_tokenizer, CHAT))
    ids = tiny_tokenizer(conversation(tiny_tokenizer, " "), add_special_tokens=False)["input_ids"]
    assert finder.content(ids) == [tiny_tokenizer.bos_token_id]
    with pytest.raises(MolaError, match="at least one token"):
        finder.content([])


def test_tokenizers_without_chat_template_have_no_layout(tiny_tokenizer):
    assert chat_layouts(tiny_tokenizer) == []
