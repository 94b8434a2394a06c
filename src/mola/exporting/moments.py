"""Second moments of the inputs of linears, gathered in hooks while a model computes; memory is bounded by groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from mola.errors import MolaError
from mola.files.terminal import progress
from mola.generation.predicting import base_of, last_positions

Rows = torch.Tensor  # token ids (samples, length), all real: batches are of one length, so there is no padding
Features = Callable[[str, torch.Tensor], torch.Tensor]


class Moments(NamedTuple):
    """Sums over tokens for linears that read the same input `x`.

    Attributes:
        second: float64 `(in, in)`, the sum of `x x^T`.
        cross: by name of the linear, float64 `(m, in)`, the sum of `h x^T` for its features `h`.
    """

    second: torch.Tensor
    cross: dict[str, torch.Tensor]


@torch.no_grad()
def with_same_input(model: Any, modules: Mapping[str, nn.Module], row: torch.Tensor) -> list[list[str]]:
    """Names of modules in groups that are given the same tensor, such as q, k and v; from one forward pass.

    Args:
        model: holds the modules.
        modules: name -> module.
        row: token ids `(1, length)`.
    """
    groups: list[tuple[torch.Tensor, list[str]]] = []  # tensors are kept, or another could take their place

    def see(name: str, x: torch.Tensor) -> None:
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        elif not any(name in names for _, names in groups):
            groups.append((x, [name]))

    with inputs_seen(modules, see):
        run(model, row)
    seen = {name for _, names in groups for name in names}
    return [names for _, names in groups] + [[name] for name in modules if name not in seen]


def moment_bytes(in_features: int, widths: Iterable[int]) -> int:
    """Memory of the moments of one input.

    Args:
        in_features: size of the input.
        widths: number of features of each linear that reads it.
    """
    return 8 * in_features * (in_features + sum(widths))


def within(sizes: Sequence[int], budget: float, least: int = 1) -> list[list[int]]:
    """Consecutive indices in parts that need at most `budget` bytes; at least `least` parts if there are as many.

    While a part is solved, the largest input's moments are there twice more: a product of a batch, a factor.

    Raises:
        MolaError: one alone needs more.
    """
    parts: list[list[int]] = []
    longest = max(1, len(sizes) // least)
    for index, size in enumerate(sizes):
        if 3 * size > budget:
            raise MolaError(
                f"`memory_gb` must be at least {3 * size / 1e9:.3g}, for the widest linear's moments: got "
                f"{budget / 1e9:g}. Raise it, or leave data out for the mean of the experts."
            )
        before = [sizes[i] for i in parts[-1]] if parts else []
        if 0 < len(before) < longest and sum(before) + size + 2 * max(size, *before) <= budget:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


@torch.no_grad()
def gather_all(
    model: Any,
    modules: Mapping[str, nn.Module],
    groups: Sequence[Sequence[str]],
    features: Features,
    batches: Sequence[Rows],
    weights: Sequence[torch.Tensor] | None = None,
) -> list[Moments | None]:
    """Moments over batches, in one pass over them.

    Args:
        model: in eval mode.
        modules: name -> module.
        groups: names of modules with the same input.
        features: `h (N, m)` of a module's name and its input `(N, in)`, at least float32.
        batches: token ids.
        weights: of the tokens of each batch, in its shape; without them each token counts once.

    Returns:
        One for each group; None where no token came by.

    Raises:
        MolaError: a number is not finite.
    """
    found: list[dict[str, torch.Tensor]] = [{} for _ in groups]
    weight = torch.ones(())
    place = {name: (index, name == names[0]) for index, names in enumerate(groups) for name in names}

    def see(name: str, x: torch.Tensor) -> None:
        index, is_first = place[name]
        x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        sums = [(name, features(name, x))] + ([("", x)] if is_first else [])
        # Linears that see patches of tokens, or some tokens only, count each once.
        weighted = x * weight.to(x).reshape(-1, 1) if weight.numel() in (1, len(x)) else x
        for key, left in sums:
            product = left.t() @ weighted
            if key not in found[index]:
                found[index][key] = torch.zeros_like(product, dtype=torch.float64, device=_device(product))
            found[index][key] += product.to(found[index][key].device)

    with inputs_seen({name: modules[name] for name in place}, see):
        for number in progress(range(len(batches)), "Reading the data"):
            weight = weight if weights is None else weights[number]
            run(model, batches[number], **every_logit(model, (modules[name] for name in place)))
    for names, sums in zip(groups, found, strict=True):
        if not all(torch.isfinite(each).all() for each in sums.values()):
            raise MolaError(f"inputs of {names[0]!r} must be finite numbers: they are not. Pass --dtype float32.")
    return [Moments(sums.pop(""), sums) if sums else None for sums in found]


@contextmanager
def inputs_seen(modules: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `see` with a module's name and input before each of its forward passes."""

    def hook(name: str) -> Any:
        return lambda module, inputs: see(name, inputs[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def every_logit(model: Any, modules: Iterable[nn.Module]) -> dict[str, int]:
    """Arguments of `run` with which these modules see every token: the head sees those whose logits are asked for."""
    find = getattr(base_of(model), "get_output_embeddings", None)
    head = None if find is None else find()
    return {"logits_to_keep": 0} if any(module is head for module in modules) else {}


def run(model: Any, rows: Rows, **arguments: Any) -> torch.Tensor:
    """Logits of a batch; of the last position only unless `logits_to_keep=0` is passed."""
    device = next(model.parameters()).device
    arguments = {"logits_to_keep": last_positions(1, device), "use_cache": False} | arguments
    return model(input_ids=rows.to(device), **arguments).logits


def _device(like: torch.Tensor) -> torch.device:
    return torch.device("cpu") if like.device.type == "mps" else like.device  # MPS has no float64
