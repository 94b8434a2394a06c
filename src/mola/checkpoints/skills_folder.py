"""A skills folder: plain LoRAs of one base model, and what is needed to decide which of them answers a prompt.

    skills.json               base model, layer and threshold of the decision; digests of the skills
    statistics.safetensors    tensors "general/X" of general text, and "skills/NAME/X" of each skill's prompts
    NAME/                     one skill: a plain LoRA in PEFT's format

Keys are sorted and no file holds a date, so the same skills give the same bytes, whatever the order of adding.

`skills.json` is written last, and counts: a skill that is not in it does not exist, even if there are files of it. So a
command that is killed leaves the old folder or the new one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mola.checkpoints.adapter_folder import read_tensors
from mola.checkpoints.adapter_settings import (
    BASE,
    SKILLS_FILE,
    SKILLS_FORMAT,
    is_skills_folder,
    skills_settings,
    unknown_skill,
)
from mola.checkpoints.recorded_base import is_recorded_base
from mola.errors import MolaError
from mola.files import locking
from mola.files.atomic import atomic_write_bytes, atomic_write_json, flush_to_disk, write_new_folder
from mola.files.digests import CONFIG_FILE, WEIGHTS_FILE, check_finite, file_sha256
from mola.files.failures import explain_write_errors

STATISTICS_FILE = "statistics.safetensors"

Tensors = dict[str, Any]  # arrays as they are read, without torch; torch's tensors as they are measured

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_GENERAL, _SKILLS = "general/", "skills/"
_RUN_RECORD = "run.json"  # written by `mola train`

logger = logging.getLogger(__name__)
_warn_once = functools.cache(logger.warning)


@dataclass(frozen=True)
class SkillEntry:
    """What `skills.json` says about a skill.

    Attributes:
        adapter_sha256: of its file of weights.
        statistics_sha256: of its tensors in the file of statistics; see `tensors_sha256`.
        first_layer: the lowest layer that it adapts.
        rows: number of prompts that its statistics were measured on.
    """

    adapter_sha256: str
    statistics_sha256: str
    first_layer: int
    rows: int


@dataclass(frozen=True)
class SkillsFolder:
    """The content of a skills folder, without the weights of the LoRAs.

    Attributes:
        path: the folder.
        base_model: folder or hub id of the base model.
        base_digest: identifies the base model's weights; see `mola.models.base_model.weights_identity`.
        layer: the decision reads the input of this layer.
        threshold: a skill answers a prompt whose margin is above it; see `mola.tuner.skills.decision`.
        reject_rate: share of prompts like the skills' own that may be below it; None if `threshold` was given.
        skills: name -> entry, sorted by name.
        general: statistics of general text.
        statistics: name of a skill -> its statistics.
    """

    path: Path
    base_model: str
    base_digest: str
    layer: int
    threshold: float
    reject_rate: float | None
    skills: dict[str, SkillEntry]
    general: Tensors
    statistics: dict[str, Tensors]

    @property
    def names(self) -> list[str]:
        """The names of the skills, sorted."""
        return sorted(self.skills)

    def entry(self, name: str) -> SkillEntry:
        """The entry of a skill.

        Raises:
            MolaError: there is no such skill.
        """
        if name not in self.skills:
            raise unknown_skill(name, self.skills, str(self.path))
        return self.skills[name]

    def adapter(self, name: str) -> Path:
        """The folder of a skill's LoRA."""
        self.entry(name)
        return self.path / name

    def check_base(self, base_model: str, digest: str) -> None:
        """Check that a base model is the one that the skills belong to; `digest` identifies its weights.

        Raises:
            MolaError: its weights are different ones.
        """
        if digest == self.base_digest:
            return
        if ("@" in digest) != ("@" in self.base_digest):  # a model on the Hub has a commit, a folder has a digest
            logger.warning(
                "The skills in %s were made on %s, and are used on %s: results are meaningful only if these are the "
                "same weights.",
                self.path,
                self.base_model,
                base_model,
            )
        elif is_recorded_base(base_model, self.base_model):
            raise MolaError(
                f"the weights of `base_model` {base_model!r} have changed since {str(self.path)!r} was made: their "
                f"digest begins with {digest[:12]!r}, {SKILLS_FILE} says {self.base_digest[:12]!r}. Restore the "
                "weights, or add the skills to a new folder."
            )
        else:
            raise MolaError(
                f"`base_model` must have the weights that {str(self.path)!r} was made on, those of "
                f"{self.base_model!r}: got {base_model!r}, which has others. Skills of another base model need a "
                "folder of their own."
            )


