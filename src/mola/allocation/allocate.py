"""`mola allocate`: chooses numbers of experts for every decoder layer, or every linear, with an exact total.

    mola allocate --base_model my-model --method alphalora --budget 160 --output allocation.json
    mola allocate --base_model my-model --method redundancy --adapter runs/probe --budget 160 --output allocation.json

The file can be passed as `num_experts` to `mola plan`, to `mola train` and in Python.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from mola.allocation.base import Base, read_base
from mola.allocation.measured import (
    LayerScores,
    ModuleScore,
    alphalora_scores,
    layer_scores,
    redundancy_scores,
    usage_scores,
)
from mola.allocation.on_data import activation_scores, encoded_samples, gradient_scores, load_for_scores
from mola.allocation.options import AllocateOptions, check_options, method_name
from mola.allocation.probe import check_mixture
from mola.allocation.rounding import (
    ModuleExperts,
    Rule,
    check_budget,
    layers_and_pattern,
    numbers_of_layers,
    numbers_of_modules,
)
from mola.architecture.layer_names import module_kinds
from mola.architecture.notation import resolve_per_layer
from mola.data.read import check_split
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.environment import software_versions
from mola.files.terminal import make_table_console
from mola.models.cost import cost_of_allocation
from mola.options.command_line import command_line, next_steps
from mola.options.fields import check_results

__all__ = ["AllocateOptions", "AllocateResult", "allocate", "main"]

_WHY = {
    "alphalora": "whose weights have a larger power-law exponent count as less well trained and get more experts.",
    "gradient": "that a first step on the data would change more get more experts.",
    "activation": "whose inputs vary most in few directions get more experts.",
    "redundancy": "whose experts differ more in the probe get more experts; similar experts are redundant.",
    "usage": "that spread their tokens over more experts in the probe get more experts.",
}
_RANK = "8"  # for the count of trainable parameters; the default of `mola plan`
_BAR_WIDTH = 30


@dataclass(frozen=True)
class AllocateResult:
    """An allocation, and how it was made.

    Attributes:
        num_experts: experts of every decoder layer, lowest first. A layer without adapted linears has 1, which
            does not count for the budget and has no effect. With `per_module`, the rounded mean of each layer.
        scores: score of every layer, the mean of its linears; None without adapted linears.
        why: one sentence that explains the numbers.
        method: from the options.
        budget: total number of experts over the layers with a score; with `per_module` for each kind of linears.
        base_model: from the options.
        settings: the options.
        num_experts_pattern: with `per_module`, name of a linear whose number differs from its layer's -> its number;
            else None.
        modules: with `per_module`, every adapted linear; else empty.
    """

    num_experts: list[int]
    scores: list[float | None]
    why: str
    method: str
    budget: int
    base_model: str
    settings: dict[str, Any] = field(default_factory=dict)
    num_experts_pattern: dict[str, int] | None = None
    modules: list[ModuleExperts] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The allocation as plain values for JSON."""
        rows = enumerate(zip(self.scores, self.num_experts, strict=True))
        per_module = {} if self.num_experts_pattern is None else {"num_experts_pattern": self.num_experts_pattern}
        return {
            "num_experts": self.num_experts,
            **per_module,
            "method": self.method,
            "budget": self.budget,
            "base_model": self.base_model,
            "why": self.why,
            "layers": [
                {"layer_index": index, "score": score, "num_experts": experts} for index, (score, experts) in rows
            ],
            **({"modules": [asdict(each) for each in self.modules]} if per_module else {}),
            "settings": self.settings,
            "versions": software_versions(),
        }


def allocate(options: AllocateOptions) -> AllocateResult:
    """Allocate a budget of experts to the decoder layers of a model, or to its linears.

    Args:
        options: model, method and budget.

    Returns:
        The allocation; it is also written to `options.output`, if that is given.

    Raises:
        MolaError: options contradict each other, the budget does not fit the model, or data that the method reads
            are missing.
    """
    digits, beta = check_options(options)
    check_results(options)
    base = read_base(
        options.base_model,
        options.target_modules,
        options.trust_remote_code,
        options.gguf_file,
        has_probe=options.adapter is not None,
    )
    if digits is not None:
        found, scores = [], _shape_scores(digits, base)
        why = f"The layers keep the proportions of the shape {digits}, lowest layers first."
        if len(set(digits)) == 1:
            why = "All layers get the same number, the higher ones one more if the budget does not divide."
    else:
        found = _measured_scores(options, base)
        scores = layer_scores(found, base.num_layers)
        why = f"{'Linears' if options.per_module else 'Layers'} {_WHY[method_name(options.method)]}"
    rule = Rule(options.budget, options.min_experts, options.max_experts, beta, options.shuffle)
    modules = numbers_of_modules(found, rule) if options.per_module else []
    if options.per_module:
        num_experts, pattern = layers_and_pattern(modules, scores, rule)
    else:
        num_experts, pattern = numbers_of_layers(scores, rule), None
    if options.shuffle is not None:
        what = "linears of each name" if options.per_module else "layers"
        why += f" Then the numbers are shuffled over the {what}, by seed {options.shuffle}."
    result = AllocateResult(
        num_experts=num_experts,
        scores=scores,
        why=why,
        method=options.method,
        budget=options.budget,
        base_model=options.base_model,
        settings=asdict(options) | {"beta": beta},
        num_experts_pattern=pattern,
        modules=modules,
    )
    if options.output is not None:
        atomic_write_json(options.output, result.to_dict())
    return result


