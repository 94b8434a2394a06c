"""The names under which a skills folder is served: the whole folder, each skill, and the base model."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.checkpoints.skills_folder import BASE, SkillsFolder
from mola.data.templates import CHAT
from mola.errors import MolaError
from mola.files.digests import CONFIG_FILE, file_sha256, find_weights
from mola.models.prompts import Chat, own_chat, trained_template, warn_of_unknown_tokens

logger = logging.getLogger(__name__)

DECIDE = "(decide)"  # in place of a skill's name, for requests that leave the choice to the skills
_MAX_NAMES = 20  # a message lists at most this many names


def skills_folder(folders: Mapping[str, str]) -> str | None:
    """The skills folder among the folders that are to be served; None if all of them are adapters.

    Raises:
        MolaError: there are other folders beside it.
    """
    found = [folder for folder in folders.values() if is_skills_folder(folder)]
    if found and len(folders) > 1:
        raise MolaError(
            f"`adapter` must be the skills folder {found[0]!r} alone: got {len(folders)} folders. Add the other "
            "adapters to it as skills, or start a server for each."
        )
    return found[0] if found else None


def skill_model_names(name: str, skills: SkillsFolder, base_name: str) -> dict[str, str | None]:
    """Name in requests -> name of the skill; `DECIDE` for the whole folder, None for the base model.

    Args:
        name: the name of the folder in requests.
        skills: the folder.
        base_name: the name of the base model, which is also called "base".

    Raises:
        MolaError: two of them have the same name.
    """
    if name == BASE or name in skills.skills:
        raise MolaError(
            f"`adapter` {str(skills.path)!r} has the name {name!r}, which one of its skills or the base model has. "
            f"Rename it: NEW_NAME={skills.path}."
        )
    if base_name in skills.skills:
        raise MolaError(f"`base_name` {base_name!r} is the name of a skill. Pass a different --base_name.")
    return {name: DECIDE, **{skill: skill for skill in skills.names}, **dict.fromkeys([base_name, BASE])}


def name_behind(skill: str, folder: str | Path) -> str:
    """The name of a skill in vLLM: with a digest of its files.

    vLLM finds the keys and values of earlier prompts by the LoRA's name and folder. After a change of the files it
    would continue from those of the old LoRA.
    """
    digests = "".join(file_sha256(path) for path in (Path(folder, CONFIG_FILE), find_weights(folder)) if path)
    return f"{skill}@{hashlib.sha256(digests.encode()).hexdigest()[:16]}"


def warn_of_templates(skills: SkillsFolder) -> None:
    """Warn of skills that were not trained on chats, since chats are written with the base model's chat template."""
    templates = {name: trained_template(skills.adapter(name)) for name in skills.names}
    others = [f"{name} ({template})" for name, template in templates.items() if template not in (None, CHAT)]
    if others:
        logger.warning(
            "Chats are written with the base model's chat template, and these skills were trained with different "
            "templates: %s. Send prompts in the text of their template to /v1/completions instead.",
            listed(others),
        )


def chats_of_skills(skills: SkillsFolder, tokenizer: PreTrainedTokenizerBase) -> dict[str, Chat]:
    """Name of a skill -> its own chat format, of the skills whose chats differ from those of the base model.

    If the base model has no chat template, `DECIDE` has that of a skill: only the content of a chat is decided.
    """
    chats = {}
    for name in skills.names:
        chat = own_chat(skills.adapter(name))
        if chat is not None and chat != Chat(str(tokenizer.chat_template), tokenizer.eos_token):
            warn_of_unknown_tokens(skills.adapter(name), chat, tokenizer)
            chats[name] = chat
    if not tokenizer.chat_template and chats:
        chats[DECIDE] = next(iter(chats.values()))
    return chats


def greeting(names: Iterable[str], url: str) -> str:
    """The line that a server logs when it is ready."""
    return f"Serving {listed(list(names))} on {url}"


def listed(names: list[str]) -> str:
    """The first names of a list between commas."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
