"""The template `chat`: a conversation as the tokenizer writes it, with begin and end tokens once."""

import pytest
from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mola.data.encode import encode_examples
from mola.data.tasks import load_task
from mola.data.templates import CHAT, check_template, get_template
from mola.data.tokenized import IGNORED, tokenized
from mola.errors import MolaError
from mola.evaluation.questions import make_questions
from mola.generation import predicting
from mola.generation.likelihood import _encode
from tests.conftest import BOS, EOS, build_byte_tokenizer

TURNS = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
EXAMPLE = {"id": "1", "instruction": "Name a river.", "input": "In Egypt.", "output": "The Nile."}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Puts a begin token in front itself, and has tokens for turns."""
    found = build_byte_tokenizer()
    found.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in ("user", "assistant", "end")])
    found.chat_template = TURNS
    return found


def encoded(tokenizer, **options):
    how = {"cutoff_len": 256, **options}
    ((row,), _) = encode_examples([EXAMPLE], tokenizer, get_template(CHAT, tokenizer), **how)
    return row


def test_prompt_is_the_conversation_up_to_the_answer(tokenizer):
    template = get_template(CHAT, tokenizer)
    assert (template.name, template.lead) == ("chat", "")
    assert template.prompt("Name a river.", "") == f"{BOS}<|user|>Name a river.<|end|>\n<|assistant|>"
    asked = f"{BOS}<|user|>Name a river.\n\nIn Egypt.<|end|>\n<|assistant|>"
    assert template.prompt("Name a river.", "In Egypt.") == asked
    assert get_template(CHAT, tokenizer, PLAIN).prompt("Why?") == "[user] Why?[assistant] "


def test_special_tokens_are_those_that_the_template_writes(tokenizer):
    """As servers have it: the tokenizer's begin token is not there twice, nor where the template has none."""
    begin = tokenizer.bos_token_id
    assert encoded(tokenizer)["input_ids"].count(begin) == 1
    tokenizer.chat_template = PLAIN
    assert tokenizer("a")["input_ids"][0] == begin
    assert begin not in encoded(tokenizer)["input_ids"]


