"""The engines: which answers join the batch, which prompts are read next, which answers leave.

Every step of `BatchEngine` reads at most `max_prefill_tokens` of prompts and then gives every running answer one token.
Short prompts are read side by side. A long prompt is read in parts, in turn with other prompts, so no answer waits for
more than one part of a long prompt.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from mola.generation import predicting
from mola.generation.batching.cache import RowCache
from mola.generation.batching.forward import Adapters, Forward
from mola.generation.batching.rows import Row, TokenChooser, penalties, token_logprobs
from mola.generation.batching.skills import Skills
from mola.generation.decoding import seeded


@dataclass
class _Group:
    """Rows that go through the model together, with their cache."""

    cache: RowCache
    rows: list[Row] = field(default_factory=list)
    num_read: int = 0  # columns of the prompts that have been read

    def remove(self, index: int) -> None:
        """Remove a row. The last row takes its place, as in the cache."""
        self.cache.remove(index)
        last = self.rows.pop()
        if index < len(self.rows):
            self.rows[index] = last


class BatchEngine:
    """Generates answers in one running batch. Call it on one thread, inside `predicting.inference_state`.

    Args:
        adapters: the model's adapters.
        end_token_ids: ids of the tokens that end an answer.
        max_batch_size: maximum number of rows in the batch.
        max_prefill_tokens: maximum number of prompt tokens that one step reads, padding included.
        max_total_tokens: maximum size of the cache: the number of rows times the maximum length of the longest row,
            prompt and answer together.
    """

    def __init__(
        self,
        adapters: Adapters | Skills,
        end_token_ids: Collection[int],
        max_batch_size: int,
        max_prefill_tokens: int,
        max_total_tokens: int,
    ) -> None:
        self._adapters = adapters
        self._end_token_ids = frozenset(end_token_ids)
        self._max_batch_size = max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self._max_total_tokens = max_total_tokens
        self._forward = Forward(adapters)
        self._device = predicting.device_of(adapters.model)
        self._waiting: deque[Row] = deque()
        self._prefilling: deque[_Group] = deque()  # rows whose prompts are being read
        self._running = _Group(self._forward.new_cache())

    def add(self, row: Row) -> None:
        """Add an answer to the waiting ones. Its prompt and answer must fit into the cache."""
        self._waiting.append(row)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._prefilling or self._running.rows)

    @property
    def num_active(self) -> int:
        """Number of answers that have joined the batch."""
        return len(self._active_rows())

    @property
    def is_mixed(self) -> bool:
        """Whether answers with different adapters are in the batch."""
        return len({row.adapter for row in self._active_rows()}) > 1

    def uses(self, adapter: str) -> bool:
        """Whether an answer in the batch, or a waiting one, has this adapter."""
        return any(adapter == row.adapter for row in (*self._waiting, *self._active_rows()))

    def step(self) -> None:
        """Read a part of the prompts, and after that generate one token of every running answer."""
        self._remove_cancelled()
        self._admit()
        if self._prefilling:
            group = self._prefilling.popleft()
            self._fail_together(group, self._prefill)
        if self._running.rows:
            self._fail_together(self._running, self._decode)

    def _groups(self) -> list[_Group]:
        return [self._running, *self._prefilling]

    def _active_rows(self) -> list[Row]:
        return [row for group in self._groups() for row in group.rows]

    def _remove_cancelled(self) -> None:
        self._waiting = deque(row for row in self._waiting if not row.listener.is_cancelled())
        for group in self._groups():
            for index in reversed(range(len(group.rows))):
                if group.rows[index].listener.is_cancelled():
                    group.remove(index)
        self._prefilling = deque(group for group in self._prefilling if group.rows)
        self._fail_together(self._running, self._trim)

    def _trim(self, group: _Group) -> None:
        group.cache.trim([row.num_cached for row in group.rows])

    def _admit(self) -> None:
        """Let waiting answers join the batch in the order of their arrival, as long as there is room."""
        active, admitted = self._active_rows(), []
        longest = max((row.max_tokens for row in active), default=0)
        while self._waiting and len(active) < self._max_batch_size:
            row = self._waiting[0]
            longest = max(longest, row.max_tokens)
            has_room = (len(active) + 1) * longest <= self._max_total_tokens or not active
            can_join = self._adapters.can_mix or all(row.adapter == other.adapter for other in active)
            if not (has_room and can_join):
                break
            admitted.append(self._waiting.popleft())
            active.append(row)
        for row in admitted:
            row.chooser = TokenChooser(row.sampling, len(row.prompt), self._device)
            row.listener.on_start()
            group = self._prefilling[-1] if self._prefilling else None
            if group is None or group.num_read or not self._fits_into(group, row):
                group = _Group(self._forward.new_cache())
                self._prefilling.append(group)
            group.rows.append(row)

    def _fits_into(self, group: _Group, row: Row) -> bool:
        """Whether one step can read the prompts of a group together with the prompt of `row`."""
        longest = max(len(row.prompt), *(len(other.prompt) for other in group.rows))
        return (len(group.rows) + 1) * longest <= self._max_prefill_tokens

    def _fail_together(self, group: _Group, work: Callable[[_Group], None]) -> None:
        """Do `work` for a group. If `work` fails, only the answers of this group fail."""
        try:
            work(group)
        except Exception as error:
            rows, group.rows, group.cache = group.rows, [], self._forward.new_cache()
            for row in rows:
                row.listener.on_error(error)
            predicting.check_device(self._device)

    def _prefill(self, group: _Group) -> None:
        """Read the next part of a group's prompts. Rows whose prompts are read join the running ones."""
        end = group.num_read + self._max_prefill_tokens
        if len(group.rows) > 1:  # short prompts, which are read in one step
            end = max(len(row.prompt) for row in group.rows)
        new_ids = [row.prompt[group.num_read : end] for row in group.rows]
        lengths = [min(end, len(row.prompt)) for row in group.rows]
        logits = self._compute_logits(group, new_ids, lengths, is_lasting=False)
        group.num_read = end
        if max(len(row.prompt) for row in group.rows) > end:
            self._prefilling.append(group)
            return
        self._choose_tokens(group, logits)
        if not group.rows:
            return
        self._running.cache.make_room(group.cache)
        self._running.rows += group.rows
        group.rows = []
        # A failure from here on leaves the running rows with a cache that is partly moved, so all of them fail.
        self._fail_together(self._running, lambda running: running.cache.append(group.cache))

    def _decode(self, group: _Group) -> None:
        """Generate the next token of each row."""
        lengths = [row.num_cached + 1 for row in group.rows]
        new_ids = [row.answer[-1:] for row in group.rows]
        logits = self._compute_logits(group, new_ids, lengths, is_lasting=True)
        self._choose_tokens(group, logits)
        self._trim(group)

    def _compute_logits(
        self, group: _Group, new_ids: Sequence[Sequence[int]], lengths: Sequence[int], is_lasting: bool
    ) -> torch.Tensor:
        with self._adapters.activate([row.adapter for row in group.rows], is_lasting) as arguments:
            return self._forward(group.cache, new_ids, lengths, arguments)

    def _choose_tokens(self, group: _Group, logits: torch.Tensor) -> None:
        """Choose a token for each row; rows that end leave the group."""
        argmax = logits.argmax(dim=-1).tolist()
        for index in reversed(range(len(group.rows))):
            if not self._add_token(group.rows[index], logits[index], argmax[index]):
                group.remove(index)

    def _add_token(self, row: Row, logits: torch.Tensor, argmax: int) -> bool:
        """Choose the next token of a row and hand it to the listener; return whether the answer continues."""
        assert row.chooser is not None
        try:
            token = argmax
            if not row.chooser.is_argmax:
                token = row.chooser.choose([*row.prompt, *row.answer], logits)
            row.answer.append(token)
            num_top = row.sampling.num_logprobs
            logprobs = None if num_top is None else token_logprobs(logits, token, num_top)
            is_wanted = row.listener.on_token(token, logprobs)
            is_last = token in self._end_token_ids or len(row.answer) >= row.sampling.max_new_tokens
            if is_wanted and not is_last:
                return True
            row.listener.on_end()
        except Exception as error:  # only this answer fails
            row.listener.on_error(error)
            predicting.check_device(self._device)
        return False


