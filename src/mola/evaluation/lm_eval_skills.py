"""The harness's model for a skills folder: each context asks the skill that knows it.

This module imports the harness.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from mola.evaluation.skills import asking, skills_asked

_Request = tuple[Any, list[int], list[int]]  # the texts, and the token ids of context and continuation


class SkillsLM(HFLM):
    """The harness's `hf` model, of a base model with skills.

    A context decides without its continuations, of which all are scored by the same skill. A text without a context
    decides as a whole.

    Args:
        model: the base model with its skills.
        options: further arguments of the harness's model.

    Attributes:
        asked: skill -> number of contexts that it answered; None is the base model.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(pretrained=model, **options)
        self.asked: Counter[str | None] = Counter()

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **options: Any) -> list[tuple[float, bool]]:
        special = set(self.tokenizer.all_special_ids)
        prompts = [
            tuple(context if set(context) - special else context + continuation)
            for _, context, continuation in requests
        ]
        distinct = list(dict.fromkeys(prompts))
        names = dict(zip(distinct, skills_asked(self.model, distinct), strict=True))
        self.asked.update(names.values())
        skills = [names[prompt] for prompt in prompts]
        results: dict[int, tuple[float, bool]] = {}
        for name in dict.fromkeys(skills):
            indices = [index for index, asked in enumerate(skills) if asked == name]
            with asking(self.model, skills, indices):
                found = super()._loglikelihood_tokens([requests[index] for index in indices], **options)
            results |= dict(zip(indices, found, strict=True))
        return [results[index] for index in range(len(requests))]

    def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
        generated = super()._model_generate(context, *arguments, **options)
        self.asked.update(self.model.skills.last_names)  # `generate` has decided itself
        return generated
