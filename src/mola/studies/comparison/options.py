"""`CompareOptions`: recipes, tasks and seeds, and the options of `mola train` as defaults of all runs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mola.errors import MolaError
from mola.options.fields import START, Group, mapping, named_mappings, option
from mola.options.parsing import convert
from mola.studies.comparison.recipe_allocations import ALLOCATE, allocations_of, check_search_of_allocations
from mola.studies.train_and_test import TrainAndTestOptions

logger = logging.getLogger(__name__)

_TUNING_SEEDS = (1000, 1001)
MARK = "@"  # between a recipe and what of it is tried; no recipe has it in its name
_SET_HERE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "data_seed", "push_to_hub")
_EXAMPLES = {
    "tasks": '{"rte": {"data": "data/rte/dataset.hf"}}',
    "recipes": '{"lora": {"num_experts": "1"}, "2468": {"num_experts": "2468"}}',
}


class Key(NamedTuple):
    """Names one run."""

    task: str
    recipe: str  # in the search for options RECIPE@OPTION=VALUE
    seed: int

    def __str__(self) -> str:
        return f"{self.task}/{self.recipe}/seed-{self.seed}"

    @property
    def plain_recipe(self) -> str:
        """The recipe as the user named it."""
        return self.recipe.partition(MARK)[0]

    @property
    def candidate(self) -> str:
        """What stands behind the recipe's name in the search, mark included; else empty."""
        return self.recipe[len(self.plain_recipe) :]


