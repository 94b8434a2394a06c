"""Features of prompts at a layer of the base model, and statistics of general text."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mola.files.terminal import show_progress
from mola.generation.predicting import base_of, device_of, encode_prompts, left_pad, pad_token_id
from mola.models.prompts import own_chat
from mola.tuner.skills.content import ContentFinder, chat_layouts, template_layouts
from mola.tuner.skills.general_text import general_texts
from mola.tuner.skills.lower_layers import hidden_at
from mola.tuner.skills.statistics import GeneralStatistics, PromptBatch, prompt_features

_BATCH = 8


def content_finder(
    tokenizer: PreTrainedTokenizerBase, adapters: Sequence[str | os.PathLike[str]] = ()
) -> ContentFinder:
    """Finds the user's content in prompts of mola's templates and of the chat templates of base model and adapters."""
    layouts = [*template_layouts(tokenizer), *chat_layouts(tokenizer)]
    for template in sorted({chat.template for adapter in adapters if (chat := own_chat(adapter)) is not None}):
        layouts += chat_layouts(tokenizer, template)
    return ContentFinder(tokenizer, layouts)


def features_at(
    model: Any, layer: int, tokenizer: PreTrainedTokenizerBase, finder: ContentFinder, prompts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Features `(N, d)` of prompts at the input of a layer; see `prompt_features`.

    Args:
        model: the base model, in eval mode.
        layer: the layer.
        tokenizer: its tokenizer.
        finder: finds the content of the prompts.
        prompts: token ids of each prompt.
    """

    def compute(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        return [hidden_at(model, layer, ids, mask)]

    return _features(model, compute, tokenizer, finder, prompts)[0]


def features_of_layers(
    model: Any, tokenizer: PreTrainedTokenizerBase, finder: ContentFinder, prompts: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Features of prompts at the input of every layer, from one pass per prompt; see `features_at`."""

    decoder = base_of(model).base_model
    reads_positions = "position_ids" in inspect.signature(decoder.forward).parameters

    @torch.no_grad()
    def compute(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if reads_positions else {}
        output = decoder(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True, **positions)
        return list(output.hidden_states[:-1])  # the last one is the output of the last layer

    return _features(model, compute, tokenizer, finder, prompts)


def measure_general_text(model: Any, layer: int, tokenizer: PreTrainedTokenizerBase) -> GeneralStatistics:
    """Statistics of general text at the input of a layer."""
    prompts = encode_prompts(tokenizer, general_texts())
    finder = ContentFinder(tokenizer)
    return GeneralStatistics.of_features(features_at(model, layer, tokenizer, finder, prompts))


def _features(
    model: Any,
    compute: Any,
    tokenizer: PreTrainedTokenizerBase,
    finder: ContentFinder,
    prompts: Sequence[Sequence[int]],
) -> list[torch.Tensor]:
    """Features at each of the layers whose inputs `compute` returns.

    Batches have the prompts in their order, whatever their lengths: equal prompts give equal bits.
    """
    pad, device = pad_token_id(tokenizer), device_of(model)
    found: list[list[torch.Tensor]] = []
    starts = range(0, len(prompts), _BATCH)
    for start in show_progress(starts, "Reading the prompts"):
        batch = prompts[start : start + _BATCH]
        ids, mask = left_pad(batch, pad, device)
        content = torch.zeros(ids.shape, dtype=torch.bool)
        for row, prompt in zip(content, batch, strict=True):
            row[len(row) - len(prompt) :] = torch.tensor(finder.mask(prompt))
        inputs = compute(ids, mask)
        features = [prompt_features(PromptBatch(hidden, content.to(device), ids)).cpu() for hidden in inputs]
        found.append(features)
    return [torch.cat(layer) for layer in zip(*found, strict=True)]
