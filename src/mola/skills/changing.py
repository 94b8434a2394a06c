"""Removes skills from a folder, and adds those of other folders. Neither needs data."""

from __future__ import annotations

from pathlib import Path

from mola.checkpoints.skills_folder import (
    SkillsFolder,
    locked,
    merge_folders,
    read_skills,
    remove_entry,
    write_skills,
)
from mola.skills.adding import copy_skill
from mola.skills.deciding import describe_moves, with_threshold
from mola.skills.options import MergeOptions, RemoveOptions


def remove(options: RemoveOptions) -> tuple[SkillsFolder, list[str]]:
    """Remove skills; needs neither base model nor data.

    Returns:
        The folder as it is now, and what became of earlier decisions on held-out prompts of the skills that stay.

    Raises:
        MolaError: there is no such skill, or no skill would be left.
    """
    path = Path(options.folder).expanduser()
    with locked(path):
        folder = before = read_skills(path)
        for name in dict.fromkeys(options.skills):
            folder = remove_entry(folder, name)
        folder = with_threshold(folder)
        write_skills(folder, {}, copy_skill)
    return folder, describe_moves(before, folder)


def merge(options: MergeOptions) -> tuple[SkillsFolder, list[str]]:
    """Add the skills of other folders; needs neither base model nor data.

    Returns:
        The folder as it is now, and what became of earlier decisions on held-out prompts of its own skills.

    Raises:
        MolaError: a folder has another base model or another layer, or two different skills have one name.
    """
    path = Path(options.folder).expanduser()
    adapters: dict[str, Path] = {}
    with locked(path):
        folder = before = read_skills(path)
        for other in options.others:
            folder, new = merge_folders(folder, read_skills(other))
            adapters |= new
        folder = with_threshold(folder)
        write_skills(folder, adapters, copy_skill)
    return folder, describe_moves(before, folder)
