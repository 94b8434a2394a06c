"""Data for commands that measure a model: examples of any kind, the prompt template that fits, tokens and labels."""

import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedTokenizerBase

from mola.data.encode import encode_untruncated
from mola.data.examples import load_data
from mola.data.tasks import Task
from mola.data.templates import Template
from mola.models.prompts import choose_template, trains_end_token, warn_of_other_template

logger = logging.getLogger(__name__)


class Samples(NamedTuple):
    """The examples of a data source."""

    examples: list[dict[str, Any]]  # see `load_data`
    task: Task | None  # the task that says where the answers are; None for free text
    template: Template
    left_out: int = 0  # number of rows that come after the first `limit` ones


def read_samples(
    path: str,
    task: Task | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str | None,
    limit: int | None = None,
    filters: Mapping[str, Any] | None = None,
    template: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Samples:
    """Read examples, and choose their prompt template.

    Args:
        path: data that `load_data` reads.
        task: how raw rows are turned into examples; None recognises the rows by their columns.
        tokenizer: the model's tokenizer.
        split: split of a source that has several.
        limit: number of examples to read, from the first on; None for all.
        filters: column -> value, or list of values, that a row must have.
        template: name of the template; None for the one of the adapter's training, else of the task or the rows.
        adapter: folder of the adapter that is measured; None for a base model.

    Raises:
        MolaError: the data are unreadable or of no known format, or there is no such template.
    """
    data = load_data(path, task, split, limit=limit, filters=filters)
    layout = choose_template(template, data, tokenizer, adapter)
    warn_of_other_template(adapter, layout.name)
    logger.info("%s", data.summary(layout.description))
    has_answers = data.task is not None and data.task.answer is not None
    return Samples(data.examples, data.task if has_answers else None, layout, data.left_out)


def encode_samples(
    samples: Samples,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    adapter: str | os.PathLike[str] | None = None,
) -> datasets.Dataset:
    """Tokens and labels as in the adapter's training: without its end token, the end of an output has no label.

    Args:
        samples: see `read_samples`.
        tokenizer: the model's tokenizer.
        max_length: length of the longest sequence that the model can read, in tokens; None if unlimited.
        adapter: folder of the adapter that is measured; None for a base model.

    Returns:
        See `encode_examples`.

    Raises:
        MolaError: a sample is longer than `max_length`, or has nothing to train.
    """
    return encode_untruncated(samples.examples, tokenizer, samples.template, max_length, trains_end_token(adapter))
