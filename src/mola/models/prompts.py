"""In which prompts an adapter was trained: others are none that it knows."""

import functools
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mola.data.templates import CHAT, Template, get_template
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.reading import read_json_object

CHAT_TEMPLATE = "chat_template.jinja"  # where tokenizers keep it; older ones in their configuration
PROMPTS_FILE = "prompts.json"  # beside an adapter that was made from another: the name of its template
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE, "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
)
_RECORD = "run.json"  # of `mola train`

logger = logging.getLogger(__name__)

_warn_once = functools.cache(logger.warning)


def trained_settings(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings of an adapter's training, also of a checkpoint's; empty if its folder does not tell."""
    for path in (place / _RECORD for place in _places(adapter)):
        if settings := read_json_object(path).get("settings"):
            return dict(settings)
    return {}


def _places(adapter: str | os.PathLike[str]) -> list[Path]:
    """Where the record of an adapter's training may be."""
    folder = Path(os.path.expanduser(adapter)).resolve()
    return [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]


def trained_template(adapter: str | os.PathLike[str]) -> str | None:
    """Name of the prompt template of an adapter's training; None if its folder does not tell."""
    for path in (place / name for place in _places(adapter) for name in (_RECORD, PROMPTS_FILE)):
        record = read_json_object(path)
        if not record and path.exists():
            logger.warning("%s cannot be read: the adapter's template is not known. Pass `template`.", path)
        if record.get("template"):
            return str(record["template"])
    return None


def warn_of_other_template(adapter: str | os.PathLike[str] | None, asked: str) -> None:
    """Say so where an adapter is looked at, or trained on, in other prompts than those of its training."""
    trained = None if adapter is None else trained_template(adapter)
    if trained not in (None, asked):
        logger.warning(
            "The adapter was trained with the prompt template %s and is used with %s. If that is not meant, pass "
            "`template` %s.",
            *(trained, asked, trained),
        )
    elif trained is None and asked != CHAT and adapter is not None and own_chat(adapter) is not None:
        logger.warning(
            "%s does not say in which prompts it was trained, and has a chat template beside it, as TRL leaves one: it "
            "is used with %s. Pass `template` %s if it was trained on chats.",
            *(adapter, asked, CHAT),
        )


def template_for(name: str, tokenizer: Any, adapter: str | os.PathLike[str] | None = None) -> Template:
    """The prompt template of that name for an adapter: of `chat` the template beside it, if there is one.

    Raises:
        MolaError: no template has this name, or there is no chat template.
    """
    own = own_chat(adapter) if adapter is not None and name == CHAT else None
    if own is not None and adapter is not None:
        warn_of_unknown_tokens(adapter, own, tokenizer)
    return get_template(name, tokenizer, *(() if own is None else own))


class Chat(NamedTuple):
    """How a conversation is written.

    Attributes:
        template: in Jinja.
        end_token: text of the token that ends an answer; None if it is not known to be another than the base model's.
    """

    template: str
    end_token: str | None


def own_chat(adapter: str | os.PathLike[str]) -> Chat | None:
    """How an adapter was trained to chat, as TRL leaves it beside one; None if that is not there.

    `mola train` leaves the base model's there, and trains in prompts of its own unless its template was `chat`.

    Raises:
        MolaError: a file cannot be read.
    """
    if trained_template(adapter) not in (None, CHAT):
        return None
    folder = Path(os.path.expanduser(adapter))
    settings = read_json_object(folder / "tokenizer_config.json")
    path, template = folder / CHAT_TEMPLATE, settings.get("chat_template")
    if path.is_file():
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise MolaError(f"the chat template of an adapter cannot be read: {str(path)!r} ({error}).") from error
    return Chat(template, end_token_of(folder)) if isinstance(template, str) else None


def warn_of_unknown_tokens(adapter: str | os.PathLike[str], chat: Chat, tokenizer: Any) -> None:
    """Say so, once, where an adapter writes chats with tokens of its tokenizer that the base model's does not have."""
    added = read_json_object(Path(os.path.expanduser(adapter)) / "tokenizer.json").get("added_tokens")
    names = [each["content"] for each in added or [] if isinstance(each, dict) and isinstance(each.get("content"), str)]
    used = [name for name in names if name in chat.template or name == chat.end_token]
    known = tokenizer.get_vocab() if used else {}
    if missing := [name for name in used if name not in known]:
        _warn_once(
            "%s writes chats with %s, which the base model's tokenizer does not have: they are read as text, not as "
            "the tokens of its training. Save the adapter's tokenizer into the base model's folder, and pass that.",
            *(os.fspath(adapter), ", ".join(missing)),
        )


def end_token_of(folder: str | os.PathLike[str]) -> str | None:
    """Text of the token that ends an answer, as the tokenizer in a folder says it; None if it is not known."""
    end = read_json_object(Path(folder, "tokenizer_config.json")).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return end if isinstance(end, str) else None


def hand_on_template(source: str | os.PathLike[str], target: Path) -> None:
    """Write down the name of an adapter's prompt template, if its folder tells."""
    if (template := trained_template(source)) is not None:
        atomic_write_json(target / PROMPTS_FILE, {"template": template})


def hand_on_prompts(source: str | os.PathLike[str], target: Path) -> None:
    """Let the folder of an adapter say how it is asked, as that of the adapter does that it was made from."""
    hand_on_template(source, target)
    if own_chat(source) is not None:
        for name in TOKENIZER_FILES:
            if (path := Path(os.path.expanduser(source)) / name).is_file():
                shutil.copyfile(path, target / name)


def use_chat(tokenizer: Any, chat: Chat) -> None:
    """Make an adapter's way of chatting that of a tokenizer, as far as it has the end token."""
    tokenizer.chat_template = chat.template
    if chat.end_token in tokenizer.get_vocab():
        tokenizer.eos_token = chat.end_token


def own_chats(folders: Mapping[str, str]) -> dict[str, Chat]:
    """Name -> chat of adapters that have their own; a warning for those that were trained in no chat.

    `folders`: name -> folder.
    """
    found = {}
    for name, folder in folders.items():
        if (trained := trained_template(folder)) not in (None, CHAT):
            logger.warning(
                "%r was trained with the prompt template %s. Chats are written as the base model has it: send that "
                "template's text as `prompt` to /v1/completions.",
                *(name, trained),
            )
        elif (chat := own_chat(folder)) is not None:
            found[name] = chat
    return found
