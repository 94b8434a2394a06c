"""A sequence of which every stage adds a skill: the skills folder after a stage, who is asked, what changes."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.checkpoints.skills_folder import read_skills
from mola.files.digests import WEIGHTS_FILE, file_sha256
from mola.skills.changing import remove
from mola.skills.options import RemoveOptions
from mola.studies.continual_learning.stages import Stage
from mola.training.skill import add_trained_skill

Answers = Mapping[str, Sequence[Mapping[str, Any]]]  # task -> samples of its test


def settle_skills(folder: Path, stages: Sequence[Stage]) -> None:
    """Let a skills folder hold the skills of these finished stages and no others; mostly it does already."""
    wanted = {stage.name: file_sha256(stage.folder / WEIGHTS_FILE) for stage in stages}
    found = read_skills(folder).skills if is_skills_folder(folder) else {}
    kept = {name for name, entry in found.items() if entry.adapter_sha256 == wanted.get(name)}
    if found and not kept:
        shutil.rmtree(folder)
    elif gone := sorted(found.keys() - kept):
        remove(RemoveOptions(str(folder), gone))
    for stage in stages:
        if stage.name not in kept:
            add_trained_skill(stage.options, stage.folder, None)


def asked(answers: Answers) -> dict[str, dict[str, int]]:
    """Task -> name of a skill, or "base" -> number of questions that ask it."""
    return {task: dict(Counter(sample["asked"] for sample in samples)) for task, samples in answers.items()}


def changed(before: Answers, now: Answers) -> list[dict[str, Any]]:
    """The questions of earlier tasks that ask another skill, or have another answer, than after the stage before.

    Returns:
        For each question `task`, `place` in its test, counted from 0, `id`, and `before` and `now`, each with `asked`,
        `predicted` and `correct`.
    """
    parts = ("asked", "predicted", "correct")
    found = []
    for task, samples in before.items():
        for place, (old, new) in enumerate(zip(samples, now[task], strict=True)):
            states = [{part: sample[part] for part in parts} for sample in (old, new)]
            if states[0] != states[1]:
                question = {"task": task, "place": place, "id": new["id"]}
                found.append({**question, "before": states[0], "now": states[1]})
    return found
