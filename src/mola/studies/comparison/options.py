"""`CompareOptions`: recipes, tasks and seeds, with the options of `mola train` as defaults of all runs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mola.errors import MolaError
from mola.options.fields import parse_mapping, parse_named_mappings
from mola.options.parsing import convert
from mola.studies.fields import CompareFields
from mola.studies.train_and_test import TrainAndTestOptions

MARK = "@"  # between a recipe and the values that the search tries; recipe names cannot contain it
_SET_BY_COMPARISON = ("overwrite_output_dir", "resume_from_checkpoint", "seed", "data_seed", "push_to_hub")
_NOT_IN_TUNE = ("test_split", "test_data", "num_experts")
_TASKS_EXAMPLE = '{"rte": {"data": "data/rte/dataset.hf"}}'
_RECIPES_EXAMPLE = '{"lora": {"num_experts": "1"}, "2468": {"num_experts": "2468"}}'


class Key(NamedTuple):
    """Identifies one run."""

    task: str
    recipe: str  # RECIPE; for a run of the search RECIPE@OPTION=VALUE
    seed: int

    def __str__(self) -> str:
        return f"{self.task}/{self.recipe}/seed-{self.seed}"

    @property
    def plain_recipe(self) -> str:
        """The recipe as the user named it."""
        return self.recipe.partition(MARK)[0]

    @property
    def candidate(self) -> str:
        """The values that the search tries, such as "@learning_rate=0.001"; empty for a run of the comparison."""
        return self.recipe[len(self.plain_recipe) :]


@dataclass
class CompareOptions(CompareFields, TrainAndTestOptions):
    """Options of `mola compare`: those of `CompareFields`, and every option of `mola train` as the default of all runs.

    Without `tasks` there is one task, on `data`. Without `recipes` the caller chooses them, with `use_recipes`.

    The options of the runs are made from the values given here. Changing a field afterwards has no effect on them.

    Attributes:
        runs: options of each run, in the order of training: all runs with one seed before the next seed. With `tune`
            they have the first value of each list; see `tuned_runs`.
        tuning_runs: options of each run of the search; empty without `tune`.
        is_short: whether no `recipes` were given.
        given: the value of each option before it was checked and filled in.
        candidates: the combinations of `tune`, by the text that follows a recipe's name.

    Raises:
        MolaError: a value is outside its range, options contradict each other, or a recipe or task is wrong.
    """

    def __post_init__(self) -> None:
        # The runs get the values that the user gave: TrainingArguments replaces some of them below.
        self.given = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        if self.tasks is None:
            self.tasks = {_name_of(self.task or self.data or "data"): {}}
        self.tasks = self._tasks = parse_named_mappings("tasks", self.tasks, _TASKS_EXAMPLE)
        self.is_short = self.recipes is None
        if self.output_dir is None and self.is_short:
            self.output_dir = f"runs/compare-{next(iter(self.tasks))}"
        super().__post_init__()
        if self.seeds is None:
            self.seeds = [0, 1] if self.is_short else [0, 1, 2]
        self.candidates = _candidates(parse_mapping("tune", self.tune))
        self._data_of: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}  # by task, see `use_data`
        self.runs: dict[Key, TrainAndTestOptions] = {}
        self.tuning_runs: dict[Key, TrainAndTestOptions] = {}
        self._check()
        if not self.is_short:
            self.use_recipes(self.recipes)

    def use_recipes(self, recipes: Mapping[str, Any] | str | None) -> None:
        """Set `recipes`, and make the runs.

        Raises:
            MolaError: a recipe is wrong, or contradicts other options.
        """
        self.recipes = parse_named_mappings("recipes", recipes, _RECIPES_EXAMPLE)
        if self.reference is None:
            self.reference = next(iter(self.recipes))
        if self.reference not in self.recipes:
            raise MolaError(
                f"`reference` must be one of the recipes {', '.join(self.recipes)}: got {self.reference!r}."
            )
        self._options_of = {
            f"{kind}.{name}": convert(TrainAndTestOptions, values, f"{kind}.{name}")
            for kind, parts in (("tasks", self._tasks), ("recipes", self.recipes))
            for name, values in parts.items()
        }
        self._make_runs()

    def _make_runs(self) -> None:
        # Until the search has chosen (`tuned_runs`), all runs have the values of the first candidate.
        first_candidate = next(iter(self.candidates.values()), {})
        self.runs = {key: self._run_options(key, first_candidate) for key in self._keys(self.seeds or [])}
        self.tuning_runs = {}
        for key in self._keys(self.tuning_seeds):
            for name, values in self.candidates.items():
                tuning_key = key._replace(recipe=key.recipe + name)
                self.tuning_runs[tuning_key] = self._run_options(tuning_key, values)

    def use_data(self, task: str, changes: dict[str, Any], for_search: dict[str, Any]) -> None:
        """Make all runs of a task anew with other data.

        Args:
            task: name of the task.
            changes: option -> value for all runs, such as `data` and `test_data`.
            for_search: the same for the test of the search's runs; `changes` hold for them, too.
        """
        self._data_of[task] = changes, for_search
        self._make_runs()

    def tuned_runs(self, chosen: Mapping[tuple[str, str], str]) -> dict[Key, TrainAndTestOptions]:
        """`runs` with what the search has chosen: (task, recipe) -> one of `candidates`."""
        return {key: self._run_options(key, self.candidates[chosen[key.task, key.recipe]]) for key in self.runs}

    def _keys(self, seeds: Sequence[int]) -> list[Key]:
        return [Key(task, recipe, seed) for seed in seeds for task in self.tasks or {} for recipe in self.recipes or {}]

    def _check(self) -> None:
        self.check_one_process("mola compare", cure="")
        for name in ("overwrite_output_dir", "push_to_hub", "seed"):
            if self.given[name] != getattr(TrainAndTestOptions, name):
                raise MolaError(f"`{name}` has no effect in a comparison, which sets it for every run. Leave it out.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise MolaError(f"`seeds` must be a non-empty list of distinct numbers: got {self.seeds}.")
        if not self.candidates:
            return
        if not self.tuning_seeds or len({*self.tuning_seeds, *self.seeds}) < len(self.tuning_seeds) + len(self.seeds):
            raise MolaError(
                f"`tuning_seeds` must be a non-empty list of distinct numbers without any of `seeds` {self.seeds}: got "
                f"{self.tuning_seeds}."
            )
        if self.tuning_split == self.test_split:
            raise MolaError(
                f"`tuning_split` must not be `test_split` ({self.test_split!r}): tuning on the test questions "
                "would bias the result. Name a different split."
            )

    def _run_options(self, key: Key, tuned: Mapping[str, Any]) -> TrainAndTestOptions:
        """Options of a run; `tuned` are its values of the options in `tune`."""
        parts = {
            f"tasks.{key.task}": self._options_of[f"tasks.{key.task}"],
            f"recipes.{key.plain_recipe}": self._options_of[f"recipes.{key.plain_recipe}"],
            "tune": convert(TrainAndTestOptions, tuned, "tune"),
        }
        for where, values in parts.items():
            if wrong := values.keys() & {*_SET_BY_COMPARISON, "output_dir", *(_NOT_IN_TUNE if where == "tune" else ())}:
                raise MolaError(f"`{min(wrong)}` cannot be set in `{where}`: the comparison sets it.")
        # Tasks and recipes may replace an option of all runs. An option in `tune` must not be set anywhere else.
        defaults = {item.name: item.default for item in fields(TrainAndTestOptions)}
        set_for_all = [name for name in parts["tune"] if self.given[name] != defaults[name]]
        count = Counter([*set_for_all, *(name for values in parts.values() for name in values)])
        if twice := [name for name in count if count[name] > 1]:
            raise MolaError(
                f"`{twice[0]}` is set twice for {key}: for all runs, by the task, by the recipe or by `tune`. Leave it "
                "in one place."
            )
        changes = {name: value for values in parts.values() for name, value in values.items()}
        if key.candidate:  # the search is tested on questions of its own
            changes |= {"test_split": self.tuning_split, "test_data": None}
        if key.task in self._data_of:
            drawn, for_search = self._data_of[key.task]
            changes |= {"test_split": TrainAndTestOptions.test_split, **drawn, **(for_search if key.candidate else {})}
        seed_and_folder = {"seed": key.seed, "output_dir": str(Path(self.output_dir or "") / str(key))}
        try:
            given = {item.name: self.given[item.name] for item in fields(TrainAndTestOptions) if item.init}
            return TrainAndTestOptions(**{**given, **changes, **seed_and_folder})
        except (ValueError, TypeError, ImportError) as error:  # MolaError, and TrainingArguments' own checks
            raise MolaError(f"task `{key.task}`, recipe `{key.recipe}`: {error}") from error


def _name_of(source: str) -> str:
    """A name for the folder of a task or of data: the file's name without its endings, letters and digits only."""
    stem = source.rstrip("/").rpartition("/")[2].partition(".")[0].partition(":")[0]
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in stem).strip("_") or "data"


def _candidates(tune: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All combinations of the values in `tune`, each by a text such as "@learning_rate=0.001"."""
    for name, values in tune.items():
        if not isinstance(values, list) or not values or any(isinstance(each, (list, dict)) for each in values):
            raise MolaError(f"`tune.{name}` must be a list of values, such as [0.0003, 0.001]: got {values!r}.")
    combinations = [dict(zip(tune, values, strict=True)) for values in product(*tune.values())] if tune else []
    return {MARK + ",".join(f"{name}={value}" for name, value in each.items()): each for each in combinations}
