"""`mola evaluate`: a model's answers on a test file, and how many are right.

- `evaluate_examples` is the core: loaded model, examples in memory.
- `evaluate` adds checks before loading, loading, resuming, and the result file.
- `main` is the command: it prints a table.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase, set_seed

from mola.data.encode import data_fingerprint
from mola.data.examples import load_examples
from mola.data.read import check_split
from mola.data.tasks import Task, load_task
from mola.errors import MolaError
from mola.evaluation.core import MAX_NEW_TOKENS, EvaluateResult, checked_questions, evaluate_examples
from mola.evaluation.partial import PartialResults
from mola.files.atomic import atomic_write_json, check_new_file
from mola.files.environment import software_versions
from mola.files.terminal import table_console
from mola.models.adapters import check_adapter
from mola.models.base_model import max_positions
from mola.models.devices import resolve_device, resolve_dtype
from mola.models.options import ModelOptions, check_model, model_for, tokenizer_for
from mola.models.prompts import template_for, warn_of_other_template
from mola.options.fields import START, Group, check_positive, mapping, option

__all__ = ["EvaluateOptions", "EvaluateResult", "evaluate", "main"]

logger = logging.getLogger(__name__)


@dataclass
class EvaluateOptions(ModelOptions):
    """Options of `mola evaluate`."""

    _start: ClassVar = START
    task: str = field(metadata={"help": "Name of a task, or a task file (YAML)."})
    data: str = field(metadata={"help": "Test data: a JSON, JSON lines or CSV file, or a saved dataset."})
    adapter: str | None = option(None, "Folder of an adapter; none evaluates the base model alone.")

    _data: ClassVar = Group("data")
    split: str = option("test", "Split to read where the data has several.")
    filters: dict[str, Any] | str | None = option(None, "Keep rows with these values: {column: value, or a list}.")
    limit: int | None = option(None, "Evaluate only the first so many samples.")

    _answers: ClassVar = Group("answers")
    batch_size: int = option(8, "Samples per batch.")
    max_new_tokens: int = option(
        MAX_NEW_TOKENS, "Tokens to generate per sample; enough for a short answer (the research code uses 128)."
    )
    template: str | None = option(
        None, "Prompt template; chat is the chat template of adapter or base model. Default: the task's own."
    )
    scoring: str = option(
        "generate",
        "'generate': decode greedily and extract the answer. 'likelihood': the possible answer (letter or "
        "word) that is most probable where the expected output states it.",
    )

    _run: ClassVar = Group("run")
    output: str | None = option(None, "Result file (JSON) with every sample.")
    overwrite: bool = option(False, "Replace an existing result; discard an unfinished run with other settings.")
    seed: int = option(0, "Random seed; decoding is greedy, so only code shipped with a model may use it.")


def evaluate(options: EvaluateOptions) -> EvaluateResult:
    """Load a model, evaluate it on a file and write the result file.

    With `output`, finished samples are kept in `<output>.partial.jsonl`; after an interruption the same
    call goes on from there.

    Args:
        options: what to evaluate.

    Returns:
        The result, as written.

    Raises:
        MolaError: anything wrong with the options or the data, before the model is loaded.
    """
    task, examples, tokenizer = check_evaluation(options)
    if options.output is None:
        return _evaluate(options, task, examples, tokenizer, None)
    partial = PartialResults(options.output, _identity(options, task, examples))
    with partial.held():
        check_new_file("output", options.output, options.overwrite)  # another one may have ended meanwhile
        return _evaluate(options, task, examples, tokenizer, partial)


def _evaluate(
    options: EvaluateOptions,
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    partial: PartialResults | None,
) -> EvaluateResult:
    finished = [] if partial is None else partial.read(discard_other=options.overwrite)
    if partial is not None and finished:
        logger.warning("Going on with %d finished samples of %s.", len(finished), partial.path)
    set_seed(options.seed)
    model = model_for(options, options.adapter)
    result = evaluate_examples(
        model,
        tokenizer,
        task,
        examples,
        template=template_for(options.template or task.template, tokenizer, options.adapter),
        scoring=options.scoring,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        finished=finished,
        on_batch=None if partial is None else partial.append,
    )
    result = replace(result, settings=asdict(options))
    if options.output is not None and partial is not None:
        atomic_write_json(options.output, result.to_dict())
        partial.remove()
    return result


def main(options: EvaluateOptions) -> int:
    """Run the command and print the summary."""
    if options.scoring == "likelihood" and options.max_new_tokens != MAX_NEW_TOKENS:
        logger.warning("`max_new_tokens` is not used: scoring by likelihood generates nothing.")
    result = evaluate(options)
    table_console().print(_table(result, options))
    if options.output is not None:
        print(f"Every sample is in {options.output}")
    return 0


def check_evaluation(options: EvaluateOptions) -> tuple[Task, list[dict[str, Any]], PreTrainedTokenizerBase]:
    """Task, examples and tokenizer; refuses everything that can be wrong without a model, cheapest first."""
    check_positive(batch_size=options.batch_size, max_new_tokens=options.max_new_tokens, limit=options.limit)
    if not 0 <= options.seed < 2**32:
        raise MolaError(f"`seed` must be a whole number from 0 to 2**32 - 1: got {options.seed}.")
    config = check_model(options)
    if options.adapter is not None:
        check_adapter(options.adapter)
    if options.output is not None:
        check_new_file("output", options.output, options.overwrite)
        if os.path.realpath(options.output) == os.path.realpath(options.data):
            raise MolaError(f"`output` must not be `data` ({options.data!r}), which it would replace. Choose another.")
    task = load_task(options.task)
    check_split("split", options.split, EvaluateOptions.split, options.data)
    filters = mapping("filters", options.filters)
    examples = load_examples(options.data, task, options.split, limit=options.limit, filters=filters)
    tokenizer = tokenizer_for(options)
    limit = max_positions(config)
    warn_of_other_template(options.adapter, options.template or task.template)
    template = template_for(options.template or task.template, tokenizer, options.adapter)
    checked_questions(tokenizer, task, examples, template, options.scoring, options.max_new_tokens, limit)
    return task, examples, tokenizer


def _identity(options: EvaluateOptions, task: Task, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What must be equal for finished samples to be reused: settings, data, weights, versions, numerics."""
    device = resolve_device(options.device)
    settings = {key: value for key, value in asdict(options).items() if key not in ("output", "overwrite")}
    # A changed answer or number of choices changes the score while the texts may stay the same.
    answers = [[example["answer"], example["num_choices"]] for example in examples]
    return {
        **settings,
        "task_version": task.version,
        "task_fingerprint": task.fingerprint(),
        "data_fingerprint": data_fingerprint(examples),
        "answers_fingerprint": hashlib.sha256(json.dumps(answers).encode()).hexdigest(),
        "weights": [_file_stamps(folder) for folder in (options.base_model, options.adapter) if folder],
        "versions": software_versions(),
        "computed": [device.type, str(resolve_dtype(options.dtype, device)[0])],
    }


