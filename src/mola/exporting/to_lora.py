"""`mola convert --to lora`: a mixture becomes the plain LoRA that is nearest to it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

import torch
from peft import LoraConfig

from mola.allocation.probe import check_mixture, read_routing_records
from mola.architecture.layer_names import PREFIX
from mola.checkpoints.adapter_folder import read_tensors
from mola.checkpoints.adapter_settings import read_settings
from mola.data.tasks import Task
from mola.errors import MolaError
from mola.evaluation.questions import checked_questions
from mola.exporting.calibration import (
    Calibration,
    note_overlaps,
    read_data,
    read_general_text,
    read_samples_of,
    test_rows,
)
from mola.exporting.lora_files import stacked_lora_tensors, write_lora
from mola.exporting.measuring import (
    REPORT_FILE,
    ExportReport,
    explained_shares,
    measure_accuracies,
    measure_divergence,
)
from mola.exporting.mixtures import Lora, Mixture, as_loras, mola_layers, read_mixtures
from mola.exporting.options import METHODS, ConvertOptions
from mola.exporting.regression import fit_updates, mean_of_experts
from mola.files.atomic import atomic_write_json, write_new_folder
from mola.models.adapters import check_fits, warn_other_base
from mola.models.base_model import load_config, max_positions
from mola.models.loading import load_model
from mola.models.lora_config import lora_like
from mola.models.meta import model_on_meta
from mola.models.prompts import hand_on_prompts
from mola.models.sample_data import Samples
from mola.models.tokenizer import load_tokenizer
from mola.options.fields import check_positive
from mola.tuner import MolaConfig
from mola.tuner.layer import MolaLinear


class _Adapter(NamedTuple):
    """The mixture to convert."""

    experts: dict[str, Mixture]
    lora: LoraConfig  # the configuration of the LoRA to write
    other_tensors: dict[str, torch.Tensor]  # tensors of the LoRA that are not experts of linears


def convert_to_lora(options: ConvertOptions, output: Path) -> ExportReport:
    """Run `mola convert --to lora`; see `mola.exporting.convert.convert`."""
    # Everything that needs no weights of the base model is read and checked first.
    source, base_model = os.path.expanduser(options.source[0]), str(options.base_model)
    method = _choose_method(options)
    adapter = _read_adapter(options, source)
    experts, rank = adapter.experts, int(adapter.lora.r)
    data, test = _read_rows(options)
    gates = _read_gates(source, experts) if method == "usage" else {}

    is_fitted = method == "regression"
    seconds: dict[str, float] = {}
    notes = [f"{n} rows of data left out: too long" for each in data.values() if (n := each.too_long)]
    notes += note_overlaps(data) if is_fitted else []
    model, layers = None, {}
    if data:
        with _timed(seconds, "loading"):
            model = load_model(base_model, source, options.dtype, options.device, options.trust_remote_code)
            layers = mola_layers(model)
    else:
        warn_other_base(base_model, source, read_settings(Path(source)))
    with _timed(seconds, "fitting"):
        if is_fitted:
            rows = [row for each in data.values() for row in each.fitted]
            updates, unreached = fit_updates(model, layers, experts, rows, options)
            if unreached:
                notes.append(
                    f"{len(unreached)} linears got no token and have the experts' mean, such as {unreached[0]}"
                )
        else:
            updates = {name: mean_of_experts(each, rank, gates.get(name)) for name, each in experts.items()}
    with _timed(seconds, "measuring"):
        loras = as_loras(layers, updates) if layers else {}
        measured = _measure(model, layers, experts, loras, data, test)
    report = ExportReport(
        output,
        method,
        rank,
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
    with write_new_folder("output", output) as folder:
        write_lora(folder, adapter.lora, updates, adapter.other_tensors)
        atomic_write_json(folder / REPORT_FILE, report.to_dict())
        hand_on_prompts(source, folder)
    return report


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def _choose_method(options: ConvertOptions) -> str:
    has_data = options.data is not None or options.text is not None
    method = options.method or ("regression" if has_data else "mean")
    if method not in METHODS:
        raise MolaError(f"`method` must be one of {', '.join(METHODS)}: got {method!r}.")
    if method == "regression" and not has_data:
        raise MolaError("`method` regression needs `data` or `text` to fit to. Pass one of them, or --method mean.")
    if options.data is not None and len(options.data) > 1:
        raise MolaError(f"`data` must be one file with --to lora, got {len(options.data)}. Join the files.")
    check_positive(fit_passes=options.fit_passes)
    if not 0 < options.answer_weight < math.inf:
        raise MolaError(f"`answer_weight` must be above 0, got {options.answer_weight}.")
    return method


def _read_adapter(options: ConvertOptions, source: str) -> _Adapter:
    """Read the mixture, and check that it fits the base model and that a LoRA can replace it."""
    check_mixture(source)
    config: Any = MolaConfig.from_pretrained(source)
    if config.bias != "none":
        raise MolaError(f"`bias` of the adapter must be 'none' to be exported, got {config.bias!r}.")
    base_model, tensors = str(options.base_model), read_tensors(Path(source))
    on_meta = check_fits(model_on_meta(base_model, options.trust_remote_code), config, tensors)
    experts = read_mixtures(tensors, mola_layers(on_meta))
    rank = options.rank
    if rank is None:
        if any(len(each.A) > 1 for each in experts.values()):
            raise MolaError(
                "`rank` must be given with --to lora for several experts. It is the size of the LoRA. The rank of one "
                "expert is a good start, such as --r 8."
            )
        rank = mode([each.A.shape[1] for each in experts.values()] or [1])
    # Without any mixture, every rank from 1 on is possible.
    highest = max((each.highest_rank for each in experts.values()), default=max(rank, 1))
    if not 1 <= rank <= highest:
        raise MolaError(
            f"`rank` must be from 1 to {highest}, the highest rank that an update of this adapter can have: got {rank}."
        )
    stacked, stacked_ranks = stacked_lora_tensors(on_meta, tensors, rank)
    single = {name.removeprefix(PREFIX): each.A.shape[1] for name, each in experts.items() if len(each.A) == 1}
    own_ranks = {name: r for name, r in (*single.items(), *stacked_ranks.items()) if r > rank}
    # The scale of the LoRA is 1, as its B includes the scale of the mixture.
    scale: Any = {"lora_alpha": rank, "alpha_pattern": own_ranks, "use_rslora": False}
    one: Any = {"num_experts": 1, "num_experts_pattern": None, "r": rank, "rank_pattern": own_ranks}
    one |= {**scale, "lora_dropout": 0.0, "init_lora_weights": True}
    lora = lora_like(replace(config, **one), model_on_meta(base_model, options.trust_remote_code))
    lora.inference_mode, lora.base_model_name_or_path = True, base_model
    return _Adapter(experts, lora, {key: each for key, each in tensors.items() if ".mola_" not in key} | stacked)


def _read_rows(options: ConvertOptions) -> tuple[dict[str, Calibration], dict[str, Any]]:
    """The rows of all data, and the arguments of `evaluate_examples` if the test file has answers."""
    found, questions = {}, {}
    if options.data is not None:
        found["answer"] = read_data(options, options.data[0], options.source[0])
    if options.text is not None:
        found["text"] = read_general_text(options, "text")
    if options.test is not None:
        samples, tokenizer = read_samples_of(options, options.test, options.source[0], "test")
        if samples.task is not None:
            questions = _questions(options, samples, samples.task)
        elif options.scoring != ConvertOptions.scoring:
            raise MolaError(
                f"`scoring` ({options.scoring!r}) is for questions with answers, but `test` is free text. Leave it "
                "out, or pass the `task` that says where the answers are."
            )
        found["test answer"] = test_rows(options, samples, tokenizer)
    if options.test_text is not None:
        found["other text"] = read_general_text(options, "test_text")
    return found, questions


def _questions(options: ConvertOptions, samples: Samples, task: Task) -> dict[str, Any]:
    """The arguments of `evaluate_examples` that measure the accuracy on the test file, checked without the model."""
    tokenizer = load_tokenizer(str(options.base_model), trust_remote_code=options.trust_remote_code)
    limit = max_positions(load_config(str(options.base_model), options.trust_remote_code))
    checked_questions(tokenizer, task, samples.examples, samples.template, options.scoring, limit=limit)
    return {
        "tokenizer": tokenizer,
        "task": task,
        "examples": samples.examples,
        "template": samples.template,
        "scoring": options.scoring,
    }


def _read_gates(source: str, experts: Mapping[str, Mixture]) -> dict[str, torch.Tensor]:
    records, path = read_routing_records(source, None, "source", "Pass the run folder, or --method mean.")
    gates = {row["module"]: torch.tensor(row["mean_gates"], dtype=torch.float64) for row in records}
    for name, mixture in experts.items():
        if len(mixture.A) > 1 and (name not in gates or len(gates[name]) != len(mixture.A)):
            raise MolaError(
                f"{path} must belong to the adapter: it does not hold the gates of {name!r}. Pass --method mean."
            )
    return gates


def _measure(
    model: Any,
    layers: Mapping[str, MolaLinear],
    experts: Mapping[str, Mixture],
    loras: Mapping[str, Lora],
    data: Mapping[str, Calibration],
    test: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure the LoRA; return the values of the report's measured attributes."""
    found: dict[str, Any] = {}
    rows = [row for each in data.values() if each.fitted for row in each.held_out]
    if rows:
        found["explained"] = explained_shares(model, layers, experts, loras, rows)
    measured = {kind: measure_divergence(model, layers, loras, each.held_out) for kind, each in data.items()}
    found["divergence"] = {kind: kl for kind, (kl, _) in measured.items()}
    found["loss"] = {kind: loss for kind, (_, loss) in measured.items()}
    if test:
        found["accuracy"], found["differences"] = measure_accuracies(model, layers, loras, **test)
    return found
