"""The core of an evaluation: a loaded model answers examples, and the correct answers are counted."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mola.checkpoints.skills_folder import BASE
from mola.data.encode import data_fingerprint
from mola.data.tasks import Task
from mola.data.templates import Template
from mola.errors import NotFiniteError
from mola.evaluation.options import MAX_NEW_TOKENS
from mola.evaluation.questions import Question, checked_questions, end_text
from mola.evaluation.scoring import accuracy_by_group, accuracy_summary, binary_metrics, constant_prediction
from mola.evaluation.skills import SkillPrompts, asking, count_asked, decides, skills_asked
from mola.files import terminal
from mola.files.environment import machine_description, software_versions
from mola.generation import predicting
from mola.generation.likelihood import option_log_probabilities
from mola.options.fields import check_positive

logger = logging.getLogger(__name__)

# Padding changes the answers of these types of model, although it is masked.
_PADDING_SENSITIVE_TYPES = (
    # recurrent models, whose state reads the padding
    "rwkv",
    "recurrent_gemma",
    "xlstm",
    # models that cut a sequence into windows
    "deepseek_v4",
    "minimax_m3_vl",
    "minimax_m3_vl_text",
    "blt",
)


@dataclass
class EvaluateResult:
    """Result of an evaluation; the fields are those of the result file.

    Attributes:
        accuracy: correct answers as a fraction of all samples.
        correct: number of correct answers.
        total: number of samples.
        unanswered: samples without an extractable answer; they count as wrong.
        interval_95: Wilson interval of `accuracy`.
        metrics: the task's `more_metrics`, by name (`f1`, `matthews`); an unanswered sample counts as if the opposite
            label had been predicted.
        groups: column -> value -> accuracy, correct, total, interval_95.
        samples: id, prompt, output, predicted, answer, correct of each sample, in the order of the data; of a skills
            folder also `asked`, the name of the skill that is asked, or "base".
        settings: task, template, scoring, batch size (1 if batches would change answers) and max_new_tokens.
        versions: of mola, torch, transformers, peft and Python.
        data_fingerprint: SHA-256 of the examples, computed as for a training run's `run.json`.
        task_fingerprint: SHA-256 of the task's prompts and answer extraction.
        seconds: wall time of answering all samples, excluding loading; includes the time before a resume.
        machine: cpu, gpu, threads.
        asked: name of a skill, or "base" -> number of samples that it answered; None without skills, and then it is
            no field of the file.
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
    asked: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Content of the result file."""
        return {name: value for name, value in asdict(self).items() if name != "asked" or value is not None}


def evaluate_examples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    *,
    template: str | Template | None = None,
    skill_prompts: Mapping[str, SkillPrompts] | None = None,
    scoring: str = "generate",
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    finished_records: Iterable[Mapping[str, Any]] = (),
    on_batch: Callable[[list[dict[str, Any]]], None] | None = None,
    show_progress: bool = True,
) -> EvaluateResult:
    """Let a loaded model answer the examples' questions and score its answers; model and tokenizer stay unchanged.

    In a model with skills each question asks the skill that knows it, unless the caller names one with
    `model.skills.use`.

    Args:
        model: causal language model, in training or eval mode.
        tokenizer: its tokenizer.
        task: how answers are extracted and grouped.
        examples: as `mola.data.examples.load_examples` returns them.
        template: prompt template, or its name; None for the task's own.
        skill_prompts: skills whose questions are written otherwise, see `mola.evaluation.skills.skill_prompts`.
        scoring: `"generate"` or `"likelihood"`.
        batch_size: samples per batch.
        max_new_tokens: tokens to generate per sample.
        finished_records: records of an earlier, interrupted evaluation, in the form in which `on_batch` gets them.
        on_batch: called after every batch with its records `{"index", "seconds", "sample"}`: index in `examples`,
            its share of the batch's wall time, and the entry of `EvaluateResult.samples`.
        show_progress: show a progress bar on stderr.

    Returns:
        The result.

    Raises:
        MolaError: wrong arguments or examples; a prompt too long for the model.
    """
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    limit = predicting.positions_left(model)

    def make(indices: Sequence[int], template: str | Template | None) -> tuple[list[Question], list[int]]:
        chosen = [examples[index] for index in indices]
        return checked_questions(tokenizer, task, chosen, template, scoring, max_new_tokens, limit)

    questions, lengths = make(range(len(examples)), template)
    skills = None
    if decides(model):
        prompts = [question.prompt for question in questions]
        skills = skills_asked(model, predicting.encode_prompts(tokenizer, prompts, questions[0].template))
        for name, own in (skill_prompts or {}).items():
            if indices := [index for index, asked in enumerate(skills) if asked == name]:
                for index, question, length in zip(indices, *make(indices, own.template), strict=True):
                    questions[index], lengths[index] = question, length
    longest = max(lengths) + (max_new_tokens if scoring == "generate" else 0)
    if batch_size > 1 and (reason := why_one_by_one(model, longest)) is not None:
        logger.warning("Samples are processed one at a time: %s.", reason)
        batch_size = 1

    def answer_questions(indices: list[int]) -> list[dict[str, Any]]:
        with asking(model, skills, indices):
            samples = _answer_batch(model, tokenizer, task, [questions[i] for i in indices], max_new_tokens)
        if skills is None:
            return samples
        return [sample | {"asked": skills[index] or BASE} for index, sample in zip(indices, samples, strict=True)]

    title = f"{task.name}, batches" if show_progress else None
    records = process_batches(model, answer_questions, lengths, batch_size, finished_records, on_batch, title, skills)
    settings = {
        "task": task.name,
        "template": template.name if isinstance(template, Template) else template,
        "scoring": scoring,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    device = next(model.parameters()).device
    result = _build_result(task, examples, records, settings, device)
    if skills is not None:
        result = replace(result, asked=count_asked(skills))
    if (answer := constant_prediction(result.samples)) is not None:
        logger.warning(
            "All %d samples got the same answer, %r, which is correct for %.1f %% of them: accuracy only reflects how "
            "common that answer is.",
            result.total,
            answer,
            100 * result.accuracy,
        )
    return result


def process_batches(
    model: Any,
    process: Callable[[list[int]], list[dict[str, Any]]],
    lengths: Sequence[int],
    batch_size: int,
    finished_records: Iterable[Mapping[str, Any]],
    on_batch: Callable[[list[dict[str, Any]]], None] | None,
    title: str | None,
    groups: Sequence[Any] | None = None,
) -> list[Mapping[str, Any]]:
    """Process those samples in batches that have no record yet, the longest first.

    Args:
        model: put into its inference state during the work.
        process: makes the samples of a batch from their indices.
        lengths: number of tokens of each sample.
        batch_size: samples per batch.
        finished_records: records of an earlier, interrupted evaluation.
        on_batch: see `evaluate_examples`.
        title: text before the progress bar; None for no bar.
        groups: the group of each sample, such as the skill that it asks: a batch has samples of one group.

    Returns:
        The record `{"index", "seconds", "sample"}` of each sample, in the order of `lengths`.
    """
    records: dict[int, Mapping[str, Any]] = {record["index"]: record for record in finished_records}
    remaining: dict[Any, list[int]] = {}
    for index in range(len(lengths)):
        if index not in records:
            remaining.setdefault(groups and groups[index], []).append(index)
    batches = [
        [group[i] for i in batch]
        for group in remaining.values()
        for batch in predicting.batches_by_length([lengths[i] for i in group], batch_size)
    ]
    with predicting.inference_state(model):
        for batch in batches if title is None else terminal.show_progress(batches, title):
            start = time.perf_counter()
            samples = process(batch)
            seconds = (time.perf_counter() - start) / len(batch)
            new = [
                {"index": index, "seconds": seconds, "sample": sample}
                for index, sample in zip(batch, samples, strict=True)
            ]
            records.update(zip(batch, new, strict=True))
            if on_batch is not None:
                on_batch(new)
    return [records[index] for index in range(len(lengths))]


def why_one_by_one(model: Any, longest: int) -> str | None:
    """Why samples must be answered one at a time; None if they can be answered in batches.

    `longest` is the number of tokens of the longest sample, with its answer.
    """
    max_length = predicting.max_length_of_batched_rope(model.config)
    if max_length is not None and longest > max_length:
        return "the position encoding of this model depends on the longest sample of a batch"
    if getattr(model.config, "model_type", None) in _PADDING_SENSITIVE_TYPES:
        return "padding changes the answers of this type of model"
    if predicting.prompt_learning_configs(model):
        return "padding would come between the virtual tokens of prompt tuning and the prompt"
    return None


def _answer_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, questions: Sequence[Question], max_new_tokens: int
) -> list[dict[str, Any]]:
    """One sample per question, in the form of `EvaluateResult.samples`."""
    predictions: Sequence[str | None]
    if questions[0].options:  # scoring by likelihood
        options = _choose_options(model, tokenizer, questions)
        outputs = [question.prefix + option for question, option in zip(questions, options, strict=True)]
        predictions = options
    else:
        outputs = _generate_outputs(model, tokenizer, questions, max_new_tokens)
        predictions = [
            task.extract_answer(output, question.example["num_choices"])
            for question, output in zip(questions, outputs, strict=True)
        ]
    return [
        {
            "id": question.example["id"],
            "prompt": question.prompt,
            "output": output,
            "predicted": predicted,
            "answer": question.example["answer"],
            "correct": predicted == question.example["answer"],
        }
        for question, output, predicted in zip(questions, outputs, predictions, strict=True)
    ]


def _choose_options(model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    """The most probable option of each question."""
    template = questions[0].template
    end = end_text(tokenizer, template)
    texts, prompts = [each.option_texts(end) for each in questions], [each.prompt for each in questions]
    chosen = []
    scores = option_log_probabilities(model, tokenizer, texts, template, prompts)
    for question, values in zip(questions, scores, strict=True):
        if any(map(math.isnan, values)):
            raise NotFiniteError(
                f"the scores of sample {question.example['id']!r} are NaN and cannot be compared. Pass "
                "--dtype float32 or bfloat16, and check that the weights of `base_model` are finite."
            )
        chosen.append(question.options[values.index(max(values))])
    return chosen


def _generate_outputs(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], max_new_tokens: int
) -> list[str]:
    """The text that greedy decoding writes after each prompt."""
    template = questions[0].template
    prompts = predicting.encode_before_answer(tokenizer, [question.prompt for question in questions], template)
    # Only the first token that ends an answer: EOS may follow it.
    ends = [] if template is None else template.ending(tokenizer)[:1]
    return predicting.generate_batch(
        model, tokenizer, prompts, ends=ends, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
    )


def _build_result(
    task: Task,
    examples: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    settings: dict[str, Any],
    device: torch.device,
) -> EvaluateResult:
    samples = [dict(record["sample"]) for record in records]
    is_correct = [bool(sample["correct"]) for sample in samples]
    metrics: dict[str, float] = {}
    if task.more_metrics and task.binary_labels is not None:
        answers, predicted = ([sample[name] for sample in samples] for name in ("answer", "predicted"))
        metrics = binary_metrics(task.more_metrics, answers, predicted, task.binary_labels)
    return EvaluateResult(
        **accuracy_summary(sum(is_correct), len(is_correct)),
        unanswered=sum(sample["predicted"] is None for sample in samples),
        metrics=metrics,
        groups=accuracy_by_group(examples, is_correct, task.groups),
        samples=samples,
        settings=settings,
        versions=software_versions(),
        data_fingerprint=data_fingerprint(examples),
        task_fingerprint=task.fingerprint(),
        seconds=sum(record["seconds"] for record in records),
        machine=machine_description(device),
    )
