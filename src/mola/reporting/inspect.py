"""`mola inspect`: the router decisions of an adapter on data, and how different its experts are.

Of a skills folder: what it holds, and which skill the data ask.
"""

import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mola.checkpoints.adapter_folder import read_tensors
from mola.checkpoints.adapter_settings import is_skills_folder
from mola.checkpoints.skills_folder import BASE, read_skills
from mola.data.formats import find_format
from mola.data.read import check_split, stream_rows
from mola.data.tasks import Task, load_task
from mola.data.templates import Template
from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, atomic_write_text
from mola.files.environment import software_versions
from mola.files.terminal import make_table_console
from mola.insight.ablation import list_experiments, measure_losses_without
from mola.insight.inspection import TokenTypes, measure_redundancy, measure_router_use, to_records
from mola.models.adapters import check_adapter
from mola.models.base_model import max_positions
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.options import ModelOptions
from mola.models.prompts import trained_settings
from mola.models.sample_data import encode_samples, read_samples
from mola.options.fields import check_results, parse_mapping
from mola.reporting.adapter_weights import read_adapter_weights
from mola.reporting.document import Section, render
from mola.reporting.expert_sections import (
    agreement_section,
    allocation_section,
    gates_section,
    has_agreement,
    leave_one_out_section,
    pair_means,
    redundancy_section,
)
from mola.reporting.load_run import Run
from mola.reporting.options import InspectOptions
from mola.reporting.result_sections import inspected_samples_section
from mola.skills.options import TestOptions
from mola.skills.summary import describe, summarize, summary_dict, summary_table
from mola.skills.testing import test

logger = logging.getLogger(__name__)

_CAPTION = (
    "Means over the modules of a layer. effective: effective experts of a token; above 0.9: tokens whose largest gate "
    "is; dead: experts that no token chose; agreement: between the choices of the modules of a layer; below: between "
    "their choices and those of the layer below."
)