def _file_stamps(folder: str) -> list[list[Any]]:
    """Name, size and time of the files that make a local model; empty for a hub id."""
    path = Path(folder)
    files = [
        file for kind in ("*.safetensors", "*.bin", "*.gguf", "*config.json", "*.jinja") for file in path.glob(kind)
    ]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]


def _table(result: EvaluateResult, options: EvaluateOptions) -> Table:
    model = options.base_model if options.adapter is None else f"{options.base_model} + {options.adapter}"
    table = Table(title=escape(f"{options.task}: {model}"))
    for column in ("group", "value"):
        table.add_column(column, overflow="fold")
    for column in ("accuracy", "95 % interval", "correct", "total"):
        table.add_column(column, justify="right")

    def add(group: str, value: str, row: Mapping[str, Any]) -> None:
        low, high = row["interval_95"]
        table.add_row(
            escape(group),
            escape(value),
            f"{row['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            str(row["correct"]),
            str(row["total"]),
        )

    add("all", "", result.to_dict())
    for column, values in result.groups.items():
        for value, row in values.items():
            add(column, value, row)
    metrics = "".join(f"{name} {value:.3f}, " for name, value in result.metrics.items())
    table.caption = f"{metrics}{result.unanswered} unanswered (counted as wrong), {result.seconds:.1f} s"
    return table
