"""General text of several languages and forms: what a prompt is compared to that belongs to no skill."""

from functools import cache
from importlib.resources import files


@cache
def general_texts() -> tuple[str, ...]:
    """Short texts of our own: prose, requests, code, lists, dialogues and a dozen languages."""
    text = files("mola.tuner.skills").joinpath("general_text.txt").read_text(encoding="utf-8")
    return tuple(each.strip("\n") for each in text.split("\n---\n"))
