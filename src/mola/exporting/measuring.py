"""A mixture, its base and a LoRA in its place on the same rows: explained updates, divergence, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mola.data.tasks import Task
from mola.data.templates import Template
from mola.errors import MolaError
from mola.evaluation.core import EvaluateResult, evaluate_examples
from mola.evaluation.differences import paired_differences
from mola.exporting.calibration import Row, answer_tokens, batches
from mola.exporting.mixtures import Lora, Mixture, as_lora, gated
from mola.exporting.moments import every_logit, inputs_seen, run
from mola.tuner.layer import MolaLinear


@torch.no_grad()
def explained_shares(
    model: Any,
    layers: Mapping[str, MolaLinear],
    experts: Mapping[str, Mixture],
    loras: Mapping[str, Lora],
    rows: Sequence[Row],
) -> dict[str, float | None]:
    """`1 - E ||y - B A x||^2 / E ||y||^2` of modules with several experts; None where `y` is 0 or no token came by."""
    several = {name: layer for name, layer in layers.items() if len(experts[name].A) > 1}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in several}
    updates = {name: loras[name].update for name in several}

    def see(name: str, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        B, A = updates[name]
        y = gated(layers[name], experts[name].A, x) @ experts[name].B.to(x).flatten(0, 1)
        rest = y - (x @ A.to(x).t()) @ B.to(x).t()
        sums[name] += torch.stack([each.square().sum() for each in (rest, y)]).cpu().double()

    with inputs_seen(several, see):
        for ids, _ in batches(rows):
            run(model, ids, **every_logit(model, several.values()))
    return {name: 1 - (rest / all_).item() if all_ > 0 else None for name, (rest, all_) in sums.items()}


@torch.no_grad()
def divergence(
    model: Any, layers: Mapping[str, MolaLinear], loras: Mapping[str, Lora], rows: Sequence[Row]
) -> tuple[float, dict[str, float]]:
    """KL(mixture || LoRA), and the losses of base, mixture and LoRA: means over the rows' answer tokens, in nats."""
    total, count = torch.zeros(4, dtype=torch.float64), 0
    for ids, labels in batches(rows):
        wanted = answer_tokens(labels)
        targets = labels[:, 1:][wanted]
        with model.disable_adapter():
            base = log_probabilities(model, ids, wanted)
        mixture = log_probabilities(model, ids, wanted)
        with as_lora(layers, loras):
            lora = log_probabilities(model, ids, wanted)
        losses = [F.nll_loss(each, targets.to(each.device), reduction="sum") for each in (base, mixture, lora)]
        parts = [F.kl_div(lora, mixture, log_target=True, reduction="sum"), *losses]
        total += torch.stack(parts).cpu().double()
        count += len(targets)
    if not torch.isfinite(total).all():
        raise MolaError(
            "what mixture and LoRA say must be finite to be compared: KL divergence and losses of base, mixture and "
            f"LoRA sum up to {', '.join(f'{each:g}' for each in total.tolist())}. Pass --dtype float32 or bfloat16, or "
            "a lower `distill_learning_rate` if you distil."
        )
    kl, base_loss, mixture_loss, lora_loss = (total / max(count, 1)).tolist()
    return kl, {"base": base_loss, "mixture": mixture_loss, "lora": lora_loss}


def log_probabilities(model: Any, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of the next token, float32 `(tokens, vocabulary)`, at the positions `wanted` `(samples, length - 1)`."""
    logits = run(model, ids, logits_to_keep=0)[:, :-1]
    return torch.log_softmax(logits[wanted.to(logits.device)].float(), dim=-1)


def accuracies(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    layers: Mapping[str, MolaLinear],
    loras: Mapping[str, Lora],
    scoring: str,
    template: Template | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Accuracy of base, mixture and LoRA on the same questions, and differences from the mixture."""
    contexts = {"base": model.disable_adapter, "mixture": nullcontext, "lora": lambda: as_lora(layers, loras)}
    results: dict[str, EvaluateResult] = {}
    for name, context in contexts.items():
        with context():
            results[name] = evaluate_examples(
                *(model, tokenizer, task, examples),
                template=template,
                scoring=scoring,
                batch_size=16,
                show_progress=False,
            )
    keys = ("accuracy", "correct", "total", "interval_95")
    accuracy = {name: {key: getattr(result, key) for key in keys} for name, result in results.items()}
    marks = {name: np.array([[s["correct"] for s in result.samples]], dtype=float) for name, result in results.items()}
    mixture = marks.pop("mixture")
    return accuracy, {name: asdict(each) for name, each in paired_differences(marks, mixture).items()}
