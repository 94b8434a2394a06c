"""Prompts as they may come to a skill that was trained on other ones: shifts of text, all made by rule.

General text is that of Python's own manual and source code, which mola's statistics of general text do not contain.
"""

from __future__ import annotations

import inspect
import random
import re
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

# Words that often stand in questions and news -> others of the same meaning.
_PARAPHRASES = {
    "what": "which thing",
    "where": "in which place",
    "who": "which person",
    "why": "for what reason",
    "when": "at what time",
    "which": "what",
    "how": "in what way",
    "said": "stated",
    "told": "informed",
    "also": "too",
    "many": "a lot of",
    "because": "since",
    "but": "however,",
    "if": "in case",
    "about": "around",
    "after": "following",
    "before": "prior to",
    "would": "might",
    "will": "is going to",
    "can": "is able to",
    "could": "might",
    "need": "require",
    "needs": "requires",
    "likely": "probably",
    "person": "individual",
    "people": "persons",
    "company": "firm",
    "big": "large",
    "make": "produce",
    "makes": "produces",
    "made": "produced",
    "use": "employ",
    "used": "employed",
    "get": "obtain",
    "find": "discover",
    "found": "discovered",
    "show": "display",
    "want": "wish",
    "wanted": "wished",
    "happen": "occur",
    "happens": "occurs",
    "animal": "creature",
    "year": "period of twelve months",
    "more": "additional",
    "such as": "for example",
    "sentence": "phrase",
    "kind": "sort",
    "best": "most suitable",
    "buy": "purchase",
    "killed": "slain",
    "reported": "announced",
    "officials": "authorities",
}
_WORDS = re.compile(rf"\b({'|'.join(_PARAPHRASES)})\b", re.IGNORECASE)
_MARKS = re.compile(r"[^\w\s]")
_REQUESTS = (
    "Bitte lies den folgenden Text aufmerksam und antworte kurz auf Deutsch:\n{}\nVielen Dank für deine Hilfe!",
    "Veuillez lire ce texte avec attention et répondre en français :\n{}\nMerci beaucoup pour votre aide !",
    "Por favor, lee el siguiente texto con atención y responde en español:\n{}\n¡Muchas gracias por tu ayuda!",
)
_CODE = 'from assistant import ask\n\ntext = """{}"""\nprint(ask(text, max_words=20))'


def paraphrase(text: str) -> str:
    """Frequent words are replaced; a request comes first."""

    def other(match: re.Match[str]) -> str:
        word = _PARAPHRASES[match[0].lower()]
        return word.capitalize() if match[0][0].isupper() else word

    return f"Tell me, please: {_WORDS.sub(other, text)}"


def first_half(text: str) -> str:
    """The first half of the words, at least one."""
    words = text.split(" ")
    return " ".join(words[: max(1, len(words) // 2)])


def lower_without_marks(text: str) -> str:
    """Lower case, without punctuation."""
    return _MARKS.sub("", text.lower())


def in_another_language(text: str, row: int) -> str:
    """The text in a request in German, French or Spanish."""
    return _REQUESTS[row % len(_REQUESTS)].format(text)


def in_code(text: str) -> str:
    """The text as a string in a program."""
    return _CODE.format(text)


def with_sentence_inside(text: str, other: str) -> str:
    """The first sentence of another text after the first half of the words."""
    begin = first_half(text)
    sentence = re.split(r"(?<=[.!?])\s", other.strip(), maxsplit=1)[0]
    return f"{begin} {sentence}{text[len(begin) :]}"


@cache
def manual_paragraphs() -> tuple[str, ...]:
    """Paragraphs of prose of Python's manual, as this Python brings it."""
    from pydoc_data.topics import topics

    found = (" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n") if part[:1].isalpha())
    return tuple(dict.fromkeys(part for part in found if part.endswith(".") and 15 <= len(part.split()) <= 100))


@cache
def code_texts() -> tuple[str, ...]:
    """Functions of Python's standard library, without their explanations."""
    import bisect
    import calendar
    import colorsys
    import fractions
    import shutil
    import statistics

    functions = [
        value
        for module in (bisect, calendar, colorsys, fractions, shutil, statistics, textwrap)
        for _, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == module.__name__
    ]
    sources = (re.sub(r'""".*?"""\n', "", inspect.getsource(each), flags=re.DOTALL) for each in functions)
    return tuple(source for source in sources if 3 <= source.count("\n") <= 25)


def preamble(tokenizer: Any, tokens: int, generator: random.Random) -> str:
    """Paragraphs of the manual that follow each other, cut to a number of tokens."""
    paragraphs = manual_paragraphs()
    begin, ids = generator.randrange(len(paragraphs)), []
    while len(ids) < tokens:
        ids += tokenizer(paragraphs[begin % len(paragraphs)] + "\n", add_special_tokens=False)["input_ids"]
        begin += 1
    return str(tokenizer.decode(ids[:tokens]))


Shift = Callable[[str, str, int, random.Random], str]


def content_shifts(tokenizer: Any, sizes: tuple[int, int] = (60, 600)) -> dict[str, Shift]:
    """Shifts of the user's content: functions of the text, of a text of another kind, of the row and of random numbers.

    Args:
        tokenizer: the tokenizer that counts the tokens of preambles.
        sizes: tokens of the short and of the long preamble.
    """

    def preamble_of(size: int) -> Shift:
        return lambda text, other, row, draw: f"{preamble(tokenizer, size, draw)}\n\n{text}"

    return {
        "as trained": lambda text, other, row, draw: text,
        "paraphrase": lambda text, other, row, draw: paraphrase(text),
        **{f"preamble of {size} tokens": preamble_of(size) for size in sizes},
        "sentence of another kind inside": lambda text, other, row, draw: with_sentence_inside(text, other),
        "first half of the words": lambda text, other, row, draw: first_half(text),
        "lower case without marks": lambda text, other, row, draw: lower_without_marks(text),
        "upper case": lambda text, other, row, draw: text.upper(),
        "request in another language": lambda text, other, row, draw: in_another_language(text, row),
        "inside code": lambda text, other, row, draw: in_code(text),
    }
