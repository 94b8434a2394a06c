"""`CountedTokens`: which tokens of a forward pass count in the router losses, and how much the losses weigh."""

from __future__ import annotations

import inspect
from collections.abc import Set
from typing import Any

import torch
from torch import nn

from mola.architecture.layer_stacks import LayerStacks

# Tasks whose labels stand at the position of their token; labels of causal language models stand one position later.
_UNSHIFTED_TASKS = ("SEQ_2_SEQ_LM", "TOKEN_CLS", "SEQ_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# Task by `loss_type` of Transformers' models, for adapters without `task_type`. PEFT has no task type
# for masked language models.
_TASKS_OF_LOSSES = {
    "ForMaskedLM": "FEATURE_EXTRACTION",
    "ForTokenClassification": "TOKEN_CLS",
    "ForSequenceClassification": "SEQ_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class CountedTokens:
    """The tokens that the inputs of a model's forward pass select by `attention_mask` and `labels`.

    Args:
        model: the model.
        layer_stacks: the layers of the model.
    """

    def __init__(self, model: nn.Module, layer_stacks: LayerStacks) -> None:
        self._model = model
        self._layer_stacks = layer_stacks
        self._attention_mask: torch.Tensor | None = None
        self._label_mask: torch.Tensor | None = None
        self._divides_by_num_items = True  # whether the model's loss is a sum divided by `num_items_in_batch`

    def clear(self) -> None:
        """Forget the masks of the last forward pass."""
        self._attention_mask = self._label_mask = None

    def read(self, inputs: dict[str, Any], task_types: Set[str | None]) -> None:
        """Read the masks of a forward pass.

        Args:
            inputs: all arguments of the call by name.
            task_types: `task_type` of the active adapters.
        """
        tasks = {task or _task_of_model(self._model) for task in task_types}
        has_shifted_labels = tasks.isdisjoint(_UNSHIFTED_TASKS)
        is_divided = "SEQ_2_SEQ_LM" in tasks and _uses_loss_function(self._model)
        self._divides_by_num_items = has_shifted_labels or is_divided
        attention_mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        if torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
            self._attention_mask = attention_mask.bool()
        if torch.is_tensor(labels) and labels.dim() == 2:
            mask = labels.ne(-100)
            if has_shifted_labels:  # position t predicts the label at t + 1, and the last position predicts none
                mask = torch.cat([mask[:, 1:], mask.new_zeros(len(mask), 1)], 1)
            self._label_mask = mask
        elif inputs.get("shift_labels") is not None:
            # Used only without `labels`: otherwise it may cover just the positions in `logits_to_keep`.
            self._label_mask = inputs["shift_labels"].ne(-100)

    def mask(self, num_tokens: int, layer_index: int | None, runs: int) -> torch.Tensor | None:
        """The mask `(num_tokens,)` of the tokens that count in one module; None if all its tokens count.

        All tokens count if their number differs from the mask's, as in an expert of a MoE base. A module that runs
        several times in a forward pass (ALBERT's layers) sees the mask's tokens `runs` times.
        """
        # In an encoder-decoder the attention mask belongs to the encoder's tokens, and the labels to the decoder's.
        has_encoder = bool(self._layer_stacks.num_encoder_layers)
        masks = [self._attention_mask]
        if not (has_encoder and self._layer_stacks.is_encoder(layer_index)):
            masks.append(self._label_mask)
        known = [mask for mask in masks if mask is not None]
        fitting = [mask.reshape(-1).repeat(runs) for mask in known if num_tokens == runs * mask.numel()]
        if has_encoder:
            fitting = fitting[-1:]
        if not fitting:
            return None
        return fitting[0] if len(fitting) == 1 else fitting[0] * fitting[1].to(fitting[0].device)

    def share_of_batch(self, num_items: Any, device: torch.device) -> Any:
        """This forward pass's share of the `num_items` labelled tokens of an optimiser step.

        1 if `num_items` is None, or if the model does not divide its loss by it.
        """
        if num_items is None or self._label_mask is None or not self._divides_by_num_items:
            return 1.0
        share = self._label_mask.sum() / num_items
        return share.to(device) if isinstance(share, torch.Tensor) else share


def _task_of_model(model: nn.Module) -> str | None:
    """PEFT's task type of a model; None for a causal language model, and for an unknown model."""
    task = _TASKS_OF_LOSSES.get(getattr(model, "loss_type", None) or "")
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return task or ("SEQ_2_SEQ_LM" if is_encoder_decoder else None)


def _uses_loss_function(model: nn.Module) -> bool:
    """Whether an encoder-decoder divides its loss like causal models (T5Gemma); T5 and BART always use the mean."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names
