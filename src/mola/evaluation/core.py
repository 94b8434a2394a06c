"""The core of an evaluation: a loaded model answers examples in memory, and the answers are counted."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from mola.data.encode import data_fingerprint
from mola.data.tasks import LETTERS, Task
from mola.data.templates import Template
from mola.errors import MolaError
from mola.evaluation.answering import Question, answer_questions, make_questions, question_lengths
from mola.evaluation.scoring import accuracy_by_group, accuracy_summary, binary_metrics, one_answer
from mola.files.environment import machine_description, software_versions
from mola.generation import predicting
from mola.options.fields import check_positive

logger = logging.getLogger(__name__)

_warn_once = functools.cache(logger.warning)

# Masked or not, it is part of their state, or shifts the windows into which they cut a sequence.
_SEE_PADDING = (
    *("rwkv", "recurrent_gemma", "xlstm"),
    *("deepseek_v4", "minimax_m3_vl", "minimax_m3_vl_text", "blt"),
)

MAX_NEW_TOKENS = 16  # enough for a short answer


@dataclass
class EvaluateResult:
    """Result of an evaluation; the fields are those of the result file.

    Attributes:
        accuracy: right answers as a fraction of all samples.
        correct: number of right answers.
        total: number of samples.
        unanswered: samples without an extractable answer; they count as wrong.
        interval_95: Wilson interval of `accuracy`.
        metrics: name -> value of the task's `more_metrics` (`f1`, `matthews`); an unanswered sample counts as
            the wrong label.
        groups: column -> value -> accuracy, correct, total, interval_95.
        samples: id, prompt, output, predicted, answer, correct of each sample, in the order of the data.
        settings: the options used.
        versions: of mola, torch, transformers, peft and Python.
        data_fingerprint: SHA-256 of the examples, the same as in a training run's `run.json`.
        task_fingerprint: SHA-256 of how the task asks and how it reads answers.
        seconds: wall time of answering all samples, without loading; resumed parts included.
        machine: cpu, gpu, threads.
    """

    accuracy: float
    correct: int
    total: int
    unanswered: int
    interval_95: list[float]
    metrics: dict[str, float]
    groups: dict[str, dict[str, dict[str, Any]]]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]
    data_fingerprint: str
    task_fingerprint: str
    seconds: float
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Content of the result file."""
        return asdict(self)


