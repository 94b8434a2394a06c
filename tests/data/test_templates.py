"""The prompt strings are interface: they are written out here once more, by hand."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mola.data.templates import CHAT, get_template, template_names
from mola.errors import MolaError

LEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
LEAD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
LEAD_FR = (
    "Ci-dessous se trouve une instruction qui décrit une tâche. "
    "Écrivez une réponse qui complète correctement la demande."
)
LEAD_FR_INPUT = (
    "Ci-dessous se trouve une instruction qui décrit une tâche, associée à une entrée qui fournit un "
    "contexte supplémentaire. Écrivez une réponse qui complète correctement la demande."
)

EXPECTED = {
    "alpaca": (
        f"{LEAD}\n\n### Instruction:\nAdd.\n\n### Response:\n",
        f"{LEAD_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n",
    ),
    "alpaca_legacy": (
        f"{LEAD}\n\n### Instruction:\nAdd.\n\n### Response:",
        f"{LEAD_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:",
    ),
    "alpaca_short": (
        "### Instruction:\nAdd.\n\n### Response:\n",
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n",
    ),
    "vigogne": (
        f"{LEAD_FR}\n\n### Instruction:\nAdd.\n\n### Réponse:\n",
        f"{LEAD_FR_INPUT}\n\n### Instruction:\nAdd.\n\n### Entrée:\n2 and 3\n\n### Réponse:\n",
    ),
    "plain": ("Add.", "Add.\n\n2 and 3"),
    "meta": ("Add.\n\n", "Add.\n\n2 and 3\n\n"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_prompt_equals_the_published_string(name):
    without_input, with_input = EXPECTED[name]
    template = get_template(name)
    assert template.name == name
    assert template.prompt("Add.") == template.prompt("Add.", "") == without_input
    assert template.prompt("Add.", "2 and 3") == with_input


def test_template_names_are_all_covered_here():
    assert sorted(template_names()) == sorted([*EXPECTED, CHAT])  # that of a tokenizer: test_chat_template.py


def test_empty_name_means_alpaca():
    assert get_template("") is get_template("alpaca")


@pytest.mark.parametrize("name", ["alpacca", None, 3])
def test_unknown_name_lists_the_names(name):
    with pytest.raises(
        MolaError, match=f"alpaca, alpaca_legacy, alpaca_short, vigogne, meta, plain, chat: got {name!r}"
    ):
        get_template(name)


@pytest.mark.parametrize("name", EXPECTED)
@given(instruction=st.text(), context=st.text(min_size=1))
@example(instruction="{input} {", context="{instruction}")
def test_fields_are_inserted_untouched(name, instruction, context):
    template = get_template(name)
    before, after = template.prompt_no_input.split("{instruction}")
    assert template.prompt(instruction) == before + instruction + after
    before, rest = template.prompt_input.split("{instruction}")
    middle, after = rest.split("{input}")
    assert template.prompt(instruction, context) == before + instruction + middle + context + after


def test_none_instruction_is_the_empty_prompt_of_meta_only():
    assert get_template("meta").prompt(None) == ""
    with pytest.raises(MolaError, match="`instruction` must be text for the template `alpaca`"):
        get_template("alpaca").prompt(None)
    with pytest.raises(MolaError, match="`instruction`"):
        get_template("meta").prompt(None, "context")


def test_input_that_is_no_text_is_an_error():
    with pytest.raises(MolaError, match="`input` must be text or None: got 5"):
        get_template("alpaca").prompt("Add.", 5)
