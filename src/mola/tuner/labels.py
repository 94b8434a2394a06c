"""Which position a label belongs to, and what a model's loss is a mean over: by the adapter's task or the model's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from torch import nn

_UNSHIFTED_TASKS = ("SEQ_2_SEQ_LM", "TOKEN_CLS", "SEQ_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# By `loss_type` of Transformers' models, for adapters without a task type; PEFT has none for masked language models.
_TASKS_OF_LOSSES = {
    "ForMaskedLM": "FEATURE_EXTRACTION",
    "ForTokenClassification": "TOKEN_CLS",
    "ForSequenceClassification": "SEQ_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def labels_of(model: nn.Module, task_types: Iterable[str | None]) -> tuple[bool, bool]:
    """Whether labels stand where their token is, not one position further, and whether the loss follows their number.

    Args:
        model: a model of Transformers, or another one.
        task_types: of the active adapters, as PEFT has them; None is what the model is for.
    """
    tasks = {task or _task_of(model) for task in task_types}
    unshifted = not tasks.isdisjoint(_UNSHIFTED_TASKS)
    return unshifted, not unshifted or ("SEQ_2_SEQ_LM" in tasks and _uses_loss_function(model))


def _task_of(model: nn.Module) -> str | None:
    """The task type that a model is for; None for a causal language model, and where it does not tell."""
    task = _TASKS_OF_LOSSES.get(getattr(model, "loss_type", None) or "")
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return task or ("SEQ_2_SEQ_LM" if is_encoder_decoder else None)


def _uses_loss_function(model: nn.Module) -> bool:
    """Whether it computes its loss as causal models do (T5Gemma); others (T5, BART) take the mean in any case."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names
