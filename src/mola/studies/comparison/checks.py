"""Everything that can be wrong with any run of a comparison, before the first one is trained."""

import copy
import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mola.allocation.allocate import AllocateOptions
from mola.allocation.options import method_name
from mola.architecture.notation import smallest_entry
from mola.data.encode import data_fingerprint
from mola.data.examples import distinct_questions
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions, check_evaluation
from mola.files.digests import weights_sha256
from mola.models.identity import weights_identity
from mola.options.parsing import convert
from mola.studies.comparison.options import CompareOptions, Key
from mola.studies.overlaps import Questions, check_seen, holds_the_other, warn_of_seen
from mola.studies.train_and_test import NOT_COMPARED, TrainAndTestOptions, evaluation_of
from mola.training.data import prepare_data
from mola.training.options import ADAPTER_DEFAULTS
from mola.training.schedule import check_steps
from mola.training.setup import check_model_options, load_tokenizer_for

logger = logging.getLogger(__name__)

# Told apart by their content, in the fingerprints and `base_model`, wherever the files are.
PLACES = (*NOT_COMPARED, "data", "eval_data", "test_data", "base_model")
# Told apart by the dtype that they come to on this machine.
_PRECISION = ("dtype", "bf16", "fp16")
# Of a test: places, and what the rest of a run's identity says.
_NOT_OF_A_TEST = ("adapter", "data", "base_model", "output", "overwrite", "device", "dtype")
# Options that change neither data nor steps: data that were checked once need no second look.
_OF_THE_ADAPTER = (*ADAPTER_DEFAULTS, "learning_rate", "weight_decay")


# Fingerprints, number of questions, base model, its dtype, task, questions
_Data = tuple[dict[str, str], int, str, str, str, Questions]
# Evaluation, allocation asked for, its probe, data
_Looked = tuple[EvaluateOptions, AllocateOptions | None, str | None, _Data]


@dataclass
class Run:
    """One training with its test."""

    key: Key  # its task, recipe and seed
    options: TrainAndTestOptions  # of the training; `output_dir` is its folder
    test: EvaluateOptions  # of the evaluation; adapter and output file are filled in later
    allocation: AllocateOptions | None  # what `mola allocate` is asked for, if `num_experts` comes from there
    probe: str | None  # recipe whose adapter (same task and seed) the allocation is made from
    test_every: int | None  # steps between two tests during the training
    settings: dict[str, Any]  # the options that are no defaults: what has to be equal for a result to be kept
    fingerprints: dict[str, str]  # sha256 of training, evaluation and test examples and of a starting adapter, by part
    num_questions: int  # how many test samples there are
    base_model: str  # which weights, see `mola.models.identity`
    dtype: str  # of the base, which `auto` chooses for each machine
    rule: str  # sha256 of the task's template and of how it reads answers
    questions: Questions = field(repr=False)  # of the test

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """By part, what has to be equal to go on with the run."""
        model = {"base_model": self.base_model, "dtype": self.dtype}
        return {"setting": self.settings, "data": self.fingerprints, "model": model, "task": {"rule": self.rule}}

    @property
    def base_identity(self) -> dict[str, dict[str, Any]]:
        """The same for the test of the base model on the run's task."""
        settings = {name: value for name, value in asdict(self.test).items() if name not in _NOT_OF_A_TEST}
        return {**self.identity, "setting": settings, "data": {"test": self.fingerprints["test"]}}


def check_runs(options: CompareOptions, runs_options: Mapping[Key, TrainAndTestOptions]) -> list[Run]:
    """The runs in their order, all of them checked without loading weights; an error names task and recipe."""
    looked_at: dict[str, _Data] = {}
    tests: dict[tuple[str, str, int | None], _Looked] = {}
    runs = []
    for key, run_options in runs_options.items():
        place = key.task, key.recipe, run_options.seed if run_options.validation_size else None
        asked = dict(options.allocations.get(key.plain_recipe, {}))
        if place not in tests:  # seeds make no difference here, but to which rows are taken out of the training data
            try:
                looked = _look(key, run_options, looked_at, options.test_every, bool(asked))
                probe = asked.pop("probe", None)
                probe = probe and probe + key.candidate
                probed = runs_options[key._replace(recipe=probe)] if probe else None
                allocation = _allocate_options(run_options, asked, probed) if asked else None
                tests[place] = evaluation_of(run_options), allocation, probe, looked
            except MolaError as error:
                raise MolaError(f"task `{key.task}`, recipe `{key.recipe}`: {error}") from error
        settings = _settings(run_options, options.allocations.get(key.plain_recipe))
        if options.test_every is not None:
            settings["test_every"] = options.test_every
        test, allocation, probe, data = tests[place]
        runs.append(Run(key, run_options, test, allocation, probe, options.test_every, settings, *data))
    _check_same_questions(runs)
    return runs


def _check_same_questions(runs: Sequence[Run]) -> None:
    """Refuse recipes that are tested on other questions than the first: they would be compared answer by answer."""
    firsts: dict[str, Run] = {}
    for run in runs:
        first = firsts.setdefault(run.key.task, run)
        if run.fingerprints["test"] != first.fingerprints["test"]:
            raise MolaError(
                f"task `{run.key.task}`: the recipes {first.key.recipe!r} and {run.key.recipe!r} must have the same "
                f"test questions, got {first.num_questions} and {run.num_questions}. Set what chooses them (`filters`, "
                "`task`, `test_limit`...) in `tasks`."
            )


