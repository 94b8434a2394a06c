"""Read the content of prompts by the layers below the decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mola.tuner.skills.content import ContentFinder
from mola.tuner.skills.lower_layers import hidden_at
from mola.tuner.skills.statistics import PromptBatch

Compute = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]


def read_prompts(model: Any, layer: int, finder: ContentFinder, prompts: Sequence[Sequence[int]]) -> PromptBatch:
    """The content of prompts at the input of a layer.

    Args:
        model: the base model, in eval mode, with nothing adapted below the layer.
        layer: the layer.
        finder: finds the content of the prompts.
        prompts: token ids of each prompt.

    Raises:
        MolaError: a prompt is empty, or the model has no such layer.
    """
    return read_layers(lambda ids, mask: [hidden_at(model, layer, ids, mask)], finder, prompts, _device(model))[0]


def read_layers(
    compute: Compute, finder: ContentFinder, prompts: Sequence[Sequence[int]], device: Any
) -> list[PromptBatch]:
    """The content of prompts at several places of a model.

    The first token of a content is read, but does not count: models use it as a place to attend to.

    Args:
        compute: hidden states `(B, T, d)` of these places, from ids and attention mask `(B, T)`.
        finder: finds the content of the prompts.
        prompts: token ids of each prompt.
        device: where ids and mask are.
    """
    contents = [finder.content(prompt) for prompt in prompts]
    ids = torch.zeros(len(contents), max(map(len, contents)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    counts = torch.zeros(ids.shape, dtype=torch.bool)
    for row, content in enumerate(contents):
        ids[row, : len(content)] = torch.tensor(content)
        mask[row, : len(content)] = 1
        counts[row, min(1, len(content) - 1) : len(content)] = True
    ids, mask, counts = ids.to(device), mask.to(device), counts.to(device)
    return [PromptBatch(hidden.detach(), counts.to(hidden.device), ids) for hidden in compute(ids, mask)]


def _device(model: Any) -> torch.device:
    return torch.device(model.get_input_embeddings().weight.device)
