"""A LoRA trained towards the logits of the mixture that it came from."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mola.errors import MolaError
from mola.exporting.calibration import Row, answer_tokens, batches
from mola.exporting.measuring import log_probabilities
from mola.exporting.mixtures import Lora, as_lora
from mola.files.terminal import progress
from mola.tuner.layer import MolaLinear


def distill(
    model: Any,
    layers: Mapping[str, MolaLinear],
    loras: Mapping[str, Lora],
    trained: Collection[str],
    rows: Sequence[Row],
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train LoRAs in place towards `min KL(mixture || LoRA)`, the mean over the answer tokens of a batch.

    AdamW without weight decay, one batch per step; the learning rate falls to 0 over the steps.

    Args:
        model: with the mixture, in eval mode.
        layers: of the model.
        loras: of all layers.
        trained: names of those that are trained.
        rows: to train on.
        steps: how many; all batches come once before one comes again.
        learning_rate: of the first step.
        seed: of the order of batches.

    Raises:
        MolaError: the loss is not finite.
    """
    parameters = [parameter for name in trained for parameter in loras[name]]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    every, chance, order = batches(rows), random.Random(seed), list[int]()
    for step in progress(range(steps), "Distilling"):
        order = order or chance.sample(range(len(every)), len(every))
        ids, labels = every[order.pop()]
        wanted = answer_tokens(labels)
        with torch.no_grad():
            mixture = log_probabilities(model, ids, wanted)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with as_lora(layers, loras), torch.enable_grad():
            lora = log_probabilities(model, ids, wanted)
            loss = F.kl_div(lora, mixture, log_target=True, reduction="sum") / max(int(wanted.sum()), 1)
            loss.backward()
        if not torch.isfinite(loss):
            raise MolaError(
                f"the divergence of step {step + 1} of `distill_steps` must be finite, got {loss.item()}. Pass a "
                f"`distill_learning_rate` below {learning_rate:g}, or --dtype float32."
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(False)
    # Of the last step there is no loss.
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise MolaError(
            f"the LoRA must stay finite: it is not. Pass a `distill_learning_rate` below {learning_rate:g}."
        )
