"""From options to encoded data of a run; everything that can be wrong with it is found before weights load."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
from numpy.typing import NDArray
from transformers import IntervalStrategy, PreTrainedTokenizerBase

from mola.data.encode import EncodeReport, data_fingerprint, encode_examples
from mola.data.examples import distinct_questions, hash_example, load_examples
from mola.data.read import check_split, has_rows
from mola.data.read import split_names as data_splits
from mola.data.tasks import Task, load_task, template_name
from mola.data.templates import ChatTemplate
from mola.errors import MolaError
from mola.models.base_model import load_config, max_positions, vocabulary_size
from mola.models.prompts import Chat, template_for, use_chat, warn_of_other_template
from mola.options.fields import mapping
from mola.training.options import TrainOptions

logger = logging.getLogger(__name__)

Examples = list[dict[str, Any]]


@dataclass
class TrainingData:
    """Encoded data of a run.

    Attributes:
        train: encoded training samples.
        evaluation: encoded evaluation samples, or None.
        reports: what encoding did, by part.
        fingerprints: sha256 of the examples, by part.
        questions: hashes of the questions, by part; see `mola.data.hashing.distinct_questions`.
        template: name of the prompt template.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    reports: dict[str, EncodeReport]
    fingerprints: dict[str, str]
    questions: dict[str, NDArray[np.uint64]]
    template: str


def prepare_data(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None = None
) -> TrainingData:
    """Read, split and encode; `checkpoint` is the one that a run goes on from, as of `check_model_options`.

    Raises:
        MolaError: data is missing or unreadable, lacks a column, or a sample does not fit.
    """
    if options.data is None:
        raise MolaError("`data` must name the training data. Pass --data with a file or a saved dataset.")
    task = load_task(options.task) if options.task is not None else None
    name = template_name(options.template, task)
    adapter = options.adapter and str(checkpoint or options.adapter)
    template = template_for(name, tokenizer, adapter)
    if isinstance(template, ChatTemplate) and template.jinja is not None:  # of an adapter; both are saved with the run
        use_chat(tokenizer, Chat(template.jinja, template.end_token))
    warn_of_other_template(adapter, name)
    if options.template is None and task is None and tokenizer.chat_template:
        logger.warning(
            "The prompts of the training are those of the template %s, not of the base model's chat template, in which "
            "servers and `messages` ask it. Pass --template chat for that one, or name another.",
            name,
        )
    filters = mapping("filters", options.filters)
    check_split("train_split", options.train_split, type(options).train_split, options.data)
    with _named(split="train_split"):
        train = load_examples(options.data, task, options.train_split, limit=options.limit, filters=filters)
    train, evaluation = _evaluation_examples(options, task, train)
    _warn_of_shared(train, evaluation)
    limit = max_positions(load_config(options.base_model or "", options.trust_remote_code, options.gguf_file))
    if limit is not None and options.cutoff_len > limit:
        raise MolaError(
            f"`cutoff_len` must not be above what the model can read: got {options.cutoff_len}, "
            f"{options.base_model} has {limit} positions. Lower `cutoff_len`."
        )
    encoded, reports, fingerprints, questions = {}, {}, {}, {}
    for part, examples in (("train", train), ("evaluation", evaluation)):
        if examples:
            encoded[part], reports[part] = encode_examples(
                examples,
                tokenizer,
                template,
                cutoff_len=options.cutoff_len,
                train_on_inputs=options.train_on_inputs,
                add_eos_token=options.add_eos_token,
                truncation=options.truncation,
            )
            _check_known(encoded[part], options)
            fingerprints[part] = data_fingerprint(examples)
            questions[part] = distinct_questions(examples)
            logger.info("%s data: %s", part, reports[part].summary())
    return TrainingData(encoded["train"], encoded.get("evaluation"), reports, fingerprints, questions, name)


