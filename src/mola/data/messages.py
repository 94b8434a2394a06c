"""Chats as other programs write them become lists of `role` and `content`, checked for what a template cannot write.

Known are OpenAI's `messages`, ShareGPT's `conversations` with `from` and `value`, and calls of tools in both.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mola.errors import MolaError

CHAT_COLUMNS = ("messages", "conversations", "conversation")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}
_CALLS = ("function_call", "tool_call")  # ShareGPT's roles of a message whose text is a call in JSON
_TURNS = "Messages take turns: a system message if there is one, then user and assistant; tools answer calls"


def read_messages(value: Any, system: Any = None) -> list[dict[str, Any]]:
    """The messages of one conversation, with the keys `role` and `content`; other keys are kept.

    Args:
        value: list of messages, each with `role` and `content`, or with `from` and `value`; or its JSON text.
        system: text of the system message, from a column of its own.

    Raises:
        MolaError: a message has no known role, no text, or comes out of turn; it says which.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = parse_json_text(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise MolaError(f"a conversation must be a list of messages: got {_short(value)}. Correct or remove the row.")
    messages = [_message(message, index) for index, message in enumerate(value)]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(system, "system")})
    _check_turns(messages)
    return messages


def read_tools(value: Any) -> list[Any] | None:
    """Descriptions of tools, as a list or as its JSON text; None without any."""
    if isinstance(value, str) and value.strip():
        value = parse_json_text(value)
    if not value:
        return None
    if not isinstance(value, (list, tuple)):
        raise MolaError(f"`tools` must be a list of descriptions: got {_short(value)}. Correct it.")
    return list(value)


def _message(message: Any, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise MolaError(f"message {index} must have `role` and `content`: got {_short(message)}. Correct the row.")
    # A table gives every message the keys of all others, with the value None.
    message = {key: value for key, value in message.items() if value is not None}
    given = message.pop("role", None) or message.pop("from", None)
    role = _ROLES.get(str(given).lower())
    if role is None:
        raise MolaError(
            f"message {index} has the role {_short(given)}; known are {', '.join(_ROLES)}. Rename the role; if the "
            f"message has it under another key ({', '.join(map(str, message)) or 'none'}), rename that to `role`."
        )
    content = message.pop("content", None)
    if content is None:
        content = message.pop("value", None)
    if given in _CALLS:
        calls = parse_json_text(content) if isinstance(content, str) else content
        calls = list(calls) if isinstance(calls, (list, tuple)) else [calls]
        return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    is_blank_allowed = role in ("tool", "system") or bool(message.get("tool_calls"))
    return {"role": role, "content": _text(content, f"message {index}", is_blank_allowed), **message}


def _text(content: Any, name: str, is_blank_allowed: bool = False) -> str:
    is_part = isinstance(content, (list, tuple)) and len(content) == 1 and isinstance(content[0], Mapping)
    if is_part and content[0].get("type", "text") == "text":
        content = content[0].get("text")
    if not isinstance(content, str):
        raise MolaError(f"the content of {name} must be one text: got {_short(content)}. Correct or remove the row.")
    if not content.strip() and not is_blank_allowed:
        raise MolaError(f"the content of {name} must not be empty. Correct or remove the row.")
    return content


def _check_turns(messages: Sequence[Mapping[str, Any]]) -> None:
    before = "system"
    for index, message in enumerate(messages):
        role = "system" if message["role"] == "developer" else message["role"]
        has_calls = index > 0 and bool(messages[index - 1].get("tool_calls"))
        allowed = {
            "system": index == 0,
            "user": before in ("system", "assistant"),
            "assistant": before in ("user", "tool"),
            "tool": before == "tool" or has_calls,
        }
        if not allowed[role]:
            last = "nothing" if index == 0 else f"the role {messages[index - 1]['role']}"
            raise MolaError(f"message {index} of the role {role} follows {last}. {_TURNS}. Correct or remove the row.")
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise MolaError("a conversation must have an answer of the assistant to train on. Correct or remove the row.")


def parse_json_text(text: str) -> Any:
    """The value of a JSON text in a row, which names the text in its error."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise MolaError(f"{_short(text)} is not valid JSON: {error}. Correct or remove the row.") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
