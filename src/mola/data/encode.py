"""Turns examples into token ids and labels.

- The text is prompt + output. Only the output contributes to the loss, unless `train_on_inputs` is set.
- `truncation` says what happens to samples that are too long; by default they are an error. The report counts every
  dropped or truncated sample.
"""

import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from mola.data.templates import Template
from mola.data.tokenized import IGNORED, Sample, tokenized
from mola.errors import MolaError

TRUNCATIONS = ("error", "drop", "left", "right")
_SMALLEST_CUTOFF = 8
_CHUNK = 10_000  # samples held as Python lists at the same time; lists need several times the memory of Arrow arrays


@dataclass(frozen=True)
class EncodeReport:
    """What happened to the samples.

    Attributes:
        total: samples received, `kept` + `dropped`.
        kept: samples in the result.
        dropped: samples left out because they were too long or had no token to train on.
        truncated: kept samples that lost a token, even if only the end-of-sequence token.
        answer_cut: kept samples that lost a token of the answer's text.
        longest: length in tokens of the longest sample, before truncation.
        tokens: tokens in the result.
        trained_tokens: tokens in the result that contribute to the loss.
    """

    total: int
    kept: int
    dropped: int
    truncated: int
    answer_cut: int
    longest: int
    tokens: int
    trained_tokens: int

    def summary(self) -> str:
        """The report in one line."""
        return (
            f"{self.kept} of {self.total} samples kept, {self.dropped} dropped, {self.truncated} truncated "
            f"({self.answer_cut} with a cut answer); longest {self.longest} tokens; {self.tokens} tokens, "
            f"{self.trained_tokens} of them in the loss"
        )


def encode_examples(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    template: Template,
    *,
    cutoff_len: int,
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    truncation: str = "error",
) -> tuple[datasets.Dataset, EncodeReport]:
    """Tokenise examples for training.

    The tokenizer's special tokens (BOS) precede the text. With `add_eos_token` exactly one EOS follows it, even if the
    tokenizer adds none. If a chat template ends a turn with a token of its own, that token comes before EOS.

    A token that spans the boundary between prompt and output contributes to the loss, like the output. A chat template
    avoids such a token: prompt and output are then tokenised separately.

    Args:
        examples: as `load_examples` returns them.
        tokenizer: fast or slow; a slow one tokenises prompt and output separately.
        template: prompt template.
        cutoff_len: maximum length of a sample in tokens, at least 8.
        train_on_inputs: let the prompt's tokens contribute to the loss as well; the labels become a copy of the ids.
        add_eos_token: end every sample with EOS.
        truncation: what happens to a sample longer than `cutoff_len`. 'error': raise; 'drop': leave it out; 'left':
            remove the prompt's first tokens after BOS and keep the whole answer, or raise if the answer is too long;
            'right': cut the end, including the answer, and leave the sample out if no token to train on remains.

    Returns:
        Dataset with `input_ids`, `attention_mask`, `labels` (each a list of integers), `length` and `example` (the
        position in `examples`), and the report. Each example is one sample, unless its chat template changes earlier
        turns of a conversation: then each answer is a sample.

    Raises:
        MolaError: an option or an example is wrong, samples are too long (see `truncation`), or no
            sample is left.
    """
    if cutoff_len < _SMALLEST_CUTOFF:
        raise MolaError(f"`cutoff_len` must be at least {_SMALLEST_CUTOFF}: got {cutoff_len!r}. Raise it.")
    if truncation not in TRUNCATIONS:
        raise MolaError(f"`truncation` must be one of {', '.join(map(repr, TRUNCATIONS))}: got {truncation!r}.")
    if add_eos_token and tokenizer.eos_token_id is None:
        raise MolaError(
            "`add_eos_token` needs a tokenizer with an EOS token: this one has none. Set "
            "`tokenizer.eos_token`, or switch `add_eos_token` off."
        )
    if not examples:
        raise MolaError("`examples` must not be empty: got none. Check the data and its filters.")
    samples = iter(tokenized(examples, tokenizer, template, template.ending(tokenizer) if add_eos_token else []))
    parts: list[datasets.Dataset] = []
    counts: Counter[str] = Counter()
    total = longest = too_long = 0
    longest_id = ""
    while chunk := list(itertools.islice(samples, _CHUNK)):
        total += len(chunk)
        if len((most := max(chunk, key=lambda sample: len(sample.ids))).ids) > longest:
            longest, longest_id = len(most.ids), most.row_id
        too_long += sum(len(sample.ids) > cutoff_len for sample in chunk)
        if too_long and truncation == "error":
            continue  # keep counting for the error message
        columns = _fit_samples(chunk, cutoff_len, train_on_inputs, truncation, counts)
        if columns["input_ids"]:
            parts.append(datasets.Dataset.from_dict(columns))
    if too_long and truncation == "error":
        raise MolaError(
            f"`cutoff_len` is too small: {too_long} of {total} samples would lose tokens. The longest, "
            f"`{longest_id}`, has {longest}, but `cutoff_len` is {cutoff_len}. Raise `cutoff_len` to {longest}, or set "
            "`truncation` to 'drop', 'left' or 'right'."
        )
    if not parts:
        raise MolaError(
            f"`truncation` {truncation!r} leaves no sample: all {total} were dropped, because they are longer than "
            f"`cutoff_len` {cutoff_len} or have no token to train on. The longest has {longest} tokens. Raise "
            "`cutoff_len`, set `truncation` to 'left', or check the column `output`."
        )
    report = EncodeReport(
        total=total,
        kept=counts["kept"],
        dropped=total - counts["kept"],
        truncated=counts["truncated"],
        answer_cut=counts["answer_cut"],
        longest=longest,
        tokens=counts["tokens"],
        trained_tokens=counts["trained_tokens"],
    )
    return datasets.concatenate_datasets(parts), report