def evaluate_examples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    *,
    template: str | Template | None = None,
    scoring: str = "generate",
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    finished: Iterable[Mapping[str, Any]] = (),
    on_batch: Callable[[list[dict[str, Any]]], None] | None = None,
    show_progress: bool = True,
) -> EvaluateResult:
    """Ask a loaded model and score its answers; model and tokenizer come back as they were.

    Args:
        model: causal language model, in training or eval mode.
        tokenizer: its tokenizer.
        task: how answers are extracted and grouped.
        examples: as `mola.data.examples.load_examples` returns them.
        template: prompt template, or its name; None for the task's own.
        scoring: `"generate"` or `"likelihood"`.
        batch_size: samples per batch.
        max_new_tokens: tokens to generate per sample.
        finished: records of samples answered before, as `on_batch` received them.
        on_batch: called with the records of every finished batch.
        show_progress: show a progress bar on stderr.

    Returns:
        The result; its `settings` are these arguments.

    Raises:
        MolaError: wrong arguments or examples; a prompt too long for the model.
    """
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    limit = predicting.positions_left(model)
    questions, lengths = checked_questions(tokenizer, task, examples, template, scoring, max_new_tokens, limit)
    longest = max(lengths) + (max_new_tokens if scoring == "generate" else 0)
    if batch_size > 1 and (reason := _why_one_by_one(model, longest)) is not None:
        logger.warning("Samples are asked one by one: %s.", reason)
        batch_size = 1
    records: dict[int, Mapping[str, Any]] = {record["index"]: record for record in finished}
    open_indices = [index for index in range(len(questions)) if index not in records]
    batches = [
        [open_indices[i] for i in batch]
        for batch in predicting.batches_by_length([lengths[i] for i in open_indices], batch_size)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task(escape(task.name), total=len(questions), completed=len(records))

        def collect(batch: list[dict[str, Any]]) -> None:
            records.update({record["index"]: record for record in batch})
            if on_batch is not None:
                on_batch(batch)
            progress.update(bar, completed=len(records))

        answer_questions(model, tokenizer, task, questions, batches, max_new_tokens, collect)
    settings = {
        "task": task.name,
        "template": template.name if isinstance(template, Template) else template,
        "scoring": scoring,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    device = next(model.parameters()).device
    result = _result(task, examples, [records[index] for index in range(len(questions))], settings, device)
    if (answer := one_answer(result.samples)) is not None:
        logger.warning(
            "All %d samples got one answer, %r, which is right for %.1f %% of them: this accuracy says how frequent it "
            "is, not what the model has learnt.",
            *(result.total, answer, 100 * result.accuracy),
        )
    return result


def _why_one_by_one(model: Any, longest: int) -> str | None:
    """Why answers would depend on what else is in a batch; None if they do not."""
    if longest > (predicting.longest_of_one_rope(model.config) or longest):
        return "positions of this model depend on a batch's longest sample"
    if getattr(model.config, "model_type", None) in _SEE_PADDING:
        return "models of this kind see the padding of a batch"
    if predicting.prompt_learning(model):
        return "between virtual tokens and a prompt there would be padding"
    return None


def checked_questions(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    template: str | Template | None,
    scoring: str,
    max_new_tokens: int = MAX_NEW_TOKENS,
    limit: int | None = None,
) -> tuple[list[Question], list[int]]:
    """Questions and their lengths in tokens; everything that can be wrong with them shows here, without a model.

    Raises:
        MolaError: as `make_questions`, `check_answers` and `question_lengths`.
    """
    questions = make_questions(task, examples, template, scoring, tokenizer)
    check_answers(task, examples)
    if scoring == "generate":
        warn_of_pattern(task, examples)
    return questions, question_lengths(tokenizer, questions, scoring, max_new_tokens, limit)


def check_answers(task: Task, examples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse answers that the task cannot extract from any text: they would count as wrong whatever a model says."""
    if task.answer is None:
        return
    words = task.answer.words
    for example in examples:
        possible = list(LETTERS[: example["num_choices"]]) if words is None else list(words.values())
        if example["answer"] not in possible:
            known = ", ".join(map(repr, dict.fromkeys(possible)))
            raise MolaError(
                f"`answer` of sample {example['id']!r} must be one of {known} for the task {task.name!r}: got "
                f"{example['answer']!r}. Correct it, or run `mola prepare` on the raw data."
            )


def warn_of_pattern(task: Task, examples: Sequence[Mapping[str, Any]]) -> None:
    """Say so, once, where not even the outputs of the data are read as their own answers."""
    if task.answer is None:
        return
    lost = [
        each["id"]
        for each in examples
        if each.get("output") and task.extract_answer(each["output"], each["num_choices"]) != each["answer"]
    ]
    if lost:
        _warn_once(
            "`answer_pattern` of the task %s does not find the answer in the output of %d of %d samples, such as %r: a "
            "model that writes these outputs counts as wrong.",
            *(task.name, len(lost), len(examples), lost[0]),
        )


def _result(
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    settings: dict[str, Any],
    device: torch.device,
) -> EvaluateResult:
    samples = [dict(record["sample"]) for record in records]
    marks = [bool(sample["correct"]) for sample in samples]
    return EvaluateResult(
        **accuracy_summary(sum(marks), len(marks)),
        unanswered=sum(sample["predicted"] is None for sample in samples),
        metrics=_more_metrics(task, samples),
        groups=accuracy_by_group(examples, marks, task.groups),
        samples=samples,
        settings=settings,
        versions=software_versions(),
        data_fingerprint=data_fingerprint(examples),
        task_fingerprint=task.fingerprint(),
        seconds=sum(record["seconds"] for record in records),
        machine=machine_description(device),
    )


def _more_metrics(task: Task, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if not task.more_metrics or task.binary_labels is None:
        return {}
    answers = [sample["answer"] for sample in samples]
    return binary_metrics(task.more_metrics, answers, [sample["predicted"] for sample in samples], task.binary_labels)
