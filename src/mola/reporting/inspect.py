"""`mola inspect`: the router decisions of an adapter on data, and how different its experts are."""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from rich.console import Console

from mola.checkpoints.adapter_folder import read_tensors
from mola.data.encode import encode_whole
from mola.data.examples import load_examples
from mola.data.read import check_split
from mola.data.tasks import Task, load_task, template_name
from mola.data.templates import check_template
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json, atomic_write_text, check_new_file
from mola.files.terminal import make_table_console
from mola.insight.ablation import LEAVE_ONE_OUT, list_experiments, measure_losses_without
from mola.insight.inspection import TokenTypes, measure_redundancy, measure_router_use
from mola.models.adapters import check_adapter
from mola.models.base_model import max_positions
from mola.models.options import ModelOptions, check_model, model_for, tokenizer_for
from mola.models.prompts import template_for, trained_settings, warn_of_other_template
from mola.options.fields import START, Group, check_positive, option, parse_mapping
from mola.reporting.adapter_weights import read_adapter_weights
from mola.reporting.document import Section, render
from mola.reporting.expert_sections import (
    agreement_section,
    allocation_section,
    gates_section,
    has_agreement,
    leave_one_out_section,
    redundancy_section,
)
from mola.reporting.inspect_result import InspectResult, result_table
from mola.reporting.load_run import Run
from mola.reporting.result_sections import inspected_samples_section

logger = logging.getLogger(__name__)


@dataclass
class InspectOptions(ModelOptions):
    """Options of `mola inspect`."""

    _start: ClassVar = START
    adapter: str = field(metadata={"help": "Folder of an adapter."})
    data: str = field(metadata={"help": "Data: a JSON, JSON lines or CSV file, or a saved dataset."})
    task: str | None = option(
        None, "Task: its name or a YAML file. Default: that of the adapter's training; not needed for prepared data."
    )

    _data: ClassVar = Group("data")
    split: str = option("test", "Split to read if the data has several.")
    filters: dict[str, Any] | str | None = option(None, "Keep rows with these values: {column: value, or a list}.")
    limit: int | None = option(200, "Number of samples to inspect, from the first on.")
    template: str | None = option(
        None,
        "Prompt template; chat is the chat template of adapter or base model. Default: the task's own, else alpaca.",
    )

    _measured: ClassVar = Group("what is measured")
    examples: int = option(8, "Number of samples, evenly spread, whose mean gates go into the result file.")
    leave_one_out: str = option(
        "none",
        "Measure the loss on answers without each expert: none, layers (leaves out the expert with a given number in "
        "all modules of a layer) or modules (in one module). This takes one forward pass per expert and sample.",
    )
    leave_one_out_limit: int = option(16, "Number of samples for `leave_one_out`, from the first on.")

    _results: ClassVar = Group("results")
    json: str | None = option(None, "Result file (JSON) with every module.")
    html: str | None = option(None, "Page (HTML) with heat maps and charts, which needs no other file.")
    overwrite: bool = option(False, "Replace existing results.")


class _Samples(NamedTuple):
    """The inspected rows, the encoded rows, and the task, template and tokenizer used to encode them."""

    examples: list[dict[str, Any]]
    dataset: Any
    task: Task | None
    template: Any
    tokenizer: Any


def inspect(options: InspectOptions) -> InspectResult:
    """Measure an adapter's router decisions on data, and how alike its experts are.

    Args:
        options: adapter, data and measurements.

    Raises:
        MolaError: options or data are wrong, before weights are loaded; the adapter has no router.
    """
    samples = _load_samples(options)
    model = model_for(options, options.adapter)
    redundancy = measure_redundancy(model)
    columns = [samples.task.group_values(example) if samples.task else {} for example in samples.examples]
    groups = [{name: str(value) for name, value in values.items()} for values in columns]
    numbers = _evenly_spread(options.examples, len(groups))
    use = measure_router_use(model, samples.dataset, groups, TokenTypes(samples.tokenizer), numbers)
    examples = [
        {
            "id": str(samples.examples[number].get("id", number)),
            "prompt": samples.template.prompt(
                samples.examples[number]["instruction"], samples.examples[number].get("input")
            ),
            "answer": samples.examples[number]["output"],
            "groups": groups[number],
            "experts": use.gates[number],
        }
        for number in numbers
    ]
    agreement = {"modules": use.modules, "cramers_v": use.agreement}
    result = InspectResult(use.usage, redundancy, agreement, examples, len(groups), asdict(options))
    if options.leave_one_out != "none":
        result = _with_leave_one_out(result, model, samples, options)
    if options.json is not None:
        atomic_write_json(options.json, result.to_dict())
    if options.html is not None:
        atomic_write_text(options.html, render_inspection(options.adapter, result.to_dict()))
    return result