def _shape_scores(digits: str, base: Base) -> LayerScores:
    if len(digits) > base.num_layers:
        raise MolaError(
            f"`method` {digits} has more digits than {base.name!r} has decoder layers ({base.num_layers}). Pass at "
            "most one digit per layer."
        )
    shape = resolve_per_layer("-".join(digits), base.num_layers, "num_experts")
    return [float(digit) if is_adapted else None for digit, is_adapted in zip(shape, base.is_adapted, strict=True)]


def _measured_scores(options: AllocateOptions, base: Base) -> list[ModuleScore]:
    method = method_name(options.method)
    if method == "redundancy":
        return redundancy_scores(base, options.adapter or "")
    if method == "usage":
        return usage_scores(base, options.adapter, options.inspection, options.per_module)
    # The other methods take minutes.
    check_budget(sum(base.is_adapted), options.budget, options.min_experts, options.max_experts)
    if method == "alphalora":
        return alphalora_scores(base, options.device)
    check_split("split", options.split, AllocateOptions.split, str(options.data))
    samples = encoded_samples(base, str(options.data), options.task, options.template, options.split, options.limit)
    compute = gradient_scores if method == "gradient" else activation_scores
    return compute(base, samples, load_for_scores(base, options.device))


def main(options: AllocateOptions) -> int:
    """Run the command, print the numbers and how to use them; returns 0, the exit code."""
    result = allocate(options)
    console = make_table_console()
    title = f"{result.base_model}: {result.budget} experts by {result.method}"
    lines = [result.why]
    if options.per_module:
        console.print(module_table(result.modules, len(result.num_experts), f"{title}, for each kind of linears"))
        lines.append(_compare_cost(options, result))
    else:
        console.print(_layer_table(result.scores, result.num_experts, title))
    if options.per_module and options.output is None:
        lines.append("Pass --output FILE to use it.")
    else:
        value = options.output or one_per_layer(result.num_experts)
        lines += [f"Written to {options.output}."] if options.output else []
        model = {"base_model": options.base_model, "num_experts": value, **_needed_options(options)}
        run = {"data": options.data or "DATA", "task": options.task, "output": f"runs/{result.method}"}
        lines.append(next_steps(command_line("plan", model), command_line("train", {**model, **run})))
        lines += [] if options.data else ["DATA stands for your training data."]
    print("\n".join(lines))
    return 0


def one_per_layer(numbers: Sequence[int]) -> str:
    """Numbers per layer as a value of `num_experts`; a single number gets a comma, or its digits would be numbers."""
    return ",".join(map(str, numbers)) if len(numbers) > 1 else f"{numbers[0]},"


def _needed_options(options: AllocateOptions) -> dict[str, Any]:
    """Options without which the numbers would apply to other linears, or the model would not be found."""
    targets = options.target_modules
    if options.adapter is not None:
        adapted = check_mixture(options.adapter).get("target_modules")
        targets = ",".join(sorted(adapted)) if isinstance(adapted, list) else adapted
    loading = {"gguf_file": options.gguf_file, "trust_remote_code": options.trust_remote_code}
    return {"target_modules": targets, **loading}


def _compare_cost(options: AllocateOptions, result: AllocateResult) -> str:
    """Say how many more trainable parameters the allocation has than a uniform one with equal numbers of experts.

    The counts differ, since an expert of a wide linear has more parameters.
    """
    rule = Rule(options.budget, options.min_experts, options.max_experts)
    uniform = numbers_of_layers([None if score is None else 1.0 for score in result.scores], rule)
    parameters = [
        cost_of_allocation(
            options.base_model,
            one_per_layer(experts),
            top_k="1",
            r=_RANK,
            target_modules=",".join(each.module for each in result.modules),
            gguf_file=options.gguf_file,
            trust_remote_code=options.trust_remote_code,
            num_experts_pattern=pattern,
        ).trainable_parameters
        for experts, pattern in ((result.num_experts, result.num_experts_pattern), (uniform, None))
    ]
    return (
        f"{sum(each.num_experts for each in result.modules)} experts of linears in all. At r {_RANK} they have "
        f"{parameters[0]:,} trainable parameters; the same number of experts, spread uniformly, has "
        f"{parameters[1]:,} ({parameters[0] / parameters[1] - 1:+.1%})."
    )


def _layer_table(scores: LayerScores, num_experts: Sequence[int], title: str) -> Table:
    table = Table(title=escape(title))
    for column in ("layer", "score", "experts"):
        table.add_column(column, justify="right")
    table.add_column("", width=_BAR_WIDTH)
    largest = max(num_experts)
    for index, (score, experts) in enumerate(zip(scores, num_experts, strict=True)):
        bar: Any = "not adapted"
        if score is not None:
            bar = ProgressBar(largest, experts, _BAR_WIDTH, finished_style="bar.complete")
        table.add_row(str(index), "-" if score is None else f"{score:.4g}", str(experts), bar)
    return table


def module_table(modules: Sequence[ModuleExperts], num_layers: int, title: str) -> Table:
    """Table of the linears' numbers: one row per layer, one column per kind of linear, and the sum of each kind.

    A layer with several linears of a kind shows their smallest and largest number.
    """
    table = Table(title=escape(title))
    kinds = module_kinds(each.module for each in modules)
    cells: dict[tuple[int, str], list[int]] = defaultdict(list)
    sums: dict[str, int] = defaultdict(int)
    for each in modules:
        cells[each.layer_index, kinds[each.module]].append(each.num_experts)
        sums[kinds[each.module]] += each.num_experts
    for column in ("layer", *sums):
        table.add_column(escape(column), justify="right")
    for layer in range(num_layers):
        ends = [sorted({min(own), max(own)}) if (own := cells[layer, kind]) else ["-"] for kind in sums]
        table.add_row(str(layer), *("-".join(map(str, both)) for both in ends))
    table.add_section()
    table.add_row("total", *map(str, sums.values()), style="bold")
    return table
