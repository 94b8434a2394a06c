"""One answer after the other, each by `model.generate`: for models whose rows cannot come and go, or if asked for."""

from collections import deque
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from mola.generation import predicting
from mola.generation.batching.forward import Adapters
from mola.generation.batching.rows import Row
from mola.generation.batching.sampling import logprobs, penalties
from mola.generation.decoding import seeded


class _EndedError(Exception):
    """Raised out of `generate` when the rest of an answer is not wanted."""


class _Hearing(LogitsProcessor):
    """The streamer of `generate` for one row, and what sees the logits before each token."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._is_first = True
        self._logits: Any = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        self._logits = scores[0]
        return scores

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then token after token."""
        if self._row.listener.is_unwanted():
            raise _EndedError
        if self._is_first:
            self._is_first = False
            return
        count, token = self._row.sampling.num_logprobs, int(value)
        told = None if count is None else logprobs(self._logits, token, count)
        if not self._row.listener.takes(token, told):
            raise _EndedError

    def end(self) -> None:
        """Called by `generate` after the last token."""


class SingleEngine:
    """Has the interface of `BatchEngine`."""

    def __init__(self, adapters: Adapters, tokenizer: PreTrainedTokenizerBase) -> None:
        self.num_active = 0
        self._adapters = adapters
        self._tokenizer = tokenizer
        self._waiting: deque[Row] = deque()

    def add(self, row: Row) -> None:
        """Put an answer in the queue."""
        self._waiting.append(row)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting

    @property
    def is_mixed(self) -> bool:
        """Whether answers with different adapters are being made: never."""
        return False

    def uses(self, adapter: str) -> bool:
        """Whether an answer waits with this adapter."""
        return any(row.adapter == adapter for row in self._waiting)

    def step(self) -> None:
        """The next answer, as a whole."""
        row = self._waiting.popleft()
        if row.listener.is_unwanted():
            return
        row.listener.begins()
        self.num_active = 1
        try:
            self._answer(row)
        except Exception as error:
            row.listener.fails(error)
            predicting.check_device(next(self._adapters.model.parameters()).device)
        finally:
            self.num_active = 0

    def _answer(self, row: Row) -> None:
        hearing, sampling = _Hearing(row), row.sampling
        processors = LogitsProcessorList([hearing, *penalties(sampling, len(row.prompt))])
        try:
            with self._adapters.using([row.adapter], will_stay=True), seeded(sampling.seed):
                predicting.generate_batch(
                    self._adapters.model,
                    self._tokenizer,
                    [row.prompt],
                    streamer=hearing,
                    logits_processor=processors,
                    **sampling.decoding,
                )
        except _EndedError:
            if row.listener.is_unwanted():
                return
        row.listener.ends()
