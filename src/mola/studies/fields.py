"""Options of `mola quickstart`, and those that `mola compare` adds to `TrainOptions`.

This module imports neither torch nor Transformers, so that `--help` is quick.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mola.evaluation.options import EvaluateOptions
from mola.options.fields import START, Group, option, parse_mapping
from mola.training.fields import TrainFields
from mola.training.option_checks import check_given


@dataclass
class TestFields(TrainFields):
    """Options of a test that follows a training run."""

    _test: ClassVar = Group("test")
    test_data: str | None = option(None, "Test data; default: the split `test_split` of `data`.")
    test_split: str = option("test", "Split to test on if the data has several.")
    test_limit: int | None = option(None, "Test on at most this number of samples, from the first on.")
    test_batch_size: int = option(8, "Test samples per batch.")
    scoring: str = option(
        EvaluateOptions.scoring, "How an answer is found: generate or likelihood, like in `mola evaluate`."
    )
    max_new_tokens: int = option(EvaluateOptions.max_new_tokens, "Tokens to generate per test sample.")


@dataclass
class CompareFields(TestFields):
    """The own options of `mola compare`."""

    _start: ClassVar = START
    tasks: dict[str, Any] | str | None = option(
        None,
        "Tasks to learn and test: name -> options of `mola train` and of the test; a mapping. Default: one task, on "
        "`data`.",
    )
    recipes: dict[str, Any] | str | None = option(
        None,
        "Recipes to compare: name -> options of `mola train`; a mapping. `num_experts` may be a file of `mola "
        "allocate`. Default: a LoRA, and the mixtures 2468 and 5555 (or the one of `num_experts`) of the same size.",
    )
    seeds: list[int] | None = field(
        default=None,
        metadata={
            "help": "Seeds; each recipe is trained once with each. Default: 0 1 2, or 0 1 without `recipes`.",
            "metavar": "INT",
        },
    )

    _search: ClassVar = Group("search for options")
    tune: dict[str, Any] | str | None = option(
        None,
        "Choose these options for each recipe and task before the comparison: option -> list of values; a mapping. "
        "Every combination is trained with `tuning_seeds`; the best on `tuning_split` is used.",
    )
    tuning_seeds: list[int] = field(
        default_factory=lambda: [1000, 1001], metadata={"help": "Seeds of the search; none of `seeds`."}
    )
    tuning_split: str = option("validation", "Split of `data` that the search is tested on, instead of the test data.")

    _comparison: ClassVar = Group("comparison")
    reference: str | None = option(None, "Recipe with which the others are compared. Default: the first one.")
    record: str | None = option(
        None,
        "File with every result, from which a stopped comparison resumes. Default: compare.json in `output`.",
    )
    keep_adapters: bool = option(True, "Keep the trained weights. The results are always kept.")
    test_size: float | None = option(
        None,
        "Number or share of rows of `data` to test on, if there are no other test data. Default: a fifth, from 24 to "
        "500 rows.",
    )
    split_seed: int = option(0, "Seed that draws these test rows.")
    evaluate_base: bool = option(True, "Also test the base model alone.")
    tables: str | None = option(None, "Also write the table to these files, separated by commas: NAME.csv or NAME.md.")

    def check(self) -> None:
        """`settle`, and check that base model and data are given for all runs or for some."""
        if self.recipes is None:
            self.output_dir = self.output_dir or "runs"  # the default depends on the task
        self.settle()
        parts = [each for name in ("tasks", "recipes") for each in parse_mapping(name, getattr(self, name)).values()]
        for name in ("base_model", "data"):
            if not any(isinstance(each, dict) and name in each for each in parts):
                check_given(self, name)


@dataclass
class QuickstartOptions:
    """Options of `mola quickstart`."""

    output_dir: str = option("runs/quickstart", "Run folder.", "output")
    recipe: str | None = option(None, "Recipe of `mola train`; by default the one that mola brings.")
    model_dir: str = option(".cache/SmolLM2-135M-Instruct", "Folder for the converted base model.")
    seed: int = option(0, "Random seed for questions and training.")
    dtype: str = option("auto", "Dtype of the base: auto, float32 or bfloat16.")
