"""Logits only at positions whose next token is trained: what a model predicts within a prompt enters no loss.

With a large vocabulary the logits are a good part of a training step's time and most of its memory.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from mola.data.tokenized import IGNORED

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


class NeededLogits:
    """A collator that adds to another one's batches which logits the loss needs.

    - `logits_to_keep`: positions at which some sample's next token is trained, `(K,)`.
    - `shift_labels`: the next tokens there, `(samples, K)`; `labels` stay whole, the routers' losses read them.

    Args:
        collate: makes batches with `labels: (samples, tokens)`, each at the place of its own token.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Batch:
        """One batch; as it was where no next token is trained."""
        batch = self.collate(samples)
        return {**batch, **needed_logits(batch["labels"])}


def needed_logits(labels: torch.Tensor) -> Batch:
    """`logits_to_keep` and `shift_labels` for `labels: (samples, tokens)`; nothing where no token is trained."""
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    kept = (shifted != IGNORED).any(0).nonzero().squeeze(1)
    return {"logits_to_keep": kept, "shift_labels": shifted[:, kept].contiguous()} if len(kept) else {}


def computes_needed_logits(model: nn.Module, options: TrainingArguments) -> bool:
    """Whether a model's loss is the same from the logits that it needs: tried with three tokens. The log says why not.

    Args:
        model: a causal language model, maybe with adapters, before anything is wrapped around it.
        options: what a trainer does with logits beside the model's own loss.
    """
    reason = _why_all(model, options)
    if reason is not None:
        logger.info("The logits of all positions are computed, needed or not: %s.", reason)
    return reason is None


def _why_all(model: nn.Module, options: TrainingArguments) -> str | None:
    # The first two compute the loss again from all logits, the others cut a batch along its first dimension.
    for name in ("label_smoothing_factor", "use_liger_kernel"):
        if getattr(options, name):
            return f"`{name}` reads them"
    if getattr(getattr(options, "accelerator_config", None), "dispatch_batches", None):
        return "`accelerator_config` with dispatch_batches cuts a batch along its first dimension"
    if options.n_gpu > 1:
        return "one process uses several GPUs"
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__} has no `logits_to_keep`"
    tokens = torch.tensor([[1, 2, 3]], device=next(model.parameters()).device)
    labels = torch.tensor([[IGNORED, IGNORED, 3]], device=tokens.device)
    was_training = model.training
    model.eval()
    try:
        mixed = getattr(options, "mixed_dtype", None)  # as in the run
        with torch.no_grad(), torch.autocast(tokens.device.type, mixed, enabled=mixed is not None):
            every = model(input_ids=tokens, labels=labels).loss.float()
            needed = model(input_ids=tokens, labels=labels, **needed_logits(labels)).loss.float()
        is_same = torch.allclose(every, needed, rtol=1e-2, atol=1e-3, equal_nan=True)
    except Exception as error:  # whatever it is, a model that is asked as usual may still work
        return f"{type(inner).__name__} fails with less: {error}"
    finally:
        model.train(was_training)
    return None if is_same else f"{type(inner).__name__} has another loss with less"
