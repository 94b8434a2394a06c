"""One row of a batch is one answer: its prompt, its sampling settings, and the listener that receives its tokens.

A sampled answer with a seed does not depend on the other rows: its random numbers are those that `model.generate` draws
for this seed when it generates this answer alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen.

    Args:
        decoding: fields of `GenerationConfig`, made by `mola.generation.decoding.decoding_settings`.
        seed: seed of the random numbers; None for greedy decoding.
        presence_penalty: subtracted once from the logit of every token that the answer already has.
        frequency_penalty: subtracted from the logit of a token once for each time that the answer has the token.
        num_logprobs: number of the most probable tokens to report with each token; None for no log-probabilities.
    """

    decoding: Mapping[str, Any]
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_logprobs: int | None = None

    @property
    def max_new_tokens(self) -> int:
        """Maximum length of the answer in tokens."""
        return int(self.decoding["max_new_tokens"])


class TokenLogprobs(NamedTuple):
    """Natural log-probabilities of one token and its alternatives, before penalties, temperature, top-k and top-p."""

    token_id: int
    own: float  # of the token itself
    top: list[tuple[int, float]]  # id and log-probability of the most probable tokens, most probable first


class Listener(Protocol):
    """Receives one answer, on the thread that generates it."""

    def is_cancelled(self) -> bool:
        """Whether the answer is cancelled. Called before every token; a cancelled answer ends without more calls."""

    def on_start(self) -> None:
        """Called when the answer has left the queue."""

    def on_token(self, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """Called with the next token; returns whether generation should continue."""

    def on_end(self) -> None:
        """Called when the answer is complete."""

    def on_error(self, error: Exception) -> None:
        """Called when the answer has failed."""


@dataclass(eq=False)
class Row:
    """One answer.

    Args:
        adapter: the model's name for the adapter; None for the base model alone.
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        listener: receives the tokens.
    """

    adapter: str | None
    prompt: Sequence[int]
    sampling: Sampling
    listener: Listener
    answer: list[int] = field(default_factory=list)  # its tokens so far
    chooser: "TokenChooser | None" = None  # set when the row joins the batch

    @property
    def max_tokens(self) -> int:
        """Maximum length of prompt and answer together, in tokens."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def num_cached(self) -> int:
        """Number of tokens whose keys and values are in the cache once the prompt is read: all but the last token."""
        return len(self.prompt) + len(self.answer) - 1


class Penalties(LogitsProcessor):
    """OpenAI's penalties: `logit - count * frequency_penalty - (count > 0) * presence_penalty`.

    `count` is how often the answer has the token. The first `prompt_length` tokens, the prompt, are not counted.
    """

    def __init__(self, prompt_length: int, presence_penalty: float, frequency_penalty: float) -> None:
        self._prompt_length = prompt_length
        self._presence, self._frequency = presence_penalty, frequency_penalty

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """New scores `(rows, vocabulary)`; `input_ids` are prompts and answers so far, `(rows, tokens)`."""
        answer = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


def penalties(sampling: Sampling, prompt_length: int) -> list[LogitsProcessor]:
    """The penalties of an answer as logits processors; an empty list if the answer has no penalties."""
    values = sampling.presence_penalty, sampling.frequency_penalty
    return [Penalties(prompt_length, *values)] if any(values) else []


class TokenChooser:
    """Chooses the tokens of one row.

    Args:
        sampling: the row's settings.
        prompt_length: number of tokens in the prompt.
        device: the device of the logits.
    """

    def __init__(self, sampling: Sampling, prompt_length: int, device: torch.device) -> None:
        decoding = sampling.decoding
        self._processors = LogitsProcessorList(penalties(sampling, prompt_length))
        self._has_penalties = bool(self._processors)
        self._generator = None
        if decoding["do_sample"]:
            self._generator = torch.Generator(device)
            self._generator.manual_seed(sampling.seed or 0)
            # The order and the conditions are those of `model.generate`.
            if decoding["temperature"] != 1:
                self._processors.append(TemperatureLogitsWarper(float(decoding["temperature"])))
            if decoding["top_k"]:
                self._processors.append(TopKLogitsWarper(decoding["top_k"]))
            if decoding["top_p"] < 1:
                self._processors.append(TopPLogitsWarper(float(decoding["top_p"])))

    @property
    def is_argmax(self) -> bool:
        """Whether the token with the largest logit is always chosen."""
        return self._generator is None and not self._processors

    def choose(self, token_ids: Sequence[int], logits: torch.Tensor) -> int:
        """The next token after `token_ids`, which are prompt and answer; `logits` are float32, `(vocabulary,)`."""
        scores = logits.unsqueeze(0)
        if self._processors:
            read = token_ids if self._has_penalties else ()  # the other processors read no tokens
            ids: Any = torch.tensor([read], dtype=torch.long, device=logits.device)
            scores = self._processors(ids, scores)
        if self._generator is None:
            return int(scores.argmax())
        probabilities = scores.softmax(dim=-1)
        if not bool(torch.isfinite(probabilities).all()):  # on a GPU `multinomial` would end the process
            raise RuntimeError("probabilities of the next token are not finite")
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def token_logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of a token and of the `num_top` most probable ones; `logits` are float32, `(vocabulary,)`."""
    values = logits.log_softmax(dim=-1)
    pairs: list[tuple[int, float]] = []
    if num_top:
        top = values.topk(num_top)
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(values[token_id]), pairs)
