"""From options to the encoded samples of a run, before weights are loaded."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
from numpy.typing import NDArray
from transformers import IntervalStrategy, PretrainedConfig, PreTrainedTokenizerBase

from mola.data.encode import EncodeReport, data_fingerprint, encode_examples
from mola.data.examples import LoadedData, distinct_questions, hash_example, load_data
from mola.data.read import check_split, has_rows
from mola.data.read import split_names as data_splits
from mola.data.tasks import Task, load_task
from mola.data.templates import ChatTemplate, Template
from mola.errors import MolaError
from mola.models.base_model import max_positions, vocabulary_size
from mola.models.prompts import Chat, choose_template, use_chat, warn_of_other_template
from mola.training.option_checks import check_given
from mola.training.options import TrainOptions
from mola.training.packing import pack_samples

logger = logging.getLogger(__name__)

Examples = list[dict[str, Any]]


@dataclass
class TrainingData:
    """Encoded data of a run.

    Attributes:
        train: encoded training samples, or rows of several samples with `packing`.
        evaluation: encoded evaluation samples, or None.
        reports: what encoding changed, by part (train, evaluation).
        fingerprints: sha256 of the examples, by part.
        questions: hashes of the questions, by part; see `mola.data.examples.distinct_questions`.
        template: name of the prompt template.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    reports: dict[str, EncodeReport]
    fingerprints: dict[str, str]
    questions: dict[str, NDArray[np.uint64]]
    template: str


def prepare_data(
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    checkpoint: Path | None = None,
) -> TrainingData:
    """Read the data, split off the evaluation samples, and encode both parts.

    A run that resumes from `checkpoint` reads the chat template there, not in the folder `adapter`.

    Raises:
        MolaError: data is missing or unreadable, lacks a column, or a sample does not fit.
    """
    check_given(options, "data")
    limit = max_positions(config)
    if limit is not None and options.cutoff_len > limit:
        raise MolaError(
            f"`cutoff_len` must not be above what the model can read: got {options.cutoff_len}, "
            f"{options.base_model} has {limit} positions. Lower `cutoff_len`."
        )
    task = load_task(options.task) if options.task is not None else None
    data = _load(options, task, data="data", split="train_split", limit=options.limit)
    template = _template_of(options, data, tokenizer, checkpoint)
    train, evaluation = _split_evaluation(options, task, data.examples)
    _warn_of_overlap(train, evaluation)
    encoded, reports, fingerprints, questions = {}, {}, {}, {}
    for part, examples in (("train", train), ("evaluation", evaluation)):
        if examples:
            encoded[part], report = encode_examples(
                examples,
                tokenizer,
                template,
                cutoff_len=options.cutoff_len,
                train_on_inputs=options.train_on_inputs,
                add_eos_token=options.add_eos_token,
                truncation=options.truncation,
            )
            _check_vocabulary(encoded[part], config)
            reports[part], fingerprints[part] = report, data_fingerprint(examples)
            questions[part] = distinct_questions(examples)
            found = replace(data, examples=examples, path=data.path if part == "train" else "evaluation data")
            logger.info("%s", found.summary(template.description, report))
            if report.dropped or report.truncated:
                logger.info("%s data: %s", part, report.summary())
    train_rows = encoded["train"]
    if options.packing:
        train_rows = pack_samples(train_rows, options.cutoff_len)
        filled = reports["train"].tokens / (len(train_rows) * options.cutoff_len)
        logger.info(
            "Packed into %d rows of %d tokens, %.0f %% filled.", len(train_rows), options.cutoff_len, 100 * filled
        )
    return TrainingData(train_rows, encoded.get("evaluation"), reports, fingerprints, questions, template.name)


def _template_of(
    options: TrainOptions, data: LoadedData, tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None
) -> Template:
    """The template of the prompts. The tokenizer gets the adapter's chat template."""
    adapter = options.adapter and str(checkpoint or options.adapter)
    # A task has its own template, also where an adapter learns several tasks one after another.
    template = choose_template(options.template or (options.task and data.template), data, tokenizer, adapter)
    if isinstance(template, ChatTemplate) and template.jinja is not None:
        use_chat(tokenizer, Chat(template.jinja, template.end_token))
    warn_of_other_template(adapter, template.name)
    return template


