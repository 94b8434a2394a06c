"""`mola inspect`: what the routers of an adapter do on data, and how different its experts are."""

import logging
import os
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
from mola.files.terminal import table_console
from mola.insight.ablation import LEAVE_ONE_OUT, experiments, losses_without
from mola.insight.inspection import TokenTypes, redundancy_of, router_use
from mola.models.adapters import check_adapter
from mola.models.base_model import max_positions
from mola.models.options import ModelOptions, check_model, model_for, tokenizer_for
from mola.models.prompts import template_for, trained_settings, warn_of_other_template
from mola.options.fields import START, Group, check_positive, mapping, option
from mola.reporting.inspect_result import InspectResult, result_table
from mola.reporting.page import render_inspection

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
    split: str = option("test", "Split to read where the data has several.")
    filters: dict[str, Any] | str | None = option(None, "Keep rows with these values: {column: value, or a list}.")
    limit: int | None = option(200, "Look at the first so many samples only.")
    template: str | None = option(
        None,
        "Prompt template; chat is the chat template of adapter or base model. Default: the task's own, else alpaca.",
    )

    _measured: ClassVar = Group("what is measured")
    examples: int = option(8, "Put the experts' mean gates of so many single samples into the result file.")
    leave_one_out: str = option(
        "none",
        "Measure the loss on answers without each expert: none, layers (an expert's number in all modules of a layer) "
        "or modules. It takes one forward pass per expert and sample.",
    )
    leave_one_out_limit: int = option(16, "Measure this on the first so many samples only.")

    _results: ClassVar = Group("results")
    json: str | None = option(None, "Result file (JSON) with every module.")
    html: str | None = option(None, "Page (HTML) with heat maps and charts, which needs no other file.")
    overwrite: bool = option(False, "Replace existing results.")


class _Samples(NamedTuple):
    """What is looked at: rows, the same encoded, and what they were encoded with."""

    examples: list[dict[str, Any]]
    dataset: Any
    task: Task | None
    template: Any
    tokenizer: Any


def inspect(options: InspectOptions) -> InspectResult:
    """Look at an adapter's experts.

    Args:
        options: what to look at.

    Raises:
        MolaError: options or data are wrong, before weights are loaded; the adapter has no router.
    """
    samples = _check(options)
    model = model_for(options, options.adapter)
    redundancy = redundancy_of(model)
    columns = [samples.task.group_values(example) if samples.task else {} for example in samples.examples]
    groups = [{name: str(value) for name, value in values.items()} for values in columns]
    chosen = spread(options.examples, len(groups))
    types = TokenTypes(samples.tokenizer)
    use = router_use(model, samples.dataset, groups, types, chosen)
    result = InspectResult(
        use.usage,
        redundancy,
        {"modules": use.modules, "cramers_v": use.agreement},
        [_example(number, samples, groups[number]) | {"experts": use.gates[number]} for number in chosen],
        len(groups),
        asdict(options),
    )
    if options.leave_one_out != "none":
        result = _leave_one_out(result, model, samples, options)
    if options.json is not None:
        atomic_write_json(options.json, result.to_dict())
    if options.html is not None:
        atomic_write_text(options.html, render_inspection(options.adapter, result.to_dict()))
    return result


def _leave_one_out(result: InspectResult, model: Any, samples: _Samples, options: InspectOptions) -> InspectResult:
    count = min(options.leave_one_out_limit, len(samples.examples))
    wanted = experiments(model, options.leave_one_out)
    passes = (len(wanted) + 1) * count
    Console(stderr=True).print(
        f"leave_one_out: {len(wanted)} experts and {count} samples take {passes:,} forward passes.", highlight=False
    )
    dataset = [samples.dataset[number] for number in range(count)]
    loss, found = losses_without(model, dataset, wanted)
    return replace(result, leave_one_out=found, leave_one_out_baseline={"loss": loss, "samples": count})


def spread(count: int, total: int) -> list[int]:
    """Up to `count` numbers below `total`, spread evenly, from 0 on."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def main(options: InspectOptions) -> int:
    """Run the command and print a table by layer."""
    result = inspect(options)
    console = table_console()
    console.print(result_table(result))
    if options.json is not None:
        console.print(f"Every module is in {options.json}", highlight=False, markup=False)
    if options.html is not None:
        console.print(f"Open {options.html} in a browser", highlight=False, markup=False, soft_wrap=True)
    return 0


def _check(options: InspectOptions) -> _Samples:
    """Everything that can be wrong without weights; the encoded samples."""
    check_positive(limit=options.limit, leave_one_out_limit=options.leave_one_out_limit)
    if options.examples < 0:
        raise MolaError(f"`examples` must be at least 0: got {options.examples}. Pass 0 for none.")
    if options.examples != InspectOptions.examples and options.json is None and options.html is None:
        raise MolaError(f"`examples` ({options.examples}) are written to `json` or `html`. Pass one, or leave it out.")
    if options.leave_one_out not in LEAVE_ONE_OUT:
        raise MolaError(
            f"`leave_one_out` must be one of {', '.join(LEAVE_ONE_OUT)}: got {options.leave_one_out!r}. Pass layers."
        )
    default = type(options).leave_one_out_limit
    if options.leave_one_out == "none" and options.leave_one_out_limit != default:
        raise MolaError(
            f"`leave_one_out_limit` counts only with `leave_one_out`: got {options.leave_one_out_limit}. Pass that too."
        )
    config = check_model(options)
    check_adapter(options.adapter)
    if not any(".mola_router" in name for name in read_tensors(Path(options.adapter))):
        raise MolaError(
            f"`adapter` must be a mixture of experts: no module of {options.adapter!r} has a router, so there is "
            "nothing to look at."
        )
    for name in ("json", "html"):
        path = getattr(options, name)
        if path is not None:
            check_new_file(name, path, options.overwrite)
    if options.json and options.html and os.path.realpath(options.json) == os.path.realpath(options.html):
        raise MolaError(f"`json` and `html` must be two files: both are {options.json!r}. Choose another name.")
    trained = trained_settings(options.adapter)
    task = _task_of(options, trained.get("task"))
    if task is not None and "token" in task.groups:
        raise MolaError(
            f"`groups` of the task {task.name!r} must not have `token`, as kinds of tokens are called here. Rename it."
        )
    prompts = template_name(options.template, task)
    check_template(prompts)
    warn_of_other_template(options.adapter, prompts)
    check_split("split", options.split, InspectOptions.split, options.data)
    filters = mapping("filters", options.filters)
    examples = load_examples(options.data, task, options.split, limit=options.limit, filters=filters)
    tokenizer = tokenizer_for(options, "right")
    template = template_for(prompts, tokenizer, options.adapter)
    # As in training: an end token that was never trained is no part of an answer.
    ends = trained.get("add_eos_token") is not False
    dataset = encode_whole(examples, tokenizer, template, max_positions(config), ends)
    return _Samples(examples, dataset, task, template, tokenizer)


def _task_of(options: InspectOptions, trained: Any) -> Task | None:
    if options.task is not None:
        return load_task(options.task)
    try:
        return None if trained is None else load_task(str(trained))
    except MolaError:  # a file that is elsewhere now
        logger.warning("The task of the training, %s, is not here: groups are left out. Pass `task`.", trained)
        return None


def _example(number: int, samples: _Samples, groups: dict[str, str]) -> dict[str, Any]:
    example = samples.examples[number]
    return {
        "id": str(example.get("id", number)),
        "prompt": samples.template.prompt(example["instruction"], example.get("input")),
        "answer": example["output"],
        "groups": groups,
    }
