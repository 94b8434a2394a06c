"""Heads of tasks, which are trained in full beside the experts."""

from __future__ import annotations

from typing import Any

from torch import nn

from mola.tuner.config import MolaConfig

_HEADS: dict[Any, tuple[str, ...]] = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_OTHER_HEADS = ("classification_head", "logits_proj")  # of sequence classifiers, which PEFT does not know


def add_head(model: nn.Module, config: MolaConfig, is_new: bool) -> None:
    """Add the heads of a configuration's task to its `modules_to_save`.

    PEFT writes those of these tasks into the user's object, after it has been copied.
    """
    known = _HEADS.get(config.task_type, ())
    if config.task_type == "SEQ_CLS" and is_new:
        known = tuple(name for name in _OTHER_HEADS if hasattr(model, name))
    heads = [name for name in known if name not in (config.modules_to_save or ())]
    if heads:
        config.modules_to_save = [*(config.modules_to_save or ()), *heads]