@dataclass
class CompareOptions(TrainAndTestOptions):
    """Options of `mola compare`: those below, and every option of `mola train` as the default of all runs.

    The options of the runs are made from the values given here; changing a field afterwards has no effect on them.

    Attributes:
        runs: options of each run, in the order of training: seed after seed, so that a comparison that is stopped
            has whole seeds. Where there is a search they have the first value of each list; see `tuned_runs`.
        tuning_runs: the same of the search for options; empty without `tune`.
        candidates: the combinations of `tune`, by the mark behind a recipe's name.
        allocations: what `mola allocate` is asked for, of each recipe that has `allocate`.
        pairs: recipes that are compared with each other, from `contrasts`.

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

    _search: ClassVar = Group("search for options")
    tune: dict[str, Any] | str | None = option(
        None,
        "Choose these options for each recipe and task before the comparison: option -> list of values; a mapping. "
        "Every combination is trained with `tuning_seeds`; the best on `tuning_split` is taken.",
    )
    tuning_seeds: list[int] = field(
        default_factory=lambda: [*_TUNING_SEEDS], metadata={"help": "Seeds of the search; none of `seeds`."}
    )
    tuning_split: str = option("validation", "Split of `data` that the search is tested on, instead of the test data.")

    _comparison: ClassVar = Group("comparison")
    test_every: int | None = option(
        None, "Also test after every so many steps: curves, and the accuracy over the whole training."
    )
    target_accuracy: float | None = option(
        None, "With `test_every`: also say after how many steps this accuracy, a fraction of 1, is reached."
    )
    margin: float = option(
        5.0, "Difference that would matter, in points: how many seeds it takes to see one is said after the search."
    )
    reference: str | None = option(None, "Recipe that the others are compared with; default: the first one.")
    contrasts: dict[str, Any] | str | None = option(
        None, "Also compare recipes with each other: recipe -> another, or a list of them; a mapping."
    )
    record: str | None = option(
        None,
        "File with every result, from which a stopped comparison goes on. Default: compare.json in `output_dir`.",
    )
    keep_adapters: bool = option(True, "Keep the trained weights; without them the results still stay.")
    evaluate_base: bool = option(True, "Also test the base model alone.")
    tables: str | None = option(
        None,
        "Also write the tables to these files, between commas: NAME.csv, NAME.html or NAME.md. Of an .md file that has "
        "the lines <!-- tables --> and <!-- /tables --> only what stands between them is replaced.",
    )
    plots: str | None = option(
        None, "Also draw curves and differences into these files, between commas: NAME.png or NAME.svg."
    )

    def __post_init__(self) -> None:
        # Before TrainingArguments replaces some of them by what it makes of them.
        given = {item.name: getattr(self, item.name) for item in fields(TrainAndTestOptions) if item.init}
        super().__post_init__()
        self.tasks, self.recipes = (
            named_mappings(name, value, _EXAMPLES[name])
            for name, value in (("tasks", self.tasks), ("recipes", self.recipes))
        )
        for kind, parts in (("tasks", self.tasks), ("recipes", self.recipes)):
            parts.update({name: _with_underscores(f"{kind}.{name}", values) for name, values in parts.items()})
        self._check()
        self.allocations = allocations_of(self.recipes)
        self.pairs = pairs_of(mapping("contrasts", self.contrasts), self.recipes)
        self._given = given
        self.candidates = _candidates(_with_underscores("tune", mapping("tune", self.tune)))
        self._check_given(next(iter(self.candidates.values()), {}))
        self._check_search()
        first = next(iter(self.candidates.values()), {})
        self.runs = {key: self._run_options(key, first) for key in self._keys(self.seeds)}
        self.tuning_runs = {
            key: self._run_options(key, self.candidates[key.candidate])
            for plain in self._keys(self.tuning_seeds)
            for key in (plain._replace(recipe=plain.recipe + mark) for mark in self.candidates)
        }

    def _check_given(self, tuned: Mapping[str, Any]) -> None:
        """What a search chooses has no other value."""
        defaults = {item.name: item.default for item in fields(TrainAndTestOptions)}
        for name in tuned:
            if name in self._given and self._given[name] != defaults[name]:
                raise MolaError(f"`{name}` ({self._given[name]!r}) is in `tune`, which chooses it. Leave one out.")

    def tuned_runs(self, marks: Mapping[tuple[str, str], str]) -> dict[Key, TrainAndTestOptions]:
        """`runs` with what the search has chosen: (task, recipe) -> one of `candidates`."""
        return {key: self._run_options(key, self.candidates[marks[key.task, key.recipe]]) for key in self.runs}

    def _keys(self, seeds: Sequence[int]) -> list[Key]:
        assert isinstance(self.tasks, dict)
        assert isinstance(self.recipes, dict)
        return [Key(task, recipe, seed) for seed in seeds for task in self.tasks for recipe in self.recipes]

    def _check(self) -> None:
        self.check_one_process("mola compare", "")
        if self.overwrite_output_dir:
            raise MolaError(
                "`overwrite_output_dir` has no use here, for finished runs are kept. To start again, pass another "
                "`output_dir` (and `record`)."
            )
        if self.push_to_hub:
            raise MolaError("`push_to_hub` has no use here: every run would be uploaded. Upload the one you choose.")
        if self.seed != type(self).seed:
            raise MolaError(
                f"`seed` has no use here, for `seeds` has those of the runs: got {self.seed}. Pass `seeds`."
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

    def _check_search(self) -> None:
        if self.test_every is not None and self.test_every < 1:
            raise MolaError(f"`test_every` must be at least 1: got {self.test_every}.")
        if self.target_accuracy is not None and not (self.test_every and 0 < self.target_accuracy <= 1):
            raise MolaError(
                "`target_accuracy` must be a fraction of 1, above 0, and needs `test_every`: got "
                f"{self.target_accuracy} with `test_every` {self.test_every}."
            )
        if not self.margin > 0:
            raise MolaError(f"`margin` must be above 0 (points): got {self.margin}.")
        if not self.candidates:
            cls = type(self)
            defaults = {"tuning_seeds": [*_TUNING_SEEDS], "tuning_split": cls.tuning_split, "margin": cls.margin}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    logger.warning("`%s` is not used: it is about a search, and there is no `tune`.", name)
            return
        check_search_of_allocations(self.allocations, next(iter(self.candidates.values())))
        both = {*self.tuning_seeds, *self.seeds}
        if not self.tuning_seeds or len(both) < len(self.tuning_seeds) + len(self.seeds):
            raise MolaError(
                f"`tuning_seeds` must be different numbers, at least one, and none of `seeds` {self.seeds}, which are "
                f"the comparison's: got {self.tuning_seeds}."
            )
        if self.tuning_split == self.test_split:
            raise MolaError(
                f"`tuning_split` must not be `test_split` ({self.test_split!r}): a choice on the test's questions says "
                "nothing about others. Name another split."
            )

    def _run_options(self, key: Key, more: Mapping[str, Any]) -> TrainAndTestOptions:
        """Options of a run; `more` are those of `tune`, which may stand in neither task nor recipe."""
        assert isinstance(self.tasks, dict)
        assert isinstance(self.recipes, dict)
        parts = (
            ("tasks", key.task, self.tasks[key.task]),
            ("recipes", key.plain_recipe, self.recipes[key.plain_recipe]),
        )
        changes: dict[str, Any] = {}
        for kind, name, values in parts:
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
        if twice := changes.keys() & more.keys():
            raise MolaError(f"`{min(twice)}` is in `tune`, and set by the task or recipe of {key}. Leave one out.")
        changes |= convert(TrainAndTestOptions, more, "tune")
        is_allocated = key.plain_recipe in self.allocations
        if is_allocated and changes.get("num_experts") is not None:
            raise MolaError(
                f"`num_experts` is set by the task {key.task!r}, and the recipe {key.plain_recipe!r} has `{ALLOCATE}`, "
                "which gives another. Leave one out."
            )
        if key.candidate:  # the search has its own questions
            changes |= {"test_split": self.tuning_split, "test_data": None}
        folder = Path(self.output_dir or "") / str(key)
        values = {**self._given, **changes, "seed": key.seed, "output_dir": str(folder)}
        if is_allocated and values.get("adapter") is not None:
            raise MolaError(
                f"`adapter` ({values['adapter']!r}) brings its own experts, and the recipe of {key} has `{ALLOCATE}`, "
                "which gives others. Leave one out."
            )
        try:
            return TrainAndTestOptions(**values)
        except (ValueError, TypeError, ImportError) as error:  # MolaError, and TrainingArguments' own checks
            raise MolaError(f"task `{key.task}`, recipe `{key.recipe}`: {error}") from error


def _with_underscores(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their names: on the command line, and so here, dashes do as well."""
    found = {name.replace("-", "_"): value for name, value in values.items()}
    if len(found) < len(values):
        raise MolaError(f"`{where}` has an option twice, with dashes and with underscores: {', '.join(values)}.")
    return found


