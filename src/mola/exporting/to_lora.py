"""`mola convert --to lora`: a mixture becomes the plain LoRA that is nearest to it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mola.allocation.probe import check_mixture, routing_records
from mola.checkpoints.tensors import read_tensors
from mola.data.examples import load_examples
from mola.data.tasks import Task
from mola.errors import MolaError
from mola.evaluation.questions import SCORINGS, checked_questions
from mola.exporting.calibration import Calibration, read_data, read_general_text, read_task, read_test, seen_rows
from mola.exporting.distilling import distill
from mola.exporting.fitting import mean_of_experts, nearest_on_data
from mola.exporting.lora_files import check_loads, lora_config, write_lora
from mola.exporting.measuring import accuracies, divergence, explained_shares
from mola.exporting.mixtures import Lora, Mixture, Update, as_parameters, mixtures, mola_layers
from mola.exporting.options import METHODS, ConvertOptions
from mola.exporting.report import REPORT_FILE, ExportReport
from mola.exporting.stacked_lora import stacked_lora
from mola.files.atomic import atomic_write_json, new_folder
from mola.models.adapters import check_fits, warn_other_base
from mola.models.base_model import load_config, max_positions
from mola.models.loading import load_model
from mola.models.meta import model_on_meta
from mola.models.prompts import hand_on_prompts, template_for
from mola.models.quantized import keep_gradients
from mola.models.tokenizer import load_tokenizer
from mola.tuner import MolaConfig
from mola.tuner.layer import MolaLinear
from mola.tuner.replication import has_lists


@dataclass
class _Checked:
    """What is exported, and what it is fitted to and measured on; of the model no weights are loaded yet."""

    source: str
    method: str
    rank: int
    task: Task | None
    config: Any
    tensors: dict[str, torch.Tensor]
    on_meta: Any
    experts: dict[str, Mixture]
    stacked: dict[str, torch.Tensor]  # LoRAs of stacked parameters, as they are
    ranks: dict[str, int]  # theirs
    examples: list[dict[str, Any]] | None
    data: dict[str, Calibration]
    gates: dict[str, torch.Tensor]


def to_lora(options: ConvertOptions, output: Path) -> ExportReport:
    """Export an adapter; see `mola.exporting.convert.convert`."""
    checked = _check(options)
    config, experts, data, rank = checked.config, checked.experts, checked.data, checked.rank
    seconds: dict[str, float] = {}
    model, layers = None, {}
    if data or checked.examples:
        with _timed(seconds, "loading"):
            model = load_model(
                str(options.base_model), checked.source, options.dtype, options.device, options.trust_remote_code
            )
            layers = mola_layers(model)
            if options.distill_steps:
                keep_gradients(model)
    else:
        warn_other_base(str(options.base_model), checked.source, config.to_dict())
    notes = [f"{n} rows of data left out: too long" for each in data.values() if (n := each.too_long)]
    if config.layer_replication:
        notes.append("it does not merge: layers of `layer_replication` share their weights")
        notes.append("base: the base model with its layers repeated")
    reads_rows = checked.method == "regression" or options.distill_steps > 0
    notes += seen_rows(data) if reads_rows else []
    updates, loras = _fitted(options, checked, model, layers, seconds, notes)
    with _timed(seconds, "measuring"):
        measured = _measured(options, checked, model, layers, loras)
    report = ExportReport(
        output,
        checked.method,
        rank,
        len(experts),
        sum(len(mixture.A) == 1 for mixture in experts.values()),
        rows={
            kind: {"fitted": len(each.fitted) if reads_rows else 0, "held_out": len(each.held_out)}
            for kind, each in data.items()
        },
        seconds=seconds,
        notes=notes,
        settings=asdict(options),
        **measured,
    )
    config.base_model_name_or_path = str(options.base_model)
    others = {key: value for key, value in checked.tensors.items() if ".mola_" not in key} | checked.stacked
    with new_folder("output", output) as folder:
        write_lora(folder, updates, rank, config, checked.on_meta, others, checked.ranks)
        atomic_write_json(folder / REPORT_FILE, report.to_dict())
        hand_on_prompts(options.source[0], folder)
    return report


def _check(options: ConvertOptions) -> _Checked:
    """Everything that can be wrong before weights are loaded."""
    source, base_model, rank = os.path.expanduser(options.source[0]), str(options.base_model), int(options.rank or 0)
    method, task = _method(options), read_task(options)
    check_mixture(source)
    config: Any = MolaConfig.from_pretrained(source)
    if config.bias != "none":
        raise MolaError(f"`bias` of the adapter must be 'none' to be exported, got {config.bias!r}.")
    tensors = read_tensors(Path(source))
    on_meta = check_fits(model_on_meta(base_model, options.trust_remote_code), config, tensors)
    if config.layer_replication and has_lists(on_meta):
        raise MolaError(
            f"`layer_replication` of the adapter ({config.layer_replication}) cannot be exported for {base_model!r}: "
            "its configuration has lists by layer, such as `layer_types`, which PEFT does not repeat for a LoRA."
        )
    experts = mixtures(tensors, mola_layers(on_meta))
    _check_rank(rank, experts)
    stacked, ranks = stacked_lora(on_meta, tensors, rank)
    check_loads(
        lora_config(experts, rank, config, on_meta, ranks),
        experts,
        model_on_meta(base_model, options.trust_remote_code),
    )
    if options.distill_steps and all(len(mixture.A) == 1 for mixture in experts.values()):
        raise MolaError(
            f"`distill_steps` ({options.distill_steps}) has nothing to train: every linear has one expert, which is "
            "exported exactly. Leave it out."
        )
    examples = None if options.test is None or task is None else load_examples(options.test, task, "test")
    if examples and task is not None:
        _check_test(options, task, examples)
    data = _read(options, task)
    gates = _gates(source, experts) if method == "usage" else {}
    return _Checked(
        source, method, rank, task, config, tensors, on_meta, experts, stacked, ranks, examples, data, gates
    )


def _fitted(
    options: ConvertOptions,
    checked: _Checked,
    model: Any,
    layers: Mapping[str, MolaLinear],
    seconds: dict[str, float],
    notes: list[str],
) -> tuple[dict[str, Update], dict[str, Lora]]:
    """The LoRA, as it is written, and in the place of the mixture where a model is loaded."""
    experts, rank = checked.experts, checked.rank
    rows = [row for each in checked.data.values() for row in each.fitted]
    with _timed(seconds, "fitting"):
        if checked.method == "regression":
            memory, passes, weight = options.memory_gb, options.fit_passes, options.answer_weight
            updates, unseen = nearest_on_data(model, layers, experts, rows, rank, memory, passes, weight)
            if unseen:
                notes.append(f"{len(unseen)} linears saw no token and have the experts' mean, such as {unseen[0]}")
        else:
            updates = {name: mean_of_experts(each, rank, checked.gates.get(name)) for name, each in experts.items()}
    loras = as_parameters(layers, updates) if layers else {}
    if options.distill_steps:
        trained = [name for name, mixture in experts.items() if len(mixture.A) > 1]
        with _timed(seconds, "distilling"):
            steps, rate = options.distill_steps, options.distill_learning_rate
            distill(model, layers, loras, trained, rows, steps, rate, options.seed)
        updates |= {name: loras[name].update for name in trained}
    return updates, loras


def _measured(
    options: ConvertOptions, checked: _Checked, model: Any, layers: Mapping[str, MolaLinear], loras: Mapping[str, Lora]
) -> dict[str, Any]:
    """What the report says of the LoRA, by its attributes."""
    found: dict[str, Any] = {}
    data, examples, task = checked.data, checked.examples, checked.task
    if data:
        rows = [row for each in data.values() if each.fitted for row in each.held_out]
        if rows:
            found["explained"] = explained_shares(model, layers, checked.experts, loras, rows)
        near = {kind: divergence(model, layers, loras, each.held_out) for kind, each in data.items()}
        found["divergence"] = {kind: kl for kind, (kl, _) in near.items()}
        found["loss"] = {kind: loss for kind, (_, loss) in near.items()}
    if examples and task is not None:
        tokenizer = load_tokenizer(str(options.base_model), trust_remote_code=options.trust_remote_code)
        found["accuracy"], found["differences"] = accuracies(
            *(model, tokenizer, task, examples, layers, loras, options.scoring),
            template_for(task.template, tokenizer, options.source[0]),
        )
    return found


def _method(options: ConvertOptions) -> str:
    has_data = options.data is not None or options.text is not None
    method = options.method or ("regression" if has_data else "mean")
    if method not in METHODS:
        raise MolaError(f"`method` must be one of {', '.join(METHODS)}: got {method!r}.")
    if method == "regression" and not has_data:
        raise MolaError(
            "`method` regression needs `data` or `text` to fit to: got neither. Pass one, or --method mean."
        )
    if options.scoring not in SCORINGS:
        raise MolaError(f"`scoring` must be one of {', '.join(SCORINGS)}: got {options.scoring!r}.")
    if options.data is not None and len(options.data) > 1:
        raise MolaError(f"`data` must be one file with --to lora, got {len(options.data)}. Put them into one.")
    if options.fit_passes < 1:
        raise MolaError(f"`fit_passes` must be at least 1, got {options.fit_passes}.")
    if not 0 < options.answer_weight < math.inf:
        raise MolaError(f"`answer_weight` must be above 0, got {options.answer_weight}.")
    if options.distill_steps < 0 or (options.distill_steps and not has_data):
        raise MolaError(
            f"`distill_steps` must be at least 0, and 0 without `data` or `text` to train on: got "
            f"{options.distill_steps}."
        )
    if not 0 < options.distill_learning_rate < math.inf:
        raise MolaError(f"`distill_learning_rate` must be above 0, got {options.distill_learning_rate}.")
    return method


def _check_test(options: ConvertOptions, task: Task, examples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse questions that `accuracies` could not ask, before the model is loaded."""
    tokenizer = load_tokenizer(str(options.base_model), trust_remote_code=options.trust_remote_code)
    limit = max_positions(load_config(str(options.base_model), options.trust_remote_code))
    template = template_for(task.template, tokenizer, options.source[0])
    checked_questions(tokenizer, task, examples, template, options.scoring, limit=limit)


