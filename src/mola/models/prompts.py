"""In which prompts an adapter was trained: others are none that it knows."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from mola.errors import MolaError
from mola.files.reading import read_json_object, read_text

_CHAT_TEMPLATE = "chat_template.jinja"  # where tokenizers keep it; older ones in their configuration
_RECORD = "run.json"  # of `mola train`

logger = logging.getLogger(__name__)


def trained_template(adapter: str | os.PathLike[str]) -> str | None:
    """Name of the prompt template of an adapter's training; None if its run folder does not tell."""
    folder = Path(adapter).expanduser().resolve()
    places = [folder, folder.parent] if folder.name.startswith("checkpoint-") else [folder]
    for path in (place / _RECORD for place in places):
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
            "The adapter was trained with the prompt template %s and is used with %s: `template` %s is as before.",
            *(trained, asked, trained),
        )


def own_chat_template(adapter: str | os.PathLike[str]) -> str | None:
    """The chat template that an adapter was trained with, as TRL leaves it beside one; None if there is none.

    `mola train` leaves the base model's there, and trains in prompts of its own.
    """
    if trained_template(adapter) is not None:
        return None
    path = Path(adapter, _CHAT_TEMPLATE)
    if path.is_file():
        try:
            return read_text(path)
        except (OSError, ValueError) as error:
            raise MolaError(f"the chat template of an adapter cannot be read: {str(path)!r} ({error}).") from error
    found = read_json_object(Path(adapter, "tokenizer_config.json")).get("chat_template")
    return found if isinstance(found, str) else None


def chat_templates(folders: Mapping[str, str]) -> dict[str, str]:
    """Name -> chat template of adapters that have their own; a warning for those that were trained in no chat.

    `folders`: name -> folder.
    """
    found = {}
    for name, folder in folders.items():
        if (trained := trained_template(folder)) is not None:
            logger.warning(
                "%r was trained with the prompt template %s. Chats are written as the base model has it: send that "
                "template's text as `prompt` to /v1/completions.",
                *(name, trained),
            )
        elif (template := own_chat_template(folder)) is not None:
            found[name] = template
    return found
