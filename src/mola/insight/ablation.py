"""What an expert is worth: the loss on answers without it, less that of the whole model."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from mola.files.terminal import progress
from mola.insight.replacing import Experts, replaced_experts
from mola.tuner.layer import MolaLinear

LEAVE_ONE_OUT = ("none", "layers", "modules")


@dataclass(frozen=True)
class LeftOut:
    """The loss without one expert."""

    layer_index: int | None  # its decoder layer, None outside the layers
    module: str | None  # its module; None where the expert of this number was taken out of all modules of the layer
    expert: int  # its number
    loss_change: float  # loss without it, less the loss of the whole model; above 0 if it helps


@dataclass(frozen=True)
class Experiment:
    """One expert to take out, of one module or of all modules of a layer."""

    layer_index: int | None
    module: str | None
    expert: int
    layers: tuple[MolaLinear, ...]


def experiments(model: nn.Module, by: str) -> list[Experiment]:
    """Every expert of the modules with a router, once; `by` is "layers" or "modules"."""
    groups: dict[tuple[int | None, str | None], list[MolaLinear]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, MolaLinear) and _adapter(module) is not None:
            groups[module.layer_index, name if by == "modules" else None].append(module)
    return [
        Experiment(index, name, expert, tuple(layer for layer in layers if expert < _num_experts(layer)))
        for (index, name), layers in groups.items()
        for expert in range(max(map(_num_experts, layers)))
    ]


def _adapter(layer: MolaLinear) -> str | None:
    return next((name for name in layer.active_adapters if layer.num_experts.get(name, 1) > 1), None)


def _num_experts(layer: MolaLinear) -> int:
    return layer.num_experts[_adapter(layer) or ""]


@contextmanager
def expert_left_out(layers: Sequence[MolaLinear], expert: int) -> Iterator[None]:
    """Compute without one expert, as if its logit were minus infinity, until the context ends.

    The `top_k` largest of the other logits are chosen, or all of them where fewer are left; gates add up to 1. Each
    of the modules has a router and more than `expert` experts.
    """
    with ExitStack() as stack:
        for layer in layers:
            name = _adapter(layer) or ""
            others = [index for index in range(layer.num_experts[name]) if index != expert]
            A, B, router = layer.mola_A[name], layer.mola_B[name], layer.mola_router[name]
            old = layer.settings[name]
            settings = replace(old, num_experts=len(others), top_k=min(old.top_k, len(others)))
            left = Experts(_only(A, others), _only(B, others), _only(router, others), settings)
            stack.enter_context(replaced_experts(layer, name, left))
        yield


def _only(part: nn.Parameter, experts: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(part.detach()[experts], requires_grad=False)


def losses_without(
    model: Any, samples: Sequence[Mapping[str, Any]], wanted: Sequence[Experiment]
) -> tuple[float, list[LeftOut]]:
    """The loss of the whole model, and its change without each expert; `(1 + experts) * samples` forward passes.

    The model is in eval mode, samples have `input_ids` and `labels`, `wanted` is from `experiments`.

    Raises:
        MolaError: the loss of the whole model is no finite number.
    """
    loss, found = 0.0, []
    steps: list[Experiment | None] = [None, *wanted]
    for each in progress(steps, f"Leaving out {len(wanted)} experts"):
        if each is None:
            loss = answer_loss(model, samples)
            if not math.isfinite(loss):
                raise MolaError(
                    f"the model's loss must be a finite number to see how it changes: got {loss}. In float16 this "
                    "model's activations may be too large: pass --dtype bfloat16 or float32."
                )
            continue
        with expert_left_out(each.layers, each.expert):
            change = answer_loss(model, samples) - loss
        found.append(LeftOut(each.layer_index, each.module, each.expert, change))
    return loss, found


@torch.no_grad()
def answer_loss(model: Any, samples: Sequence[Mapping[str, Any]]) -> float:
    """Mean negative log-likelihood of the answers' tokens over all samples, which are read one at a time."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for sample in samples:
        ids, labels = (torch.tensor([list(sample[name])], device=device) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0, :-1].float()
        wanted = labels[0, 1:]
        total += nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum").item()
        count += int((wanted != IGNORED).sum())
    return total / max(count, 1)
