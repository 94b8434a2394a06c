"""Examples become token ids and labels.

- Text is prompt + output; only the output is trained unless `train_on_inputs`.
- A sample that does not fit is an error, or is handled as asked and counted: no answer is lost in silence.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import datasets

from mola.data.templates import Template
from mola.data.tokenized import IGNORED, Sample, tokenized
from mola.errors import MolaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATIONS = ("error", "drop", "left", "right")
_SMALLEST_CUTOFF = 8
_CHUNK = 10_000  # samples that are lists of Python at a time, which take several times the memory
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class EncodeReport:
    """What happened to the samples.

    Attributes:
        total: samples received, `kept` + `dropped`.
        kept: samples in the result.
        dropped: samples left out because they did not fit or had nothing to train.
        truncated: kept samples that lost a token, be it the end-of-sequence token only.
        answer_cut: kept samples that lost a token of the answer's text.
        longest: tokens of the longest sample before truncation.
        tokens: tokens in the result.
        trained_tokens: labels in the result that are trained.
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
            f"{self.trained_tokens} trained"
        )


def encode_examples(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    cutoff_len: int,
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    truncation: str = "error",
) -> tuple[datasets.Dataset, EncodeReport]:
    """Tokenise examples for training.

    Special tokens before the text (BOS) are those of the tokenizer. After the text stands exactly one
    EOS with `add_eos_token`, also if the tokenizer adds none (after the token that ends a turn, where a chat template
    has one of its own), and nothing without it. A token that
    straddles the border between prompt and output counts as output, so it is trained; a chat template across whose
    border one would reach is tokenised in two parts.

    Args:
        examples: as `load_examples` returns them.
        tokenizer: fast or slow; a slow one tokenises prompt and output separately.
        template: prompt template.
        cutoff_len: most tokens a sample may have, at least 8.
        train_on_inputs: train the prompt's tokens as well; the labels are then a copy of the ids.
        add_eos_token: end every sample with EOS.
        truncation: what happens to a longer sample. `error`: raise; `drop`: leave it out; `left`: cut
            the prompt after BOS and keep the whole answer; `right`: cut the end, the answer with it,
            and leave the sample out if nothing to train remains.

    Returns:
        Dataset with `input_ids`, `attention_mask`, `labels` (each a list of integers) and `length`, and
        the report.

    Raises:
        MolaError: an option or an example does not fit, samples are too long (see `truncation`), or no
            sample is left.
    """
    _check_options(examples, tokenizer, cutoff_len, add_eos_token, truncation)
    ending = template.ending(tokenizer) if add_eos_token else []
    return _dataset(tokenized(examples, tokenizer, template, ending), cutoff_len, train_on_inputs, truncation)


def _dataset(
    samples: Iterable[Sample], cutoff_len: int, train_on_inputs: bool, truncation: str
) -> tuple[datasets.Dataset, EncodeReport]:
    parts: list[datasets.Dataset] = []
    counts: Counter[str] = Counter()
    longest = 0
    for chunk in _chunks(samples):
        longest = max(longest, *(len(sample.ids) for sample in chunk))
        counts["total"] += len(chunk)
        counts["too long"] += sum(len(sample.ids) > cutoff_len for sample in chunk)
        if counts["too long"] and truncation == "error":
            continue  # to say how many there are
        kept, truncated, answer_cut = _fitted(chunk, cutoff_len, train_on_inputs, truncation)
        labels = [sample.labels(train_on_inputs) for sample in kept]
        counts.update(
            kept=len(kept),
            truncated=truncated,
            answer_cut=answer_cut,
            tokens=sum(len(sample.ids) for sample in kept),
            trained_tokens=sum(label != IGNORED for row in labels for label in row),
        )
        columns = {
            "input_ids": [sample.ids for sample in kept],
            "attention_mask": [[1] * len(sample.ids) for sample in kept],
            "labels": labels,
            "length": [len(sample.ids) for sample in kept],
        }
        if kept:
            parts.append(datasets.Dataset.from_dict(columns))
    total, too_long = counts["total"], counts["too long"]
    if too_long and truncation == "error":
        raise MolaError(
            f"`cutoff_len` must not be smaller than a sample: {too_long} of {total} samples "
            f"would lose tokens, the longest has {longest}, `cutoff_len` is {cutoff_len}. Raise `cutoff_len` "
            f"to {longest}, or choose `truncation` drop, left or right."
        )
    if not parts:
        raise MolaError(
            f"`cutoff_len` leaves no sample: all {total} were dropped, the longest has {longest} "
            f"tokens, `cutoff_len` is {cutoff_len}. Raise `cutoff_len`, or choose `truncation` left."
        )
    same = {name: counts[name] for name in ("kept", "truncated", "answer_cut", "tokens", "trained_tokens")}
    report = EncodeReport(total=total, dropped=total - counts["kept"], longest=longest, **same)
    return datasets.concatenate_datasets(parts), report