def _evenly_spread(count: int, total: int) -> list[int]:
    """Up to `count` numbers from 0 to `total - 1`, evenly spread, starting with 0."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def _with_leave_one_out(result: InspectResult, model: Any, samples: _Samples, options: InspectOptions) -> InspectResult:
    count = min(options.leave_one_out_limit, len(samples.examples))
    wanted = list_experiments(model, options.leave_one_out)
    passes = (len(wanted) + 1) * count
    Console(stderr=True).print(
        f"leave_one_out: {len(wanted)} experts and {count} samples take {passes:,} forward passes.", highlight=False
    )
    dataset = [samples.dataset[number] for number in range(count)]
    loss, changes = measure_losses_without(model, dataset, wanted)
    return replace(result, leave_one_out=changes, leave_one_out_baseline={"loss": loss, "samples": count})


def main(options: InspectOptions) -> int:
    """Run the command and print a table by layer."""
    result = inspect(options)
    console = make_table_console()
    console.print(result_table(result))
    if options.json is not None:
        console.print(f"Every module is in {options.json}", highlight=False, markup=False)
    if options.html is not None:
        console.print(f"Open {options.html} in a browser", highlight=False, markup=False, soft_wrap=True)
    return 0


def _load_samples(options: InspectOptions) -> _Samples:
    """Check the options, and read and encode the samples, before weights are loaded."""
    _check_options(options)
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
    prompts = template_name(options.template, task)
    check_template(prompts)
    warn_of_other_template(options.adapter, prompts)
    check_split("split", options.split, InspectOptions.split, options.data)
    filters = parse_mapping("filters", options.filters)
    examples = load_examples(options.data, task, options.split, limit=options.limit, filters=filters)
    tokenizer = tokenizer_for(options, "right")
    template = template_for(prompts, tokenizer, options.adapter)
    # Like in training, the end token is part of an answer only if the adapter was trained with it.
    has_end_token = trained.get("add_eos_token") is not False
    dataset = encode_whole(examples, tokenizer, template, max_positions(config), has_end_token)
    return _Samples(examples, dataset, task, template, tokenizer)


def _check_options(options: InspectOptions) -> None:
    check_positive(limit=options.limit, leave_one_out_limit=options.leave_one_out_limit)
    if options.examples < 0:
        raise MolaError(f"`examples` must be at least 0: got {options.examples}. Pass 0 for none.")
    if options.leave_one_out not in LEAVE_ONE_OUT:
        raise MolaError(
            f"`leave_one_out` must be one of {', '.join(LEAVE_ONE_OUT)}: got {options.leave_one_out!r}. Pass layers."
        )
    for name in ("json", "html"):
        path = getattr(options, name)
        if path is not None:
            check_new_file(name, path, options.overwrite)
    if options.json and options.html and os.path.realpath(options.json) == os.path.realpath(options.html):
        raise MolaError(f"`json` and `html` must be two files: both are {options.json!r}. Choose a different name.")


def _task_of(options: InspectOptions, trained: Any) -> Task | None:
    if options.task is not None:
        return load_task(options.task)
    try:
        return None if trained is None else load_task(str(trained))
    except MolaError:  # the task is a file that has been moved
        logger.warning("The task of the training, %s, cannot be found: groups are left out. Pass `task`.", trained)
        return None


def render_inspection(adapter: str, inspection: Mapping[str, Any]) -> str:
    """The page about an adapter from its folder and its `mola inspect` result; equal arguments give the same text."""
    folder = Path(adapter)
    weights = read_adapter_weights(folder)
    run = Run(
        folder,
        record={},
        curves={},
        adapter=weights,
        routing=None,
        before=None,
        after=None,
        inspection=inspection,
        export=None,
        paths={},
    )
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
