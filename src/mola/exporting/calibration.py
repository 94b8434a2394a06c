"""Reads the data that a conversion is fitted to and measured on: tokens, held-out rows, batches without padding."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from mola.data.encode import encode_examples
from mola.data.read import check_split
from mola.data.tasks import load_task
from mola.data.tokenized import IGNORED
from mola.errors import MolaError
from mola.exporting.options import ConvertOptions
from mola.models.base_model import load_config, max_positions
from mola.models.prompts import template_of, trains_end_token
from mola.models.sample_data import Samples, read_samples
from mola.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_PIECE_LENGTH = 256  # number of tokens in a piece of text
_BATCH_TOKENS = 1024
_HELD_OUT_INTERVAL = 10  # one row in ten is held out
_NO_LIMIT = 1 << 30


class Row(NamedTuple):
    """The tokens of one sample."""

    ids: Sequence[int]  # token ids of prompt and answer
    labels: Sequence[int]  # the same ids, with `IGNORED` for the prompt


class Calibration(NamedTuple):
    """The rows of one data source."""

    fitted: list[Row]  # rows to fit to
    held_out: list[Row]  # different rows, to measure on
    too_long: int = 0  # number of rows left out because they are longer than the model's positions


def read_data(options: ConvertOptions, path: str, source: str) -> Calibration:
    """Read the rows of a data file, in the prompts of the training of the adapter `source`.

    Raises:
        MolaError: the file is unreadable, or fewer than two of its rows fit the model.
    """
    check_split("split", options.split, ConvertOptions.split, path)
    samples, tokenizer = read_samples_of(options, path, source, options.split, options.limit)
    if samples.left_out:
        _warn_of_limit(options.limit, f"samples of {path}")
    return _hold_out(*_encode(options, samples, tokenizer, source), path)


def test_rows(options: ConvertOptions, samples: Samples, tokenizer: PreTrainedTokenizerBase) -> Calibration:
    """The rows of the test file, which are all held out."""
    rows, too_long = _encode(options, samples, tokenizer, options.source[0])
    return Calibration([], rows, too_long)


def read_samples_of(
    options: ConvertOptions, path: str, source: str, split: str, limit: int | None = None
) -> tuple[Samples, PreTrainedTokenizerBase]:
    """Read a data file for the adapter `source`; returns its samples and the tokenizer.

    Without `template`, adapters that were trained with different templates have their data read in the same prompts.

    Raises:
        MolaError: the file is unreadable, or there is no such task or template.
    """
    task = None if options.task is None else load_task(options.task)
    has_one_template = options.template is not None or len({template_of(each) for each in options.source}) == 1
    tokenizer = load_tokenizer(str(options.base_model), "right", options.trust_remote_code)
    samples = read_samples(
        path,
        task,
        tokenizer,
        split=split,
        limit=limit,
        template=options.template,
        adapter=source if has_one_template else None,
    )
    if not has_one_template:
        logger.warning(
            "The adapters were trained with different prompt templates: %s is read with the template %s.",
            path,
            samples.template.name,
        )
    return samples, tokenizer


def _encode(
    options: ConvertOptions, samples: Samples, tokenizer: PreTrainedTokenizerBase, source: str
) -> tuple[list[Row], int]:
    """The rows that fit the model, and the number of rows that are too long."""
    dataset, report = encode_examples(
        samples.examples,
        tokenizer,
        samples.template,
        cutoff_len=_max_length(options),
        add_eos_token=trains_end_token(source) and bool(samples.template.ending(tokenizer)),
        truncation="drop",
    )
    return [Row(row["input_ids"], row["labels"]) for row in dataset], report.dropped


def _warn_of_limit(limit: int, what: str) -> None:
    logger.warning("Only the first %d %s are read. `limit` sets this number.", limit, what)


def read_general_text(options: ConvertOptions, option: str) -> Calibration:
    """Read a text file as pieces of 256 tokens; all pieces of `test_text` are held out.

    Args:
        options: the command's options.
        option: name of the option with the file: text or test_text.

    Raises:
        MolaError: the file is unreadable, or is too short: `text` needs two pieces, `test_text` one.
    """
    path = str(getattr(options, option))
    tokenizer = load_tokenizer(str(options.base_model), "right", options.trust_remote_code)
    try:
        ids = tokenizer(Path(path).read_text(encoding="utf-8"), verbose=False, add_special_tokens=False)["input_ids"]
    except (OSError, ValueError) as error:
        raise MolaError(f"`{option}` cannot be read: {path!r} ({error}). Pass a file of text in UTF-8.") from error
    # Models with a begin token never saw a text without it, so every piece begins with it.
    begin = tokenizer("a")["input_ids"][:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    size = min(_PIECE_LENGTH, _max_length(options)) - len(begin)
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    rows = [Row([*begin, *piece], [*begin, *piece]) for piece in pieces if len(piece) + len(begin) > 1]
    if len(rows) > options.limit:
        _warn_of_limit(options.limit, f"pieces of {path}")
    rows = rows[: options.limit]
    if option == "text":
        return _hold_out(rows, 0, path)
    if not rows:
        raise MolaError(f"`{option}` must have at least 2 tokens: {path!r} has fewer. Pass a longer file.")
    return Calibration([], rows)


def _max_length(options: ConvertOptions) -> int:
    config: Any = load_config(str(options.base_model), options.trust_remote_code)
    return max_positions(config) or _NO_LIMIT


def _hold_out(rows: list[Row], too_long: int, path: str) -> Calibration:
    if len(rows) < 2:
        raise MolaError(f"data to fit to must have at least 2 rows, one of them held out: {path!r} has {len(rows)}.")
    interval = min(_HELD_OUT_INTERVAL, len(rows))
    fitted = [row for number, row in enumerate(rows, 1) if number % interval]
    return Calibration(fitted, rows[interval - 1 :: interval], too_long)


def batches(rows: Sequence[Row]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of token ids and labels `(samples, length)`; all rows of a batch are equally long, without padding."""
    by_length: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_length[len(row.ids)].append(row)
    found = []
    for length, same_length in sorted(by_length.items()):
        size = max(1, _BATCH_TOKENS // length)
        for start in range(0, len(same_length), size):
            part = same_length[start : start + size]
            found.append((torch.tensor([row.ids for row in part]), torch.tensor([row.labels for row in part])))
    return found


def token_ids(rows: Sequence[Row]) -> list[torch.Tensor]:
    """Batches of token ids; see `batches`."""
    return [ids for ids, _ in batches(rows)]


def answer_weights(rows: Sequence[Row], weight: float) -> list[torch.Tensor]:
    """Weights of the tokens in `batches`: `weight` if the token predicts a token of an answer, else 1."""
    return [torch.where(F.pad(answer_mask(labels), (0, 1)), weight, 1.0) for _, labels in batches(rows)]


def answer_mask(labels: torch.Tensor) -> torch.Tensor:
    """Boolean mask `(samples, length - 1)` of the positions that predict a token of an answer."""
    return labels[:, 1:] != IGNORED


def note_overlaps(data: Mapping[str, Calibration]) -> list[str]:
    """Notes for the report about held-out rows that have the same tokens as a fitted row of any data source."""
    fitted = {tuple(row.ids) for each in data.values() for row in each.fitted}
    overlaps = {kind: sum(tuple(row.ids) in fitted for row in each.held_out) for kind, each in data.items()}
    return [
        f"{count} of the {len(data[kind].held_out)} held-out rows of {kind} have the same text as a fitted row"
        for kind, count in overlaps.items()
        if count
    ]
