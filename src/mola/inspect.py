"""`mola inspect`: what the routers of an adapter do on data, and how different its experts are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mola.data.encode import encode_examples
from mola.data.prepare import load_examples
from mola.data.tasks import load_task
from mola.data.templates import get_template
from mola.environment import software_versions
from mola.errors import MolaError
from mola.evaluation.core import check_positive
from mola.evaluation.predicting import max_positions
from mola.files import atomic_write_json, check_new_file
from mola.insight.looking import ModuleRedundancy, redundancy_of, to_records, usage_on
from mola.insight.usage import ModuleUsage
from mola.loading import check_adapter
from mola.model_options import ModelOptions, check_model, model_for, tokenizer_for
from mola.options import mapping, option

__all__ = ["InspectOptions", "InspectResult", "inspect", "main"]

_NO_LIMIT = 1 << 30


@dataclass
class InspectOptions(ModelOptions):
    """Options of `mola inspect`."""

    adapter: str = field(metadata={"help": "Folder of an adapter."})
    data: str = field(metadata={"help": "Data: a JSON, JSON lines or CSV file, or a saved dataset."})
    task: str = option("scienceqa", "Name of a task, or a task file (YAML).")
    split: str = option("test", "Split to read where the data has several.")
    filters: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keep the rows whose columns have these values (or one of a list): a mapping, JSON."},
    )
    limit: int | None = option(200, "Look at the first so many samples only.")
    template: str | None = option(None, "Prompt template; by default the task's own.")
    json: str | None = option(None, "Result file (JSON) with every module.")
    overwrite: bool = option(False, "Replace an existing result.")


@dataclass(frozen=True)
class InspectResult:
    """What was seen.

    Attributes:
        usage: use of experts by module, over `all` tokens, the `prompt`, the `answer`, and every group of samples.
        redundancy: likeness of experts by module.
        samples: how many samples were looked at.
        settings: the options.
    """

    usage: dict[str, list[ModuleUsage]]
    redundancy: list[ModuleRedundancy]
    samples: int
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "samples": self.samples,
            "usage": {name: to_records(rows) for name, rows in self.usage.items()},
            "redundancy": to_records(self.redundancy),
            "settings": self.settings,
            "versions": software_versions(),
        }


def inspect(options: InspectOptions) -> InspectResult:
    """Look at an adapter's experts.

    Args:
        options: what to look at.

    Raises:
        MolaError: options or data are wrong, before weights are loaded; the adapter has no router.
    """
    dataset, groups = _check(options)
    model = model_for(options, options.adapter)
    redundancy = redundancy_of(model)
    if not redundancy:
        raise MolaError(
            f"`adapter` must be a mixture of experts: no module of {options.adapter!r} has a router, so there is "
            "nothing to look at."
        )
    result = InspectResult(
        usage_on(model, dataset, groups, show_progress=Console(stderr=True).is_terminal),
        redundancy,
        len(groups),
        asdict(options),
    )
    if options.json is not None:
        atomic_write_json(options.json, result.to_dict())
    return result


def main(options: InspectOptions) -> int:
    """Run the command and print a table by layer.

    Returns:
        The exit code, 0.
    """
    result = inspect(options)
    console = Console()
    console.print(_table(result))
    if options.json is not None:
        console.print(f"Every module is in {options.json}", highlight=False, markup=False)
    return 0


def _check(options: InspectOptions) -> tuple[Any, Sequence[Mapping[str, str]]]:
    """Everything that can be wrong without weights; the encoded samples and their groups."""
    check_positive(limit=options.limit)
    config = check_model(options)
    check_adapter(options.adapter)
    if options.json is not None:
        check_new_file("json", options.json, options.overwrite)
    task = load_task(options.task)
    template = get_template(options.template or task.template)
    filters = mapping("filters", options.filters)
    examples = load_examples(options.data, task, options.split, limit=options.limit, filters=filters)
    tokenizer = tokenizer_for(options, "right")
    cutoff = max_positions(config) or _NO_LIMIT
    dataset, _ = encode_examples(examples, tokenizer, template, cutoff_len=cutoff)
    groups = [{name: str(example[name]) for name in task.groups if name in example} for example in examples]
    return dataset, groups


def _table(result: InspectResult) -> Table:
    table = Table(title=escape(f"{result.settings['adapter']}: {result.samples} samples"))
    for column in ("layer", "experts", "balance", "margin", "dead", "distance", "input overlap", "output overlap"):
        table.add_column(column, justify="right")
    usage, redundancy = defaultdict(list), defaultdict(list)
    for used in result.usage["all"]:
        usage[used.layer_index].append(used)
    for alike in result.redundancy:
        redundancy[alike.layer_index].append(alike)
    for layer, rows in usage.items():
        others = redundancy[layer]
        table.add_row(
            "-" if layer is None else str(layer),
            ", ".join(str(number) for number in sorted({len(row.shares) for row in rows})),
            f"{fmean(row.balance for row in rows):.2f}",
            f"{fmean(row.margin for row in rows):.2f}",
            str(sum(len(row.dead_experts) for row in rows)),
            f"{fmean(row.distance for row in others):.3g}",
            _two_digits(fmean(row.input_overlap for row in others)),
            _two_digits(fmean(row.output_overlap for row in others)),
        )
    table.caption = "Means over the modules of a layer; dead: experts that no token chose."
    return table


def _two_digits(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"  # not a number: a factor is zero
