"""Real text for the suites that need it: the generated questions of `mola prepare sample`, in a model's tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import DataCollatorForSeq2Seq

from benchmarks.models import Case
from benchmarks.options import BenchmarkOptions
from mola.data.encode import EncodeReport, encode_examples
from mola.data.sample import generate_splits
from mola.data.tasks import load_task
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.models.base_model import load_config, max_positions
from mola.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_WITH_QUESTIONS = ("logits", "attention")  # in these suites every question is a sample; `curve` joins the questions
_QUESTIONS = 640  # the number that `mola quickstart` trains on


def has_text(suite: str, model: str) -> bool:
    """Whether a model has a tokenizer; the log says so if it has none."""
    if model == "random12":
        logger.info("%s: random12 is left out, it has no tokenizer for real text", suite)
    return model != "random12"


def check_text(options: BenchmarkOptions, folder: Path) -> None:
    """Check that a model can read the text in blocks of the wanted length, if a suite needs the text.

    Raises:
        MolaError: the model has no tokenizer, or the blocks are too long.
    """
    limit = max_positions(load_config(folder))
    if "curve" in options.suite:
        length = options.curve_seq_len
        if limit is not None and length > limit:
            raise MolaError(f"`curve_seq_len` must fit the model: got {length}, {folder.name} has {limit} positions.")
        if not len(text_blocks(folder, length)):
            raise MolaError(f"`curve_seq_len` must not be above the sample text's tokens: got {length}. Lower it.")
    if set(_WITH_QUESTIONS) & set(options.suite):
        encoded, _ = _encoded(load_tokenizer(folder, "right"), options.batch_size, train_on_inputs=False)
        longest = max(map(len, encoded["input_ids"]))
        if limit is not None and longest > limit:
            raise MolaError(
                f"{' and '.join(_WITH_QUESTIONS)} need a model that reads {longest} tokens: {folder.name} has {limit} "
                "positions. Leave them out of `suite`."
            )


def _encoded(tokenizer: Any, questions: int, train_on_inputs: bool) -> tuple[datasets.Dataset, EncodeReport]:
    task = load_task("sample")
    rows = generate_splits({"train": questions})["train"]
    examples = [task.example(row, index, "train") for index, row in enumerate(rows)]
    template = get_template(task.template)
    return encode_examples(examples, tokenizer, template, cutoff_len=1 << 20, train_on_inputs=train_on_inputs)


def question_batch(case: Case) -> dict[str, torch.Tensor]:
    """One batch of questions, padded on the right, whose labels are the answers."""
    tokenizer = load_tokenizer(case.folder, "right")
    encoded, _ = _encoded(tokenizer, case.batch_size, train_on_inputs=False)
    columns = ["input_ids", "attention_mask", "labels"]
    batch = DataCollatorForSeq2Seq(tokenizer)(list(encoded.select_columns(columns)))
    return {name: batch[name].to(case.device) for name in columns}


def text_blocks(folder: str | Path, seq_len: int) -> torch.Tensor:
    """All questions with their answers one after the other, cut into blocks: `(blocks, seq_len)`."""
    encoded, report = _encoded(load_tokenizer(folder, "right"), _QUESTIONS, train_on_inputs=True)
    tokens = torch.tensor([token for ids in encoded["input_ids"] for token in ids])
    blocks = report.tokens // seq_len
    return tokens[: blocks * seq_len].view(blocks, seq_len)


def text_batches(case: Case, steps: int) -> list[dict[str, torch.Tensor]]:
    """Batches of blocks without padding, every token a label; blocks in an order that `case.seed` decides.

    When all blocks have been used, they are used again in a different order.
    """
    blocks = text_blocks(case.folder, case.seq_len)
    needed = steps * case.batch_size
    generator = torch.Generator().manual_seed(case.seed)
    rounds = -(-needed // len(blocks))
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(rounds)])[:needed]
    batches = blocks[order].view(steps, case.batch_size, case.seq_len).to(case.device)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in batches]