def _check_rank(rank: int, experts: Mapping[str, Mixture]) -> None:
    largest = max(
        (min(m.A.shape[0] * m.A.shape[1], m.A.shape[2], m.B.shape[2]) for m in experts.values()), default=max(rank, 1)
    )
    if not 1 <= rank <= largest:
        raise MolaError(
            f"`rank` must be from 1 to {largest}, the highest rank that an update of this adapter can have: got {rank}."
        )


def _read(options: ConvertOptions, task: Task | None) -> dict[str, Calibration]:
    found = {}
    if options.data is not None and task is not None:
        found["answer"] = read_data(options, options.data[0], task, options.source[0])
    if options.text is not None:
        found["text"] = read_general_text(options, "text")
    if options.test is not None and task is not None:
        found["test answer"] = read_test(options, task)
    if options.test_text is not None:
        found["other text"] = read_general_text(options, "test_text")
    return found


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def _gates(source: str, experts: Mapping[str, Mixture]) -> dict[str, torch.Tensor]:
    records, path = routing_records(source, None, "source", "Pass the run folder, or --method mean.")
    gates = {row["module"]: torch.tensor(row["mean_gates"], dtype=torch.float64) for row in records}
    for name, mixture in experts.items():
        if len(mixture.A) > 1 and (name not in gates or len(gates[name]) != len(mixture.A)):
            raise MolaError(f"{path} must belong to the adapter: it does not speak of {name!r}. Pass --method mean.")
    return gates
