"""Samples of a model with skills: which skill each one asks, and how the skill's prompts are written.

The prompt alone decides. All samples of a batch ask the same skill, so results are those of its LoRA.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from mola.checkpoints.skills_folder import BASE, read_skills
from mola.data.templates import Template
from mola.generation.batching.skills import Skills
from mola.generation.predicting import batches_by_length, inference_state
from mola.models.prompts import template_for, template_of, trains_end_token
from mola.tuner.skills.runtime import SkillsRuntime

_BATCH = 16  # prompts in a pass of the layers that decide


class SkillPrompts(NamedTuple):
    """How the prompts of a skill are written, as in its training."""

    template: Template
    add_eos_token: bool


def skill_prompts(
    folder: str, template: str | None, has_prompts: bool, tokenizer: PreTrainedTokenizerBase
) -> dict[str, SkillPrompts]:
    """Name -> how its prompts are written, of the skills of a folder that record their template.

    Args:
        folder: a skills folder.
        template: name of the template that all prompts have; None for the one of each skill's training.
        has_prompts: False for texts without a prompt, which no template writes.
        tokenizer: the base model's tokenizer.
    """
    skills = read_skills(folder)
    found = {}
    for name in skills.names if has_prompts else ():
        adapter = skills.adapter(name)
        if (used := template or template_of(adapter)) is not None:
            found[name] = SkillPrompts(template_for(used, tokenizer, adapter), trains_end_token(adapter))
    return found


def decides(model: Any) -> bool:
    """Whether each prompt asks a skill of the model: it has skills, and the caller does not name one with `use`."""
    runtime = getattr(model, "skills", None)
    return isinstance(runtime, SkillsRuntime) and not runtime.is_named


def skills_asked(model: Any, prompts: Sequence[Sequence[int]]) -> list[str | None]:
    """The skill that each prompt (token ids) asks; None is the base model."""
    skills, names = Skills(model), dict[int, str | None]()
    with inference_state(model):
        for batch in batches_by_length([len(prompt) for prompt in prompts], _BATCH):
            names |= dict(zip(batch, skills.decide([prompts[index] for index in batch]), strict=True))
    return [names[index] for index in range(len(prompts))]


def asking(model: Any, skills: Sequence[str | None] | None, indices: Sequence[int]) -> AbstractContextManager[Any]:
    """A `with` block in which the samples of a batch ask their skill, the same one; nothing if no skills are asked."""
    if skills is None:
        return nullcontext()
    (name,) = {skills[index] for index in indices}
    return model.skills.use(name)


def count_asked(names: Iterable[str | None]) -> dict[str, int]:
    """Name of a skill, or "base" for the base model -> number of samples that it answers."""
    return dict(sorted(Counter(name or BASE for name in names).items()))


def describe(asked: Mapping[str, int] | None) -> str:
    """Who was asked how often, for a table's caption; "" if no skills were."""
    return "" if asked is None else "\nasked: " + ", ".join(f"{name} {count}" for name, count in asked.items())
