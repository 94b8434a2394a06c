"""`mola evaluate`: the loss of a model on free text, or how many questions of a test file it answers correctly.

- `evaluate_examples` in `mola.evaluation.core` lets a loaded model answer examples in memory, and `evaluate_loss` in
  `mola.evaluation.free_text` measures its loss on them.
- `evaluate` checks the options, loads model and data, resumes an interrupted evaluation and writes the result file.
- `main` is the command, which prints a table.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase, set_seed

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.data.read import check_split
from mola.data.tasks import Task, load_task
from mola.data.templates import Template
from mola.errors import MolaError
from mola.evaluation.core import EvaluateResult, evaluate_examples
from mola.evaluation.free_text import LossResult, evaluate_loss
from mola.evaluation.options import MAX_NEW_TOKENS, EvaluateOptions
from mola.evaluation.questions import checked_questions
from mola.evaluation.resuming import AnswersFile, answers_made_with
from mola.evaluation.skills import SkillPrompts, describe, skill_prompts
from mola.files.atomic import atomic_write_json
from mola.files.terminal import make_table_console
from mola.models.base_model import max_positions
from mola.models.from_options import adapter_alone, adapter_for, check_model, model_for, tokenizer_for
from mola.models.prompts import trains_end_token
from mola.models.sample_data import encode_samples, read_samples
from mola.options.command_line import command_line, next_steps
from mola.options.fields import parse_mapping

__all__ = ["EvaluateOptions", "EvaluateResult", "LossResult", "evaluate", "main"]

logger = logging.getLogger(__name__)


class CheckedEvaluation(NamedTuple):
    """What an evaluation needs besides the model."""

    task: Task | None  # the task whose answers are scored; None if the loss of free text is measured
    examples: list[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    template: Template
    adapter: str | None = None  # the one that answers, which `skill` may name; see `named_adapter`
    # Skills that write prompts in another way than `template`.
    skill_prompts: Mapping[str, SkillPrompts] = MappingProxyType({})

    @property
    def template_name(self) -> str:
        """Name of the template; of several skills the names of all."""
        names = {self.template.name, *(each.template.name for each in self.skill_prompts.values())}
        return ", ".join(sorted(names))


def evaluate(options: EvaluateOptions) -> EvaluateResult | LossResult:
    """Load a model, evaluate it on a file and write the result file.

    With `output`, answered samples are kept in `<output>.partial.jsonl`; after an interruption the same
    call resumes with these samples.

    Args:
        options: what to evaluate.

    Returns:
        The result, as written: an `EvaluateResult` for a task with answers, else a `LossResult`.

    Raises:
        MolaError: something is wrong with the options or the data; raised before the model is loaded.
    """
    checked = check_evaluation(options)
    answers, finished = None, []
    if options.output is not None:
        made_with = answers_made_with(options, checked.task, checked.template_name, checked.examples)
        answers = AnswersFile(options.output, made_with)
        finished = answers.read(discard_others=options.overwrite)
        if finished:
            logger.warning("Resuming with %d finished samples of %s.", len(finished), answers.path)
    set_seed(options.seed)
    model = model_for(options, checked.adapter)
    result = _measure(options, model, checked, finished, None if answers is None else answers.append)
    if options.skill is not None:
        result = replace(result, asked={options.skill: result.total})
    if options.output is not None and answers is not None:
        atomic_write_json(options.output, result.to_dict())
        answers.remove()
    return result


def _measure(
    options: EvaluateOptions,
    model: Any,
    checked: CheckedEvaluation,
    finished: list[dict[str, Any]],
    on_batch: Callable[[list[dict[str, Any]]], None] | None,
) -> EvaluateResult | LossResult:
    task, examples, tokenizer, template, adapter, skill_prompts = checked
    if task is None:
        result = evaluate_loss(
            model,
            tokenizer,
            examples,
            template=template,
            skill_prompts=skill_prompts,
            add_eos_token=trains_end_token(adapter_alone(adapter)),
            batch_size=options.batch_size,
            finished_records=finished,
            on_batch=on_batch,
        )
        return replace(result, settings=asdict(options) | {"template": checked.template_name})
    accuracy = evaluate_examples(
        model,
        tokenizer,
        task,
        examples,
        template=template,
        skill_prompts=skill_prompts,
        scoring=options.scoring,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        finished_records=finished,
        on_batch=on_batch,
    )
    return replace(accuracy, settings=asdict(options))


def main(options: EvaluateOptions) -> int:
    """Run the command and print the summary."""
    if options.scoring == "likelihood" and options.max_new_tokens != MAX_NEW_TOKENS:
        logger.warning("`max_new_tokens` is not used: scoring by likelihood generates nothing.")
    result = evaluate(options)
    table = _loss_table(result, options) if isinstance(result, LossResult) else _table(result, options)
    make_table_console().print(table)
    if options.output is not None:
        print(f"Every sample is in {options.output}")
        if options.adapter is not None and (Path(options.adapter) / "run.json").is_file():
            print(next_steps(command_line("report", {"after": options.output}, str(options.adapter))))
    return 0


def check_evaluation(options: EvaluateOptions) -> CheckedEvaluation:
    """Load task, examples and tokenizer, and find all errors that can be found before the weights are loaded."""
    options.check()
    config = check_model(options)
    adapter = adapter_for(options)
    task = None if options.task is None else load_task(options.task)
    check_split("split", options.split, EvaluateOptions.split, options.data)
    filters = parse_mapping("filters", options.filters)
    tokenizer = tokenizer_for(options)
    samples = read_samples(
        options.data,
        task,
        tokenizer,
        split=options.split,
        limit=options.limit,
        filters=filters,
        template=options.template,
        adapter=adapter_alone(adapter),
    )
    limit = max_positions(config)
    if samples.task is None:
        _check_no_option_is_ignored(options)
        encode_samples(samples, tokenizer, limit, adapter_alone(adapter))
    else:
        arguments = samples.template, options.scoring, options.max_new_tokens, limit
        checked_questions(tokenizer, samples.task, samples.examples, *arguments)
    checked = CheckedEvaluation(samples.task, samples.examples, tokenizer, samples.template, adapter)
    if adapter is None or not is_skills_folder(adapter):
        return checked
    has_prompts = "messages" in samples.examples[0] or samples.examples[0]["instruction"] is not None
    return checked._replace(skill_prompts=skill_prompts(adapter, options.template, has_prompts, tokenizer))


def _check_no_option_is_ignored(options: EvaluateOptions) -> None:
    for name in ("scoring", "max_new_tokens"):
        if (value := getattr(options, name)) != getattr(EvaluateOptions, name):
            raise MolaError(
                f"`{name}` ({value!r}) is for questions with answers, but the loss of free text is measured. Leave it "
                "out, or pass the `task` that says where the answers are."
            )


def _model_words(options: EvaluateOptions) -> str:
    words = options.base_model if options.adapter is None else f"{options.base_model} + {options.adapter}"
    return words if options.skill is None else f"{words}, skill {options.skill}"


def _loss_table(result: LossResult, options: EvaluateOptions) -> Table:
    table = Table(title=escape(f"{options.data}: {_model_words(options)}"))
    per_byte, interval = "-", "-"
    if result.loss_per_byte is not None:
        per_byte = f"{result.loss_per_byte:.4f}"
    if result.interval_95 is not None:
        interval = "{:.4f} to {:.4f}".format(*result.interval_95)
    values = {
        "loss per token": f"{result.loss:.4f}",
        "95 % interval": interval,
        "perplexity": f"{result.perplexity:.4g}",
        "loss per byte": per_byte,
        "rows": str(result.total),
        "tokens": str(result.tokens),
    }
    for column in values:
        table.add_column(column, justify="right")
    table.add_row(*values.values())
    table.caption = (
        f"losses in nats, template {result.settings['template']}, {result.seconds:.1f} s{describe(result.asked)}"
    )
    return table


def _table(result: EvaluateResult, options: EvaluateOptions) -> Table:
    table = Table(title=escape(f"{options.task or options.data}: {_model_words(options)}"))
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
    table.caption = (
        f"{metrics}{result.unanswered} unanswered (counted as wrong), {result.seconds:.1f} s{describe(result.asked)}"
    )
    return table