def inspect(options: InspectOptions) -> dict[str, Any]:
    """Measure an adapter's router decisions on data, and how alike its experts are.

    Args:
        options: adapter, data and measurements.

    Returns:
        The content of the result file: `samples` (their number); `usage` of the experts by module, over `all` tokens,
        the `prompt`, the `answer` and every group of samples; `redundancy`, how alike the experts of each module are;
        `agreement` of the routers (`modules`, and `cramers_v` of every pair of them); `examples`, some samples with
        the mean gates over their answers; `leave_one_out` and its baseline, None if not measured; `settings`,
        `versions`.

    Raises:
        MolaError: options or data are wrong, before weights are loaded; the adapter has no router.
    """
    samples, dataset, tokenizer = _load_samples(options)
    model = model_for(options, options.adapter)
    redundancy = measure_redundancy(model)
    count = min(options.examples, len(samples))
    numbers = [index * len(samples) // count for index in range(count)]  # evenly spread, starting with 0
    use = measure_router_use(model, dataset, [each["groups"] for each in samples], TokenTypes(tokenizer), numbers)
    result: dict[str, Any] = {
        "samples": len(samples),
        "usage": {name: to_records(rows) for name, rows in use.usage.items()},
        "redundancy": to_records(redundancy),
        "agreement": {"modules": use.modules, "cramers_v": use.agreement},
        "examples": [samples[number] | {"experts": use.gates[number]} for number in numbers],
        "leave_one_out": None,
        "leave_one_out_baseline": None,
        "settings": asdict(options),
        "versions": software_versions(),
    }
    if options.leave_one_out != "none":
        result |= _measure_leave_one_out(model, dataset, options)
    if options.json is not None:
        atomic_write_json(options.json, result)
    if options.html is not None:
        atomic_write_text(options.html, render_inspection(options.adapter, result))
    return result


def _measure_leave_one_out(model: Any, dataset: Any, options: InspectOptions) -> dict[str, Any]:
    count = min(options.leave_one_out_limit, len(dataset))
    experiments = list_experiments(model, options.leave_one_out)
    passes = (len(experiments) + 1) * count
    Console(stderr=True).print(
        f"leave_one_out: {len(experiments)} experts and {count} samples take {passes:,} forward passes.",
        highlight=False,
    )
    loss, changes = measure_losses_without(model, [dataset[number] for number in range(count)], experiments)
    return {"leave_one_out": to_records(changes), "leave_one_out_baseline": {"loss": loss, "samples": count}}


def main(options: InspectOptions) -> int:
    """Run the command and print a table by layer."""
    if is_skills_folder(options.adapter):
        _inspect_skills(options)
        return 0
    result = inspect(options)
    console = make_table_console()
    console.print(_result_table(result))
    if options.json is not None:
        console.print(f"Every module is in {options.json}", highlight=False, markup=False)
    if options.html is not None:
        console.print(f"Open {options.html} in a browser", highlight=False, markup=False, soft_wrap=True)
    return 0


def _inspect_skills(options: InspectOptions) -> None:
    """Print what a skills folder holds, and which skill is asked for each prompt of the data."""
    for name in ("filters", "leave_one_out", "html"):
        if getattr(options, name) != getattr(InspectOptions, name):
            raise MolaError(f"`{name}` is for the experts of a mixture, and {options.adapter!r} is a skills folder.")
    check_results(options)
    shared = [each.name for each in fields(ModelOptions)] + ["task", "split", "template"]
    found = test(
        TestOptions(
            folder=options.adapter,
            data=[f"{BASE}={options.data}"],
            limit=sys.maxsize if options.limit is None else options.limit,
            **{name: getattr(options, name) for name in shared},
        )
    )
    folder = read_skills(options.adapter)
    skills, asked = summarize(folder), dict(sorted(found.asked[BASE].items()))
    console = make_table_console()
    console.print(summary_table(skills))
    print(describe(folder))
    print(f"{options.data} asks: {', '.join(f'{name} {count}' for name, count in asked.items())}.")
    if options.json is not None:
        result = {**summary_dict(folder, skills), "asked": asked, "settings": asdict(options)}
        atomic_write_json(options.json, result | {"versions": software_versions()})
        print(f"Written to {options.json}.")


def _load_samples(options: InspectOptions) -> tuple[list[dict[str, Any]], Any, Any]:
    """The samples as they go into the result, the encoded samples, and the tokenizer; loads no weights."""
    options.check()
    config = check_model(options)
    check_adapter(options.adapter)
    if not any(".mola_router" in name for name in read_tensors(Path(options.adapter))):
        raise MolaError(
            f"`adapter` must be a mixture of experts: no module of {options.adapter!r} has a router, so there is "
            "nothing to inspect."
        )
    trained = trained_settings(options.adapter)
    task = _task_of(options, trained.get("task"))
    if task is not None and "token" in task.groups:
        raise MolaError(
            f"`groups` of the task {task.name!r} must not have `token`, which names token types here. Rename it."
        )
    check_split("split", options.split, InspectOptions.split, options.data)
    if options.task is None and task is not None and not _reads_data(task, options):
        task = None
    tokenizer = tokenizer_for(options, "right")
    samples = read_samples(
        options.data,
        task,
        tokenizer,
        split=options.split,
        limit=options.limit,
        filters=parse_mapping("filters", options.filters),
        template=options.template,
        adapter=options.adapter,
    )
    dataset = encode_samples(samples, tokenizer, max_positions(config), options.adapter)
    described = []
    for number, row in zip(dataset["example"], dataset, strict=True):
        example = samples.examples[number]
        groups = {name: str(value) for name, value in task.group_values(example).items()} if task else {}
        prompt, answer = _texts(example, row, samples.template, tokenizer)
        described.append({"id": str(example["id"]), "prompt": prompt, "answer": answer, "groups": groups})
    return described, dataset, tokenizer


def _texts(example: Mapping[str, Any], row: Mapping[str, Any], template: Template, tokenizer: Any) -> tuple[str, str]:
    """The text before the answer, and the answer. In a chat these are the first answer, and all answers together."""
    if "messages" not in example:
        return template.prompt(example["instruction"], example.get("input")), example["output"]
    answers = [label for label in row["labels"] if label != IGNORED]
    start = next(index for index, label in enumerate(row["labels"]) if label != IGNORED)
    return tokenizer.decode(row["input_ids"][:start]), tokenizer.decode(answers)


def _task_of(options: InspectOptions, trained: Any) -> Task | None:
    if options.task is not None:
        return load_task(options.task)
    try:
        return None if trained is None else load_task(str(trained))
    except MolaError:  # the task is a file that has been moved
        logger.warning("The task of the training, %s, cannot be found: groups are left out. Pass `task`.", trained)
        return None


def _reads_data(task: Task, options: InspectOptions) -> bool:
    """False if the first row lacks columns of the task and is of a known format."""
    row = next(stream_rows(options.data, options.split, is_stored=True), {})
    missing = task.missing_columns(row)
    if not missing or {"instruction", "output"} <= row.keys():  # raw rows of the task, or prepared ones
        return True
    try:
        kind = find_format(row, options.data).name
    except MolaError:
        return True  # the task's own error names the column that is missing
    logger.info(
        "%s has no column `%s`, which the task of the training, %s, reads. It is read as %s, without the task.",
        options.data,
        missing[0],
        task.name,
        kind,
    )
    return False


def _result_table(result: Mapping[str, Any]) -> Table:
    """Means by layer, as a table for `rich`."""
    table = Table(title=escape(f"{result['settings']['adapter']}: {result['samples']} samples"), caption=_CAPTION)
    columns = ["layer", "experts", "balance", "entropy", "margin", "effective", "above 0.9", "dead", "distance"]
    columns += ["input overlap", "output overlap", "agreement", "below"]
    if result["leave_one_out"] is not None:
        samples = result["leave_one_out_baseline"]["samples"]
        columns += [f"loss without an expert, {samples} samples, least", "most"]
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")  # no digit is cut
    means = ("balance", "entropy", "margin", "effective_experts", "first_gate_above")
    usage = result["usage"]["all"]
    redundancy, left_out = _by_layer(result["redundancy"]), _by_layer(result["leave_one_out"] or ())
    layer_of = {row["module"]: row["layer_index"] for row in usage}
    agreement = pair_means(result["agreement"]["modules"], result["agreement"]["cramers_v"], layer_of.__getitem__)
    for layer, rows in _by_layer(usage).items():
        changes = [row["loss_change"] for row in left_out[layer]]
        table.add_row(
            "-" if layer is None else str(layer),
            ", ".join(str(number) for number in sorted({len(row["shares"]) for row in rows})),
            *(f"{fmean(row[name] for row in rows):.2f}" for name in means),
            str(sum(len(row["dead_experts"]) for row in rows)),
            f"{fmean(row['distance'] for row in redundancy[layer]):.3g}",
            _mean_text(row["input_overlap"] for row in redundancy[layer]),
            _mean_text(row["output_overlap"] for row in redundancy[layer]),
            _mean_text([agreement.get((layer, layer))]),
            _mean_text([None if layer is None else agreement.get((layer, layer - 1))]),
            *(f"{pick(changes):+.4f}" for pick in (min, max) if changes),
        )
    return table


def _by_layer(rows: Sequence[Mapping[str, Any]]) -> dict[int | None, list[Mapping[str, Any]]]:
    layers = defaultdict(list)
    for row in rows:
        layers[row["layer_index"]].append(row)
    return layers


def _mean_text(values: Iterable[float | None]) -> str:
    """Mean of the known values as text; an overlap is None if a factor is still zero."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.2f}" if known else "-"


def render_inspection(adapter: str, inspection: Mapping[str, Any]) -> str:
    """The page about an adapter from its folder and its `mola inspect` result; equal arguments give the same text."""
    weights = read_adapter_weights(Path(adapter))
    run = Run(Path(adapter), {}, adapter=weights, inspection=inspection)
    gates = gates_section(run)
    sections = [
        Section("allocation", "Experts by layer", allocation_section(run) if weights else None),
        Section("gates", "Which experts work", gates),
        Section("redundancy", "How alike experts are", redundancy_section(run) if weights else None),
        Section("agreement", "How routers agree", agreement_section(run) if has_agreement(inspection) else None),
        Section("leave-one-out", "What an expert is worth", leave_one_out_section(run)),
        Section("samples", "Samples", inspected_samples_section(inspection)),
    ]
    return render("inspection.html", f"{run.name}: experts, by mola", sections, gates["choices"], run=run)
