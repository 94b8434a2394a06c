"""Examples become token ids, and the position where the output begins.

A fast tokenizer tokenises prompt and output together. Character offsets then say which tokens belong to the output, so
the tokens are those of the whole text. Prompt and output are tokenised separately in two cases: the tokenizer is slow,
or a chat template is used and one token would contain the border between prompt and output.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mola.data.templates import Template
from mola.errors import MolaError

IGNORED = -100  # label that cross entropy leaves out
_BATCH = 512  # texts per tokenizer call


@dataclass(frozen=True)
class Sample:
    """One example as tokens."""

    row_id: str  # the example's id, for messages
    ids: list[int]  # token ids
    prefix: int  # number of special tokens at the beginning
    answer_start: int  # position of the first token of the output
    text_end: int  # position after the last token of the output's text; EOS may follow

    def labels(self, train_on_inputs: bool) -> list[int]:
        """The ids; those of the prompt are replaced by `IGNORED` unless `train_on_inputs`."""
        return list(self.ids) if train_on_inputs else [IGNORED] * self.answer_start + self.ids[self.answer_start :]


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
        MolaError: the template cannot write the prompt of an example, or its output is not text.
    """
    encode = encode_with_border if tokenizer.is_fast and not template.is_encoded_apart else _encode_apart
    for begin in range(0, len(examples), _BATCH):
        batch = examples[begin : begin + _BATCH]
        texts = [_text_parts(example, template) for example in batch]
        encoded = encode(tokenizer, texts, template.adds_special_tokens)
        for example, (ids, prefix, start) in zip(batch, encoded, strict=True):
            text_end = len(ids)
            # Some outputs spell out the first token of the ending; it is not added a second time.
            is_ended = text_end > start and ids[-1:] == [*ending[:1]]
            ids = [*ids, *(ending[1:] if is_ended else ending)]
            yield Sample(str(example.get("id")), ids, prefix, start, text_end)


def _text_parts(example: Mapping[str, Any], template: Template) -> tuple[str, str]:
    """Prompt and output of one example as text."""
    try:
        prompt = template.prompt(example["instruction"], example.get("input"))
    except MolaError as error:
        raise MolaError(f"example `{example.get('id')}`: {error}") from error
    if not isinstance(example["output"], str):
        raise MolaError(f"example `{example.get('id')}`: `output` must be text: got {example['output']!r}. Correct it.")
    return prompt, template.answer(example["output"])


def encode_with_border(
    tokenizer: Any, texts: list[tuple[str, str]], adds_special_tokens: bool = True
) -> Iterator[tuple[list[int], int, int]]:
    """Tokenise each prompt together with its output; works with fast tokenizers only.

    Args:
        tokenizer: a fast tokenizer.
        texts: prompts and outputs.
        adds_special_tokens: whether the tokenizer adds its special tokens. If not, the prompt's text holds them, and
            prompt and output are tokenised separately if a token would contain the border.

    Yields:
        Ids without special tokens after the text, number of special tokens before it, first position of the output.
    """
    encoding = tokenizer(
        [prompt + output for prompt, output in texts],
        add_special_tokens=adds_special_tokens,
        return_offsets_mapping=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    for index, (prompt, _) in enumerate(texts):
        ids, offsets = encoding["input_ids"][index], encoding["offset_mapping"][index]
        # `sequence_ids` is None for the special tokens that the tokenizer added.
        in_text = [position for position, part in enumerate(encoding.sequence_ids(index)) if part is not None]
        if in_text:
            prefix, end = in_text[0], in_text[-1] + 1
        else:
            prefix = end = len(_special_prefix(tokenizer)) if adds_special_tokens else 0
        if not adds_special_tokens:
            prefix = _written_prefix(tokenizer, ids)
        border = len(prompt)
        # The end of a token decides, not its start: some tokenizers leave leading blanks out of the offsets.
        after = (position for position in range(prefix, end) if border == 0 or offsets[position][1] > border)
        start = next(after, end)
        if not adds_special_tokens and start < end and offsets[start][0] < border:
            yield from _encode_apart(tokenizer, [texts[index]], adds_special_tokens)
        else:
            yield ids[:end], prefix, start


def _encode_apart(
    tokenizer: Any, texts: list[tuple[str, str]], adds_special_tokens: bool = True
) -> Iterator[tuple[list[int], int, int]]:
    """Like `encode_with_border`, but tokenises prompt and output separately and joins them."""
    special = _special_prefix(tokenizer) if adds_special_tokens else []
    for prompt, output in texts:
        head, tail = (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            for text in (prompt, output)
        )
        prefix = len(special) if adds_special_tokens else _written_prefix(tokenizer, head)
        yield [*special, *head, *tail], prefix, len(special) + len(head)


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
