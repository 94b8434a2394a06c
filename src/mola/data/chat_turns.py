"""Find the assistant's turns in a conversation that a chat template has written.

A model that answers reads the template's text up to its own turn. So each answer must be trained after exactly this
text, and the loss must count exactly what the model writes itself: the answer and the end of the turn.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mola.errors import MolaError

Segment = tuple[str, bool]  # a piece of a text, and whether its tokens contribute to the loss
Messages = Sequence[Mapping[str, Any]]


def trained_segments(messages: Messages, write: Callable[..., str]) -> list[list[Segment]]:
    """The text of a conversation in segments, of which those of the assistant are trained.

    For an answer at position `i`, the prompt is `write(messages[:i], add_generation_prompt=True)`. It must be the
    beginning of `write(messages[:i + 1])`; the rest is trained, without blanks at its end. If the text of each answer
    is the beginning of the whole text, the conversation is one sample. Some templates leave thoughts out of earlier
    answers, or change earlier text in other ways. Then each answer becomes a sample that ends with it.

    Args:
        messages: role and content of each message. An answer with a `weight` of 0 is not trained; messages after the
            last trained answer are left out, because they change no loss.
        write: the chat template.

    Returns:
        One list of segments for each sample.

    Raises:
        MolaError: no answer is trained, or the template does not write an answer as the model would continue its
            prompt, or leaves content out.
    """
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        prompt = write(messages[:index], add_generation_prompt=True)
        text = write(messages[: index + 1]).rstrip()
        if not text.startswith(prompt):
            raise MolaError(
                f"the chat template ends a prompt with {prompt[-40:]!r}, and begins the answer in message {index} "
                "differently: an answer would be trained after a text that no prompt has. Pass another `template`, or "
                "save a chat template for training in the tokenizer."
            )
        _check_content(messages[: index + 1], prompt, text[len(prompt) :])
        turns.append((prompt, text))
    if not turns:
        raise MolaError("`messages` must have an answer of the assistant with a `weight` other than 0.")
    whole = turns[-1][1]
    if all(whole.startswith(text) for _, text in turns):
        return [_segments(turns)]
    return [_segments([turn]) for turn in turns]


def _segments(turns: Sequence[tuple[str, str]]) -> list[Segment]:
    segments: list[Segment] = []
    end = 0
    for prompt, text in turns:
        segments += [(text[end : len(prompt)], False), (text[len(prompt) :], True)]
        end = len(text)
    return segments


def _check_content(messages: Messages, prompt: str, answer: str) -> None:
    """Raise if the template leaves out the answer, a question or the system prompt. Blanks do not count."""
    *before, last = messages
    written = _without_blanks(prompt)
    expected = [(message, written) for message in before if message["role"] in ("user", "system", "developer")]
    for message, text in [*expected, (last, _without_blanks(answer))]:
        content = message.get("content")
        if isinstance(content, str) and _without_blanks(content) not in text:
            raise MolaError(
                f"the chat template leaves out content of the role {message['role']!r}: {content[:60]!r}. Remove that "
                "part from the data, or pass another `template`."
            )
    for call in last.get("tool_calls") or []:
        if str(call.get("function", call).get("name")) not in answer:
            raise MolaError("the chat template leaves out the assistant's `tool_calls`. Pass another `template`.")


def _without_blanks(text: str) -> str:
    return "".join(text.split())


def alpaca_chat_template(adds_begin_token: bool) -> str:
    """A chat template (Jinja) that writes conversations in the layout of the template `alpaca`.

    It is for tokenizers without a chat template. One question and its answer give the text of `alpaca`; a system
    message replaces the first sentences.

    Args:
        adds_begin_token: whether the text begins with the begin token, because the tokenizer adds it to other texts.
    """
    begin = "{{ bos_token }}" if adds_begin_token else ""
    return (
        begin + "{%- if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}"
        "{%- else %}{{ 'Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\\n\\n' }}{%- endif %}"
        "{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{%- elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{%- elif not (loop.first and message['role'] == 'system') %}"
        "{{ raise_exception('the role ' + message['role'] + ' has no place in the layout of alpaca') }}"
        "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '### Response:\\n' }}{%- endif %}"
    )
