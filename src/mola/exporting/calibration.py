"""Data that a conversion is fitted to and measured on: tokens, held-out rows, batches without padding."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mola.data.encode import encode_examples
from mola.data.examples import load_examples
from mola.data.read import check_split
from mola.data.tasks import Task, load_task
from mola.data.templates import check_template
from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from mola.exporting.options import ConvertOptions
from mola.models.base_model import load_config, max_positions
from mola.models.prompts import template_for, trained_template, warn_of_other_template
from mola.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_PIECE = 256  # tokens of a piece of text
_TOKENS = 1024  # of a batch: logits of all of them are compared
_EVERY = 10  # of so many rows one is held out
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Row:
    """Tokens of a sample.

    Attributes:
        ids: all of them.
        labels: the same; `IGNORED` for the prompt.
    """

    ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class Calibration:
    """Rows of one kind.

    Attributes:
        fitted: rows to fit to.
        held_out: others, to measure on.
        too_long: rows left out because the model takes no such length.
    """

    fitted: list[Row]
    held_out: list[Row]
    too_long: int = 0


def read_task(options: ConvertOptions) -> Task | None:
    """The task of `data` and `test`, with the template that was asked for, or that of the adapter's training.

    Raises:
        MolaError: it is missing with one of them, given with neither, or wrong.
    """
    wanted = options.data is not None or options.test is not None
    if wanted != (options.task is not None):
        raise MolaError(
            f"`task` must be given with `data` or `test`, and with these only: got task {options.task!r}, data "
            f"{options.data!r}, test {options.test!r}."
        )
    if options.task is None:
        return None
    task = load_task(options.task)
    trained = {trained_template(source) for source in options.source}
    name = options.template or (trained.pop() if len(trained) == 1 else None) or task.template
    if options.template is None and len(trained) > 1:
        logger.warning("The adapters were trained in different prompts: `data` are read in those of %s.", name)
    check_template(name)
    for source in options.source[:1] if len(trained) < 2 else ():  # of different ones it was said
        warn_of_other_template(source, name)
    return replace(task, template=name)


def read_data(options: ConvertOptions, path: str, task: Task, source: str) -> Calibration:
    """The rows of a data file, in the prompts of `task`; `source` is the adapter that they are for.

    Raises:
        MolaError: it is unreadable, or has fewer than two rows that fit.
    """
    check_split("split", options.split, ConvertOptions.split, path)
    return _divided(*_read_rows(options, path, task, source, options.split, options.limit), path)


def read_test(options: ConvertOptions, task: Task) -> Calibration:
    """The rows of the test file, all held out.

    Raises:
        MolaError: it is unreadable.
    """
    rows, too_long = _read_rows(options, str(options.test), task, options.source[0], "test", None)
    return Calibration([], rows, too_long)


def _read_rows(
    options: ConvertOptions, path: str, task: Task, source: str, split: str, limit: int | None
) -> tuple[list[Row], int]:
    """Rows, and how many are too long."""
    tokenizer = load_tokenizer(str(options.base_model), "right", options.trust_remote_code)
    examples = load_examples(path, task, split, limit=None if limit is None else limit + 1)
    if limit is not None and len(examples) > limit:
        examples = examples[:limit]
        _say_limit(f"samples of {path}", limit)
    cutoff = _longest(options)
    dataset, report = encode_examples(
        examples,
        tokenizer,
        template_for(task.template, tokenizer, source),
        cutoff_len=cutoff,
        truncation="drop",
    )
    return [Row(row["input_ids"], row["labels"]) for row in dataset], report.dropped


def _say_limit(what: str, limit: int) -> None:
    logger.warning("Only the first %d %s are read. `limit` sets how many.", limit, what)


def read_general_text(options: ConvertOptions, option: str) -> Calibration:
    """The pieces of a text file; those of `test_text` are all held out.

    Args:
        options: of the command.
        option: text or test_text.

    Raises:
        MolaError: it is unreadable, or has no piece, of `text` fewer than two.
    """
    path = str(getattr(options, option))
    tokenizer = load_tokenizer(str(options.base_model), "right", options.trust_remote_code)
    try:
        ids = tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False, add_special_tokens=False)["input_ids"]
    except (OSError, ValueError) as error:
        raise MolaError(f"`{option}` cannot be read: {path!r} ({error}). Pass a file of text in UTF-8.") from error
    # Every piece begins as a text does: models that know a begin token have seen none without.
    begin = tokenizer("a")["input_ids"][:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    size = min(_PIECE, _longest(options)) - len(begin)
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    rows = [Row([*begin, *piece], [*begin, *piece]) for piece in pieces if len(piece) + len(begin) > 1]
    if len(rows) > options.limit:
        rows = rows[: options.limit]
        _say_limit(f"pieces of {path}", options.limit)
    if option == "text":
        return _divided(rows, 0, path)
    if not rows:
        raise MolaError(f"`{option}` must have at least 2 tokens: {path!r} has fewer. Pass another.")
    return Calibration([], rows)


def batches(rows: Sequence[Row]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels `(samples, length)`, rows of one length together: there is no padding to leave out."""
    by_length: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_length[len(row.ids)].append(row)
    found = []
    for length, alike in sorted(by_length.items()):
        size = max(1, _TOKENS // length)
        for start in range(0, len(alike), size):
            part = alike[start : start + size]
            found.append((torch.tensor([row.ids for row in part]), torch.tensor([row.labels for row in part])))
    return found


def seen_rows(data: Mapping[str, Calibration]) -> list[str]:
    """What to tell of held-out rows whose tokens are those of a fitted row, of whichever kind."""
    fitted = {tuple(row.ids) for each in data.values() for row in each.fitted}
    seen = {kind: sum(tuple(row.ids) in fitted for row in each.held_out) for kind, each in data.items()}
    return [
        f"{count} of the {len(data[kind].held_out)} held-out rows of {kind} are fitted to, too, with the same text"
        for kind, count in seen.items()
        if count
    ]


def token_ids(rows: Sequence[Row]) -> list[torch.Tensor]:
    """The token ids of `batches`."""
    return [ids for ids, _ in batches(rows)]


def answer_weights(rows: Sequence[Row], weight: float) -> list[torch.Tensor]:
    """How often each token of `batches` counts: `weight` times where an answer's token is predicted, else once."""
    return [torch.where(F.pad(answer_tokens(labels), (0, 1)), weight, 1.0) for _, labels in batches(rows)]


def answer_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Which positions `(samples, length - 1)` predict a token of an answer."""
    return labels[:, 1:] != IGNORED


def _longest(options: ConvertOptions) -> int:
    config: Any = load_config(str(options.base_model), options.trust_remote_code)
    return max_positions(config) or _NO_LIMIT


def _divided(rows: list[Row], too_long: int, path: str) -> Calibration:
    if len(rows) < 2:
        raise MolaError(
            f"data to fit to must have at least 2 rows, of which one is held out: {path!r} has {len(rows)}. Pass more."
        )
    every = min(_EVERY, len(rows))
    held_out = rows[every - 1 :: every]
    return Calibration([row for i, row in enumerate(rows) if i % every != every - 1], held_out, too_long)
