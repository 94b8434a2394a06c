"""The suite `curve`: the loss over the first optimiser steps, mola beside the plain loop.

Both start from the same weights and read the same batches of real text in the same order.

- Without dropout they compute the same function; their curves differ by rounding, and by what AdamW does with experts
  that no token of a step chose: in the loop they have no gradient and stay as they are, in mola they have zeros and
  move on by their momentum. Beside them stands what mola's own curve does when the initial weights are changed by as
  much as one rounding, and when they are others.
- With dropout their masks differ by design: one for a module in mola, one for each expert in the loop. So both are
  trained with several seeds of weights and masks; the batches stay the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.cases import make_case
from benchmarks.experts import copy_experts
from benchmarks.models import Case, load_base
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import Provider, build, make_forward, trainable_parameters
from benchmarks.text import has_text, text_batches

logger = logging.getLogger(__name__)

LEARNING_RATE = 3e-4  # as `mola train`, but constant
LAST = 20  # steps whose mean is the final loss
_REPORT_EVERY = 10  # steps
_OTHER = 1000  # added to the seed of other weights

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


@dataclass
class Curves:
    """Losses of one way of training, one curve for each seed.

    Attributes:
        name: who it is and what differs.
        provider: the model after the last seed.
        losses: `(seeds, steps)`.
        idle_experts: share of matrices A without a gradient, over all steps: of experts that no token chose. None are
            in mola, where an expert is a part of one parameter.
    """

    name: str
    provider: Provider
    losses: list[list[float]]
    idle_experts: float


def curve(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[Row]:
    """Curves and their differences for every dtype; with dropout for the first dtype only, as seeds take long."""
    if not has_text("curve", model):
        return
    for dtype in options.dtype:
        base = None
        for dropout in options.dropout:
            if dropout > 0 and dtype != options.dtype[0]:
                continue
            case = make_case(options, model, folder, dtype, dropout)
            case = replace(case, seq_len=options.curve_seq_len, optimizer=True)
            base = base or load_base(case)
            seeds = [options.seed + index for index in range(options.curve_seeds if dropout else 1)]
            yield from _measure(options, base, case, seeds)


def _measure(options: BenchmarkOptions, base: PreTrainedModel, case: Case, seeds: Sequence[int]) -> list[Row]:
    """Rows of one case."""
    batches = text_batches(case, options.curve_steps)
    variants = ["mola"] + ["loop"] * ("loop" in options.providers)
    variants += [] if case.dropout else ["mola, rounded", "mola, other weights"]
    curves = [_train_seeds(name, base, case, seeds, batches) for name in variants]
    rows = []
    for each in curves:
        shared = {"provider": each.name, "steps": options.curve_steps, "learning_rate": LEARNING_RATE}
        seen = {"seeds": list(seeds), "losses": each.losses, "idle_experts": each.idle_experts}
        reference = None if each is curves[0] else curves[0].losses
        rows.append(case.row() | each.provider.row() | shared | seen | compare(each.losses, reference))
    return rows


def compare(losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]] | None) -> Row:
    """Figures of `(seeds, steps)` losses, and of their differences from those of a reference with the same seeds.

    Returns:
        `final_loss`: mean over the last steps and seeds; `final_loss_std`: standard deviation over seeds.
        `max_difference`, `mean_difference`: of single steps, absolute. `final_difference` and its `_std`: difference
        of the final losses within a seed, mean and standard deviation over seeds. None without a reference, and for
        deviations with one seed.
    """
    values = np.asarray(losses)
    final = values[:, -LAST:].mean(axis=1)
    row: Row = {"first_loss": float(values[:, 0].mean())} | _mean_and_std("final_loss", final)
    if reference is None:
        return row
    others = np.asarray(reference)
    distance = np.abs(values - others)
    row |= {"max_difference": float(distance.max()), "mean_difference": float(distance.mean())}
    return row | _mean_and_std("final_difference", final - others[:, -LAST:].mean(axis=1))


def _mean_and_std(name: str, values: np.ndarray) -> Row:
    return {name: float(values.mean()), f"{name}_std": float(values.std(ddof=1)) if len(values) > 1 else None}


def _train_seeds(name: str, base: PreTrainedModel, case: Case, seeds: Sequence[int], batches: list[Batch]) -> Curves:
    """Train one variant once for each seed."""
    losses, idle = [], []
    for seed in seeds:
        said = f"curve: {case.model}, {case.dtype}, dropout {case.dropout:g}, {name}, seed {seed}"
        provider = _build_variant(name, base, replace(case, seed=seed))
        torch.manual_seed(seed)  # of the masks
        one, unused = _train(provider, case, batches, said)
        losses.append(one)
        idle.append(unused)
    return Curves(name, provider, losses, float(np.mean(idle)))


def _build_variant(name: str, base: PreTrainedModel, case: Case) -> Provider:
    if name == "mola, other weights":
        return build("mola", base, replace(case, seed=case.seed + _OTHER), fresh=True)
    provider = build("mola", base, case, fresh=True)
    if name == "mola, rounded":
        _round_otherwise(provider, case.dtype)
    if name != "loop":
        return provider
    loop = build("loop", base, case, fresh=True)
    copy_experts(provider.model, loop.model)
    return loop


@torch.no_grad()
def _round_otherwise(provider: Provider, dtype: str) -> None:
    """Change every weight by up to half the distance to the next number of the format."""
    half = torch.finfo(getattr(torch, dtype)).eps / 2
    for parameter in trainable_parameters(provider.model):
        parameter.mul_(1 + half * (2 * torch.rand_like(parameter) - 1))


def _train(provider: Provider, case: Case, batches: list[Batch], said: str) -> tuple[list[float], float]:
    """Losses before every step, and the share of expert matrices that had no gradient."""
    parameters = trainable_parameters(provider.model)
    experts = [each for name, each in provider.model.named_parameters() if "_A." in name]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    losses: list[float] = []
    idle, start = 0, time.perf_counter()
    for index, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = make_forward(provider.model, batch, case)()
        loss.backward()
        idle += sum(each.grad is None for each in experts)
        optimizer.step()
        losses.append(loss.item())
        if index % _REPORT_EVERY == 0 or index == len(batches):
            seconds = (time.perf_counter() - start) / index
            logger.info("%s: step %d of %d, loss %.4f, %.1f s a step", said, index, len(batches), losses[-1], seconds)
    return losses, idle / (len(batches) * len(experts))
