"""Options of the commands `mola skills add`, `remove`, `list`, `test`, `merge` and `suggest`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mola.checkpoints.adapter_settings import is_skills_folder, skills_settings, unknown_skill
from mola.checkpoints.recorded_base import base_model_of
from mola.checkpoints.skills_folder import check_name_is_free, check_skill_name
from mola.errors import MolaError
from mola.files.atomic import check_new_folder
from mola.files.reading import first_repeated
from mola.models.options import ModelOptions
from mola.options.fields import START, Group, check_positive, check_required, convert_paths, option, required

REJECT_RATE = 0.02
_FOLDER = "Skills folder."
_TASK = "Task of the data: its name or a YAML file. Default: the one of the adapter's run, else by the columns."
_TEMPLATE = "Prompt template of the data. Default: the one that the skill was trained with; see docs/guides/data.md."
_BASE = "Folder or hub id of the base model. Default: the one that the skills folder records."


@dataclass
class AddOptions(ModelOptions):
    """Options of `mola skills add`."""

    _start: ClassVar = START
    folder: str = required("Skills folder; it is created with the first skill.")
    skills: list[str] = option(
        None, "The skills, NAME=ADAPTER each: a folder with a plain LoRA.", required=True, metavar="NAME=ADAPTER"
    )
    base_model: str = option(
        None,
        "Folder or hub id of the base model. Default: the one that the skills folder records, else the one that the "
        "adapters were trained on.",
    )
    data: list[str] | None = option(
        None,
        "Prompts that each skill is for, one source per skill in the same order. Default: the training data that the "
        "adapter's run records.",
    )

    _decision: ClassVar = Group("decision")
    layer: int | None = option(
        None,
        "The decision reads the input of this layer. Default: the folder's; in a new folder a third of the layers, "
        "rounded down.",
    )
    reject_rate: float | None = option(
        None,
        "Share of a skill's own prompts that may be left to the base model; sets the threshold. Default: the "
        f"folder's, {REJECT_RATE} in a new one.",
    )
    threshold: float | None = option(None, "Threshold of the decision, instead of one that `reject_rate` sets.")

    _data: ClassVar = Group("data")
    task: str | None = option(None, _TASK)
    template: str | None = option(None, _TEMPLATE)
    split: str = option("train", "Split to read if `data` has several.")
    limit: int = option(200, "Read at most this many prompts per skill, evenly spread over the data.")

    _run: ClassVar = Group("run")
    overwrite: bool = option(False, "Replace skills that the folder has under the same names.")

    def __post_init__(self) -> None:
        convert_paths(self)
        check_required(self)
        self.skills = [self.skills] if isinstance(self.skills, str) else list(self.skills)
        self.data = [self.data] if isinstance(self.data, str) else self.data
        check_positive(limit=self.limit)
        check_rate(self.reject_rate)
        if self.threshold is not None and self.reject_rate is not None:
            raise MolaError("`threshold` and `reject_rate` both set the threshold. Leave out one of the two.")
        self.folder = os.path.expanduser(self.folder)
        adapters = self.sources()
        if self.data is not None and len(self.data) != len(adapters):
            raise MolaError(
                f"`data` must have one source per skill, in their order: got {len(self.data)} sources for "
                f"{', '.join(adapters)}."
            )
        self.base_model = base_model_of(
            self.base_model, [self.folder] if is_skills_folder(self.folder) else adapters.values()
        )

    def check(self) -> None:
        """Raise for a name that cannot be a skill's or is taken, and for a new folder that has files."""
        if not is_skills_folder(self.folder):
            check_new_folder("folder", self.folder)
        for name in self.sources():
            check_skill_name(name)
            check_name_is_free(self.folder, name, self.overwrite)

    def sources(self) -> dict[str, str]:
        """Name of each skill -> folder of its adapter."""
        return split_pairs("skills", self.skills, "NAME=ADAPTER")


@dataclass
class RemoveOptions:
    """Options of `mola skills remove`."""

    folder: str = required(_FOLDER)
    skills: list[str] = option(None, "Names of the skills to remove.", required=True, metavar="NAME")

    def __post_init__(self) -> None:
        convert_paths(self)
        check_required(self)
        self.skills = [self.skills] if isinstance(self.skills, str) else list(self.skills)

    def check(self) -> None:
        """Raise if the folder has no such skill."""
        names = skills_settings(Path(self.folder).expanduser())["skills"]
        for name in self.skills:
            if name not in names:
                raise unknown_skill(name, names, self.folder)