def _candidates(tune: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All combinations of the values, by a mark such as `@learning_rate=0.001`."""
    for name, values in tune.items():
        if name in (*_SET_HERE, "test_split", "test_data", "num_experts"):
            raise MolaError(f"`tune` cannot have `{name}`: it follows from the comparison, or is what is compared.")
        if not isinstance(values, list) or not values or any(isinstance(each, (list, dict)) for each in values):
            raise MolaError(f"`tune.{name}` must be a list of values, such as [0.0003, 0.001]: got {values!r}.")
    found = [dict(zip(tune, values, strict=True)) for values in product(*tune.values())] if tune else []
    return {MARK + ",".join(f"{name}={value}" for name, value in each.items()): each for each in found}


def pairs_of(contrasts: Mapping[str, Any], recipes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The option `contrasts` as pairs: recipe -> another, or a list of them.

    Raises:
        MolaError: one is no recipe, is compared with itself, or a pair is there twice.
    """
    found: list[tuple[str, str]] = []
    for recipe, others in contrasts.items():
        for other in others if isinstance(others, list) else [others]:
            for name in (recipe, other):
                if name not in recipes:
                    raise MolaError(f"`contrasts` must name recipes, {', '.join(recipes)}: got {name!r}.")
            if recipe == other or {(recipe, other), (other, recipe)} & {*found}:
                raise MolaError(
                    f"`contrasts` must be pairs of different recipes, each once: got {recipe!r} and {other!r}."
                )
            found.append((recipe, other))
    return found
