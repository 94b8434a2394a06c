"""`mola convert --to lora`: a mixture becomes the plain LoRA that is nearest to it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mola.allocation.probe import check_mixture, routing_records
from mola.checkpoints.tensors import read_tensors
from mola.data.examples import load_examples
from mola.data.tasks import Task
from mola.errors import MolaError
from mola.evaluation.answering import SCORINGS, make_questions
from mola.exporting.calibration import Calibration, read_data, read_general_text, read_task, token_ids
from mola.exporting.lora_files import write_lora
from mola.exporting.low_rank import cut, regression, square_root
from mola.exporting.measuring import accuracies, divergence, explained_shares
from mola.exporting.mixtures import Mixture, Update, gated, mixtures, mola_layers
from mola.exporting.moments import gather_all, moment_bytes, with_same_input, within
from mola.exporting.options import METHODS, ConvertOptions
from mola.exporting.report import REPORT_FILE, ExportReport
from mola.exporting.stacked_lora import stacked_lora
from mola.files.atomic import atomic_write_json
from mola.files.folders import new_folder
from mola.models.adapters import check_fits
from mola.models.loading import load_model, load_tokenizer
from mola.models.meta import model_on_meta
from mola.tuner import MolaConfig
from mola.tuner.layer import MolaLinear


def to_lora(options: ConvertOptions, output: Path) -> ExportReport:
    """Export an adapter; see `mola.exporting.convert.convert`."""
    source, base_model, rank = os.path.expanduser(options.source[0]), str(options.base_model), int(options.rank or 0)
    method, task = _method(options), read_task(options)
    check_mixture(source)
    config: Any = MolaConfig.from_pretrained(source)
    if config.bias != "none":
        raise MolaError(f"`bias` of the adapter must be 'none' to be exported, got {config.bias!r}.")
    tensors = read_tensors(Path(source))
    on_meta = check_fits(model_on_meta(base_model, options.trust_remote_code), config, tensors)
    experts = mixtures(tensors, mola_layers(on_meta))
    _check_rank(rank, experts)
    data = _read(options, task)
    examples = None if options.test is None or task is None else load_examples(options.test, task, "test")
    if examples and task is not None:
        make_questions(task, examples, None, options.scoring)
    seconds: dict[str, float] = {}
    model, layers = None, {}
    if data or examples:
        with _timed(seconds, "loading"):
            model = load_model(base_model, source, options.dtype, options.device, options.trust_remote_code)
            layers = mola_layers(model)
    notes = []
    with _timed(seconds, "fitting"):
        if method == "regression":
            updates, unseen = _nearest_on_data(model, layers, experts, data, rank, options.memory_gb)
            if unseen:
                notes.append(f"{len(unseen)} linears saw no token and have the experts' mean, such as {unseen[0]}")
        else:
            gates = _gates(source, experts) if method == "usage" else {}
            updates = {name: _nearest(mixture, rank, gates.get(name)) for name, mixture in experts.items()}
    notes += [f"{n} rows of data left out: too long" for each in data.values() if (n := each.too_long)]
    measured: dict[str, Any] = {}
    with _timed(seconds, "measuring"):
        if data:
            rows = [row for each in data.values() if each.fitted for row in each.held_out]
            measured["explained"] = explained_shares(model, layers, experts, updates, rows)
            found = {kind: divergence(model, layers, updates, each.held_out) for kind, each in data.items()}
            measured["divergence"] = {kind: kl for kind, (kl, _) in found.items()}
            measured["loss"] = {kind: loss for kind, (_, loss) in found.items()}
        if examples and task is not None:
            tokenizer = load_tokenizer(base_model, trust_remote_code=options.trust_remote_code)
            measured["accuracy"], measured["differences"] = accuracies(
                model, tokenizer, task, examples, layers, updates, options.scoring
            )
    report = ExportReport(
        output,
        method,
        rank,
        len(experts),
        sum(len(mixture.A) == 1 for mixture in experts.values()),
        rows={k: {"fitted": len(each.fitted), "held_out": len(each.held_out)} for k, each in data.items()},
        seconds=seconds,
        notes=notes,
        settings=asdict(options),
        **measured,
    )
    config.base_model_name_or_path = base_model
    stacked, ranks = stacked_lora(on_meta, tensors, rank)
    others = {key: value for key, value in tensors.items() if ".mola_" not in key} | stacked
    with new_folder("output", output) as folder:
        write_lora(folder, updates, rank, config, on_meta, others, ranks)
        atomic_write_json(folder / REPORT_FILE, report.to_dict())
    return report


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
    return method


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
        found["answer"] = read_data(options, options.data[0], task)
    if options.text is not None:
        found["text"] = read_general_text(options, "text")
    if options.test_text is not None:
        other = read_general_text(options, "test_text")
        found["other text"] = Calibration([], [*other.fitted, *other.held_out])
    return found


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def _gates(source: str, experts: Mapping[str, Mixture]) -> dict[str, torch.Tensor]:
    records, path = routing_records(source, None)
    gates = {row["module"]: torch.tensor(row["mean_gates"], dtype=torch.float64) for row in records}
    for name, mixture in experts.items():
        if len(mixture.A) > 1 and (name not in gates or len(gates[name]) != len(mixture.A)):
            raise MolaError(f"{path} must belong to the adapter: it does not speak of {name!r}. Pass --method mean.")
    return gates


def _exact(mixture: Mixture) -> Update:
    return mixture.B[0].t(), mixture.A[0]


def _nearest(mixture: Mixture, rank: int, gates: torch.Tensor | None) -> Update:
    """The mean of the experts, weighted by `gates`, cut to a rank; one expert as it is."""
    num_experts = len(mixture.A)
    if num_experts == 1:
        return _exact(mixture)
    weights = torch.full((num_experts,), 1 / num_experts) if gates is None else gates / gates.sum()
    return cut(mixture.left(weights), mixture.right(), rank)


def _nearest_on_data(
    model: Any,
    layers: Mapping[str, MolaLinear],
    experts: Mapping[str, Mixture],
    data: Mapping[str, Calibration],
    rank: int,
    memory_gb: float,
) -> tuple[dict[str, Update], list[str]]:
    """Reduced-rank regressions of all modules on the data, and the names of those that saw no token."""
    rows = token_ids([row for each in data.values() for row in each.fitted])
    several = {name: layer for name, layer in layers.items() if len(experts[name].A) > 1}
    updates = {name: _exact(experts[name]) for name in layers if name not in several}
    groups = with_same_input(model, several, rows[0][:1])
    sizes = [
        moment_bytes(experts[names[0]].A.shape[2], (experts[name].A[..., 0].numel() for name in names))
        for names in groups
    ]
    unseen = []
    for part in within(sizes, memory_gb * 1e9):
        names = [groups[index] for index in part]
        found = gather_all(model, layers, names, lambda name, x: gated(layers[name], experts[name].A, x), rows)
        for index, moments in enumerate(found):
            found[index] = None  # freed one after the other
            if moments is None:
                unseen += names[index]
                updates |= {name: _nearest(experts[name], rank, None) for name in names[index]}
                continue
            root, ridge = square_root(moments.second)
            for name in names[index]:
                # What the data do not say is left to the mean of the experts, not to zero.
                mean = experts[name].right().to(root.device) / len(experts[name].A)
                left = experts[name].left().to(root.device)
                B, A = regression(root, moments.cross[name] + mean * ridge, left, rank)
                updates[name] = B.cpu(), A.cpu()
    return {name: updates[name] for name in layers}, unseen
