"""Examples become token ids and labels.

- Text is prompt + output; only the output is trained unless `train_on_inputs`.
- The border is found by character offsets in one tokenisation, so tokens never shift across it.
- A sample that does not fit is an error, or is handled as asked and counted: no answer is lost in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import datasets

from mola.data.templates import Template
from mola.errors import MolaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATIONS = ("error", "drop", "left", "right")
IGNORED = -100  # label that cross entropy leaves out
_SMALLEST_CUTOFF = 8
_BATCH = 512  # texts per tokenizer call


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


@dataclass(frozen=True)
class _Sample:
    """Token ids; the first `prefix` are special tokens, the answer runs from `start` to `text_end`."""

    row_id: str
    ids: list[int]
    prefix: int
    start: int
    text_end: int

    def labels(self, train_on_inputs: bool) -> list[int]:
        """Ids with the prompt masked."""
        return list(self.ids) if train_on_inputs else [IGNORED] * self.start + self.ids[self.start :]


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
    EOS with `add_eos_token`, also if the tokenizer adds none, and nothing without it. A token that
    straddles the border between prompt and output counts as output, so it is trained.

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
    eos = tokenizer.eos_token_id if add_eos_token else None
    samples = list(_tokenized(examples, tokenizer, template, eos))
    too_long = [sample for sample in samples if len(sample.ids) > cutoff_len]
    longest = max(len(sample.ids) for sample in samples)
    if too_long and truncation == "error":
        raise MolaError(
            f"`cutoff_len` must not be smaller than a sample: {len(too_long)} of {len(samples)} samples "
            f"would lose tokens, the longest has {longest}, `cutoff_len` is {cutoff_len}. Raise `cutoff_len` "
            f"to {longest}, or choose `truncation` drop, left or right."
        )
    kept: list[_Sample] = []
    truncated = answer_cut = 0
    for sample in samples:
        fitted = _fit(sample, cutoff_len, truncation)
        if fitted is None or not _has_labels(fitted, train_on_inputs, truncation):
            continue
        kept.append(fitted)
        truncated += len(fitted.ids) < len(sample.ids)
        answer_cut += fitted.text_end - fitted.start < sample.text_end - sample.start
    if not kept:
        raise MolaError(
            f"`cutoff_len` leaves no sample: all {len(samples)} were dropped, the longest has {longest} "
            f"tokens, `cutoff_len` is {cutoff_len}. Raise `cutoff_len`, or choose `truncation` left."
        )
    labels = [sample.labels(train_on_inputs) for sample in kept]
    report = EncodeReport(
        total=len(samples),
        kept=len(kept),
        dropped=len(samples) - len(kept),
        truncated=truncated,
        answer_cut=answer_cut,
        longest=longest,
        tokens=sum(len(sample.ids) for sample in kept),
        trained_tokens=sum(label != IGNORED for row in labels for label in row),
    )
    columns = {
        "input_ids": [sample.ids for sample in kept],
        "attention_mask": [[1] * len(sample.ids) for sample in kept],
        "labels": labels,
        "length": [len(sample.ids) for sample in kept],
    }
    return datasets.Dataset.from_dict(columns), report


def data_fingerprint(examples: Iterable[Mapping[str, Any]]) -> str:
    """Sha256 (hex) of id, instruction, input and output of all examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        row = [example.get(name) for name in ("id", "instruction", "input", "output")]
        digest.update(json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()


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


def _tokenized(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    eos: int | None,
) -> Iterator[_Sample]:
    """Samples at full length, EOS included."""
    encode = _encode_fast if tokenizer.is_fast else _encode_slow
    for begin in range(0, len(examples), _BATCH):
        batch = examples[begin : begin + _BATCH]
        texts = [_text_parts(example, template) for example in batch]
        for example, (ids, prefix, start) in zip(batch, encode(tokenizer, texts), strict=True):
            text_end = len(ids)
            # Text that spells out the EOS token itself does not get a second one.
            if eos is not None and (text_end == start or ids[-1] != eos):
                ids = [*ids, eos]
            yield _Sample(str(example.get("id")), ids, prefix, start, text_end)


def _text_parts(example: Mapping[str, Any], template: Template) -> tuple[str, str]:
    """Prompt and output of one example."""
    try:
        prompt = template.prompt(example["instruction"], example.get("input"))
        output = example["output"]
    except KeyError as error:
        raise MolaError(
            f"example `{example.get('id')}` has no `{error.args[0]}`. Make examples with `load_examples`."
        ) from error
    except MolaError as error:
        raise MolaError(f"example `{example.get('id')}`: {error}") from error
    if not isinstance(output, str):
        raise MolaError(f"example `{example.get('id')}`: `output` must be text: got {output!r}. Correct it.")
    return prompt, output


def _encode_fast(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]]
) -> Iterator[tuple[list[int], int, int]]:
    """(ids without special tokens after the text, special tokens before it, first token of the output)."""
    encoding = tokenizer(
        [prompt + output for prompt, output in texts],
        return_offsets_mapping=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    for index, (prompt, _) in enumerate(texts):
        ids, offsets = encoding["input_ids"][index], encoding["offset_mapping"][index]
        # sequence_ids is None exactly for tokens that the tokenizer's post-processor added.
        in_text = [position for position, part in enumerate(encoding.sequence_ids(index)) if part is not None]
        if in_text:
            prefix, end = in_text[0], in_text[-1] + 1
        else:
            prefix = end = len(_special_prefix(tokenizer))
        border = len(prompt)
        # Ends, not starts, decide: some tokenizers trim leading blanks from offsets, so starts may be late.
        after = (position for position in range(prefix, end) if border == 0 or offsets[position][1] > border)
        yield ids[:end], prefix, next(after, end)


def _encode_slow(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]]
) -> Iterator[tuple[list[int], int, int]]:
    """As `_encode_fast`; without offsets, prompt and output are tokenised separately and joined."""
    special = _special_prefix(tokenizer)
    for prompt, output in texts:
        head, tail = (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            for text in (prompt, output)
        )
        yield [*special, *head, *tail], len(special), len(special) + len(head)


def _special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before any text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for begin in range(len(full) - len(plain) + 1):
        if full[begin : begin + len(plain)] == plain:
            return full[:begin]
    raise MolaError(
        "`tokenizer` must keep the text's tokens together when it adds special tokens: this one does not. "
        "Use a fast tokenizer."
    )


def _fit(sample: _Sample, cutoff_len: int, truncation: str) -> _Sample | None:
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
    if sample.prefix + excess > sample.start:
        needed = len(sample.ids) - sample.start + sample.prefix
        raise MolaError(
            f"`cutoff_len` must leave room for the answer: example `{sample.row_id}` needs {needed} tokens "
            f"without its prompt, `cutoff_len` is {cutoff_len}. Raise it, or choose `truncation` drop."
        )
    return replace(
        sample,
        ids=sample.ids[: sample.prefix] + sample.ids[sample.prefix + excess :],
        start=sample.start - excess,
        text_end=sample.text_end - excess,
    )


def _has_labels(sample: _Sample, train_on_inputs: bool, truncation: str) -> bool:
    """Whether anything is trained; raises where dropping was not asked for."""
    if train_on_inputs or sample.start < len(sample.ids):
        return True
    if truncation in ("error", "left"):
        raise MolaError(
            f"`output` must not be empty without `add_eos_token`: example `{sample.row_id}` has nothing to "
            "train. Correct or remove it, or choose `truncation` drop."
        )
    return False