def encode_untruncated(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    template: Template,
    max_length: int | None,
    add_eos_token: bool = True,
) -> datasets.Dataset:
    """`encode_examples` without truncation, for commands that have no `cutoff_len`.

    Args:
        examples: as in `encode_examples`.
        tokenizer: the model's tokenizer.
        template: prompt template.
        max_length: length of the longest sequence that the model can read, in tokens; None if unlimited.
        add_eos_token: end every sample with EOS, if the tokenizer has one.

    Raises:
        MolaError: a sample is longer than `max_length`; see also `encode_examples`.
    """
    has_end = add_eos_token and bool(template.ending(tokenizer))
    dataset, report = encode_examples(examples, tokenizer, template, cutoff_len=sys.maxsize, add_eos_token=has_end)
    if max_length is not None and report.longest > max_length:
        row_id = examples[dataset["example"][list(dataset["length"]).index(report.longest)]]["id"]
        raise MolaError(
            f"samples of `data` must have at most {max_length} tokens, the longest sequence that the model can read: "
            f"sample {row_id!r} has {report.longest}. Shorten it, or leave it out."
        )
    return dataset


def data_fingerprint(examples: Iterable[Mapping[str, Any]]) -> str:
    """Sha256 (hex) of id, instruction, input, output and messages of all examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        row = [example.get(name) for name in ("id", "instruction", "input", "output")]
        row += [example[name] for name in ("messages", "tools") if name in example]
        digest.update(json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()


def _fit_samples(
    samples: Iterable[Sample], cutoff_len: int, train_on_inputs: bool, truncation: str, counts: Counter[str]
) -> dict[str, list[Any]]:
    """Columns of the dataset, with the samples that are kept; adds to the report's `counts`."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "attention_mask", "labels", "length", "example")
    }
    for sample in samples:
        fitted = _fit(sample, cutoff_len, truncation)
        if fitted is None or not _has_labels(fitted, train_on_inputs, truncation):
            continue
        labels = fitted.labels(train_on_inputs)
        columns["input_ids"].append(fitted.ids)
        columns["attention_mask"].append([1] * len(fitted.ids))
        columns["labels"].append(labels)
        columns["length"].append(len(fitted.ids))
        columns["example"].append(sample.example)
        counts["kept"] += 1
        counts["truncated"] += len(fitted.ids) < len(sample.ids)
        counts["answer_cut"] += fitted.num_answer_tokens < sample.num_answer_tokens
        counts["tokens"] += len(fitted.ids)
        counts["trained_tokens"] += len(labels) - labels.count(IGNORED)
    return columns


def _fit(sample: Sample, cutoff_len: int, truncation: str) -> Sample | None:
    """The sample with at most `cutoff_len` tokens; None if it is dropped."""
    excess = len(sample.ids) - cutoff_len
    if excess <= 0:
        return sample
    if truncation == "drop":
        return None
    if truncation == "right":
        return sample.cut(sample.prefix, cutoff_len)
    # truncation is 'left'; `encode_examples` has raised for 'error'
    kept_prefix = max(sample.prefix, 1)  # the answer needs a token before it, from which it is predicted
    if kept_prefix + excess > sample.answer_start:
        needed = len(sample.ids) - sample.answer_start + kept_prefix
        raise MolaError(
            f"`cutoff_len` must leave room for the answer: example `{sample.row_id}` needs {needed} tokens "
            f"without its prompt, but `cutoff_len` is {cutoff_len}. Raise it, or set "
            "`truncation` to 'drop', or to 'right', which cuts the answer."
        )
    return sample.cut(sample.prefix + excess, len(sample.ids))


def _has_labels(sample: Sample, train_on_inputs: bool, truncation: str) -> bool:
    """Whether any token contributes to the loss; raises if none does and `truncation` does not allow dropping it."""
    first_label = max(0 if train_on_inputs else sample.spans[0][0], 1)  # the first token is never predicted
    if first_label < len(sample.ids):
        return True
    if truncation in ("error", "left"):
        raise MolaError(
            f"`output` must not be empty without `add_eos_token`: example `{sample.row_id}` has no token "
            "to train on. Correct or remove it, or set `truncation` to 'drop'."
        )
    return False
