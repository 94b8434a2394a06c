"""Chats: which tokens of a conversation are trained, with the chat templates of many families."""

import re
from pathlib import Path

import pytest
from tokenizers import AddedToken

from mola.data.chat_turns import alpaca_chat_template
from mola.data.encode import encode_examples
from mola.data.messages import read_messages
from mola.data.templates import CHAT, get_template
from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from tests.conftest import BOS, EOS, build_byte_tokenizer

CHATS = [
    {"role": "user", "content": "Which planet is largest?"},
    {"role": "assistant", "content": "Jupiter is."},
    {"role": "user", "content": "And the smallest?"},
    {"role": "assistant", "content": "Mercury is."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
_SPECIAL = re.compile(r"<[|｜][^<>{}'\"\s]+?[|｜]>|</?(?:start_of_turn|end_of_turn|think|turn\||s)>|\[/?INST\]")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Layouts of families, in words of our own: what is written between the messages is theirs.
FAMILIES = {
    "chatml": CHATML,
    "SmolLM2": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML,
    "InternLM2": "{{ bos_token }}" + CHATML,
    "Llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set before = '<<SYS>>\n' + "
        "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set before = '' %}"
        "{% endif %}"
        "{% for m in rest %}{% set text = before + m['content'] if loop.first else m['content'] %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "Llama-3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "Gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
        "+ (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "Zephyr, OLMo": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
        "{% if m['role'] == 'assistant' or m['role'] == 'system' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "Phi-4": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "Granite": (
        "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] "
        "+ '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    ),
    "Falcon": (
        "{% for m in messages %}{{ {'user': 'User: ', 'assistant': 'Falcon: ', 'system': 'System: '}[m['role']] "
        "+ m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Falcon: ' }}{% endif %}"
    ),
    "GPT-2 and others without a template": alpaca_chat_template(adds_begin_token=True),
    # An empty thought before the last answer; earlier answers lose theirs.
    "Qwen3": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'].split('</think>')[-1].strip('\n') + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "with today's date": "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n' }}" + CHATML,
}


def tokenizer_of(template):
    tokenizer = build_byte_tokenizer()
    names = [name for name in sorted(set(_SPECIAL.findall(template))) if name not in (BOS, EOS)]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.chat_template = template
    return tokenizer


def trained_texts(tokenizer, messages, template=None):
    """The trained runs of tokens of each sample, as text."""
    example = {"id": "1", "instruction": None, "output": messages[-1]["content"], "messages": read_messages(messages)}
    dataset, report = encode_examples([example], tokenizer, template or get_template(CHAT, tokenizer), cutoff_len=9999)
    assert report.total == len(dataset)
    samples = []
    for row in dataset:
        runs = [[]]
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (token, IGNORED)
            if label != IGNORED:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        samples.append([tokenizer.decode(run) for run in runs if run])
        assert samples[-1][-1].endswith(EOS)
    return samples


def without_ends(text):
    """A trained run without the end of its turn, an empty thought or the name of a channel before it."""
    text = re.sub(r"^(<think>)?\s*(</think>)?\s*", "", text)
    text = re.sub(r"^\s*(<think></think>|<\|channel\|>final<\|message\|>|to=user<\|message\|>)\s*", "", text)
    return re.sub(r"(\s|<[^<>]*>)*$", "", text)


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_trained_and_nothing_else(family, system):
    tokenizer = tokenizer_of(FAMILIES[family])
    if family == "Mistral" and system:
        with pytest.raises(MolaError, match="example `1`: .*Only user and assistant roles are supported!"):
            trained_texts(tokenizer, [*system, *CHATS])
        return
    samples = trained_texts(tokenizer, [*system, *CHATS])
    assert [[without_ends(run) for run in runs] for runs in samples] == (
        [["Jupiter is."], ["Mercury is."]] if family == "Qwen3" else [["Jupiter is.", "Mercury is."]]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_each_answer_is_trained_after_the_prompt_that_a_server_writes(family):
    tokenizer = tokenizer_of(FAMILIES[family])
    example = {"id": "1", "instruction": None, "output": "", "messages": read_messages(CHATS)}
    dataset, _ = encode_examples([example], tokenizer, get_template(CHAT, tokenizer), cutoff_len=9999)
    for answer in (1, 3):
        prompt = tokenizer.apply_chat_template(CHATS[:answer], add_generation_prompt=True, return_dict=False)
        begins = [row for row in dataset if row["input_ids"][: len(prompt)] == prompt]
        assert any(row["labels"][len(prompt)] == row["input_ids"][len(prompt)] for row in begins)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_and_its_answer_give_the_tokens_of_an_instruction(family):
    tokenizer = tokenizer_of(FAMILIES[family])
    template = get_template(CHAT, tokenizer)
    chat = {"id": "1", "instruction": None, "output": "Jupiter is.", "messages": CHATS[:2]}
    pair = {"id": "1", "instruction": CHATS[0]["content"], "input": "", "output": "Jupiter is."}
    one, other = (encode_examples([each], tokenizer, template, cutoff_len=9999)[0][0] for each in (chat, pair))
    assert one == other


def test_chats_without_a_chat_template_have_the_layout_of_alpaca():
    tokenizer = tokenizer_of(alpaca_chat_template(adds_begin_token=True))
    chat = {"id": "1", "instruction": None, "output": "Jupiter is.", "messages": CHATS[:2]}
    pair = {"id": "1", "instruction": CHATS[0]["content"], "input": "", "output": "Jupiter is."}
    one = encode_examples([chat], tokenizer, get_template(CHAT, tokenizer), cutoff_len=9999)[0][0]
    assert one == encode_examples([pair], tokenizer, get_template("alpaca"), cutoff_len=9999)[0][0]
    # A template of its own name writes one turn only.
    assert one == encode_examples([chat], tokenizer, get_template("alpaca"), cutoff_len=9999)[0][0]
    with pytest.raises(MolaError, match="not a conversation of 4 messages .* template chat"):
        trained_texts(tokenizer, CHATS, get_template("alpaca"))


TRL_FOLDER = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
# Their generation prompt is not the beginning of an answer without a thought, or they want content in parts.
REFUSED = "deepseek|nemotron|idefics3|smolvlm|llava"
SPLIT = r"gptoss|phi3|qwen3\.jinja|qwen3_5_(no)?think\.jinja|qwen3_6\.jinja"


@pytest.mark.parametrize("path", sorted(TRL_FOLDER.glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_that_trl_brings(path):
    tokenizer = tokenizer_of(path.read_text(encoding="utf-8"))
    if re.match(REFUSED, path.name):
        with pytest.raises(
            MolaError, match="begins the answer in message 1 differently|leaves out content|cannot write"
        ):
            trained_texts(tokenizer, CHATS)
        return
    samples = trained_texts(tokenizer, CHATS)
    assert [without_ends(run) for runs in samples for run in runs] == ["Jupiter is.", "Mercury is."]
    assert len(samples) == (2 if re.match(SPLIT, path.name) else 1)


SKIP = "{% if m['role'] != 'system' %}{{ '<|im"
TRAPS = {
    "the chat template leaves out content of the role 'assistant'": CHATML.replace(
        "m['content']", "m['content'].split('</think>')[-1]"
    ),
    "the chat template leaves out content of the role 'system'": CHATML.replace("{{ '<|im", SKIP, 1).replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    ),
    "begins the answer in message 2 differently": CHATML.replace("assistant\n'", "assistant\nWell: '"),
    "leaves out the assistant's `tool_calls`": CHATML,
}


@pytest.mark.parametrize("message", TRAPS)
def test_traps_of_templates_are_refused(message):
    answer = {"role": "assistant", "content": "<think>It is big.</think>Jupiter is."}
    if "tool_calls" in message:
        answer = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    with pytest.raises(MolaError, match="example `1`: .*|needs a chat template") as error:
        trained_texts(tokenizer_of(TRAPS[message]), [SYSTEM, CHATS[0], answer])
    assert message in str(error.value)


def test_turns_of_no_weight_and_messages_after_the_last_answer_are_not_trained():
    tokenizer = tokenizer_of(CHATML)
    chat = [dict(message) for message in [*CHATS, {"role": "user", "content": "Thanks."}]]
    assert trained_texts(tokenizer, chat) == trained_texts(tokenizer, CHATS)
    chat[1]["weight"] = 0
    assert trained_texts(tokenizer, chat) == [[f"Mercury is.<|im_end|>{EOS}"]]
    chat[3]["weight"] = 0
    with pytest.raises(MolaError, match="an answer of the assistant with a `weight`"):
        trained_texts(tokenizer, chat)


def test_tools_and_their_calls_are_written_by_the_template():
    template = "{{ tools | tojson }}" + CHATML.replace(
        "m['content'] +", "m['content'] + (m['tool_calls'] | tojson if m['tool_calls'] else '') +"
    )
    tokenizer = tokenizer_of(template)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        CHATS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        CHATS[3],
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    example = {"id": "1", "instruction": None, "output": "", "messages": read_messages(chat), "tools": tools}
    ((row,), _) = encode_examples([example], tokenizer, get_template(CHAT, tokenizer), cutoff_len=9999)
    assert "Adds." in tokenizer.decode(row["input_ids"])
    trained = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert '"add"' in trained
    assert "Mercury is." in trained
    assert "Adds." not in trained
    share_gpt = [
        {"from": "human", "value": CHATS[0]["content"]},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Mercury is."},
    ]
    assert read_messages(share_gpt) == read_messages([*chat[:1], {**chat[1], "content": ""}, *chat[2:]])


def test_truncation_from_the_left_keeps_the_last_answer():
    tokenizer = tokenizer_of(CHATML)
    example = {"id": "1", "instruction": None, "output": "", "messages": read_messages(CHATS)}
    template = get_template(CHAT, tokenizer)
    (whole, _) = encode_examples([example], tokenizer, template, cutoff_len=9999)
    length = len(whole[0]["input_ids"])
    for lost in (1, length // 2, length - 30):
        (cut, report) = encode_examples([example], tokenizer, template, cutoff_len=length - lost, truncation="left")
        assert cut[0]["input_ids"] == whole[0]["input_ids"][lost:]
        assert cut[0]["labels"] == whole[0]["labels"][lost:]
        assert report.truncated == 1
    (cut, report) = encode_examples([example], tokenizer, template, cutoff_len=length - 20, truncation="right")
    assert cut[0]["labels"] == whole[0]["labels"][:-20]
    assert report.answer_cut == 1
