"""`mola.Skills`: the commands `mola skills ...` for a program."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.checkpoints.skills_folder import read_skills
from mola.skills import changing
from mola.skills.adding import AddResult, add
from mola.skills.options import AddOptions, MergeOptions, RemoveOptions, TestOptions
from mola.skills.summary import SkillSummary, summarize
from mola.skills.testing import TestResult, test


class Skills:
    """A skills folder. Every change is written at once.

    `mola.load_model(folder)` loads its base model, of which each prompt asks a skill.

    Args:
        folder: a skills folder, or a new one, which `add` creates.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()

    @property
    def names(self) -> list[str]:
        """The names of the skills, sorted; none in a folder that does not exist yet.

        Raises:
            MolaError: the folder is damaged, or is no skills folder.
        """
        return read_skills(self.folder).names if self.folder.exists() else []

    def summary(self) -> list[SkillSummary]:
        """Rank, layers, number of prompts and size of each skill, by name."""
        return summarize(read_skills(self.folder))

    def add(
        self,
        adapters: Mapping[str, str | os.PathLike[str]],
        data: Mapping[str, str | os.PathLike[str]] | None = None,
        **options: Any,
    ) -> AddResult:
        """Add skills.

        Args:
            adapters: name -> folder of a plain LoRA.
            data: name -> prompts; None: the training data that the adapters' runs record.
            options: see `AddOptions`.

        Raises:
            MolaError: see `mola.skills.adding.add`.
        """
        pairs = [f"{name}={os.fspath(adapter)}" for name, adapter in adapters.items()]
        paths = None if data is None else [os.fspath(data[name]) for name in adapters]
        return add(AddOptions(folder=str(self.folder), skills=pairs, data=paths, **options))

    def remove(self, *names: str) -> None:
        """Remove skills.

        Raises:
            MolaError: there is no such skill, or no skill would be left.
        """
        changing.remove(RemoveOptions(str(self.folder), list(names)))

    def merge(self, *others: str | os.PathLike[str]) -> None:
        """Add the skills of other folders of the same base model.

        Raises:
            MolaError: see `mola.skills.changing.merge`.
        """
        changing.merge(MergeOptions(str(self.folder), [os.fspath(each) for each in others]))

    def test(self, data: Mapping[str, str | os.PathLike[str]], **options: Any) -> TestResult:
        """Decide who is asked for some prompts.

        Args:
            data: name of a skill -> its prompts; "base" -> prompts that no skill is for.
            options: see `TestOptions`.

        Raises:
            MolaError: see `mola.skills.testing.test`.
        """
        pairs = [f"{name}={os.fspath(path)}" for name, path in data.items()]
        return test(TestOptions(folder=str(self.folder), data=pairs, **options))
