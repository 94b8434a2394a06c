"""`python -m benchmarks.effective_experts`: what a token sees of kept mixtures, beside LoRAs of equal size.

    python -m benchmarks.effective_experts mixture=runs/2468 lora=runs/lora --data data/sample/test.json \\
        --output seen.json
    python -m benchmarks.effective_experts_page seen.json --picture seen.svg > seen.md

The question is whether a mixture acts as a LoRA of the rank of one expert. Of every adapted linear the record has:

1. `effective_experts` of a token, `1 / sum_e g_e^2`;
2. `first_gate_above`: share of tokens whose largest gate is above 0.9;
3. `effective_rank` of the update that a token sees (`benchmarks.token_updates` has the formula), and
   `mean_update_rank`, that of the mean update over all tokens;
4. `relative_norm`: norm of the update's output over the norm of the frozen linear's output; `update_norm` alone;
5. `gradient`: norms of the loss's gradient with respect to the A and the B of each expert, means over batches, and
   each expert's share in them; `training_gates`: mean gates over the whole training, from the run's `routing.jsonl`.

1, 3 and 4 are means and quantiles over the tokens of prompts and answers. Nothing is trained: a sample takes one
forward and one backward pass in eval mode, without dropout. Samples are read one by one, without padding; a batch's
gradient is the sum of its samples' gradients, divided by its number of answer tokens, as in training. All adapters must
read the same tokens. A LoRA is a mixture with one expert here.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.errors import in_one_line
from benchmarks.token_updates import LinearMeasures, measured_updates
from mola.data.encode import data_fingerprint
from mola.data.tasks import load_task
from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from mola.exporting.convert import ConvertOptions, convert
from mola.files.atomic import atomic_write_json, check_new_file
from mola.files.environment import machine_description, software_versions
from mola.files.reading import first_repeated, read_json_lines
from mola.files.terminal import show_progress
from mola.insight import ROUTING_FILE
from mola.insight.recorder import FIRST_GATE, effective_experts
from mola.models.adapters import check_adapter
from mola.models.base_model import max_positions
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.options import ModelOptions
from mola.models.prompts import trained_settings
from mola.models.sample_data import encode_samples, read_samples
from mola.options.fields import START, Group, check_positive, option, required
from mola.options.parsing import parse
from mola.serving.options import split_adapter

FORMAT = 1


@dataclass
class LookOptions(ModelOptions):
    """Options of `python -m benchmarks.effective_experts`."""

    _start: ClassVar = START
    adapter: list[str] = option(
        None,
        "Adapters, each NAME=FOLDER or FOLDER; a FOLDER alone is named after its last part.",
        required=True,
    )
    data: str = required("Data: a JSON, JSONL, CSV or parquet file, a folder, or a Hub id.")
    output: str = required("Result file (JSON).")

    _data: ClassVar = Group("data")
    task: str | None = option(None, "Task: its name or a YAML file. Default: that of the adapter's training.")
    split: str = option("test", "Split to read if the data has several.")
    template: str | None = option(None, "Prompt template. Default: that of the adapter's training.")
    limit: int | None = option(128, "Number of samples, from the first on.")
    batch_size: int = option(8, "Samples of a batch, whose gradient is measured.")
    overwrite: bool = option(False, "Replace an existing result file.")

    def adapters(self) -> list[str]:
        """The folders of the adapters."""
        return [split_adapter(text)[1] for text in self.adapter or []]


def look(options: LookOptions) -> dict[str, Any]:
    """Measure the adapters one after the other.

    Returns:
        The content of the result file.

    Raises:
        MolaError: an option is wrong, two adapters have one name or read different tokens, or an adapter has no
            linear with experts of mola.
    """
    check_positive(limit=options.limit, batch_size=options.batch_size)
    check_new_file("output", options.output, options.overwrite)
    named = [split_adapter(text) for text in options.adapter]
    if (repeated := first_repeated(name for name, _ in named)) is not None:
        raise MolaError(f"`adapter` holds two adapters named {repeated!r}. Pass NAME=FOLDER.")
    samples, fingerprint = _samples_of_all(options, [folder for _, folder in named])
    found = []
    for name, folder in named:
        model = _model_with(options, folder)
        found.append({"name": name, **measure(model, samples, options.batch_size, name)})
        _add_training(found[-1]["linears"], Path(folder) / ROUTING_FILE)
    return {
        "format": FORMAT,
        "base_model": Path(options.base_model).name,
        "data": fingerprint,
        "samples": len(samples),
        "tokens": sum(len(sample["input_ids"]) for sample in samples),
        "batch_size": options.batch_size,
        "first_gate": FIRST_GATE,
        "dtype": options.dtype,
        "adapters": found,
        "machine": machine_description(),
        "versions": software_versions(),
    }


def _model_with(options: LookOptions, folder: str) -> Any:
    """The model with an adapter; a LoRA becomes a mixture with one expert."""
    if check_adapter(folder)["peft_type"] != "LORA":
        return model_for(options, folder)
    with tempfile.TemporaryDirectory() as place:
        one = ConvertOptions([folder], f"{place}/one", "lora", base_model=options.base_model, num_experts="1")
        return model_for(options, str(convert(one).output))


def _samples_of_all(options: LookOptions, folders: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The tokens and labels, which must be the same for all adapters, and the fingerprint of the data."""
    config, tokenizer = check_model(options), tokenizer_for(options, "right")
    first: list[dict[str, Any]] = []
    for folder in folders:
        check_adapter(folder)
        task = options.task or trained_settings(folder).get("task")
        read = read_samples(
            options.data,
            None if task is None else load_task(str(task)),
            tokenizer,
            split=options.split,
            limit=options.limit,
            template=options.template,
            adapter=folder,
        )
        encoded = encode_samples(read, tokenizer, max_positions(config), folder)
        samples = [{name: row[name] for name in ("input_ids", "labels")} for row in encoded]
        first = first or samples
        if samples != first:
            raise MolaError(
                f"`adapter` must name adapters that read the same tokens: {folder!r} was trained with another "
                f"template or task than {folders[0]!r}. Pass `template` and `task`."
            )
    return first, data_fingerprint(read.examples)


