"""One model that answers with and without its adapter, piece by piece, one answer at a time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from mola.data.templates import Template
from mola.generation.decoding import generate_text
from mola.insight.recorder import ModuleGates, gates_of_tokens
from mola.models.prompts import template_for


class StoppedError(Exception):
    """Nobody wants the rest of the answer."""


class Answer(NamedTuple):
    """An answer, or as much of it as there is yet."""

    text: str  # new text
    token_ids: list[int]  # prompt and new tokens
    num_prompt_tokens: int  # how many of them are the prompt


class Experts(NamedTuple):
    """Which experts worked on which token of an answer."""

    modules: list[ModuleGates]  # gates of every module that has a router
    tokens: list[str]  # text of each token
    num_prompt_tokens: int  # how many of them are the prompt


class _Pieces(TextIteratorStreamer):
    """Text for whoever iterates, and the tokens it is made of."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.wanted = True
        self.token_ids: list[int] = []
        self.num_prompt_tokens = 0

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then token after token."""
        if not self.wanted:
            raise StoppedError
        if not self.token_ids:
            self.num_prompt_tokens = value.numel()
        self.token_ids += value.flatten().tolist()
        super().put(value)


class Answerer:
    """Answers of one model, a `PeftModel` or one without adapters."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, adapter: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter  # its folder
        # One thread: the adapter is switched on and off in the model itself, so answers wait for one another.
        self._executor = ThreadPoolExecutor(1, "mola-demo")
        self._running: _Pieces | None = None

    def template(self, name: str) -> Template:
        """A prompt template, see `mola.models.prompts.template_for`.

        Raises:
            MolaError: there is no such template, or no chat template.
        """
        return template_for(name, self.tokenizer, self.adapter)

    def answer(self, prompt: str, *, with_adapter: bool, **decoding: Any) -> Iterator[Answer]:
        """The answer to a prompt, growing; whoever stops to iterate stops the model.

        `decoding` and what is raised are those of `mola.generate_text`; without the adapter the base model answers.
        """
        pieces = _Pieces(self.tokenizer)
        done = self._executor.submit(self._run, prompt, with_adapter, pieces, decoding)
        text = ""
        try:
            for piece in pieces:
                text += piece
                yield Answer(text, list(pieces.token_ids), pieces.num_prompt_tokens)
        finally:
            pieces.wanted = False
            error = done.exception()
        if error is not None and not isinstance(error, StoppedError):
            raise error

    def _run(self, prompt: str, with_adapter: bool, pieces: _Pieces, decoding: dict[str, Any]) -> None:
        off = nullcontext() if with_adapter else self.model.disable_adapter()
        self._running = pieces
        try:
            with off:
                generate_text(self.model, self.tokenizer, prompt, streamer=pieces, **decoding)
        except BaseException:
            pieces.end()  # or its reader would wait for ever
            raise
        finally:  # PEFT has an adapter trained that was off, and a GPU packs trained weights at every use
            self.model.requires_grad_(False)

    def experts(self, answer: Answer) -> Experts:
        """Gates of all routers for an answer that was given with the adapter."""
        found = self._executor.submit(gates_of_tokens, self.model, answer.token_ids).result()
        # Others, such as a base model's own experts, see some of the tokens, in another order.
        modules = [each for each in found if len(each.gates) == len(answer.token_ids)]
        tokens = [str(self.tokenizer.decode([token])) for token in answer.token_ids]
        return Experts(modules, tokens, answer.num_prompt_tokens)

    def close(self) -> None:
        """End a running answer, and the thread."""
        if self._running is not None:
            self._running.wanted = False
        self._executor.shutdown(cancel_futures=True)
