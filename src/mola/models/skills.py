"""Puts the skills of a folder into a base model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from mola.checkpoints.skills_folder import SkillsFolder
from mola.models.prompts import own_chat
from mola.tuner.skills.content import ContentFinder, chat_layouts, template_layouts
from mola.tuner.skills.loras import DEFAULT_MAX_LOADED
from mola.tuner.skills.runtime import SkillsRuntime
from mola.tuner.skills.statistics import GeneralStatistics, SkillStatistics


def content_finder(
    tokenizer: PreTrainedTokenizerBase, adapters: Iterable[str | os.PathLike[str]] = ()
) -> ContentFinder:
    """Finds the user's content in prompts of mola's templates, and of the chat templates of base model and adapters."""
    layouts = [*template_layouts(tokenizer), *chat_layouts(tokenizer)]
    for template in sorted({chat.template for adapter in adapters if (chat := own_chat(adapter)) is not None}):
        layouts += chat_layouts(tokenizer, template)
    return ContentFinder(tokenizer, layouts)


def attach_skills(
    model: Any, folder: SkillsFolder, tokenizer: PreTrainedTokenizerBase, max_loaded: int = DEFAULT_MAX_LOADED
) -> SkillsRuntime:
    """Put the skills of a folder into a base model, in eval mode: `model.skills`.

    Args:
        model: the base model, whose weights the caller has compared with the folder's.
        folder: the skills.
        tokenizer: the base model's tokenizer.
        max_loaded: maximum number of LoRAs in memory.

    Raises:
        MolaError: a skill does not fit the model.
    """
    general = GeneralStatistics.from_tensors(folder.general)
    finder = content_finder(tokenizer, [folder.path / name for name in folder.names])
    runtime = SkillsRuntime(model, folder.layer, finder, general, folder.threshold, max_loaded)
    for name in folder.names:
        statistics = SkillStatistics.from_tensors(folder.statistics[name])
        runtime.add(name, folder.path / name, statistics, folder.skills[name].adapter_sha256)
    runtime.reject_rate = folder.reject_rate
    return runtime