def _chunks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    left = iter(samples)
    while chunk := list(itertools.islice(left, _CHUNK)):
        yield chunk


def data_fingerprint(examples: Iterable[Mapping[str, Any]]) -> str:
    """Sha256 (hex) of id, instruction, input and output of all examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        row = [example.get(name) for name in ("id", "instruction", "input", "output")]
        digest.update(json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()


def encode_whole(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    positions: int | None,
    add_eos_token: bool = True,
) -> datasets.Dataset:
    """`encode_examples` for what has no `cutoff_len`: nothing is cut, and nothing is longer than the model can read.

    Args:
        examples: as of `encode_examples`.
        tokenizer: of the model.
        template: prompt layout.
        positions: how many tokens the model can read; None for any number.
        add_eos_token: end every sample with the token that ends an answer.

    Raises:
        MolaError: a sample is longer; and as `encode_examples`.
    """
    limit = _NO_LIMIT if positions is None else positions
    _check_options(examples, tokenizer, limit, add_eos_token, "error")
    samples = list(tokenized(examples, tokenizer, template, template.ending(tokenizer) if add_eos_token else []))
    for sample in samples:
        if len(sample.ids) > limit:
            raise MolaError(
                f"`data` must fit into the model's {limit} positions: sample {sample.row_id!r} has {len(sample.ids)} "
                "tokens. Shorten it, or leave it out."
            )
    return _dataset(samples, limit, train_on_inputs=False, truncation="error")[0]


def _check_options(
    examples: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    add_eos_token: bool,
    truncation: str,
) -> None:
    if isinstance(cutoff_len, bool) or not isinstance(cutoff_len, int) or cutoff_len < _SMALLEST_CUTOFF:
        raise MolaError(
            f"`cutoff_len` must be an integer of at least {_SMALLEST_CUTOFF}: got {cutoff_len!r}. Raise it."
        )
    if truncation not in TRUNCATIONS:
        raise MolaError(f"`truncation` must be one of {', '.join(TRUNCATIONS)}: got {truncation!r}.")
    if add_eos_token and tokenizer.eos_token_id is None:
        raise MolaError(
            "`add_eos_token` needs a tokenizer with an EOS token: this one has none. Set "
            "`tokenizer.eos_token`, or switch `add_eos_token` off."
        )
    if not examples:
        raise MolaError("`examples` must not be empty: got none. Check the data and its filters.")


def _fitted(
    samples: Iterable[Sample], cutoff_len: int, train_on_inputs: bool, truncation: str
) -> tuple[list[Sample], int, int]:
    """Samples that are kept, how many of them lost a token, and how many a token of the answer."""
    kept: list[Sample] = []
    truncated = answer_cut = 0
    for sample in samples:
        fitted = _fit(sample, cutoff_len, truncation)
        if fitted is None or not _has_labels(fitted, train_on_inputs, truncation):
            continue
        kept.append(fitted)
        truncated += len(fitted.ids) < len(sample.ids)
        answer_cut += fitted.text_end - fitted.start < sample.text_end - sample.start
    return kept, truncated, answer_cut


def _fit(sample: Sample, cutoff_len: int, truncation: str) -> Sample | None:
    """The sample with at most `cutoff_len` tokens; None if it is dropped."""
    excess = len(sample.ids) - cutoff_len
    if excess <= 0:
        return sample
    if truncation == "drop":
        return None
    if truncation == "right":
        return replace(
            sample,
            ids=sample.ids[:cutoff_len],
            start=min(sample.start, cutoff_len),
            text_end=min(sample.text_end, cutoff_len),
        )
    before = max(sample.prefix, 1)  # no token predicts the first one
    if before + excess > sample.start:
        needed = len(sample.ids) - sample.start + before
        raise MolaError(
            f"`cutoff_len` must leave room for the answer: example `{sample.row_id}` needs {needed} tokens "
            f"without its prompt, `cutoff_len` is {cutoff_len}. Raise it, or choose "
            "`truncation` drop, or right, which cuts the answer."
        )
    return replace(
        sample,
        ids=sample.ids[: sample.prefix] + sample.ids[sample.prefix + excess :],
        start=sample.start - excess,
        text_end=sample.text_end - excess,
    )


def _has_labels(sample: Sample, train_on_inputs: bool, truncation: str) -> bool:
    """Whether anything is trained; raises where dropping was not asked for."""
    if max(0 if train_on_inputs else sample.start, 1) < len(sample.ids):  # no token predicts the first one
        return True
    if truncation in ("error", "left"):
        raise MolaError(
            f"`output` must not be empty without `add_eos_token`: example `{sample.row_id}` has nothing to "
            "train. Correct or remove it, or choose `truncation` drop."
        )
    return False