def test_answer_ends_its_turn_and_the_text(tokenizer):
    turn, end = tokenizer.convert_tokens_to_ids(["<|end|>", EOS])
    row = encoded(tokenizer)
    answer = [label for label in row["labels"] if label != IGNORED]
    assert answer[-2:] == [turn, end]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The Nile."
    messages = [
        {"role": "user", "content": "Name a river.\n\nIn Egypt."},
        {"role": "assistant", "content": "The Nile."},
    ]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row["input_ids"][:-1] == tokenizer(written.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert encoded(tokenizer, add_eos_token=False)["labels"][-1] != end
    tokenizer.eos_token = "<|end|>"  # as tokenizers of Instruct models have it
    answer = [label for label in encoded(tokenizer)["labels"] if label != IGNORED]
    assert answer[-1] == turn
    assert answer.count(turn) == 1


@pytest.mark.parametrize("lead", [" ", "<think>\n\n</think>\n\n"])
def test_text_that_the_template_writes_before_an_answer_is_trained(lead, tokenizer):
    tokenizer.chat_template = TURNS.replace(
        "<|{{ message.role }}|>", "<|{{ message.role }}|>{% if message.role == 'assistant' %}" + lead + "{% endif %}"
    )
    template = get_template(CHAT, tokenizer)
    assert template.lead == lead
    assert template.prompt("Why?").endswith("<|assistant|>")
    answer = [label for label in encoded(tokenizer)["labels"] if label != IGNORED]
    assert tokenizer.decode(answer, skip_special_tokens=True) == lead + "The Nile."


def test_an_output_with_a_thought_gets_no_second_thought(tokenizer):
    tokenizer.chat_template = TURNS.replace(
        "<|{{ message.role }}|>",
        "<|{{ message.role }}|>{% if message.role == 'assistant' %}<think> </think>{% endif %}",
    )
    template = get_template(CHAT, tokenizer)
    assert template.answer("The Nile.") == "<think> </think>The Nile."
    assert template.answer("<think> Egypt </think>The Nile.") == "<think> Egypt </think>The Nile."
    task = load_task("openbookqa")
    for thought, asked in (("", "<think> </think>"), ("<think> Egypt </think>", "<think> Egypt </think>")):
        row = {"id": "1", "instruction": "Which?", "input": "", "answer": "B", "num_choices": 4}
        row["output"] = f"{thought}Answer: The answer is B."
        (question,) = make_questions(task, [row], template, "likelihood")
        assert question.option_texts("")[2] == f"{template.prompt('Which?')}{asked}Answer: The answer is C"


def test_a_template_whose_generation_prompt_differs_from_its_answers_is_refused_in_training(tokenizer):
    tokenizer.chat_template = TURNS.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    template = get_template(CHAT, tokenizer)
    asked = template.prompt("Why?")
    assert asked.endswith("<|assistant|><think>")
    alone = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert predicting.encode_before_answer(tokenizer, [asked], template) == [alone]  # an adapter of TRL's is asked so
    with pytest.raises(MolaError, match="generation prompt is the beginning of an answer.*<think>'.*TRL"):
        encoded(tokenizer)


@pytest.fixture
def crossing_tokenizer(blanks_tokenizer):
    """Two line breaks are one token, whichever side of a border they are on."""
    blanks_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return blanks_tokenizer


def test_no_token_contains_the_border_between_prompt_and_answer(crossing_tokenizer):
    """Who asks has the prompt alone: two line breaks are one token of this vocabulary, whichever side they are on."""
    crossing_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}<think>\n\n</think>{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    template = get_template(CHAT, crossing_tokenizer)
    assert (template.lead, template.is_encoded_apart) == ("\n</think>", True)
    example = {"id": "x", "instruction": "Which one?", "input": "", "output": "It."}
    sample = next(iter(tokenized([example], crossing_tokenizer, template, [])))
    prompt = template.prompt("Which one?")
    asked = predicting.encode_before_answer(crossing_tokenizer, [prompt], template)[0]
    assert (
        sample.ids[: sample.answer_start] == asked == crossing_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    )
    assert crossing_tokenizer.decode(sample.ids[sample.answer_start :]) == "\n</think>It."


def test_a_row_with_a_token_across_the_border_is_tokenised_in_two_parts(crossing_tokenizer):
    """Also where the template's own text leaves no such token: an output that begins with a line break."""
    crossing_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    template = get_template(CHAT, crossing_tokenizer)
    assert not template.is_encoded_apart
    rows = [
        {"id": "x", "instruction": "Which one?", "input": "", "output": text, "answer": text, "num_choices": None}
        for text in ("It.", "\nIt.")
    ]
    prompt = template.prompt("Which one?")
    asked = crossing_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for sample, row in zip(tokenized(rows, crossing_tokenizer, template, []), rows, strict=True):
        assert sample.ids[: sample.answer_start] == asked
        assert crossing_tokenizer.decode(sample.ids[sample.answer_start :]) == row["output"]
        (ids,) = _encode(crossing_tokenizer, [[prompt + row["output"]]], template, [prompt])
        assert ids == [sample.ids]


def test_a_cut_prompt_keeps_its_begin_token(tokenizer):
    whole = encoded(tokenizer)
    row = encoded(tokenizer, truncation="left", cutoff_len=whole["length"] - 5)
    assert row["input_ids"] == [whole["input_ids"][0], *whole["input_ids"][6:]]


def test_the_template_of_an_adapter_uses_the_end_token_of_the_adapter(tokenizer):
    jinja = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert get_template(CHAT, tokenizer, jinja).prompt("Why?") == f"Why?{EOS}"
    template = get_template(CHAT, tokenizer, jinja, "<|end|>")
    assert template.prompt("Why?") == "Why?<|end|>"
    assert template.ending(tokenizer) == tokenizer.convert_tokens_to_ids(["<|end|>", EOS])


def test_a_template_without_a_token_for_turns_adds_only_the_end_token(tokenizer):
    tokenizer.chat_template = PLAIN
    assert get_template(CHAT, tokenizer).ending(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = PLAIN.replace("{{ m.content }}", "{{ m.content }}" + EOS)
    assert get_template(CHAT, tokenizer).ending(tokenizer) == [tokenizer.eos_token_id]


def test_a_template_that_fails_raises_an_error_of_mola(tokenizer):
    check_template(CHAT)
    with pytest.raises(MolaError, match="`template` must be one of alpaca, .*chat: got 'chats'"):
        check_template("chats")
    template = get_template(CHAT, tokenizer)
    for wrong in (None, "", 7):
        with pytest.raises(MolaError, match="`instruction` must be text for the template `chat`"):
            template.prompt(wrong, "")
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(MolaError, match="cannot write a conversation: only tools"):
        template.prompt("Why?")
    tokenizer.chat_template = None
    with pytest.raises(MolaError, match="`template` chat needs a tokenizer with a chat template"):
        get_template(CHAT, tokenizer)
