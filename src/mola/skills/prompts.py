"""The prompts of a skill: read and written like in its training, without their answers, as token ids."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from mola.data import read
from mola.data.tasks import load_task
from mola.data.templates import Template
from mola.errors import MolaError
from mola.generation.predicting import encode_before_answer
from mola.models.prompts import trained_settings
from mola.models.sample_data import read_samples

_Item = TypeVar("_Item")


class Prompts(NamedTuple):
    """The prompts of one data source.

    Attributes:
        ids: token ids of each prompt.
        too_long: number of prompts left out because they are longer than the model's positions.
    """

    ids: list[list[int]]
    too_long: int


@dataclass(frozen=True)
class DataSource:
    """Where the prompts of a skill are read, and how.

    Attributes:
        path: data as `mola train` reads them.
        task: name of a task, or a task file.
        split: split to read if there are several.
        template: name of the prompt template; None for the one of the skill's training.
        filters: column -> value, or list of values, that a row must have.
        limit: number of rows that count, from the first on; None for all.
        adapter: folder of the skill's LoRA; None for prompts of no skill.
    """

    path: str
    task: str | None = None
    split: str | None = None
    template: str | None = None
    filters: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    adapter: str | os.PathLike[str] | None = None


def recorded_source(name: str, adapter: str, template: str | None) -> DataSource:
    """The training data that the run of a skill's adapter records.

    Raises:
        MolaError: the folder has no such record, or the data do not exist any more.
    """
    settings = trained_settings(adapter)
    if not settings.get("data"):
        raise MolaError(
            f"the skill {name!r} needs data, from which its prompts are known later: {adapter!r} does not record its "
            "training data. Pass --data with one source per skill."
        )
    path = str(settings["data"])
    try:
        read.check_exists(path)
    except MolaError as error:
        raise MolaError(
            f"the skill {name!r} needs its training data, and {path!r}, which {adapter!r} records, does not exist "
            "here. Pass --data with one source per skill."
        ) from error
    return DataSource(
        path,
        settings.get("task"),
        settings.get("train_split"),
        template,
        settings.get("filters") or {},
        settings.get("limit"),
        adapter,
    )


def read_prompts(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, max_prompts: int, max_length: int | None
) -> Prompts:
    """Read the prompts of a skill.

    Args:
        source: what to read.
        tokenizer: the base model's tokenizer.
        max_prompts: number of prompts to keep, evenly spread over the data.
        max_length: number of the model's positions; None if unlimited.

    Raises:
        MolaError: the data are unreadable, or all prompts are too long.
    """
    samples = read_samples(
        source.path,
        None if source.task is None else load_task(source.task),
        tokenizer,
        split=source.split,
        limit=source.limit,
        filters=source.filters,
        template=source.template,
        adapter=source.adapter,
    )
    examples = spread(samples.examples, max_prompts)
    texts = spread([text for each in examples for text in prompt_texts(each, samples.template)], max_prompts)
    encoded = encode_before_answer(tokenizer, texts, samples.template)
    ids = [each for each in encoded if max_length is None or len(each) <= max_length]
    if not ids:
        raise MolaError(
            f"`data` must have prompts of at most {max_length} tokens, the model's positions: all {len(encoded)} of "
            f"{source.path!r} are longer. Pass shorter ones."
        )
    return Prompts(ids, len(encoded) - len(ids))


def prompt_texts(example: Mapping[str, Any], template: Template) -> Iterator[str]:
    """The text before each answer of an example; of a text without a prompt the text itself."""
    for segments in template.segments(example):
        for index, (answer, is_trained) in enumerate(segments):
            if is_trained:
                yield "".join(text for text, _ in segments[:index]) or answer


def spread(items: Sequence[_Item], number: int) -> list[_Item]:
    """At most `number` items, evenly spread, in their order."""
    number = min(number, len(items))
    return [items[index * len(items) // number] for index in range(number)]


def named_sources(
    pairs: Sequence[str], folder: Path, names: Sequence[str], others: Sequence[str] = ()
) -> dict[str, str]:
    """Name of a skill -> data, from `NAME=DATA` each, or from one source per skill in the order of their names.

    Args:
        pairs: the values.
        folder: the skills folder, for messages.
        names: its skills.
        others: further names that are allowed.

    Raises:
        MolaError: a name is unknown, or the number of sources does not fit.
    """
    if not any("=" in pair for pair in pairs):
        if len(pairs) != len(names):
            raise MolaError(
                f"`data` must have one source per skill, in the order of their names ({', '.join(names)}): got "
                f"{len(pairs)}. Pass NAME=DATA for some of them."
            )
        return dict(zip(names, pairs, strict=True))
    from mola.skills.options import split_pairs

    found = split_pairs("data", list(pairs), "NAME=DATA")
    for name in found:
        if name not in (*names, *others):
            raise MolaError(
                f"`data` must name skills of {str(folder)!r} ({', '.join(names)}), or {' or '.join(others)}: got "
                f"{name!r}."
            )
    return found
