"""Logits only at positions whose next token contributes to the loss, which the tokens of a prompt do not.

With a large vocabulary the logits take a large share of a training step's time and most of its memory.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from mola.data.tokenized import IGNORED
from mola.generation.likelihood import Batch, needed_logits
from mola.training.options import TrainOptions

logger = logging.getLogger(__name__)


class NeededLogits:
    """A collator that wraps a different collator and adds to its batches which logits the loss needs.

    - `logits_to_keep`: positions whose next token contributes to the loss in some sample, `(K,)`.
    - `shift_labels`: the next tokens of these positions, `(samples, K)`. `labels` stay whole: router losses read them.

    Args:
        collate: makes batches with `labels: (samples, tokens)`, where each label is at the position of its own token.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Batch:
        """One batch. Nothing is added if none of its tokens contributes to the loss."""
        batch = self.collate(samples)
        return {**batch, **needed_logits(batch["labels"])}


def computes_needed_logits(model: nn.Module, options: TrainOptions) -> bool:
    """Whether a causal language model can compute its loss from the needed logits only. If not, log the reason."""
    reason = _why_all_logits(model, options)
    if reason is not None:
        logger.info("The logits of all positions are computed: %s.", reason)
    return reason is None


def _why_all_logits(model: nn.Module, options: TrainOptions) -> str | None:
    """None if the needed logits suffice, else the reason why they do not."""
    for name in ("label_smoothing_factor", "use_liger_kernel"):
        if getattr(options, name):
            return f"`{name}` reads them"
    if getattr(options.accelerator_config, "dispatch_batches", None):
        return "`accelerator_config` with dispatch_batches cuts a batch along its first dimension"
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__} has no `logits_to_keep`"
    return _why_different_loss(model, options.mixed_dtype, type(inner).__name__)


def _why_different_loss(model: nn.Module, mixed_dtype: torch.dtype | None, name: str) -> str | None:
    """None if the needed logits of three tokens give the same loss as all logits, else the reason."""
    tokens = torch.tensor([[1, 2, 3]], device=next(model.parameters()).device)
    labels = torch.tensor([[IGNORED, IGNORED, 3]], device=tokens.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(tokens.device.type, mixed_dtype, enabled=mixed_dtype is not None):
            full_loss = model(input_ids=tokens, labels=labels).loss.float()
            needed_loss = model(input_ids=tokens, labels=labels, **needed_logits(labels)).loss.float()
        is_same = torch.allclose(full_loss, needed_loss, rtol=1e-2, atol=1e-3, equal_nan=True)
    except Exception as error:  # the model may still train with all logits
        return f"{name} fails with fewer logits: {error}"
    finally:
        model.train(was_training)
    return None if is_same else f"{name} has a different loss with fewer logits"
