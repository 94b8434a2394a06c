"""Decisions which skill answers, made before a request is answered; prompts that wait together share one pass."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

_MAX_TOKENS = 1024  # of the prompts that are decided in one pass; a longer prompt has a pass of its own


class DecisionQueue:
    """Collects prompts while a pass runs, and decides for them together in the next pass.

    Args:
        decide: coroutine function that decides for some prompts (token ids) and returns the skill of each of them,
            None for the base model.
    """

    def __init__(self, decide: Callable[[list[Sequence[int]]], Awaitable[Sequence[str | None]]]) -> None:
        self._decide = decide
        self._waiting: deque[tuple[Sequence[int], asyncio.Future[str | None]]] = deque()
        self._work: asyncio.Task[None] | None = None

    async def decide(self, prompt: Sequence[int]) -> str | None:
        """The skill that answers a prompt; None for the base model."""
        decision: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, decision))
        if self._work is None:
            self._work = asyncio.create_task(self._decide_all())
        return await decision

    async def _decide_all(self) -> None:
        try:
            while self._waiting:
                await self._decide_next()
        finally:
            self._work = None

    async def _decide_next(self) -> None:
        batch: list[tuple[Sequence[int], asyncio.Future[str | None]]] = []
        longest = 0
        while self._waiting:
            longest = max(longest, len(self._waiting[0][0]))
            if batch and (len(batch) + 1) * longest > _MAX_TOKENS:
                break
            batch.append(self._waiting.popleft())
        try:
            skills = await self._decide([prompt for prompt, _ in batch])
        except Exception as error:  # each of the requests fails with it
            for _, decision in batch:
                if not decision.done():
                    decision.set_exception(error)
            return
        for (_, decision), skill in zip(batch, skills, strict=True):
            if not decision.done():  # the client may have left
                decision.set_result(skill)