class SingleEngine:
    """Generates one answer after the other with `model.generate`; it has the interface of `BatchEngine`.

    It serves models whose rows cannot share a batch, and servers with `max_batch_size` 1.
    """

    def __init__(self, adapters: Adapters | Skills, tokenizer: PreTrainedTokenizerBase) -> None:
        self.num_active = 0
        self._adapters = adapters
        self._tokenizer = tokenizer
        self._waiting: deque[Row] = deque()

    def add(self, row: Row) -> None:
        """Add an answer to the waiting ones."""
        self._waiting.append(row)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting

    @property
    def is_mixed(self) -> bool:
        """Always False: answers with different adapters are never generated together."""
        return False

    def uses(self, adapter: str) -> bool:
        """Whether a waiting answer has this adapter."""
        return any(adapter == row.adapter for row in self._waiting)

    def step(self) -> None:
        """Generate the next answer in full."""
        row = self._waiting.popleft()
        if row.listener.is_cancelled():
            return
        row.listener.on_start()
        self.num_active = 1
        try:
            self._generate(row)
        except Exception as error:
            row.listener.on_error(error)
            predicting.check_device(predicting.device_of(self._adapters.model))
        finally:
            self.num_active = 0

    def _generate(self, row: Row) -> None:
        streamer, sampling = _ListenerStreamer(row), row.sampling
        processors = LogitsProcessorList([streamer, *penalties(sampling, len(row.prompt))])
        try:
            with self._adapters.activate([row.adapter], is_lasting=True), seeded(sampling.seed):
                predicting.generate_batch(
                    self._adapters.model,
                    self._tokenizer,
                    [row.prompt],
                    streamer=streamer,
                    logits_processor=processors,
                    **sampling.decoding,
                )
        except _EarlyEndError:
            if row.listener.is_cancelled():
                return
        row.listener.on_end()


class _EarlyEndError(Exception):
    """Raised inside `generate` to end an answer early."""


class _ListenerStreamer(LogitsProcessor):
    """Hands the tokens of `generate` to a row's listener.

    As a streamer it receives the tokens. As a logits processor it receives the logits before each token.
    """

    def __init__(self, row: Row) -> None:
        self._row = row
        self._prompt_seen = False
        self._logits: Any = None  # those of the next token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        self._logits = scores[0]
        return scores

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if self._row.listener.is_cancelled():
            raise _EarlyEndError
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        num_top, token = self._row.sampling.num_logprobs, int(value)
        logprobs = None if num_top is None else token_logprobs(self._logits, token, num_top)
        if not self._row.listener.on_token(token, logprobs):
            raise _EarlyEndError

    def end(self) -> None:
        """Called by `generate` after the last token."""