def check_search(searched: Sequence[Run], runs: Sequence[Run]) -> None:
    """Refuse a search on the questions of the test, whatever they are called."""
    tests = {(run.key.task, run.key.recipe): run for run in runs}
    for run in searched:
        tested = tests[run.key.task, run.key.plain_recipe]
        if holds_the_other(run.questions, tested.questions):
            raise MolaError(
                f"task `{run.key.task}`, recipe `{run.key.plain_recipe}`: `tuning_split` ({run.test.split!r}) has the "
                f"questions of the test ({tested.test.data!r}, split {tested.test.split!r}). A choice on them says "
                "nothing about others: name another split."
            )
        warn_of_seen(run.key.task, tested.questions, run.questions, f"in `tuning_split` ({run.test.split!r})")


def _look(
    key: Key,
    run_options: TrainAndTestOptions,
    looked_at: dict[str, _Data],
    test_every: int | None,
    is_allocated: bool,
) -> _Data:
    """Data, questions and weights of a recipe on a task; not twice for the same."""
    check_model_options(_with_any_numbers(run_options) if is_allocated else run_options)
    values = run_options.to_dict()
    left_out = {*_OF_THE_ADAPTER, *NOT_COMPARED, "seed"} - {"adapter", "seed" if run_options.validation_size else ""}
    same = {name: value for name, value in values.items() if name not in left_out}
    name = json.dumps(same, sort_keys=True, default=str)
    if name not in looked_at:
        logger.info("Checking %s on %s.", key.recipe, key.task)
        test = evaluation_of(run_options)
        task, examples, _ = check_evaluation(test)
        data = prepare_data(copy.copy(run_options), load_tokenizer_for(run_options))
        steps = check_steps(run_options, data)
        if test_every is not None and test_every >= steps:
            raise MolaError(
                f"`test_every` ({test_every}) must be less than the {steps} steps of a run, or no test is on the way. "
                "Lower it, or leave it out."
            )
        if test_every is not None and run_options.load_best_model_at_end and "evaluation" in data.fingerprints:
            raise MolaError(
                "`test_every` asks the model as it is after so many steps, and `load_best_model_at_end` ends the run "
                "with earlier weights: pass --load_best_model_at_end false, or leave `test_every` out."
            )
        fingerprints = {**data.fingerprints, "test": data_fingerprint(examples)}
        questions = distinct_questions(examples)
        check_seen(key.task, questions, test, run_options, data, is_search=bool(key.candidate))
        if run_options.adapter:
            fingerprints["adapter"] = weights_sha256(run_options.adapter) or ""
        weights = weights_identity(run_options.base_model or "")
        rule = task.fingerprint()
        looked_at[name] = fingerprints, len(examples), weights, run_options.base_dtype, rule, questions
    return looked_at[name]


def _with_any_numbers(run_options: TrainAndTestOptions) -> TrainAndTestOptions:
    """Options whose allocation is still to be made, with numbers of experts that leave room for `top_k`."""
    stand_in = copy.copy(run_options)
    chosen = [int(number) for number in re.findall(r"\d+", str(run_options.top_k or ""))]
    stand_in.num_experts = f"{max([8, *chosen])},"
    return stand_in


def _allocate_options(
    run_options: TrainAndTestOptions, asked: Mapping[str, Any], probed: TrainAndTestOptions | None
) -> AllocateOptions:
    shared: dict[str, Any] = {"trust_remote_code": run_options.trust_remote_code}
    if run_options.gguf_file is not None:
        shared["gguf_file"] = run_options.gguf_file
    if probed is None:  # else it says what is adapted
        shared["target_modules"] = run_options.target_modules
    if "data" in asked and "task" in asked and run_options.template != load_task(str(asked["task"])).template:
        shared["template"] = run_options.template
    values = {"base_model": run_options.base_model, **shared, **asked}
    allocation = AllocateOptions(**convert(AllocateOptions, values, "allocate"))
    allocation.method = method_name(allocation.method)
    if probed is not None:
        _check_probe(allocation.method, probed)
    if allocation.per_module and run_options.num_experts_pattern:
        raise MolaError(
            f"`num_experts_pattern` ({run_options.num_experts_pattern!r}) must not be given beside `allocate` with "
            "`per_module`, which gives another. Leave one out."
        )
    if allocation.per_module and probed and probed.target_modules != run_options.target_modules:
        raise MolaError(
            f"`target_modules` must be those of the `probe` with `per_module`: {run_options.target_modules!r}, the "
            f"probe has {probed.target_modules!r}."
        )
    return allocation


def _check_probe(method: str, probed: TrainAndTestOptions) -> None:
    """What a probe's training cannot change, before it is trained."""
    if method == "usage" and not probed.expert_telemetry:
        raise MolaError("`expert_telemetry` of the `probe` must be on for method 'usage', which reads it: got False.")
    numbers = probed.adapter_setting("num_experts")
    if method == "redundancy" and probed.adapter is None and smallest_entry(numbers, "num_experts") < 2:
        raise MolaError(
            f"`num_experts` of the `probe` must be at least 2 in every layer for method 'redundancy': got {numbers!r}. "
            "Take a probe with the same number everywhere."
        )


def _settings(options: TrainAndTestOptions, allocation: Mapping[str, Any] | None) -> dict[str, Any]:
    defaults, values = _defaults(options.use_cpu), options.to_dict()
    names = {item.name for item in fields(TrainAndTestOptions) if item.init} & values.keys()
    names -= {*PLACES, *_PRECISION}
    changed = {name: values[name] for name in sorted(names) if values[name] != defaults[name]}
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if values[name] != (options.base_dtype == dtype):  # mixed precision that does not follow from the dtype
            changed[name] = values[name]
    return {**changed, **({"allocate": dict(allocation)} if allocation else {})}


@functools.cache
def _defaults(use_cpu: bool) -> dict[str, Any]:
    return TrainAndTestOptions(output_dir="-", use_cpu=use_cpu).to_dict()
