"""The prompts that an adapter was trained with: the name of the template, and the adapter's own chat template."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mola.data.chat_turns import alpaca_chat_template
from mola.data.templates import CHAT, Template, get_template
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.reading import read_json_object

if TYPE_CHECKING:
    from mola.data.examples import LoadedData  # which needs numpy and datasets

CHAT_TEMPLATE = "chat_template.jinja"  # tokenizers save their chat template here; older ones in tokenizer_config.json
PROMPTS_FILE = "prompts.json"  # names the template of an adapter that was made from an existing adapter
CHAT_TEMPLATE_DIR = "additional_chat_templates"  # further, named chat templates; as Transformers calls it
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    CHAT_TEMPLATE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)
_RUN_RECORD = "run.json"  # written by `mola train`

logger = logging.getLogger(__name__)

_warn_once = functools.cache(logger.warning)


def trained_settings(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that an adapter or a checkpoint was trained with; empty if the folder does not hold them."""
    for path in (folder / _RUN_RECORD for folder in _record_folders(adapter)):
        if settings := read_json_object(path).get("settings"):
            return dict(settings)
    return {}


def trained_template(adapter: str | os.PathLike[str]) -> str | None:
    """Name of the prompt template that an adapter was trained with; None if its folder does not name the template."""
    for path in (folder / name for folder in _record_folders(adapter) for name in (_RUN_RECORD, PROMPTS_FILE)):
        record = read_json_object(path)
        if not record and path.exists():
            logger.warning("%s cannot be read: the adapter's template is unknown. Pass `template`.", path)
        if record.get("template"):
            return str(record["template"])
    return None


def template_of(adapter: str | os.PathLike[str]) -> str | None:
    """Name of the prompt template to use with an adapter; None if its folder does not show the template.

    This is the template that the folder names, else `chat` if the folder has a chat template, as TRL saves it.
    """
    return trained_template(adapter) or (CHAT if own_chat(adapter) is not None else None)


def trains_end_token(adapter: str | os.PathLike[str] | None) -> bool:
    """Whether the end token after an output counts in the loss of an adapter's training; True if unknown."""
    return adapter is None or trained_settings(adapter).get("add_eos_token") is not False


def _record_folders(adapter: str | os.PathLike[str]) -> list[Path]:
    """Folders that may hold the record of an adapter's training; for a checkpoint also its parent folder."""
    folder = Path(os.path.expanduser(adapter)).resolve()
    return [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]


def warn_of_other_template(adapter: str | os.PathLike[str] | None, used: str) -> None:
    """Warn if an adapter is used with a different prompt template than the one it was trained with."""
    trained = None if adapter is None else trained_template(adapter)
    if trained not in (None, used):
        logger.warning(
            "The adapter was trained with the prompt template %s and is used with %s. If this is not intended, pass "
            "`template` %s.",
            trained,
            used,
            trained,
        )
    elif trained is None and used != CHAT and adapter is not None and own_chat(adapter) is not None:
        logger.warning(
            "%s does not name its prompt template but has a chat template, as TRL saves it; it is used with the "
            "template %s. Pass `template` %s if it was trained on chats.",
            adapter,
            used,
            CHAT,
        )


def template_for(name: str, tokenizer: Any, adapter: str | os.PathLike[str] | None = None) -> Template:
    """The prompt template called `name`; for `chat` the chat template in the adapter's folder, if it holds one.

    Raises:
        MolaError: no template has this name, or there is no chat template.
    """
    own = own_chat(adapter) if adapter is not None and name == CHAT else None
    if own is not None and adapter is not None:
        warn_of_unknown_tokens(adapter, own, tokenizer)
    return get_template(name, tokenizer, *(() if own is None else own))


def choose_template(
    given: str | None, data: LoadedData, tokenizer: Any, adapter: str | os.PathLike[str] | None = None
) -> Template:
    """The prompt template for some data.

    It is the first of these: the given one; the one that the adapter was trained with, except for texts without a
    prompt; the one of the task or of the format of the rows; the chat template of the tokenizer; alpaca. For chats,
    alpaca is written as a chat template, which the tokenizer gets.

    Args:
        given: name of a template, or None.
        data: the examples.
        tokenizer: the base model's tokenizer.
        adapter: folder of an adapter, or None.

    Raises:
        MolaError: no template has the given name, or it is chat and there is no chat template.
    """
    is_chat = any("messages" in example for example in data.examples)
    name = given
    if name is None and adapter is not None and (is_chat or data.examples[0]["instruction"] is not None):
        name = template_of(adapter)
    name = name or data.template or (CHAT if is_chat or tokenizer.chat_template else "alpaca")
    if name == CHAT and is_chat and not tokenizer.chat_template:
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = alpaca_chat_template(begins)  # an adapter's own has precedence
    return template_for(name, tokenizer, adapter)


