"""The user's content among the tokens of a prompt."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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


@pytest.mark.parametrize("name", ["alpaca", "alpaca_short", "vigogne"])
def test_a_line_break_at_the_end_may_share_a_token_with_the_template(name):
    """As in the vocabularies of GPT-2 and SmolLM2, which have tokens of several line breaks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["</s>", *alphabet, "ĊĊ", "ĊĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ"), ("ĊĊ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    finder = ContentFinder(fast, template_layouts(fast))
    template = get_template(name)
    for prompt in (template.prompt(f"{QUESTION}\n"), template.prompt(f"{QUESTION}\n", "red\n")):
        found = fast.decode(finder.content(fast(prompt)["input_ids"]))
        assert found in (QUESTION, f"{QUESTION}\nred")


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
