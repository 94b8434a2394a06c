"""How much the loss on answers rises when one expert is left out."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from mola.files.terminal import show_progress
from mola.tuner.layer import ExpertSettings, MolaLinear


@dataclass(frozen=True)
class LeftOut:
    """The loss without one expert."""

    layer_index: int | None  # its decoder layer, None outside the layers
    module: str | None  # its module; None if the expert with this number was left out of all modules of the layer
    expert: int  # its number
    loss_change: float  # loss without it, less the loss of the whole model; above 0 if it helps


@dataclass(frozen=True)
class Experiment:
    """One expert to leave out of one module, or of all modules of a layer."""

    layer_index: int | None
    module: str | None
    expert: int
    layers: tuple[MolaLinear, ...]


def list_experiments(model: nn.Module, by: str) -> list[Experiment]:
    """One experiment for every expert of the modules with a router; `by` is "layers" or "modules"."""
    groups: dict[tuple[int | None, str | None], list[MolaLinear]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, MolaLinear) and _adapter_with_router(module) is not None:
            groups[module.layer_index, name if by == "modules" else None].append(module)
    return [
        Experiment(index, name, expert, tuple(layer for layer in layers if expert < _num_experts(layer)))
        for (index, name), layers in groups.items()
        for expert in range(max(map(_num_experts, layers)))
    ]


def _adapter_with_router(layer: MolaLinear) -> str | None:
    return next((name for name in layer.active_adapters if layer.num_experts.get(name, 1) > 1), None)


def _num_experts(layer: MolaLinear) -> int:
    return layer.num_experts[_adapter_with_router(layer) or ""]


def measure_losses_without(
    model: Any, samples: Sequence[Mapping[str, Any]], experiments: Sequence[Experiment]
) -> tuple[float, list[LeftOut]]:
    """The loss of the whole model, and its change without each expert.

    This needs `(1 + experiments) * samples` forward passes. The model must be in eval mode; samples have `input_ids`
    and `labels`.

    Raises:
        MolaError: the loss of the whole model is not finite.
    """
    whole_loss = answer_loss(model, samples)
    if not math.isfinite(whole_loss):
        raise MolaError(
            f"the model's loss must be a finite number to see how it changes: got {whole_loss}. In float16 "
            "this model's activations may be too large: pass --dtype bfloat16 or float32."
        )
    changes = []
    for experiment in show_progress(experiments, f"Leaving out {len(experiments)} experts"):
        with expert_left_out(experiment.layers, experiment.expert):
            change = answer_loss(model, samples) - whole_loss
        changes.append(LeftOut(experiment.layer_index, experiment.module, experiment.expert, change))
    return whole_loss, changes


@torch.no_grad()
def answer_loss(model: Any, samples: Sequence[Mapping[str, Any]]) -> float:
    """Mean negative log-likelihood of the answer tokens over all samples, computed one sample at a time."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for sample in samples:
        ids, labels = (torch.tensor([list(sample[name])], device=device) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0, :-1].float()
        targets = labels[0, 1:]
        total += nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
        count += int((targets != IGNORED).sum())
    return total / max(count, 1)


@contextmanager
def expert_left_out(layers: Sequence[MolaLinear], expert: int) -> Iterator[None]:
    """Leave one expert out of all computations until the context ends, as if its logit were minus infinity.

    The `top_k` largest of the other logits are chosen, or all of them if fewer are left; gates add up to 1. Each
    module must have a router and more than `expert` experts.
    """
    with ExitStack() as stack:
        for layer in layers:
            name = _adapter_with_router(layer) or ""
            others = [index for index in range(layer.num_experts[name]) if index != expert]
            weights = (layer.mola_A[name], layer.mola_B[name], layer.mola_router[name])
            A, B, router = (nn.Parameter(each.detach()[others], requires_grad=False) for each in weights)
            settings = layer.settings[name]
            settings = replace(settings, num_experts=len(others), top_k=min(settings.top_k, len(others)))
            stack.enter_context(replaced_experts(layer, name, Experts(A, B, router, settings)))
        yield


class Experts(NamedTuple):
    """The weights of an adapter in one layer, and their settings.

    Attributes:
        A: `(E, r, in)`.
        B: `(E, r, out)`.
        router: `(E, in)`; None for a single expert, which has no router.
        settings: settings of these experts.
    """

    A: nn.Parameter
    B: nn.Parameter
    router: nn.Parameter | None
    settings: ExpertSettings


@contextmanager
def replaced_experts(layer: MolaLinear, name: str, experts: Experts) -> Iterator[None]:
    """Replace the experts of the adapter `name` in one layer until the context ends."""
    own = Experts(layer.mola_A[name], layer.mola_B[name], layer.mola_router.get(name), layer.settings[name])
    try:
        _set_experts(layer, name, experts)
        yield
    finally:
        _set_experts(layer, name, own)


def _set_experts(layer: MolaLinear, name: str, experts: Experts) -> None:
    layer.mola_A[name], layer.mola_B[name] = experts.A, experts.B
    if experts.router is not None:
        layer.mola_router[name] = experts.router
    elif name in layer.mola_router:
        del layer.mola_router[name]
    layer.set_settings(name, experts.settings)
