"""Continuous batching: who joins, who is next, who leaves.

Every step reads at most `max_prefill_tokens` of prompts, then gives every running answer a token. Short prompts are
read side by side; a long one in parts, by turns with others. So nobody waits for more than a part of a long prompt.
"""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from mola.generation.batching.cache import RowCache
from mola.generation.batching.forward import Adapters, Forward
from mola.generation.batching.rows import Row
from mola.generation.batching.sampling import Chooser, logprobs
from mola.generation.predicting import check_device


@dataclass
class _Part:
    """Rows that go through the model together."""

    cache: RowCache
    rows: list[Row] = field(default_factory=list)
    read: int = 0  # columns of their prompts

    def drop(self, index: int) -> None:
        """Take a row out; the last one takes its place, as in the cache."""
        self.cache.drop(index)
        last = self.rows.pop()
        if index < len(self.rows):
            self.rows[index] = last


class BatchEngine:
    """Makes answers in one running batch; call everything on one thread, inside `predicting.inference_state`.

    Args:
        adapters: of the model.
        end_token_ids: each of them ends an answer.
        max_batch_size: rows at the same time.
        max_prefill_tokens: tokens of prompts that one step reads, padding included.
        max_total_tokens: rows times the longest of them, prompt and answer; what the cache may hold.
    """

    def __init__(
        self,
        adapters: Adapters,
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
        self._device = next(adapters.model.parameters()).device
        self._waiting: deque[Row] = deque()
        self._reading: deque[_Part] = deque()
        self._running = _Part(self._forward.new_cache())

    def add(self, row: Row) -> None:
        """Put an answer in the queue; one that could never fit is the caller's mistake."""
        self._waiting.append(row)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._reading or self._running.rows)

    @property
    def num_active(self) -> int:
        """Answers that have begun."""
        return sum(len(part.rows) for part in self._parts())

    def uses(self, adapter: str) -> bool:
        """Whether an answer is being made, or waits, with this adapter."""
        return any(row.adapter == adapter for row in (*self._waiting, *self._active()))

    @property
    def is_mixed(self) -> bool:
        """Whether answers with different adapters are being made."""
        return len({row.adapter for row in self._active()}) > 1

    def step(self) -> None:
        """One token for every running answer, and a part of the prompts of others."""
        self._forget_unwanted()
        self._admit()
        if self._reading:
            part = self._reading.popleft()
            self._guarded(part, self._read)
        if self._running.rows:
            self._guarded(self._running, self._decode)

    def _parts(self) -> list[_Part]:
        return [self._running, *self._reading]

    def _active(self) -> list[Row]:
        return [row for part in self._parts() for row in part.rows]

    def _forget_unwanted(self) -> None:
        self._waiting = deque(row for row in self._waiting if not row.listener.is_unwanted())
        for part in self._parts():
            for index in reversed(range(len(part.rows))):
                if part.rows[index].listener.is_unwanted():
                    part.drop(index)
        self._reading = deque(part for part in self._reading if part.rows)
        self._guarded(self._running, self._trim)

    def _trim(self, part: _Part) -> None:
        part.cache.trim([row.cached for row in part.rows])

    def _admit(self) -> None:
        """Let in who waits, first come, first served, as long as there is room."""
        active, entered = self._active(), []
        longest = max((row.most_tokens for row in active), default=0)
        while self._waiting and len(active) < self._max_batch_size:
            row = self._waiting[0]
            longest = max(longest, row.most_tokens)
            has_room = (len(active) + 1) * longest <= self._max_total_tokens or not active
            if not has_room or not (self._adapters.can_mix or all(row.adapter == each.adapter for each in active)):
                break
            entered.append(self._waiting.popleft())
            active.append(row)
        for row in entered:
            row.chooser = Chooser(row.sampling, len(row.prompt), self._device)
            row.listener.begins()
            part = self._reading[-1] if self._reading else None
            if part is None or part.read or not self._has_place(part, row):
                part = _Part(self._forward.new_cache())
                self._reading.append(part)
            part.rows.append(row)

    def _has_place(self, part: _Part, row: Row) -> bool:
        longest = max(len(row.prompt), *(len(each.prompt) for each in part.rows))
        return (len(part.rows) + 1) * longest <= self._max_prefill_tokens

    def _guarded(self, part: _Part, work: Callable[[_Part], None]) -> None:
        """Do it; if it fails, so do the answers it was done for, and no others."""
        try:
            work(part)
        except Exception as error:
            rows, part.rows, part.cache = part.rows, [], self._forward.new_cache()
            for row in rows:
                row.listener.fails(error)
            check_device(self._device)

    def _read(self, part: _Part) -> None:
        end = part.read + self._max_prefill_tokens
        if len(part.rows) > 1:  # short ones, as a whole
            end = max(len(row.prompt) for row in part.rows)
        new = [row.prompt[part.read : end] for row in part.rows]
        lengths = [min(end, len(row.prompt)) for row in part.rows]
        logits = self._pass(part, new, lengths, will_stay=False)
        part.read = end
        if max(len(row.prompt) for row in part.rows) > end:
            self._reading.append(part)
            return
        self._take(part, logits)
        if not part.rows:
            return
        self._running.cache.make_room(part.cache)
        self._running.rows += part.rows
        part.rows = []
        # From here on what fails would leave them all with a cache that is partly moved.
        self._guarded(self._running, lambda running: running.cache.append(part.cache))

    def _decode(self, part: _Part) -> None:
        lengths = [row.cached + 1 for row in part.rows]
        logits = self._pass(part, [row.answer[-1:] for row in part.rows], lengths, will_stay=True)
        self._take(part, logits)
        self._trim(part)

    def _pass(self, part: _Part, new: Any, lengths: list[int], will_stay: bool) -> torch.Tensor:
        with self._adapters.using([row.adapter for row in part.rows], will_stay) as arguments:
            return self._forward(part.cache, new, lengths, arguments)

    def _take(self, part: _Part, logits: torch.Tensor) -> None:
        """Choose a token for each row; rows that end leave."""
        likeliest = logits.argmax(dim=-1).tolist()
        for index in reversed(range(len(part.rows))):
            if not self._goes_on(part.rows[index], logits[index], likeliest[index]):
                part.drop(index)

    def _goes_on(self, row: Row, logits: torch.Tensor, likeliest: int) -> bool:
        assert row.chooser is not None
        try:
            token = likeliest
            if not row.chooser.is_plain:
                token = row.chooser.choose([*row.prompt, *row.answer], logits)
            row.answer.append(token)
            count = row.sampling.num_logprobs
            goes_on = row.listener.takes(token, None if count is None else logprobs(logits, token, count))
            is_last = token in self._end_token_ids or len(row.answer) >= row.sampling.max_new_tokens
            if goes_on and not is_last:
                return True
            row.listener.ends()
        except Exception as error:  # of one answer alone
            row.listener.fails(error)
            check_device(self._device)
        return False
