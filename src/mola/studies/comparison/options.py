"""`CompareOptions`: recipes, tasks and seeds, and the options of `mola train` as defaults of all runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mola.errors import MolaError
from mola.options.fields import START, Group, mapping, named_mappings, option
from mola.options.parsing import convert
from mola.studies.train_and_test import TrainAndTestOptions

ALLOCATE = "allocate"  # key of a recipe whose `num_experts` comes from `mola allocate`
_SET_HERE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "data_seed", "push_to_hub")
_EXAMPLES = {
    "tasks": '{"rte": {"data": "data/rte/dataset.hf"}}',
    "recipes": '{"lora": {"num_experts": "1"}, "2468": {"num_experts": "2468"}}',
}


class Key(NamedTuple):
    """Names one run."""

    task: str
    recipe: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}/{self.recipe}/seed-{self.seed}"


@dataclass
class CompareOptions(TrainAndTestOptions):
    """Options of `mola compare`: those below, and every option of `mola train` as the default of all runs.

    The options of the runs are made from the values given here; changing a field afterwards has no effect on them.

    Attributes:
        runs: options of each run, in the order of training: seed after seed, so that a comparison that is stopped
            has whole seeds.
        allocations: what `mola allocate` is asked for, of each recipe that has `allocate`.

    Raises:
        MolaError: a value is outside its range, options contradict each other, or a recipe or task is wrong.
    """

    _start: ClassVar = START
    tasks: dict[str, Any] | str | None = option(
        None, "What is learnt and tested: name -> options of `mola train` and of the test; a mapping."
    )
    recipes: dict[str, Any] | str | None = option(
        None,
        "What is compared: name -> options of `mola train`, or `allocate: {method, budget, ...}` for the experts that "
        "`mola allocate` suggests; a mapping.",
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds; each recipe is trained once with each."}
    )

    _comparison: ClassVar = Group("comparison")
    reference: str | None = option(None, "Recipe that the others are compared with; default: the first one.")
    record: str | None = option(
        None,
        "File with every result, from which a stopped comparison goes on. Default: compare.json in `output_dir`.",
    )
    keep_adapters: bool = option(True, "Keep the trained weights; without them the results still stay.")
    evaluate_base: bool = option(True, "Also test the base model alone.")
    tables: str | None = option(
        None, "Also write the table to these files, between commas: NAME.csv, NAME.md or NAME.html."
    )

    def __post_init__(self) -> None:
        # Before TrainingArguments replaces some of them by what it makes of them.
        given = {item.name: getattr(self, item.name) for item in fields(TrainAndTestOptions) if item.init}
        super().__post_init__()
        self.tasks, self.recipes = (
            named_mappings(name, value, _EXAMPLES[name])
            for name, value in (("tasks", self.tasks), ("recipes", self.recipes))
        )
        self._check()
        self.allocations = {name: _allocation(name, values) for name, values in self.recipes.items()}
        self.allocations = {name: values for name, values in self.allocations.items() if values}
        _check_probes(self.allocations, self.recipes)
        self.runs: dict[Key, TrainAndTestOptions] = {}
        for seed in self.seeds:
            for task, task_values in self.tasks.items():
                for recipe, recipe_values in self.recipes.items():
                    key = Key(task, recipe, seed)
                    self.runs[key] = self._run_options(key, given, task_values, recipe_values)

    def _check(self) -> None:
        self.check_one_process("mola compare", "")
        if self.overwrite_output_dir:
            raise MolaError(
                "`overwrite_output_dir` has no use here, for finished runs are kept. To start again, pass another "
                "`output_dir` (and `record`)."
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise MolaError(f"`seeds` must be different numbers, at least one: got {self.seeds}.")
        assert isinstance(self.recipes, dict)
        if self.reference is None:
            self.reference = next(iter(self.recipes))
        if self.reference not in self.recipes:
            raise MolaError(
                f"`reference` must be one of the recipes {', '.join(self.recipes)}: got {self.reference!r}."
            )

    def _run_options(
        self, key: Key, given: Mapping[str, Any], task_values: Mapping[str, Any], recipe_values: Mapping[str, Any]
    ) -> TrainAndTestOptions:
        changes: dict[str, Any] = {}
        for kind, name, values in (("tasks", key.task, task_values), ("recipes", key.recipe, recipe_values)):
            own = {option: value for option, value in values.items() if option != ALLOCATE}
            for option_name in own:
                if option_name in _SET_HERE:
                    raise MolaError(
                        f"`{option_name}` cannot be set in `{kind}.{name}`: it follows from the comparison."
                    )
                if option_name in changes:
                    raise MolaError(
                        f"`{option_name}` is set by the task {key.task!r} and by the recipe {key.recipe!r}. Leave one "
                        "out."
                    )
            changes |= convert(TrainAndTestOptions, own, f"{kind}.{name}")
        folder = Path(self.output_dir or "") / key.task / key.recipe / f"seed-{key.seed}"
        try:
            return TrainAndTestOptions(**{**given, **changes, "seed": key.seed, "output_dir": str(folder)})
        except (ValueError, TypeError, ImportError) as error:  # MolaError, and TrainingArguments' own checks
            raise MolaError(f"task `{key.task}`, recipe `{key.recipe}`: {error}") from error


def _allocation(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if ALLOCATE not in values:
        return {}
    if values.get("num_experts") is not None:
        raise MolaError(f"`recipes.{name}` has `num_experts` and `{ALLOCATE}`, which gives another. Leave one out.")
    asked = mapping(f"recipes.{name}.{ALLOCATE}", values[ALLOCATE])
    if "method" not in asked or "budget" not in asked:
        raise MolaError(f"`recipes.{name}.{ALLOCATE}` must have `method` and `budget`: got {asked!r}.")
    return asked


def _check_probes(allocations: Mapping[str, Mapping[str, Any]], recipes: Mapping[str, Any]) -> None:
    """A probe is another recipe, trained before."""
    order = list(recipes)
    for name, asked in allocations.items():
        probe = asked.get("probe")
        if probe is not None and (probe not in recipes or order.index(probe) >= order.index(name)):
            raise MolaError(
                f"`recipes.{name}.{ALLOCATE}.probe` must be a recipe that stands before {name!r}: got {probe!r}."
            )