def measure(
    model: torch.nn.Module, samples: Sequence[Mapping[str, Sequence[int]]], batch_size: int, name: str
) -> dict[str, Any]:
    """Measure one adapter.

    Args:
        model: the base model with the adapter, in eval mode.
        samples: `input_ids` and `labels` of each sample.
        batch_size: samples of a batch, whose gradient is measured.
        name: the adapter's name, for the progress.

    Returns:
        `trained_values`, their number; `loss`, mean over the batches; `linears`, the measures of each linear.
    """
    device = next(model.parameters()).device
    with measured_updates(model) as linears:
        trained = sum(p.numel() for each in linears for p in _parameters(each))
        model.requires_grad_(False)
        gradients = [GradientNorms(each) for each in linears]
        losses = []
        batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        for batch in show_progress(batches, f"Looking at {name}"):
            answer_tokens = [sum(label != IGNORED for label in sample["labels"][1:]) for sample in batch]
            loss = 0.0
            for sample, count in zip(batch, answer_tokens, strict=True):
                ids, labels = (torch.tensor([sample[key]], device=device) for key in ("input_ids", "labels"))
                share = model(input_ids=ids, labels=labels).loss * (count / sum(answer_tokens))
                share.backward()
                loss += share.item()
            losses.append(loss)
            for each in gradients:
                each.add()
        pairs = zip(linears, gradients, strict=True)
        rows = [each.row() | {"gradient": norms.row()} for each, norms in pairs if each.has_tokens]
    return {"trained_values": trained, "loss": sum(losses) / len(losses), "linears": rows}


def _parameters(linear: LinearMeasures) -> list[torch.nn.Parameter]:
    router = linear.layer.mola_router
    routers = [router[linear.adapter]] if linear.adapter in router else []
    return [linear.experts_A, linear.experts_B, *routers]


class GradientNorms:
    """Norms of the gradients of one linear's experts, summed over batches."""

    def __init__(self, linear: LinearMeasures) -> None:
        self.factors = linear.experts_A, linear.experts_B
        for each in self.factors:
            each.requires_grad_()
        self.sums = torch.zeros(3, len(linear.experts_A), dtype=torch.float64)  # of A, of B, of both together
        self.batches = 0

    def add(self) -> None:
        """Count the gradient of a batch, and set it to zero."""
        squared = []
        for each in self.factors:
            if each.grad is None:
                squared.append(torch.zeros(len(each), dtype=torch.float64))
            else:
                squared.append(each.grad.float().flatten(1).square().sum(1).cpu().double())
            each.grad = None
        self.sums += torch.stack([*squared, squared[0] + squared[1]]).sqrt()
        self.batches += 1

    def row(self) -> dict[str, Any]:
        """`A` and `B`: for each expert the norm of its gradient, mean over batches. `shares`: of both together.

        `effective_experts` is `1 / sum_e shares_e^2`; it and the shares are None without any gradient.
        """
        norms_A, norms_B, norms = self.sums / self.batches
        shares = norms / norms.sum() if norms.any() else None
        return {
            "A": norms_A.tolist(),
            "B": norms_B.tolist(),
            "shares": None if shares is None else shares.tolist(),
            "effective_experts": None if shares is None else effective_experts(shares, 0).item(),
        }


def _add_training(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Add the mean gates over the training to each linear; None without telemetry."""
    sums = gates_over_training(read_json_lines(path)) if path.is_file() else {}
    for row in rows:
        row["training_gates"] = sums.get(row["module"])


def gates_over_training(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Mean gates of each module over all tokens of a `routing.jsonl`, without intervals whose gates are not finite."""
    tokens: dict[str, int] = {}
    sums: dict[str, list[float]] = {}
    for record in itertools.chain.from_iterable(line["modules"] for line in lines):
        if None in record["mean_gates"]:
            continue
        name, count = record["module"], record["num_tokens"]
        before = sums.get(name, [0.0] * len(record["mean_gates"]))
        sums[name] = [old + count * gate for old, gate in zip(before, record["mean_gates"], strict=True)]
        tokens[name] = tokens.get(name, 0) + count
    return {name: [each / tokens[name] for each in values] for name, values in sums.items()}


@in_one_line("effective_experts")
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the record; 0, or 2 for wrong input."""
    words = sys.argv[1:] if arguments is None else arguments
    summary = __doc__.partition("\n")[0]
    options = parse(LookOptions, words, prog="benchmarks.effective_experts", summary=summary, positional="adapter")
    atomic_write_json(options.output, look(options))
    print(f"Written to {options.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
