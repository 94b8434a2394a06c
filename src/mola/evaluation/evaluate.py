"""`mola evaluate`: a model answers the questions of a test file, and the correct answers are counted.

- `evaluate_examples` in `mola.evaluation.core` queries a loaded model with examples in memory.
- `evaluate` checks the options, loads model and data, resumes an interrupted evaluation and writes the result file.
- `main` is the command, which prints a table.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase, set_seed

from mola.data.examples import load_examples
from mola.data.read import check_split
from mola.data.tasks import Task, load_task
from mola.errors import MolaError
from mola.evaluation.core import EvaluateResult, evaluate_examples
from mola.evaluation.options import MAX_NEW_TOKENS, EvaluateOptions
from mola.evaluation.questions import checked_questions
from mola.evaluation.resuming import AnswersFile, answers_made_with
from mola.files.atomic import atomic_write_json, check_new_file
from mola.files.terminal import make_table_console
from mola.models.adapters import check_adapter
from mola.models.base_model import max_positions
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.prompts import template_for, warn_of_other_template
from mola.options.fields import check_positive, parse_mapping

__all__ = ["EvaluateOptions", "EvaluateResult", "evaluate", "main"]

logger = logging.getLogger(__name__)


def evaluate(options: EvaluateOptions) -> EvaluateResult:
    """Load a model, evaluate it on a file and write the result file.

    With `output`, answered samples are kept in `<output>.partial.jsonl`; after an interruption the same
    call resumes with these samples.

    Args:
        options: what to evaluate.

    Returns:
        The result, as written.

    Raises:
        MolaError: something is wrong with the options or the data; raised before the model is loaded.
    """
    task, examples, tokenizer = check_evaluation(options)
    answers, finished = None, []
    if options.output is not None:
        answers = AnswersFile(options.output, answers_made_with(options, task, examples))
        finished = answers.read(discard_others=options.overwrite)
        if finished:
            logger.warning("Resuming with %d finished samples of %s.", len(finished), answers.path)
    set_seed(options.seed)
    result = evaluate_examples(
        model_for(options, options.adapter),
        tokenizer,
        task,
        examples,
        template=template_for(options.template or task.template, tokenizer, options.adapter),
        scoring=options.scoring,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        finished_records=finished,
        on_batch=None if answers is None else answers.append,
    )
    result = replace(result, settings=asdict(options))
    if options.output is not None and answers is not None:
        atomic_write_json(options.output, result.to_dict())
        answers.remove()
    return result


def main(options: EvaluateOptions) -> int:
    """Run the command and print the summary."""
    if options.scoring == "likelihood" and options.max_new_tokens != MAX_NEW_TOKENS:
        logger.warning("`max_new_tokens` is not used: scoring by likelihood generates nothing.")
    result = evaluate(options)
    make_table_console().print(_table(result, options))
    if options.output is not None:
        print(f"Every sample is in {options.output}")
    return 0


def check_evaluation(options: EvaluateOptions) -> tuple[Task, list[dict[str, Any]], PreTrainedTokenizerBase]:
    """Load task, examples and tokenizer, and find all errors that can be found before the weights are loaded."""
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
    filters = parse_mapping("filters", options.filters)
    examples = load_examples(options.data, task, options.split, limit=options.limit, filters=filters)
    tokenizer = tokenizer_for(options)
    limit = max_positions(config)
    warn_of_other_template(options.adapter, options.template or task.template)
    template = template_for(options.template or task.template, tokenizer, options.adapter)
    checked_questions(tokenizer, task, examples, template, options.scoring, options.max_new_tokens, limit)
    return task, examples, tokenizer


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
