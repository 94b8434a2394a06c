"""The suite `curve`: the loss over the first optimiser steps, of mola and of the plain loop, without dropout.

Both start from the same weights and read the same batches of real text in the same order. They compute the same
function, so their curves differ by rounding, and by what AdamW does with an expert that no token of a step chose: in
the loop this expert has no gradient and is left unchanged, in mola it has a gradient of zeros, so momentum still moves
it. Two further curves of mola show the scale: one starts from weights that are changed by one rounding, the other
from different random weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.cases import make_case
from benchmarks.loop import copy_experts
from benchmarks.models import Case, load_base
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import Provider, build, make_forward, trainable_parameters
from benchmarks.text import has_text, text_batches

logger = logging.getLogger(__name__)

LEARNING_RATE = 3e-4  # the default of `mola train`, but constant
LAST = 20  # the final loss is the mean over this many last steps
_REPORT_EVERY = 10  # steps
_OTHER_SEED = 1000  # added to the seed of the curve with different random weights

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


def curve(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[Row]:
    """Curves and their differences for every dtype."""
    if not has_text("curve", model):
        return
    for dtype in options.dtype:
        case = make_case(options, model, folder, dtype, 0.0)
        case = replace(case, seq_len=options.curve_seq_len, optimizer=True)
        base, batches = load_base(case), text_batches(case, options.curve_steps)
        variants = ["mola", *(["loop"] if "loop" in options.providers else []), "mola, rounded", "mola, other weights"]
        reference = None
        for name in variants:
            provider = _build_variant(name, base, case)
            losses, idle = _train(provider, case, batches, f"curve: {model}, {dtype}, {name}")
            shared = {"provider": name, "steps": options.curve_steps, "learning_rate": LEARNING_RATE}
            found = {"losses": losses, "idle_experts": idle} | compare(losses, reference)
            yield case.row() | provider.row() | shared | found
            reference = reference or losses


def compare(losses: Sequence[float], reference: Sequence[float] | None) -> Row:
    """Figures of a curve, and of its differences from a reference.

    Returns:
        `first_loss`; `final_loss`: mean over the last steps. With a reference also `max_difference` and
        `mean_difference` of single steps, absolute, and `final_difference` of the final losses.
    """
    values = np.asarray(losses)
    row: Row = {"first_loss": float(values[0]), "final_loss": float(values[-LAST:].mean())}
    if reference is None:
        return row
    others = np.asarray(reference)
    distance = np.abs(values - others)
    row |= {"max_difference": float(distance.max()), "mean_difference": float(distance.mean())}
    return row | {"final_difference": row["final_loss"] - float(others[-LAST:].mean())}


def _build_variant(name: str, base: PreTrainedModel, case: Case) -> Provider:
    if name == "mola, other weights":
        return build("mola", base, replace(case, seed=case.seed + _OTHER_SEED), fresh=True)
    provider = build("mola", base, case, fresh=True)
    if name == "mola, rounded":
        _perturb_by_rounding(provider, case.dtype)
    if name != "loop":
        return provider
    loop = build("loop", base, case, fresh=True)
    copy_experts(provider.model, loop.model)
    return loop


@torch.no_grad()
def _perturb_by_rounding(provider: Provider, dtype: str) -> None:
    """Change every weight by up to half the distance to the next number of the dtype."""
    half = torch.finfo(getattr(torch, dtype)).eps / 2
    for parameter in trainable_parameters(provider.model):
        parameter.mul_(1 + half * (2 * torch.rand_like(parameter) - 1))


def _train(provider: Provider, case: Case, batches: list[Batch], name: str) -> tuple[list[float], float]:
    """Losses before every step, and the share of matrices A that had no gradient, over all steps."""
    torch.manual_seed(case.seed)
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
            logger.info("%s: step %d of %d, loss %.4f, %.1f s a step", name, index, len(batches), losses[-1], seconds)
    return losses, idle / (len(batches) * len(experts))
