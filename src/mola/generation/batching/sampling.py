"""The next token of a row: penalties, sampling with the row's own random numbers, log-probabilities.

A sampled answer with a seed does not depend on its company: the numbers are those that `model.generate` draws for this
seed when it answers alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        decoding: fields of `GenerationConfig`, of `mola.generation.decoding.decoding_settings`.
        seed: of the random numbers; None for greedy decoding.
        presence_penalty: taken off the logit of every token that the answer has already.
        frequency_penalty: the same, times how often it has it.
        num_logprobs: log-probabilities to tell with every token besides its own; None for none.
    """

    decoding: Mapping[str, Any]
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_logprobs: int | None = None

    @property
    def max_new_tokens(self) -> int:
        """Longest answer in tokens."""
        return int(self.decoding["max_new_tokens"])


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities, before penalties and sampling values: of a token, and the most probable."""

    own: float
    top: list[tuple[int, float]]  # token id and value, most probable first


class Penalties(LogitsProcessor):
    """Less of what an answer has said: `logit - count * frequency_penalty - (count > 0) * presence_penalty`.

    As OpenAI's interface has it; tokens of the prompt, the first `prompt_length`, do not count.
    """

    def __init__(self, prompt_length: int, presence_penalty: float, frequency_penalty: float) -> None:
        self._start = prompt_length
        self._presence, self._frequency = presence_penalty, frequency_penalty

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Scores `(rows, vocabulary)` after prompts and answers `(rows, tokens)`."""
        said = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Chooser:
    """Chooses the tokens of one row.

    Args:
        sampling: how.
        prompt_length: tokens of the prompt.
        device: of the logits.
    """

    def __init__(self, sampling: Sampling, prompt_length: int, device: torch.device) -> None:
        decoding = sampling.decoding
        self._processors = LogitsProcessorList(penalties(sampling, prompt_length))
        self._reads_tokens = bool(self._processors)  # those below do not
        self._generator = None
        if decoding["do_sample"]:
            self._generator = torch.Generator(device)
            self._generator.manual_seed(sampling.seed or 0)
            # Order and conditions as in `model.generate`.
            if decoding["temperature"] != 1:
                self._processors.append(TemperatureLogitsWarper(float(decoding["temperature"])))
            if decoding["top_k"]:
                self._processors.append(TopKLogitsWarper(decoding["top_k"]))
            if decoding["top_p"] < 1:
                self._processors.append(TopPLogitsWarper(float(decoding["top_p"])))

    @property
    def is_plain(self) -> bool:
        """Whether the most probable token is chosen, whatever was said."""
        return self._generator is None and not self._processors

    def choose(self, token_ids: Sequence[int], logits: torch.Tensor) -> int:
        """The next token after `token_ids`, of prompt and answer; `logits` are float32, `(vocabulary,)`."""
        scores = logits.unsqueeze(0)
        if self._processors:
            read = token_ids if self._reads_tokens else ()
            said: Any = torch.tensor([read], dtype=torch.long, device=logits.device)
            scores = self._processors(said, scores)
        if self._generator is None:
            return int(scores.argmax())
        probabilities = scores.softmax(dim=-1)
        if not bool(torch.isfinite(probabilities).all()):  # which a GPU would not survive
            raise RuntimeError("probabilities of the next token are no numbers")
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def penalties(sampling: Sampling, prompt_length: int) -> list[LogitsProcessor]:
    """What changes logits before a token is chosen, in whatever way that is done."""
    values = sampling.presence_penalty, sampling.frequency_penalty
    return [Penalties(prompt_length, *values)] if any(values) else []


def logprobs(logits: torch.Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Of a token, and of the `count` most probable ones; `logits` are float32, `(vocabulary,)`."""
    values = logits.log_softmax(dim=-1)
    top = values.topk(count) if count else None
    pairs = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprobs(float(values[token_id]), pairs)
