"""Features of prompts at a layer of the base model, and statistics of general text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mola.files.terminal import show_progress
from mola.generation.predicting import base_of, device_of, encode_prompts
from mola.tuner.skills.content import ContentFinder
from mola.tuner.skills.general_text import general_texts
from mola.tuner.skills.lower_layers import hidden_at
from mola.tuner.skills.reading import Compute, read_layers
from mola.tuner.skills.statistics import GeneralStatistics, prompt_features

_BATCH = 8


def features_at(model: Any, layer: int, finder: ContentFinder, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Features of prompts at the input of a layer; see `prompt_features`.

    Args:
        model: the base model, in eval mode.
        layer: the layer.
        finder: finds the content of the prompts.
        prompts: token ids of each prompt.
    """
    return _features(lambda ids, mask: [hidden_at(model, layer, ids, mask)], model, finder, prompts)[0]


def features_of_layers(model: Any, finder: ContentFinder, prompts: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
    """Features of prompts at the input of every layer, from one pass per prompt; see `features_at`."""

    decoder = base_of(model).base_model

    @torch.no_grad()
    def compute(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        output = decoder(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return list(output.hidden_states[:-1])  # the last one is the output of the last layer

    return _features(compute, model, finder, prompts)


def measure_general_text(model: Any, layer: int, tokenizer: PreTrainedTokenizerBase) -> GeneralStatistics:
    """Statistics of general text at the input of a layer."""
    prompts = encode_prompts(tokenizer, general_texts())
    return GeneralStatistics.of_features(features_at(model, layer, ContentFinder(tokenizer), prompts))


def _features(
    compute: Compute, model: Any, finder: ContentFinder, prompts: Sequence[Sequence[int]]
) -> list[list[torch.Tensor]]:
    """Features at each of the layers whose inputs `compute` returns.

    Batches have the prompts in their order, whatever their lengths: equal prompts give equal bits.
    """
    found: list[list[list[torch.Tensor]]] = []
    for start in show_progress(range(0, len(prompts), _BATCH), "Reading the prompts"):
        batches = read_layers(compute, finder, prompts[start : start + _BATCH], device_of(model))
        found.append([prompt_features(batch) for batch in batches])
    return [[each for batch in layer for each in batch] for layer in zip(*found, strict=True)]
