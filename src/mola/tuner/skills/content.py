"""Find the user's content among the tokens of a prompt, without the tokens that a template writes around it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mola.data.templates import CHAT, PLAIN, get_template, template_names
from mola.errors import MolaError

Write = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Layout:
    """The tokens that a template writes around a user's content.

    Tokens that hold a part of the content, too, belong to the content.

    Attributes:
        before: ids before the content of the last user's turn.
        between: ids between instruction and input; empty if the template has one place for content.
        after: ids after the content.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]


class ContentFinder:
    """Finds content by the layouts of templates, from token ids alone.

    Args:
        tokenizer: the base model's tokenizer.
        layouts: layouts to look for, see `template_layouts` and `chat_layouts`; where several fit, the one whose
            `before`, `between` and `after` have the most ids wins.
    """

    def __init__(self, tokenizer: Any, layouts: Iterable[Layout] = ()) -> None:
        self._special = set(tokenizer.all_special_ids)
        # In one order, whatever order the layouts came in.
        self._layouts = sorted(set(layouts), key=lambda layout: (-_size(layout), layout.before, layout.after))
        self._tokenizer = tokenizer

    def content(self, ids: Sequence[int]) -> list[int]:
        """The tokens that a decision reads: the user's content in the last user's turn, as a text of its own.

        So a decision does not depend on the template, a system prompt or earlier turns. Without a layout that fits, all
        tokens count that are not special. Content that is all upper case or all lower case is read as sentences that
        begin with a capital, because models read such text differently.

        Args:
            ids: the tokens of one prompt, without padding.

        Returns:
            Token ids, with the tokenizer's begin token if it adds one; at least one.

        Raises:
            MolaError: `ids` is empty.
        """
        if not len(ids):
            raise MolaError("a prompt must have at least one token to decide which skill is asked: got none.")
        read = self._tokenizer(_sentence_case(self.text(ids)))["input_ids"]
        while len(read) > 1 and read[-1] in self._special:  # an end token
            read = read[:-1]
        return list(read) or list(ids[-1:])

    def text(self, ids: Sequence[int]) -> str:
        """The user's content in the last user's turn, as it is written."""
        texts = [
            self._tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
            for part in self._content(list(ids))
        ]
        return "\n".join(filter(None, texts))

    def _content(self, ids: list[int]) -> list[list[int]]:
        for layout in self._layouts:
            begin, end = 0, len(ids)
            if layout.before:
                if (start := _last(ids, layout.before, end)) is None:
                    continue
                begin = start + len(layout.before)
            if layout.after:
                if (stop := _first(ids, layout.after, begin)) is None:
                    continue
                end = stop
            if layout.between:
                if (middle := _first(ids, layout.between, begin, end)) is None:
                    continue
                return [ids[begin:middle], ids[middle + len(layout.between) : end]]
            return [ids[begin:end]]
        return [ids]


_SENTENCE_BEGIN = re.compile(r"(?:^|[.!?:]\s+|\n\s*)\w")


def _sentence_case(text: str) -> str:
    """A text of one case with capitals at the beginning of sentences and lines; any other text as it is."""
    if not (text.isupper() or text.islower()):
        return text
    return _SENTENCE_BEGIN.sub(lambda match: match.group().upper(), text.lower())


def template_layouts(tokenizer: Any) -> list[Layout]:
    """Layouts of mola's own templates that have headings, with and without an input.

    Args:
        tokenizer: the base model's tokenizer.
    """
    layouts = []
    for name in template_names():
        if name in (CHAT, PLAIN) or not (template := get_template(name)).has_headings:
            continue

        def write(contents: Sequence[str], template: Any = template) -> str:
            return template.prompt(*contents)

        for end in ("", "\n"):  # the last line break of a content may share a token with the template's
            layouts += [_layout(tokenizer, write, places, template.adds_special_tokens, end) for places in (1, 2)]
    return layouts


def chat_layouts(tokenizer: Any, chat_template: str | None = None) -> list[Layout]:
    """Layouts of a chat template: of a conversation's first turn and of a later one.

    Args:
        tokenizer: the base model's tokenizer.
        chat_template: a Jinja template to use instead of the tokenizer's own, such as one saved with a skill.

    Returns:
        No layouts if there is no template, or if it cannot write these conversations.
    """
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        return []

    def write(before: Sequence[dict[str, str]]) -> Write:
        def conversation(contents: Sequence[str]) -> str:
            messages = [*before, {"role": "user", "content": contents[0]}]
            options = {"chat_template": chat_template, "tokenize": False, "add_generation_prompt": True}
            return str(tokenizer.apply_chat_template(messages, **options))

        return conversation

    earlier = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "No."}]
    try:
        first, later = (_layout(tokenizer, write(before), 1, False) for before in ([], earlier))
    except Exception:  # whatever a template raises: prompts then count with all tokens that are not special
        return []
    # What both have in common is what the template writes before every turn of the user.
    before = _common_suffix([first.before, later.before])
    if not before:
        return [first, later]
    # The prompt may continue after the turn's end, such as with the result of a tool.
    special = set(tokenizer.all_special_ids)
    after = later.after[:1] if later.after and later.after[0] in special else later.after
    return [Layout(before, (), after)]


# Contents whose first and last tokens differ, so that what all prompts have in common is the template's.
_CONTENTS = (("Apples", "Why"), ("7 of them?", "zinc, no"), ('"Oh!" (x)', "B52)"))


def _layout(tokenizer: Any, write: Write, places: int, adds_special_tokens: bool, end: str = "") -> Layout:
    """The layout of a template with a number of places for content, for contents that end with `end`."""
    texts = [write([f"{content}{end}" for content in contents[:places]]) for contents in _CONTENTS]
    prompts = [tuple(tokenizer(text, add_special_tokens=adds_special_tokens)["input_ids"]) for text in texts]
    before, after = _common_prefix(prompts), _common_suffix(prompts)
    between: tuple[int, ...] = ()
    if places > 1:
        inner = [prompt[len(before) : len(prompt) - len(after)] for prompt in prompts]
        between = max(_runs(inner[0], inner[1:]), key=len, default=())
    special = set(tokenizer.all_special_ids)
    while before and adds_special_tokens and before[0] in special:  # a tokenizer may leave out its begin token
        before = before[1:]
    return Layout(before, between, after)


def _runs(ids: tuple[int, ...], others: Sequence[tuple[int, ...]]) -> Iterable[tuple[int, ...]]:
    """Runs of ids that all others contain, too."""
    for begin in range(len(ids)):
        for end in range(begin + 1, len(ids) + 1):
            if all(_first(other, ids[begin:end], 0) is not None for other in others):
                yield ids[begin:end]


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    return tuple(tokens[0] for tokens in same)


def _common_suffix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return _common_prefix([each[::-1] for each in sequences])[::-1]


def _first(ids: Sequence[int], wanted: tuple[int, ...], begin: int, end: int | None = None) -> int | None:
    last = (len(ids) if end is None else end) - len(wanted)
    return next((at for at in range(begin, last + 1) if tuple(ids[at : at + len(wanted)]) == wanted), None)


def _last(ids: Sequence[int], wanted: tuple[int, ...], end: int) -> int | None:
    return next((at for at in range(end - len(wanted), -1, -1) if tuple(ids[at : at + len(wanted)]) == wanted), None)


def _size(layout: Layout) -> int:
    return len(layout.before) + len(layout.between) + len(layout.after)
