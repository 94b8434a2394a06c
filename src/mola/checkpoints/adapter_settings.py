"""The settings of an adapter folder: what its `adapter_config.json` says, and which program wrote it.

Also those of a skills folder, which holds several adapters. Reading them needs neither torch nor PEFT.
"""

import difflib
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.digests import CONFIG_FILE
from mola.files.reading import read_json

SKILLS_FILE = "skills.json"
SKILLS_FORMAT = 1
BASE = "base"  # no skill may have this name: it stands for the base model alone


def adapter_settings(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the `adapter_config.json` of the folder that an option `adapter` names.

    Raises:
        MolaError: no such folder, or the file is missing or unreadable.
    """
    folder = Path(adapter)
    # Unlike `Path.is_file`, `os.path.isfile` is False for a name that no file can have.
    if not os.path.isfile(folder / CONFIG_FILE) and not is_skills_folder(folder):
        missing = f"no {CONFIG_FILE} in it" if os.path.isdir(folder) else "no such folder"
        name = folder.as_posix()
        is_hub_name = name.count("/") == 1 and not (os.path.exists(folder) or name.startswith((".", "/")))
        hint = f" If it is on the Hub, fetch it first: hf download {name} --local-dir {folder.name}"
        raise MolaError(
            f"`adapter` must be a folder that holds an adapter: {str(folder)!r}, {missing}. "
            f"Pass the folder that training or `mola convert` wrote.{hint if is_hub_name else ''}"
        )
    return read_settings(folder)


def is_skills_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a skills folder; see `mola.checkpoints.skills_folder`."""
    return os.path.isfile(Path(path, SKILLS_FILE))


def skills_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a skills folder's `skills.json`.

    Raises:
        MolaError: it is no skills folder, was written by a later version, or `skills.json` is damaged.
    """
    folder = Path(path)
    if not is_skills_folder(folder):
        missing = f"no {SKILLS_FILE} in it" if folder.is_dir() else "no such folder"
        raise MolaError(
            f"`folder` must be a skills folder: {str(folder)!r}, {missing}. `mola skills add` makes one from LoRAs."
        )
    try:
        record = read_json(folder / SKILLS_FILE)
        found = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MolaError(f"{str(folder / SKILLS_FILE)!r} is damaged ({error}). Copy the skills folder again.") from error
    if found != SKILLS_FORMAT:
        raise MolaError(
            f"{str(folder / SKILLS_FILE)!r} has format {found!r}, this version of mola reads {SKILLS_FORMAT}. Update "
            "mola."
        )
    return dict(record)


def named_adapter(adapter: str | None, skill: str | None) -> str | None:
    """The adapter that the options `adapter` and `skill` of a command mean.

    Of a skills folder this is the LoRA of the named skill, None for the skill "base", and the folder itself if no skill
    is named: each prompt then asks the skill that knows it.

    Raises:
        MolaError: the folder has no such skill, or `adapter` is no skills folder, so that no skill can be named.
    """
    if skill is None:
        return adapter
    if adapter is None or not is_skills_folder(adapter):
        given = "no adapter" if adapter is None else f"the adapter {adapter!r}"
        raise MolaError(f"`skill` names a skill of a skills folder: got {skill!r} and {given}. Leave `skill` out.")
    if skill == BASE:
        return None
    if skill not in (names := skills_settings(adapter).get("skills", {})):
        raise unknown_skill(skill, names, adapter)
    return os.path.join(adapter, skill)


def unknown_skill(name: str, names: Iterable[str], folder: str) -> MolaError:
    """The error for a name that no skill of a folder has; it shows the names that exist, and the nearest one."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return MolaError(f"there is no skill {name!r} in {folder!r}.{hint} Its skills are {', '.join(names)}.")


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        MolaError: the file is missing, unreadable, or no JSON object; the folder is a skills folder.
    """
    if is_skills_folder(folder):
        raise MolaError(
            f"`adapter` must be a single adapter: {str(folder)!r} is a skills folder. Pass one of its skills, such as "
            f"{str(folder / next(iter(skills_settings(folder).get('skills', {})), 'NAME'))!r}."
        )
    path = folder / CONFIG_FILE
    try:
        settings = read_json(path)
    except (OSError, ValueError) as error:
        raise MolaError(f"{path} cannot be read: {error}. Point to the folder of the saved adapter.") from error
    if not isinstance(settings, dict):
        raise MolaError(f"{path} must hold an object, got {settings!r}. Point to the folder of the saved adapter.")
    return settings


def is_published(settings: Mapping[str, Any]) -> bool:
    """Whether the parsed `adapter_config.json` is of the paper's research code: a LORA whose `r` is a list."""
    return settings.get("peft_type") == "LORA" and isinstance(settings.get("r"), list)


def conversion_hint(settings: Mapping[str, Any], folder: str) -> str | None:
    """The command that converts an adapter of the research code; None for adapters that PEFT can load."""
    if not is_published(settings):
        return None
    return (
        f"{folder!r} is an adapter of the paper's research code, which must be converted first: "
        f"mola convert {shlex.quote(folder)} --from published --base_model MODEL --output NEW_FOLDER --top_k K "
        "(the number used in its training)"
    )
