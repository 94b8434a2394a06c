"""Examples become token ids, and the positions of the tokens that are trained.

A fast tokenizer tokenises all segments of a text together, such as prompt and output. Character offsets then say which
tokens belong to which segment, so the tokens are those of the whole text. Segments are tokenised separately in two
cases: the tokenizer is slow, or a chat template is used and one token would contain the border between two segments.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mola.data.chat_turns import Segment
from mola.data.templates import Template
from mola.errors import MolaError

IGNORED = -100  # label that cross entropy leaves out
_BATCH = 512  # texts per tokenizer call


@dataclass(frozen=True)
class Sample:
    """One text as tokens; an example has several of them if its chat template changes earlier turns."""

    row_id: str  # the example's id, for messages
    example: int  # the example's position
    ids: list[int]  # token ids
    prefix: int  # number of special tokens at the beginning
    spans: tuple[tuple[int, int], ...]  # positions of trained tokens: from, to; the last one reaches to the end
    text_end: int  # position after the last token of the text; EOS may follow

    def labels(self, train_on_inputs: bool) -> list[int]:
        """The ids; those outside `spans` are replaced by `IGNORED` unless `train_on_inputs`."""
        if train_on_inputs:
            return list(self.ids)
        labels = [IGNORED] * len(self.ids)
        for start, end in self.spans:
            labels[start:end] = self.ids[start:end]
        return labels

    @property
    def answer_start(self) -> int:
        """Position of the first token of the last answer."""
        return self.spans[-1][0]

    @property
    def num_answer_tokens(self) -> int:
        """Number of trained tokens of the text."""
        return sum(min(end, self.text_end) - start for start, end in self.spans if start < self.text_end)

    def cut(self, first: int, last: int) -> "Sample":
        """The sample with its tokens before `prefix` and those from `first` to `last`."""
        moved = first - self.prefix
        spans = [(min(max(start, first), last) - moved, min(end, last) - moved) for start, end in self.spans]
        return replace(
            self,
            ids=self.ids[: self.prefix] + self.ids[first:last],
            spans=(*((start, end) for start, end in spans[:-1] if start < end), spans[-1]),
            text_end=min(self.text_end, last) - moved,
        )


def tokenized(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    template: Template,
    ending: Sequence[int],
) -> Iterator[Sample]:
    """Samples without truncation.

    Args:
        examples: as `load_examples` returns them.
        tokenizer: fast or slow.
        template: prompt template.
        ending: ids that stand after every text, such as EOS.

    Raises:
        MolaError: the template cannot write an example, or its output is not text.
    """
    encode = encode_segments if tokenizer.is_fast and not template.is_encoded_apart else _encode_apart
    for begin in range(0, len(examples), _BATCH):
        texts = [
            (index, segments)
            for index, example in enumerate(examples[begin : begin + _BATCH], start=begin)
            for segments in _segments(example, template)
        ]
        encoded = encode(tokenizer, [[text for text, _ in each] for _, each in texts], template.adds_special_tokens)
        for (index, segments), (ids, prefix, starts) in zip(texts, encoded, strict=True):
            text_end = len(ids)
            # Some outputs spell out the first token of the ending; it is not added a second time.
            is_ended = text_end > starts[-1] and ids[-1:] == [*ending[:1]]
            ids = [*ids, *(ending[1:] if is_ended else ending)]
            borders = [prefix, *starts, len(ids)]
            spans = tuple(
                (start, end)
                for (_, is_trained), start, end in zip(segments, borders, borders[1:], strict=False)
                if is_trained
            )
            yield Sample(str(examples[index].get("id")), index, ids, prefix, spans, text_end)


def _segments(example: Mapping[str, Any], template: Template) -> list[list[Segment]]:
    try:
        return template.segments(example)
    except MolaError as error:
        raise MolaError(f"example `{example.get('id')}`: {error}") from error


def encode_segments(
    tokenizer: Any, texts: Sequence[Sequence[str]], adds_special_tokens: bool = True
) -> Iterator[tuple[list[int], int, list[int]]]:
    """Tokenise the segments of each text together; works with fast tokenizers only.

    Args:
        tokenizer: a fast tokenizer.
        texts: segments of each text, such as a prompt and its output.
        adds_special_tokens: whether the tokenizer adds its special tokens. If not, the first segment holds them, and
            segments are tokenised separately if a token would contain the border between them.

    Yields:
        Ids without special tokens after the text, number of special tokens before it, and for each segment but the
        first the position of its first token.
    """
    encoding = tokenizer(
        ["".join(segments) for segments in texts],
        add_special_tokens=adds_special_tokens,
        return_offsets_mapping=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    for index, segments in enumerate(texts):
        ids, offsets = encoding["input_ids"][index], encoding["offset_mapping"][index]
        # `sequence_ids` is None for the special tokens that the tokenizer added.
        in_text = [position for position, part in enumerate(encoding.sequence_ids(index)) if part is not None]
        if in_text:
            prefix, end = in_text[0], in_text[-1] + 1
        else:
            prefix = end = len(_special_prefix(tokenizer)) if adds_special_tokens else 0
        if not adds_special_tokens:
            prefix = _written_prefix(tokenizer, ids)
        starts, start, is_crossed = [], prefix, False
        for border in itertools.accumulate(map(len, segments[:-1])):
            # The end of a token decides, not its start: some tokenizers leave leading blanks out of the offsets.
            after = (position for position in range(start, end) if border == 0 or offsets[position][1] > border)
            start = next(after, end)
            is_crossed = is_crossed or (start < end and offsets[start][0] < border)
            starts.append(start)
        if not adds_special_tokens and is_crossed:
            yield from _encode_apart(tokenizer, [segments], adds_special_tokens)
        else:
            yield ids[:end], prefix, starts


def _encode_apart(
    tokenizer: Any, texts: Sequence[Sequence[str]], adds_special_tokens: bool = True
) -> Iterator[tuple[list[int], int, list[int]]]:
    """Like `encode_segments`, but tokenises the segments separately and joins them."""
    special = _special_prefix(tokenizer) if adds_special_tokens else []
    for segments in texts:
        parts = [
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else [] for text in segments
        ]
        prefix = len(special) if adds_special_tokens else _written_prefix(tokenizer, parts[0])
        starts = [len(special) + total for total in itertools.accumulate(map(len, parts[:-1]))]
        yield [*special, *itertools.chain.from_iterable(parts)], prefix, starts


def _written_prefix(tokenizer: Any, ids: Sequence[int]) -> int:
    """Number of special tokens at the start of a text that holds its own: 1 if its ids begin with BOS, else 0."""
    return int(bool(ids) and ids[0] == tokenizer.bos_token_id)


def _special_prefix(tokenizer: Any) -> list[int]:
    """Ids of the special tokens that the tokenizer adds before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for begin in range(len(full) - len(plain) + 1):
        if full[begin : begin + len(plain)] == plain:
            return full[:begin]
    raise MolaError(
        "`tokenizer` must keep the text's tokens together when it adds special tokens: this tokenizer does not. "
        "Use a fast tokenizer."
    )