def check_skill_name(name: str) -> None:
    """Raise if a name cannot be a skill's."""
    if not _NAME.fullmatch(name) or name.lower() == BASE:
        raise MolaError(
            "a skill's name must be of letters, digits, '_' and '-', begin with a letter or digit, and be no "
            f"{BASE!r}, which stands for the base model alone: got {name!r}. Rename it."
        )


def check_name_is_free(folder: str | os.PathLike[str], name: str, overwrite: bool) -> None:
    """Raise if a skills folder has a skill of this name, which is not to be replaced; a new folder has none."""
    if not overwrite and is_skills_folder(folder) and name in skills_settings(folder)["skills"]:
        raise MolaError(
            f"{os.fspath(folder)!r} has a skill {name!r} already. Choose another name, or pass --overwrite to replace "
            "the skill."
        )


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """The sha256 of named tensors, whatever their order."""
    return hashlib.sha256(save(_sorted_arrays(tensors))).hexdigest()


def _sorted_arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}


# ---------------------------------------------------------------------- reading


def read_skills(path: str | os.PathLike[str]) -> SkillsFolder:
    """Read a skills folder, without the weights of its LoRAs.

    Raises:
        MolaError: it is no skills folder, was written by a later version, or a file is missing or damaged.
    """
    folder = Path(path).expanduser()
    record = skills_settings(folder)
    try:
        skills = {name: SkillEntry(**record["skills"][name]) for name in sorted(record["skills"])}
        settings = {name: record[name] for name in _SETTINGS}
        settings |= {"layer": int(settings["layer"]), "threshold": float(settings["threshold"])}
        general_sha256 = record["general_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder / SKILLS_FILE, f"{type(error).__name__}: {error}") from error
    if record.get("top_k", 1) != 1:  # 1.0.0 let two skills answer together
        _warn_once(f"{str(folder / SKILLS_FILE)!r} has `top_k` {record['top_k']}: one skill answers a prompt now.")
    general, statistics = _read_statistics(folder / STATISTICS_FILE, skills)
    digests = {"": (general, general_sha256)}
    digests |= {name: (statistics[name], entry.statistics_sha256) for name, entry in skills.items()}
    for name, (tensors, recorded) in digests.items():
        if tensors_sha256(tensors) != recorded:
            what = f"the skill {name!r}" if name else "general text"
            raise _damaged(folder / STATISTICS_FILE, f"the statistics of {what} are not those that were saved")
    for name in skills:
        check_skill_name(name)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not os.path.isfile(folder / name / file):
                raise _damaged(folder / name, f"{file} is missing")
    return SkillsFolder(folder, skills=skills, general=general, statistics=statistics, **settings)


_SETTINGS = [each.name for each in fields(SkillsFolder)][1:-3]  # the fields that skills.json holds as they are


def _read_statistics(path: Path, names: Mapping[str, Any]) -> tuple[Tensors, dict[str, Tensors]]:
    """The statistics of general text and of the named skills; an unfinished command may have left others."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    check_finite(tensors, str(path))
    general: Tensors = {}
    found: dict[str, Tensors] = {name: {} for name in names}
    for key, tensor in tensors.items():
        if key.startswith(_GENERAL):
            general[key.removeprefix(_GENERAL)] = tensor
        elif (name := key.removeprefix(_SKILLS).partition("/")[0]) in found:
            found[name][key.removeprefix(f"{_SKILLS}{name}/")] = tensor
    return general, found


def _damaged(path: Path, reason: str) -> MolaError:
    return MolaError(f"{str(path)!r} is damaged: {' '.join(reason.split())}. Copy the skills folder again.")


# ---------------------------------------------------------------------- changes, in memory


def add_entry(folder: SkillsFolder, name: str, entry: SkillEntry, statistics: Tensors) -> SkillsFolder:
    """The folder with one more skill, which is not written yet; `entry.statistics_sha256` is set here.

    Raises:
        MolaError: the name cannot be a skill's.
    """
    check_skill_name(name)
    entry = replace(entry, statistics_sha256=tensors_sha256(statistics))
    skills = {**folder.skills, name: entry}
    return replace(
        folder,
        skills={each: skills[each] for each in sorted(skills)},
        statistics={**folder.statistics, name: statistics},
    )


def remove_entry(folder: SkillsFolder, name: str) -> SkillsFolder:
    """The folder without a skill, which is not written yet.

    Raises:
        MolaError: there is no such skill, or no other one.
    """
    folder.entry(name)
    if len(folder.skills) == 1:
        raise MolaError(f"{name!r} is the only skill of {str(folder.path)!r}. Remove the folder itself.")
    return replace(
        folder,
        skills={each: entry for each, entry in folder.skills.items() if each != name},
        statistics={each: tensors for each, tensors in folder.statistics.items() if each != name},
    )


def merge_folders(folder: SkillsFolder, other: SkillsFolder) -> tuple[SkillsFolder, dict[str, Path]]:
    """The folder with the skills of another one, which is not written yet; settings are those of `folder`.

    Returns:
        The result, and name -> LoRA of the skills that are new.

    Raises:
        MolaError: the base models or the layers of the decisions differ, or two different skills have one name.
    """
    folder.check_base(other.base_model, other.base_digest)
    check_layer(folder, other.layer, str(other.path))
    new = {}
    for name, entry in other.skills.items():
        if name not in folder.skills:
            folder, new[name] = add_entry(folder, name, entry, other.statistics[name]), other.path / name
        elif folder.skills[name] != entry:
            raise MolaError(
                f"both folders have a skill {name!r}, and they differ: {str(folder.path)!r} and {str(other.path)!r}. "
                "Remove one, or add it under another name."
            )
    return folder, new


def check_layer(folder: SkillsFolder, layer: int, where: str = "`layer`") -> None:
    """Raise if statistics that were measured at the input of another layer were to be added."""
    if layer != folder.layer:
        raise MolaError(
            f"the decision of {str(folder.path)!r} reads the input of layer {folder.layer}, {where} has {layer}. "
            f"All skills of a folder share one layer: leave `layer` out, or add the skills to a new folder."
        )


# ---------------------------------------------------------------------- writing


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other commands from changing a skills folder during the block."""
    if not path.is_dir():
        yield
        return
    with locking.locked(path, f"another command is changing the skills folder {str(path)!r}. Wait for its end."):
        yield


def write_skills(new: SkillsFolder, adapters: Mapping[str, Path], copy: Callable[[Path, Path], None]) -> None:
    """Write a skills folder, or change it into `new`. Call it inside `locked`.

    Args:
        new: the content; see `add_entry`.
        adapters: name -> folder of the LoRA, for the skills that are new or replaced.
        copy: copies a LoRA's folder to a new folder; see `copy_lora`.

    Raises:
        MolaError: a file cannot be written, or a folder of the user's is where a new skill belongs.
    """
    if not is_skills_folder(new.path):
        with write_new_folder("folder", new.path) as temporary:
            for name, source in adapters.items():
                copy(source, temporary / name)
            _write_files(temporary, new, new.statistics)
        return
    with explain_write_errors(f"`folder` {str(new.path)!r}"):
        _change(new, read_skills(new.path), adapters, copy)


def _change(
    new: SkillsFolder, old: SkillsFolder, adapters: Mapping[str, Path], copy: Callable[[Path, Path], None]
) -> None:
    folder = new.path
    for leftover in folder.glob(".*.tmp"):  # of commands that were killed
        _remove(leftover)
    written = {name: folder / f".{name}.{uuid.uuid4().hex}.tmp" for name in adapters}
    try:
        for name, source in adapters.items():
            copy(source, written[name])
            flush_to_disk(*written[name].iterdir(), written[name])
        for name in adapters:
            if name in old.skills:
                # A skill that is replaced does not exist for a moment: its LoRA and statistics belong together.
                old = replace(old, skills={each: entry for each, entry in old.skills.items() if each != name})
                atomic_write_json(folder / SKILLS_FILE, _record(old))
            else:
                _check_free(folder / name, written[name])
        for name in adapters:
            _remove(folder / name)
            os.replace(written[name], folder / name)
        # Until skills.json is replaced, the statistics must serve both.
        kept = {name: old.statistics[name] for name in old.skills}
        _write_files(folder, new, {**kept, **new.statistics})
        if gone := old.skills.keys() - new.skills.keys():
            _write_statistics(folder, new, new.statistics)
            for name in gone:
                _remove(folder / name)
    finally:
        for path in written.values():
            shutil.rmtree(path, ignore_errors=True)


def _write_files(folder: Path, new: SkillsFolder, statistics: Mapping[str, Tensors]) -> None:
    _write_statistics(folder, new, statistics)
    atomic_write_json(folder / SKILLS_FILE, _record(new))
    flush_to_disk(folder)


def _record(new: SkillsFolder) -> dict[str, Any]:
    """The content of `skills.json`."""
    return {
        "format": SKILLS_FORMAT,
        **{name: getattr(new, name) for name in _SETTINGS},
        "general_sha256": tensors_sha256(new.general),
        "skills": {name: asdict(new.skills[name]) for name in sorted(new.skills)},
    }


def _write_statistics(folder: Path, new: SkillsFolder, statistics: Mapping[str, Tensors]) -> None:
    tensors = {f"{_GENERAL}{key}": tensor for key, tensor in new.general.items()}
    tensors |= {f"{_SKILLS}{name}/{key}": each for name, own in statistics.items() for key, each in own.items()}
    atomic_write_bytes(folder / STATISTICS_FILE, save(_sorted_arrays(tensors), {"format": "pt"}))


def copy_lora(source: Path, target: Path) -> None:
    """Copy a LoRA, with the record of its training if there is one; other results of the training stay behind.

    Weights in a pickle become a file of safetensors.
    """
    target.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE, _RUN_RECORD):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (source / WEIGHTS_FILE).is_file():
        atomic_write_bytes(target / WEIGHTS_FILE, _as_safetensors(source))


def lora_sha256(source: Path) -> str:
    """The sha256 of the weights that `copy_lora` writes."""
    if (source / WEIGHTS_FILE).is_file():
        return file_sha256(source / WEIGHTS_FILE)
    return hashlib.sha256(_as_safetensors(source)).hexdigest()


def _as_safetensors(source: Path) -> bytes:
    from safetensors.torch import save as save_tensors

    return save_tensors(read_tensors(source), {"format": "pt"})


def _check_free(path: Path, written: Path) -> None:
    """Raise if the place of a new skill holds anything else than what an unfinished command has written there."""
    others = {file.name for file in path.iterdir()} - {file.name for file in written.iterdir()} if path.is_dir() else ()
    if others or path.is_file():
        raise MolaError(
            f"{str(path)!r} must be free for the skill: it holds {', '.join(sorted(others)[:5]) or 'a file'}. Move it."
        )


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists; a folder vanishes in one step."""
    if path.is_dir():
        hidden = path if path.suffix == ".tmp" else path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        if hidden != path:
            os.replace(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)