@dataclass
class ListOptions:
    """Options of `mola skills list`."""

    folder: str = required(_FOLDER)
    json: str | None = option(
        None,
        "Result file (JSON); - prints JSON instead of the table.",
        nargs="?",
        const="-",
        metavar="FILE",
        writes="file",
    )
    overwrite: bool = option(False, "Replace an existing result file.")

    def __post_init__(self) -> None:
        convert_paths(self)
        check_required(self)


@dataclass
class TestOptions(ModelOptions):
    """Options of `mola skills test`."""

    __test__: ClassVar = False  # pytest would look for tests in it

    _start: ClassVar = START
    folder: str = required(_FOLDER)
    data: list[str] = option(
        None,
        "Prompts, NAME=DATA for each skill; or one source per skill, in the order of their names. base=DATA names "
        "prompts that no skill is for.",
        required=True,
        metavar="NAME=DATA",
    )
    base_model: str = option(None, _BASE)

    _data: ClassVar = Group("data")
    task: str | None = option(None, _TASK)
    template: str | None = option(None, _TEMPLATE)
    split: str = option("test", "Split to read if the data has several.")
    limit: int = option(200, "Read at most this many prompts of each source, evenly spread over it.")

    _run: ClassVar = Group("run")
    output: str | None = option(None, "Result file (JSON).", writes="file")
    misses: str | None = option(None, "File (JSONL) of the prompts that do not ask whom they should.", writes="file")
    overwrite: bool = option(False, "Replace existing result files.")

    def __post_init__(self) -> None:
        convert_paths(self)
        check_required(self)
        self.data = [self.data] if isinstance(self.data, str) else list(self.data)
        check_positive(limit=self.limit)
        self.folder = os.path.expanduser(self.folder)
        self.base_model = base_model_of(self.base_model, [self.folder])


@dataclass
class MergeOptions:
    """Options of `mola skills merge`."""

    folder: str = required("Skills folder that gets the skills of the others, and keeps its own settings.")
    others: list[str] = option(
        None, "Skills folders of the same base model; they stay as they are.", required=True, metavar="OTHER"
    )

    def __post_init__(self) -> None:
        convert_paths(self)
        check_required(self)
        self.others = [self.others] if isinstance(self.others, str) else list(self.others)

    def check(self) -> None:
        """Raise for a folder that is no skills folder."""
        for folder in (self.folder, *self.others):
            skills_settings(Path(folder).expanduser())


@dataclass
class SuggestOptions(ModelOptions):
    """Options of `mola skills suggest`."""

    _start: ClassVar = START
    folder: str = required("Base model, a folder or hub id; or a skills folder, which stays as it is.")
    data: list[str] = option(
        None, "Prompts of at least two skills, NAME=DATA each.", required=True, metavar="NAME=DATA"
    )
    base_model: str = option(None, "Folder or hub id of the base model, if `folder` is a skills folder.")

    _decision: ClassVar = Group("decision")
    reject_rate: float = option(REJECT_RATE, "Share of a skill's own prompts that may be left to the base model.")

    _data: ClassVar = Group("data")
    task: str | None = option(None, _TASK)
    template: str | None = option(None, _TEMPLATE)
    split: str = option("train", "Split to read if the data has several.")
    limit: int = option(200, "Read at most this many prompts of each source, evenly spread over it.")

    _run: ClassVar = Group("run")
    output: str | None = option(None, "Result file (JSON).", writes="file")
    overwrite: bool = option(False, "Replace an existing result file.")

    def __post_init__(self) -> None:
        convert_paths(self)
        check_required(self)
        self.data = [self.data] if isinstance(self.data, str) else list(self.data)
        check_positive(limit=self.limit)
        check_rate(self.reject_rate)
        folder = os.path.expanduser(self.folder)
        if self.base_model is None:
            self.base_model = base_model_of(None, [folder]) if is_skills_folder(folder) else folder


def split_pairs(option: str, pairs: list[str], form: str) -> dict[str, str]:
    """Name -> path of the values of an option, each a `NAME=PATH`; `form` is for messages.

    Raises:
        MolaError: a value has no name or no path, or two have the same name.
    """
    found = {}
    for pair in pairs:
        name, sign, path = pair.partition("=")
        if not (name and sign and path):
            raise MolaError(f"`{option}` must have the form {form}: got {pair!r}.")
        found[name] = os.path.expanduser(path)
    if len(found) < len(pairs):
        repeated = first_repeated(pair.partition("=")[0] for pair in pairs)
        raise MolaError(f"`{option}` must have different names: {repeated!r} is given twice. Rename one.")
    return found


def check_rate(reject_rate: float | None) -> None:
    """Raise for a `reject_rate` that is no share below 1."""
    if reject_rate is not None and not 0 <= reject_rate < 1:
        raise MolaError(f"`reject_rate` must be at least 0 and below 1: got {reject_rate}.")
