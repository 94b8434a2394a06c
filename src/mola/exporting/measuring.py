"""Measures how near a LoRA is to the mixture it was made from: updates, divergence, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table

from mola.architecture.layer_names import module_kinds
from mola.errors import MolaError
from mola.evaluation.core import EvaluateResult, evaluate_examples
from mola.evaluation.differences import interval_over_questions
from mola.exporting.calibration import Row, answer_mask, batches, token_ids
from mola.exporting.mixtures import Lora, Mixture, gated_hidden, replaced_by_loras
from mola.exporting.moments import watch_inputs
from mola.files.environment import machine_description, software_versions
from mola.generation.predicting import device_of
from mola.reporting.formatting import points
from mola.tuner.layer import MolaLinear

REPORT_FILE = "export.json"


@dataclass(frozen=True)
class ExportReport:
    """Report about an exported LoRA: what was exported, and how near the LoRA is to the mixture.

    Attributes:
        output: the folder written; its file `export.json` holds this report.
        method: regression, mean or usage.
        rank: the rank that was asked for.
        modules: number of linears.
        exact: number of linears with one expert, which are exported exactly.
        explained: for each linear with several experts, the share of the mixture's squared update on held-out tokens
            that the LoRA reproduces, `1 - E ||y - B A x||^2 / E ||y||^2`; None without data.
        divergence: mean KL(mixture || LoRA) of held-out rows in nats, by kind of tokens: `answer` (in the data),
            `test answer` (in the test file), `text`, `other text` (in the test text).
        loss: mean loss of base, mixture and LoRA on the same tokens.
        accuracy: accuracy of `base`, `mixture` and `lora` on the test file.
        differences: accuracy of `lora` and of `base` minus the mixture's on the same questions, with an interval over
            questions.
        rows: numbers of fitted and held-out rows, by kind.
        seconds: how long each step took.
        notes: what the reader of the report should know.
        settings: the options.
    """

    output: Path
    method: str
    rank: int
    modules: int
    exact: int
    explained: dict[str, float | None] | None = None
    divergence: dict[str, float] = field(default_factory=dict)
    loss: dict[str, dict[str, float]] = field(default_factory=dict)
    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    differences: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def by_kind(self) -> dict[str, float]:
        """Mean explained share for each kind of linear, over linears with several experts; empty without data."""
        known = {name: value for name, value in (self.explained or {}).items() if value is not None}
        values: dict[str, list[float]] = {}
        for name, kind in module_kinds(known).items():
            values.setdefault(kind, []).append(known[name])
        return {kind: fmean(each) for kind, each in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        more = {"explained_by_kind": self.by_kind(), "versions": software_versions(), "machine": machine_description()}
        return asdict(self) | {"output": str(self.output)} | more

    def table(self) -> Table:
        """The measurements as a table for the terminal."""
        title = f"mixture to LoRA of rank {self.rank}, {self.method}"
        table = Table(title=escape(title), caption="Measured on held-out rows.")
        for column in ("", "value", "95 % interval"):
            table.add_column(column)
        for kind, value in self.by_kind().items():
            table.add_row(f"share of the update explained, {escape(kind)}", f"{value:.1%}", "")
        for kind, value in self.divergence.items():
            losses = ", ".join(f"{self.loss[kind][name]:.3f}" for name in ("base", "mixture", "lora"))
            table.add_row(f"KL(mixture || LoRA) per {kind} token", f"{value:.4f} nats", "")
            table.add_row(f"loss per {kind} token: base, mixture, LoRA", losses, "")
        for name, row in self.accuracy.items():
            low, high = row["interval_95"]
            table.add_row(f"accuracy of {name}", f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}")
        for name, row in self.differences.items():
            table.add_row(
                f"accuracy of {name} minus mixture, same questions",
                f"{points(row['value'])} points",
                " to ".join(map(points, row["questions_95"])),
            )
        return table

    def __str__(self) -> str:
        lines = [f"{self.modules} linears; {self.exact} of them have one expert and are exported exactly"]
        lines += [f"{kind}: {n['fitted']} rows fitted, {n['held_out']} held out" for kind, n in self.rows.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"written to {self.output}"])


@torch.no_grad()
def explained_shares(
    model: Any,
    layers: Mapping[str, MolaLinear],
    experts: Mapping[str, Mixture],
    loras: Mapping[str, Lora],
    rows: Sequence[Row],
) -> dict[str, float | None]:
    """`1 - E ||y - B A x||^2 / E ||y||^2` of linears with several experts.

    None for a linear whose `y` is 0, or that no token reached.
    """
    several = {name: layer for name, layer in layers.items() if len(experts[name].A) > 1}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in several}
    updates = {name: loras[name].update for name in several}

    def add(name: str, x: torch.Tensor, number: int) -> None:
        x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        B, A = updates[name]
        y = gated_hidden(layers[name], experts[name].A, x) @ experts[name].B.to(x).flatten(0, 1)
        rest = y - (x @ A.to(x).t()) @ B.to(x).t()
        sums[name] += torch.stack([each.square().sum() for each in (rest, y)]).cpu().double()

    watch_inputs(model, several, token_ids(rows), add)
    return {name: 1 - (rest / total).item() if total > 0 else None for name, (rest, total) in sums.items()}


@torch.no_grad()
def measure_divergence(
    model: Any, layers: Mapping[str, MolaLinear], loras: Mapping[str, Lora], rows: Sequence[Row]
) -> tuple[float, dict[str, float]]:
    """KL(mixture || LoRA), and the losses of base, mixture and LoRA: means over the rows' answer tokens, in nats.

    Raises:
        MolaError: one of these values is not finite.
    """
    total, count = torch.zeros(4, dtype=torch.float64), 0
    for ids, labels in batches(rows):
        wanted = answer_mask(labels)
        targets = labels[:, 1:][wanted]
        with model.disable_adapter():
            base = _log_probabilities(model, ids, wanted)
        mixture = _log_probabilities(model, ids, wanted)
        with replaced_by_loras(layers, loras):
            lora = _log_probabilities(model, ids, wanted)
        losses = [F.nll_loss(each, targets.to(each.device), reduction="sum") for each in (base, mixture, lora)]
        parts = [F.kl_div(lora, mixture, log_target=True, reduction="sum"), *losses]
        total += torch.stack(parts).cpu().double()
        count += len(targets)
    if not torch.isfinite(total).all():
        raise MolaError(
            "mixture and LoRA must give finite logits to be compared: KL divergence and losses of base, mixture and "
            f"LoRA are {', '.join(f'{each:g}' for each in total.tolist())}. Pass --dtype float32 or bfloat16."
        )
    kl, *means = (total / max(count, 1)).tolist()
    return kl, dict(zip(("base", "mixture", "lora"), means, strict=True))


def _log_probabilities(model: Any, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(tokens, vocabulary)` of the next token at the positions `wanted (samples, length - 1)`."""
    logits = model(input_ids=ids.to(device_of(model)), logits_to_keep=0, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits[wanted.to(logits.device)].float(), dim=-1)


def measure_accuracies(
    model: Any, layers: Mapping[str, MolaLinear], loras: Mapping[str, Lora], **evaluation: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Accuracies of base, mixture and LoRA on the same questions, and their differences from the mixture's.

    `evaluation` holds the arguments of `evaluate_examples` besides the model.
    """

    def evaluate() -> EvaluateResult:
        return evaluate_examples(model, batch_size=16, show_progress=False, **evaluation)

    with model.disable_adapter():
        base = evaluate()
    mixture = evaluate()
    with replaced_by_loras(layers, loras):
        lora = evaluate()
    results = {"base": base, "mixture": mixture, "lora": lora}
    keys = ("accuracy", "correct", "total", "interval_95")
    accuracy = {name: {key: getattr(result, key) for key in keys} for name, result in results.items()}
    marks = {name: np.array([float(sample["correct"]) for sample in each.samples]) for name, each in results.items()}
    differences = {
        name: {
            "value": float((marks[name] - marks["mixture"]).mean()),
            "questions_95": interval_over_questions(marks[name], marks["mixture"]),
        }
        for name in ("base", "lora")
    }
    return accuracy, differences
