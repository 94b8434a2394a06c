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

from mola.allocation.probe import check_mixture, read_routing_records
from mola.checkpoints.adapter_folder import read_tensors
from mola.data.examples import load_examples
from mola.data.tasks import Task
from mola.errors import MolaError
from mola.evaluation.questions import SCORINGS, checked_questions
from mola.exporting.calibration import Calibration, note_overlaps, read_data, read_general_text, read_task, read_test
from mola.exporting.lora_files import check_peft_places_lora, make_lora_config, stacked_lora_tensors, write_lora
from mola.exporting.measuring import (
    REPORT_FILE,
    ExportReport,
    explained_shares,
    measure_accuracies,
    measure_divergence,
)
from mola.exporting.mixtures import Lora, Mixture, Update, as_loras, mola_layers, read_mixtures
from mola.exporting.options import METHODS, ConvertOptions
from mola.exporting.regression import fit_updates, mean_of_experts
from mola.files.atomic import atomic_write_json, write_new_folder
from mola.models.adapters import check_fits, warn_other_base
from mola.models.base_model import load_config, max_positions
from mola.models.loading import load_model
from mola.models.meta import model_on_meta
from mola.models.prompts import hand_on_prompts, template_for
from mola.models.tokenizer import load_tokenizer
from mola.tuner import MolaConfig
from mola.tuner.layer import MolaLinear


@dataclass
class _Inputs:
    """The adapter to export, the data and the settings; all are read and checked before the model's weights are."""

    source: str
    method: str
    rank: int
    task: Task | None
    config: Any
    tensors: dict[str, torch.Tensor]
    on_meta: Any
    experts: dict[str, Mixture]
    stacked: dict[str, torch.Tensor]  # LoRAs of parameters with stacked experts, in PEFT's layout
    stacked_ranks: dict[str, int]
    examples: list[dict[str, Any]] | None
    data: dict[str, Calibration]
    gates: dict[str, torch.Tensor]


def convert_to_lora(options: ConvertOptions, output: Path) -> ExportReport:
    """Run `mola convert --to lora`; see `mola.exporting.convert.convert`."""
    inputs = _read_inputs(options)
    config, experts, data = inputs.config, inputs.experts, inputs.data
    seconds: dict[str, float] = {}
    model, layers = None, {}
    if data or inputs.examples:
        with _timed(seconds, "loading"):
            model = load_model(
                str(options.base_model), inputs.source, options.dtype, options.device, options.trust_remote_code
            )
            layers = mola_layers(model)
    else:
        warn_other_base(str(options.base_model), inputs.source, config.to_dict())
    is_fitted = inputs.method == "regression"
    notes = [f"{n} rows of data left out: too long" for each in data.values() if (n := each.too_long)]
    notes += note_overlaps(data) if is_fitted else []
    with _timed(seconds, "fitting"):
        updates = _make_updates(options, inputs, model, layers, notes)
    with _timed(seconds, "measuring"):
        measured = _measure(options, inputs, model, layers, as_loras(layers, updates) if layers else {})
    report = ExportReport(
        output,
        inputs.method,
        inputs.rank,
        len(experts),
        sum(len(mixture.A) == 1 for mixture in experts.values()),
        rows={
            kind: {"fitted": len(each.fitted) if is_fitted else 0, "held_out": len(each.held_out)}
            for kind, each in data.items()
        },
        seconds=seconds,
        notes=notes,
        settings=asdict(options),
        **measured,
    )
    config.base_model_name_or_path = str(options.base_model)
    others = {key: value for key, value in inputs.tensors.items() if ".mola_" not in key} | inputs.stacked
    with write_new_folder("output", output) as folder:
        write_lora(folder, updates, inputs.rank, config, inputs.on_meta, others, inputs.stacked_ranks)
        atomic_write_json(folder / REPORT_FILE, report.to_dict())
        hand_on_prompts(options.source[0], folder)
    return report


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def _read_inputs(options: ConvertOptions) -> _Inputs:
    """Read and check everything that needs no weights of the base model."""
    source, base_model, rank = os.path.expanduser(options.source[0]), str(options.base_model), int(options.rank or 0)
    method, task = _choose_method(options), read_task(options)
    check_mixture(source)
    config: Any = MolaConfig.from_pretrained(source)
    if config.bias != "none":
        raise MolaError(f"`bias` of the adapter must be 'none' to be exported, got {config.bias!r}.")
    tensors = read_tensors(Path(source))
    on_meta = check_fits(model_on_meta(base_model, options.trust_remote_code), config, tensors)
    experts = read_mixtures(tensors, mola_layers(on_meta))
    _check_rank(rank, experts)
    stacked, stacked_ranks = stacked_lora_tensors(on_meta, tensors, rank)
    check_peft_places_lora(
        make_lora_config(experts, rank, config, on_meta, stacked_ranks),
        experts,
        model_on_meta(base_model, options.trust_remote_code),
    )
    examples = None if options.test is None or task is None else load_examples(options.test, task, "test")
    if examples and task is not None:
        _check_test(options, task, examples)
    data = _read_rows(options, task)
    gates = _read_gates(source, experts) if method == "usage" else {}
    return _Inputs(
        source, method, rank, task, config, tensors, on_meta, experts, stacked, stacked_ranks, examples, data, gates
    )