class Chat(NamedTuple):
    """How a conversation is written.

    Attributes:
        template: the chat template, in Jinja.
        end_token: text of the token that ends an answer; None if unknown, which means the base model's end token.
    """

    template: str
    end_token: str | None


def own_chat(adapter: str | os.PathLike[str]) -> Chat | None:
    """The chat template that an adapter was trained with, as TRL saves it in the adapter's folder; None without one.

    `mola train` saves the base model's tokenizer in this folder, too. Unless the adapter was trained with the template
    `chat`, that tokenizer's chat template was not used in training, and the result is None.

    Raises:
        MolaError: a file cannot be read.
    """
    if trained_template(adapter) not in (None, CHAT):
        return None
    folder = Path(os.path.expanduser(adapter))
    template = read_json_object(folder / "tokenizer_config.json").get("chat_template")
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise MolaError(f"the chat template of an adapter cannot be read: {str(path)!r} ({error}).") from error
    return Chat(template, end_token_of(folder)) if isinstance(template, str) else None


def end_token_of(folder: str | os.PathLike[str]) -> str | None:
    """Text of the token that ends an answer, from the tokenizer in a folder; None if the tokenizer does not say."""
    end = read_json_object(Path(folder, "tokenizer_config.json")).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return end if isinstance(end, str) else None


def warn_of_unknown_tokens(adapter: str | os.PathLike[str], chat: Chat, tokenizer: Any) -> None:
    """Warn, once, if an adapter's chats use added tokens that the base model's tokenizer does not have."""
    added = read_json_object(Path(os.path.expanduser(adapter)) / "tokenizer.json").get("added_tokens")
    names = [each["content"] for each in added or [] if isinstance(each, dict) and isinstance(each.get("content"), str)]
    used = [name for name in names if name in chat.template or name == chat.end_token]
    known = tokenizer.get_vocab() if used else {}
    if missing := [name for name in used if name not in known]:
        _warn_once(
            "%s writes chats with %s, which the base model's tokenizer does not have: it reads them as text, not as "
            "the tokens of the training. Save the adapter's tokenizer into the base model's folder, and pass that "
            "folder.",
            os.fspath(adapter),
            ", ".join(missing),
        )


def copy_template_name(source: str | os.PathLike[str], target: Path) -> None:
    """Write the name of the prompt template of the adapter `source` into the folder `target`, if the name is known."""
    if (template := trained_template(source)) is not None:
        atomic_write_json(target / PROMPTS_FILE, {"template": template})


def hand_on_prompts(source: str | os.PathLike[str], target: Path) -> None:
    """Write the name of the template of the adapter `source` into the folder `target`; copy its own chat template."""
    copy_template_name(source, target)
    if own_chat(source) is not None:
        for name in TOKENIZER_FILES:
            if (path := Path(os.path.expanduser(source)) / name).is_file():
                shutil.copyfile(path, target / name)


def use_chat(tokenizer: Any, chat: Chat) -> None:
    """Give a tokenizer an adapter's chat template, and its end token if the vocabulary has it."""
    tokenizer.chat_template = chat.template
    if chat.end_token in tokenizer.get_vocab():
        tokenizer.eos_token = chat.end_token


def own_chats(folders: Mapping[str, str]) -> dict[str, Chat]:
    """The chat templates of adapters that have their own; warns of adapters that were not trained on chats.

    `folders` maps the name of an adapter to its folder.
    """
    found = {}
    for name, folder in folders.items():
        if (trained := trained_template(folder)) not in (None, CHAT):
            logger.warning(
                "%r was trained with the prompt template %s, but chats are written with the base model's chat "
                "template. Send prompts in the text of %s to /v1/completions instead.",
                name,
                trained,
                trained,
            )
        elif (chat := own_chat(folder)) is not None:
            found[name] = chat
    return found
