"""The decision of a skills folder: its threshold, who is asked, and what changes when a skill comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from mola.checkpoints.skills_folder import SkillsFolder
from mola.tuner.skills.decision import Decider, moved_decisions, suggest_threshold
from mola.tuner.skills.statistics import GeneralStatistics, SkillStatistics


def statistics_of(folder: SkillsFolder) -> tuple[GeneralStatistics, dict[str, SkillStatistics]]:
    """The statistics of general text and of each skill."""
    skills = {name: SkillStatistics.from_tensors(tensors) for name, tensors in folder.statistics.items()}
    return GeneralStatistics.from_tensors(folder.general), skills


def decider_of(folder: SkillsFolder) -> Decider:
    """What decides who is asked."""
    return Decider(*statistics_of(folder), folder.threshold)


def with_threshold(folder: SkillsFolder) -> SkillsFolder:
    """The folder with the threshold that its reject rate sets; a threshold that was given stays."""
    if folder.reject_rate is None:
        return folder
    return replace(folder, threshold=suggest_threshold(*statistics_of(folder), folder.reject_rate))


def describe_moves(before: SkillsFolder | None, after: SkillsFolder, replaced: Collection[str] = ()) -> list[str]:
    """What became of decisions on held-out prompts of the skills that both folders have; one line per kind of move.

    Args:
        before: the folder before a change; None if there was none.
        after: the folder after the change.
        replaced: names of skills that have other prompts now, and are left out.
    """
    if before is None:
        return []
    moved = [each for each in moved_decisions(decider_of(before), decider_of(after)) if each.skill not in replaced]
    kinds = Counter((each.skill, each.before, each.after) for each in moved)
    held_out = {name: len(tensors["held_out"]) for name, tensors in before.statistics.items()}
    return [
        f"{count} of {held_out[skill]} held-out prompts of {skill}: from {_shown(old)} to {_shown(new)}"
        for (skill, old, new), count in sorted(kinds.items(), key=str)
    ]


def _shown(name: str | None) -> str:
    return name or "the base model"
