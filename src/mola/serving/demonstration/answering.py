"""One model that answers with and without its adapter or skills, one answer at a time, as a growing text."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.data.templates import CHAT, Template
from mola.generation.batching.skills import Skills
from mola.generation.decoding import generate_text
from mola.generation.predicting import encode_prompts
from mola.insight.recorder import ModuleGates, gates_of_tokens
from mola.models.prompts import template_for, template_of


class Answer(NamedTuple):
    """An answer, or its beginning."""

    text: str  # without the prompt
    token_ids: list[int]  # of the prompt and the answer
    num_prompt_tokens: int


class Experts(NamedTuple):
    """The gates behind an answer."""

    modules: list[ModuleGates]  # one for every module with a router
    tokens: list[str]  # text of each token of prompt and answer
    num_prompt_tokens: int


class _CancelledError(Exception):
    """Raised inside `generate` to end an answer early."""


class _Streamer(TextIteratorStreamer):
    """Text for the thread that iterates, and the tokens behind the text."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.is_cancelled = False
        self.token_ids: list[int] = []
        self.num_prompt_tokens = 0

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if self.is_cancelled:
            raise _CancelledError
        if not self.token_ids:
            self.num_prompt_tokens = value.numel()
        self.token_ids += value.flatten().tolist()
        super().put(value)


class Answerer:
    """Answers with a `PeftModel`, with a model without adapters, or with the skills of a model.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        adapter: folder of the adapter, for its chat template; or the skills folder.

    Attributes:
        skills: the model's skills; None if it has none.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, adapter: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.skills = Skills(model) if adapter is not None and is_skills_folder(adapter) else None
        # One thread, because the adapter is switched on and off in the model itself.
        self._executor = ThreadPoolExecutor(1, "mola-demo")
        self._current: _Streamer | None = None

    def ask(self, text: str) -> str | None:
        """The skill that a text asks; None for the base model, and for a model without skills."""
        if self.skills is None:
            return None
        return self._executor.submit(self.skills.decide, encode_prompts(self.tokenizer, [text])).result()[0]

    def template(self, name: str | None, skill: str | None = None) -> Template:
        """A prompt template; see `mola.models.prompts.template_for`.

        Args:
            name: name of the template; None for the one of the training, or without one that of the base model.
            skill: the skill that answers.

        Raises:
            MolaError: there is no such template, or no chat template.
        """
        adapter = self.adapter
        if self.skills is not None:
            adapter = None if skill is None else os.path.join(str(self.adapter), skill)
        if name is None:
            name = template_of(adapter) if adapter else CHAT if self.tokenizer.chat_template else None
        return template_for(name or "alpaca", self.tokenizer, adapter)

    def answer(self, prompt: str, *, with_adapter: bool, skill: str | None = None, **decoding: Any) -> Iterator[Answer]:
        """Yield the growing answer to a prompt. Closing the iterator ends the generation.

        `decoding` and the errors are those of `mola.generate_text`. Without the adapter the base model answers. In a
        model with skills `skill` answers in place of the adapter.
        """
        streamer = _Streamer(self.tokenizer)
        answering = self._answering(with_adapter, skill)
        done = self._executor.submit(self._generate, prompt, answering, streamer, decoding)
        text = ""
        try:
            for new_text in streamer:
                text += new_text
                yield Answer(text, list(streamer.token_ids), streamer.num_prompt_tokens)
        finally:
            streamer.is_cancelled = True
            error = done.exception()
        if error is not None and not isinstance(error, _CancelledError):
            raise error

    def _answering(self, with_adapter: bool, skill: str | None) -> AbstractContextManager[Any]:
        if self.skills is not None:
            return self.skills.activate([skill if with_adapter else None], True)
        return nullcontext() if with_adapter else self.model.disable_adapter()

    def _generate(
        self,
        prompt: str,
        answering: AbstractContextManager[Any],
        streamer: _Streamer,
        decoding: dict[str, Any],
    ) -> None:
        self._current = streamer
        try:
            with answering:
                generate_text(self.model, self.tokenizer, prompt, streamer=streamer, **decoding)
        except BaseException:
            streamer.end()  # otherwise the iterating thread waits forever
            raise
        finally:
            # PEFT makes an adapter trainable when it switches it on, and a GPU packs trainable weights at every use.
            self.model.requires_grad_(False)

    def experts(self, answer: Answer) -> Experts:
        """Gates of all routers for an answer that was generated with the adapter."""
        gates = self._executor.submit(gates_of_tokens, self.model, answer.token_ids).result()
        # Some modules, such as a base model's own experts, read only some of the tokens, in another order.
        modules = [module for module in gates if len(module.gates) == len(answer.token_ids)]
        tokens = [str(self.tokenizer.decode([token])) for token in answer.token_ids]
        return Experts(modules, tokens, answer.num_prompt_tokens)

    def close(self) -> None:
        """End a running answer and the thread."""
        if self._current is not None:
            self._current.is_cancelled = True
        self._executor.shutdown(cancel_futures=True)