def _choose_method(options: ConvertOptions) -> str:
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
        raise MolaError(f"`data` must be one file with --to lora, got {len(options.data)}. Join the files.")
    if options.fit_passes < 1:
        raise MolaError(f"`fit_passes` must be at least 1, got {options.fit_passes}.")
    if not 0 < options.answer_weight < math.inf:
        raise MolaError(f"`answer_weight` must be above 0, got {options.answer_weight}.")
    return method


def _check_rank(rank: int, experts: Mapping[str, Mixture]) -> None:
    largest = max(
        (min(m.A.shape[0] * m.A.shape[1], m.A.shape[2], m.B.shape[2]) for m in experts.values()), default=max(rank, 1)
    )
    if not 1 <= rank <= largest:
        raise MolaError(
            f"`rank` must be from 1 to {largest}, the highest rank that an update of this adapter can have: got {rank}."
        )


def _check_test(options: ConvertOptions, task: Task, examples: Sequence[Mapping[str, Any]]) -> None:
    """Raise for questions that `measure_accuracies` could not use."""
    tokenizer = load_tokenizer(str(options.base_model), trust_remote_code=options.trust_remote_code)
    limit = max_positions(load_config(str(options.base_model), options.trust_remote_code))
    template = template_for(task.template, tokenizer, options.source[0])
    checked_questions(tokenizer, task, examples, template, options.scoring, limit=limit)


def _read_rows(options: ConvertOptions, task: Task | None) -> dict[str, Calibration]:
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


def _read_gates(source: str, experts: Mapping[str, Mixture]) -> dict[str, torch.Tensor]:
    records, path = read_routing_records(source, None, "source", "Pass the run folder, or --method mean.")
    gates = {row["module"]: torch.tensor(row["mean_gates"], dtype=torch.float64) for row in records}
    for name, mixture in experts.items():
        if len(mixture.A) > 1 and (name not in gates or len(gates[name]) != len(mixture.A)):
            raise MolaError(
                f"{path} must belong to the adapter: it does not hold the gates of {name!r}. Pass --method mean."
            )
    return gates


def _make_updates(
    options: ConvertOptions, inputs: _Inputs, model: Any, layers: Mapping[str, MolaLinear], notes: list[str]
) -> dict[str, Update]:
    """The update of every linear by the chosen method. Linears that got no token are added to the notes."""
    experts, rank = inputs.experts, inputs.rank
    if inputs.method != "regression":
        return {name: mean_of_experts(each, rank, inputs.gates.get(name)) for name, each in experts.items()}
    rows = [row for each in inputs.data.values() for row in each.fitted]
    updates, unreached = fit_updates(
        *(model, layers, experts, rows, rank),
        memory_gb=options.memory_gb,
        passes=options.fit_passes,
        answer_weight=options.answer_weight,
    )
    if unreached:
        notes.append(f"{len(unreached)} linears got no token and have the experts' mean, such as {unreached[0]}")
    return updates


def _measure(
    options: ConvertOptions, inputs: _Inputs, model: Any, layers: Mapping[str, MolaLinear], loras: Mapping[str, Lora]
) -> dict[str, Any]:
    """Measure the LoRA; return the values of the report's measured attributes."""
    found: dict[str, Any] = {}
    data, examples, task = inputs.data, inputs.examples, inputs.task
    if data:
        rows = [row for each in data.values() if each.fitted for row in each.held_out]
        if rows:
            found["explained"] = explained_shares(model, layers, inputs.experts, loras, rows)
        measured = {kind: measure_divergence(model, layers, loras, each.held_out) for kind, each in data.items()}
        found["divergence"] = {kind: kl for kind, (kl, _) in measured.items()}
        found["loss"] = {kind: loss for kind, (_, loss) in measured.items()}
    if examples and task is not None:
        tokenizer = load_tokenizer(str(options.base_model), trust_remote_code=options.trust_remote_code)
        found["accuracy"], found["differences"] = measure_accuracies(
            *(model, tokenizer, task, examples, layers, loras, options.scoring),
            template_for(task.template, tokenizer, options.source[0]),
        )
    return found