def _check_vocabulary(dataset: datasets.Dataset, config: PretrainedConfig) -> None:
    """Check that the base model has an embedding for every token; a tokenizer may have more tokens."""
    known = vocabulary_size(config)
    highest = pyarrow.compute.max(pyarrow.compute.list_flatten(dataset.data.column("input_ids"))).as_py()
    if known is not None and highest >= known:
        raise MolaError(
            f"`data` has a token that the base model does not know: id {highest}, its vocabulary has {known}. Use the "
            "model's own tokenizer, or give it embeddings for the new tokens first."
        )


def _warn_of_overlap(train: Examples, evaluation: Examples) -> None:
    known = {hash_example(example) for example in train} if evaluation else set()
    if shared := sum(hash_example(example) in known for example in evaluation):
        logger.warning(
            "%d of %d evaluation samples are trained on, too: their loss says little, and the best weights are chosen "
            "by it. Remove these samples from one of the two.",
            shared,
            len(evaluation),
        )


def _load(options: TrainOptions, task: Task | None, *, data: str, split: str, limit: int | None) -> LoadedData:
    """Read the examples that the options called `data` and `split` name; errors name these two options."""
    source, wanted = getattr(options, data), getattr(options, split)
    check_split(split, wanted, getattr(TrainOptions, split), source)
    filters: Any = options.filters
    try:
        return load_data(source, task, wanted, limit=limit, filters=filters)
    except MolaError as error:
        raise MolaError(str(error).replace("`data`", f"`{data}`").replace("`split`", f"`{split}`")) from error


def _split_evaluation(options: TrainOptions, task: Task | None, samples: Examples) -> tuple[Examples, Examples]:
    """Training and evaluation samples.

    Evaluation samples come from `eval_data`, else from `validation_size` of the training samples, else from the split
    `eval_split` of `data` if there is one.
    """
    if options.eval_strategy == IntervalStrategy.NO:
        for name in ("eval_data", "eval_split", "eval_limit", "eval_steps", "validation_size"):
            if getattr(options, name) != getattr(TrainOptions, name):
                logger.warning("`%s` is not used, since `eval_strategy` is no: all of `data` is trained on.", name)
        return samples, []
    if options.eval_data is not None:
        return samples, _load(options, task, data="eval_data", split="eval_split", limit=options.eval_limit).examples
    if options.validation_size:
        return _take_out(options, samples)
    data, split = options.data or "", options.eval_split
    splits, is_default = data_splits(data), split == TrainOptions.eval_split
    is_empty = is_default and split in splits and not has_rows(data, split)
    if split in splits and not is_empty:
        return samples, _load(options, task, data="data", split="eval_split", limit=options.eval_limit).examples
    if not is_default:
        raise MolaError(
            f"`eval_split` must be a split of `{data}`: got {split!r}, it has {', '.join(splits) or 'none'}. Choose "
            "one of them, pass `eval_data`, or leave it out."
        )
    why = f" (the split `{split}` is empty)" if is_empty else ""
    logger.warning("There is no evaluation data%s: the run ends with its last weights, not its best ones.", why)
    return samples, []


def _take_out(options: TrainOptions, samples: Examples) -> tuple[Examples, Examples]:
    """Training and evaluation samples; the latter are `validation_size` of `samples`, drawn with `seed`."""
    size = options.validation_size
    count = math.ceil(len(samples) * size) if size < 1 else int(size)
    if not 0 < count < len(samples) or (size > 1 and count != size):
        raise MolaError(
            "`validation_size` must be a number or a share (below 1) of the training samples, and leave some to train "
            f"on: got {size} with {len(samples)} samples."
        )
    indices = list(range(len(samples)))
    random.Random(options.seed).shuffle(indices)
    taken = set(indices[:count])
    if options.eval_limit is not None and options.eval_limit < count:
        logger.warning(
            "`eval_limit` %d leaves %d samples that `validation_size` takes out neither trained on nor evaluated. "
            "Lower `validation_size`.",
            options.eval_limit,
            count - options.eval_limit,
        )
    evaluation = [sample for index, sample in enumerate(samples) if index in taken]
    return [sample for index, sample in enumerate(samples) if index not in taken], evaluation[: options.eval_limit]
