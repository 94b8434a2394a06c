"""Gathers second moments of the linears' inputs in hooks while a model computes, in groups that bound the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mola.errors import MolaError
from mola.files.terminal import show_progress
from mola.generation.predicting import base_of, device_of, last_positions


class Moments(NamedTuple):
    """Sums over tokens for linears that read the same input `x`.

    Attributes:
        second: float64 `(in, in)`, the sum of `x x^T`.
        cross: name of the linear -> float64 `(m, in)`, the sum of `h x^T` for its features `h`.
    """

    second: torch.Tensor
    cross: dict[str, torch.Tensor]


def group_by_input(model: Any, modules: Mapping[str, nn.Module], row: torch.Tensor) -> list[list[str]]:
    """Group the names of modules that get the same tensor as input, such as q, k and v.

    The groups have the order in which the model computes them. A module that gets no input forms its own group.

    Args:
        model: the model, which runs once.
        modules: name -> module.
        row: token ids `(1, length)`.
    """
    # The tensors are kept alive, so that no new tensor has the identity of an earlier one.
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def record(name: str, x: torch.Tensor, number: int) -> None:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        elif not any(name in names for _, names in groups):
            groups.append((x, [name]))

    watch_inputs(model, modules, [row], record)
    reached = {name for _, names in groups for name in names}
    return [names for _, names in groups] + [[name] for name in modules if name not in reached]


def moment_bytes(in_features: int, widths: Iterable[int]) -> int:
    """Bytes of the moments of one input; `widths` are the numbers of features of the linears that read it."""
    return 8 * in_features * (in_features + sum(widths))


def split_by_memory(sizes: Sequence[int], budget: float, min_parts: int = 1) -> list[list[int]]:
    """Split consecutive indices into parts whose moments fit into a memory budget.

    While a part is solved, its largest moments exist twice more: as a product of a batch and as a factor.

    Args:
        sizes: bytes of the moments of each index.
        budget: bytes that a part may need.
        min_parts: make at least this many parts, if there are as many indices.

    Raises:
        MolaError: one index alone needs more than the budget.
    """
    parts: list[list[int]] = []
    max_length = max(1, len(sizes) // min_parts)
    for index, size in enumerate(sizes):
        if 3 * size > budget:
            raise MolaError(
                f"`memory_gb` must be at least {3 * size / 1e9:.3g}, for the moments of the widest linear: got "
                f"{budget / 1e9:g}. Raise it, or pass no data to use the mean of the experts."
            )
        current = [sizes[i] for i in parts[-1]] if parts else []
        if 0 < len(current) < max_length and sum(current) + size + 2 * max(size, *current) <= budget:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def gather_moments(
    model: Any,
    modules: Mapping[str, nn.Module],
    groups: Sequence[Sequence[str]],
    features: Callable[[str, torch.Tensor], torch.Tensor],
    batches: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
) -> list[Moments | None]:
    """Gather moments in one pass over the batches.

    Args:
        model: the model, in eval mode.
        modules: name -> module.
        groups: names of modules with the same input.
        features: computes `h (N, m)` from a module's name and its input `(N, in)`, which is at least float32.
        batches: token ids `(samples, length)`, without padding.
        weights: the token weights of each batch, in the batch's shape; None gives every token the weight 1.

    Returns:
        The moments of each group; None for a group that no token reached.

    Raises:
        MolaError: a sum is not finite.
    """
    # For each group: name of the linear -> its cross moments, and "" -> the second moments.
    found: list[dict[str, torch.Tensor]] = [{} for _ in groups]
    place = {name: (index, name == names[0]) for index, names in enumerate(groups) for name in names}

    def add(name: str, x: torch.Tensor, number: int) -> None:
        index, is_first = place[name]
        x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        weighted = x
        # Some linears get patches of tokens, or only some of the tokens. For these linears every row has weight 1.
        if weights is not None and weights[number].numel() == len(x):
            weighted = x * weights[number].to(x).reshape(-1, 1)
        for key, left in [(name, features(name, x))] + ([("", x)] if is_first else []):
            product = left.t() @ weighted
            device = "cpu" if product.device.type == "mps" else product.device  # MPS has no float64
            if key not in found[index]:
                found[index][key] = torch.zeros_like(product, dtype=torch.float64, device=device)
            found[index][key] += product.to(device)

    watch_inputs(model, {name: modules[name] for name in place}, show_progress(batches, "Reading the data"), add)
    for names, sums in zip(groups, found, strict=True):
        if not all(torch.isfinite(each).all() for each in sums.values()):
            raise MolaError(f"inputs of {names[0]!r} must be finite numbers, but are not. Pass --dtype float32.")
    return [Moments(sums.pop(""), sums) if sums else None for sums in found]


@torch.no_grad()
def watch_inputs(
    model: Any,
    modules: Mapping[str, nn.Module],
    batches: Iterable[torch.Tensor],
    callback: Callable[[str, torch.Tensor, int], None],
) -> None:
    """Run a model on batches, and call `callback` before each forward pass of each of some modules.

    Args:
        model: the model.
        modules: name -> module.
        batches: token ids `(samples, length)`.
        callback: gets the module's name, its input, and the number of the batch.
    """
    device, head = device_of(model), getattr(base_of(model), "get_output_embeddings", lambda: None)()
    # The head computes the last position only, unless it is among the modules.
    is_watched = any(module is head for module in modules.values())
    logits_to_keep = 0 if is_watched else last_positions(1, device)
    number = -1

    def hook(name: str) -> Any:
        return lambda module, inputs: callback(name, inputs[0], number)

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        for ids in batches:
            number += 1
            model(input_ids=ids.to(device), logits_to_keep=logits_to_keep, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
