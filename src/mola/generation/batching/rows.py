"""An answer to be made, and who hears of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mola.generation.batching.sampling import Chooser, Sampling, TokenLogprobs


class Listener(Protocol):
    """Hears of one answer, on the thread that makes it: `begins`, `takes` per token, then `ends` or `fails` once."""

    def is_unwanted(self) -> bool:
        """Asked before every token; an answer that nobody wants ends without another call."""

    def begins(self) -> None:
        """It waits no longer."""

    def takes(self, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """The next token; whether the answer is to go on."""

    def ends(self) -> None:
        """There are no more tokens."""

    def fails(self, error: Exception) -> None:
        """It cannot be made."""


@dataclass(eq=False)
class Row:
    """One answer.

    Args:
        adapter: the model's name for it; None for the base model alone.
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        listener: hears of it.
    """

    adapter: str | None
    prompt: Sequence[int]
    sampling: Sampling
    listener: Listener
    answer: list[int] = field(default_factory=list)
    chooser: Chooser | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens that prompt and answer have in the end, at most."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are known once the prompt is read: all but the last."""
        return len(self.prompt) + len(self.answer) - 1