def _check_known(dataset: datasets.Dataset, options: TrainOptions) -> None:
    """Refuse tokens that the base model has no embedding for, as a tokenizer may have them."""
    known = vocabulary_size(load_config(options.base_model or "", options.trust_remote_code, options.gguf_file))
    highest = pyarrow.compute.max(pyarrow.compute.list_flatten(dataset.data.column("input_ids"))).as_py()
    if known is not None and highest >= known:
        raise MolaError(
            f"`data` has a token that the base model does not know: id {highest}, its vocabulary has {known}. Use the "
            "model's own tokenizer, or give it embeddings for the new tokens first."
        )


def _warn_of_shared(train: Examples, evaluation: Examples) -> None:
    known = {hash_example(example) for example in train} if evaluation else set()
    if shared := sum(hash_example(example) in known for example in evaluation):
        logger.warning(
            "%d of %d evaluation samples are trained on, too: their loss says little, and the best weights are chosen "
            "by it. Take them out of one of the two.",
            shared,
            len(evaluation),
        )


@contextlib.contextmanager
def _named(**options: str) -> Iterator[None]:
    """Errors of the block about `data` or `split` name the options that these are of."""
    try:
        yield
    except MolaError as error:
        text = str(error)
        for name, option in options.items():
            text = text.replace(f"`{name}`", f"`{option}`")
        raise MolaError(text) from error


def _evaluation_examples(options: TrainOptions, task: Task | None, train: Examples) -> tuple[Examples, Examples]:
    """Training and evaluation examples: from another source, another split, or taken from the training part."""
    if options.eval_strategy == IntervalStrategy.NO:
        for name in ("eval_data", "eval_split", "eval_limit", "eval_steps", "validation_size"):
            if getattr(options, name) != getattr(TrainOptions, name):
                logger.warning("`%s` is not used, since `eval_strategy` is no: all of `data` is trained on.", name)
        return train, []
    filters = mapping("filters", options.filters)
    if options.eval_data is not None:
        check_split("eval_split", options.eval_split, TrainOptions.eval_split, options.eval_data)
        with _named(data="eval_data", split="eval_split"):
            return train, load_examples(
                options.eval_data, task, options.eval_split, limit=options.eval_limit, filters=filters
            )
    if options.validation_size == 0:
        splits = data_splits(options.data or "")
        is_default = options.eval_split == TrainOptions.eval_split
        is_empty = is_default and options.eval_split in splits and not has_rows(options.data or "", options.eval_split)
        if options.eval_split in splits and not is_empty:
            return train, load_examples(
                options.data or "", task, options.eval_split, limit=options.eval_limit, filters=filters
            )
        if not is_default:
            raise MolaError(
                f"`eval_split` must be a split of `{options.data}`: got {options.eval_split!r}, it has "
                f"{', '.join(splits) or 'none'}. Choose one of them, pass `eval_data`, or leave it out."
            )
        why = f" (the split `{options.eval_split}` is empty)" if is_empty else ""
        logger.warning("There is no evaluation data%s: the run ends with its last weights, not its best ones.", why)
        return train, []
    size = options.validation_size
    count = math.ceil(len(train) * size) if size < 1 else int(size)
    if not 0 < count < len(train):
        raise MolaError(
            f"`validation_size` must leave samples to train on: {size} of {len(train)} samples are {count}."
        )
    order = list(range(len(train)))
    random.Random(options.seed).shuffle(order)
    taken = set(order[:count])
    if options.eval_limit is not None and options.eval_limit < count:
        logger.warning(
            "`eval_limit` %d leaves %d samples that `validation_size` takes out neither trained on nor evaluated. "
            "Lower `validation_size`.",
            *(options.eval_limit, count - options.eval_limit),
        )
    return _pick(train, taken, False), _pick(train, taken, True)[: options.eval_limit]


def _pick(examples: Sequence[dict[str, Any]], taken: set[int], inside: bool) -> Examples:
    return [example for index, example in enumerate(examples) if (index in taken) is inside]
