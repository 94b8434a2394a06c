"""From a request to jobs: each job is one answer, with its adapter, its prompt's tokens and its decoding settings."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from mola.data.templates import CHAT, get_template
from mola.errors import MolaError
from mola.generation import predicting
from mola.generation.batching.rows import Sampling
from mola.generation.decoding import decoding_settings
from mola.models.prompts import Chat
from mola.serving.model_names import DECIDE
from mola.serving.requests import ChatRequest, CompletionRequest
from mola.serving.responses import RequestError, unknown_model
from mola.serving.stream_writer import special_tokens

_NUM_SEEDS = 2**63
_MAX_ECHO = 80  # a message repeats at most this many characters of a wrong value
_MISSING: Any = object()


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; None for no limit."""

    max_tokens: int  # tokens in one answer
    max_choices: int  # answers to one request: prompts times `n`
    max_positions: int | None  # longest sequence of the model
    max_total_tokens: int | None = None  # prompt and answer together, limited by the size of the cache
    num_embeddings: int | None = None  # token ids from this number on have no embedding


@dataclass(frozen=True)
class Job:
    """One answer to be generated."""

    adapter: str | None  # the model's name for the adapter; None for the base model alone
    prompt: Sequence[int]  # token ids
    sampling: Sampling
    stops: Sequence[str]  # texts that end the answer


class JobMaker:
    """Turns requests into jobs and applies the limits.

    Args:
        tokenizer: the base model's tokenizer.
        adapters: name in requests -> the model's name for the adapter; None for the base model.
        limits: the limits for one request.
        chats: the model's name for an adapter -> its own chat format; the remaining adapters use the base model's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Mapping[str, str | None],
        limits: Limits,
        chats: Mapping[str, Chat] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.adapters = dict(adapters)
        self.chats = dict(chats or {})
        self._limits = limits
        self._special_tokens = special_tokens(tokenizer)
        self._turn_ends = lru_cache(self._find_turn_ends)

    def adapter(self, name: str) -> str | None:
        """The model's name for the adapter that requests call `name`.

        Raises:
            RequestError: 404, there is no model of this name.
        """
        adapter = self.adapters.get(name, _MISSING)  # one look-up: a different thread may remove the name at any time
        if adapter is _MISSING:
            raise unknown_model(name, list(self.adapters))
        return adapter

    @property
    def has_skills(self) -> bool:
        """Whether the model has skills, so that each answer says which skill gave it."""
        return DECIDE in self.adapters.values()

    def has_skill(self, adapter: str | None) -> bool:
        """Whether the skill can be asked; None is the base model."""
        return adapter is None or adapter in self.adapters

    def make(self, request: ChatRequest | CompletionRequest, adapter: str | None = _MISSING) -> list[Job]:
        """The jobs of a request: `n` for each prompt, prompt by prompt.

        They have the adapter that the request names, or `adapter` if it is given.

        Sampled answers use the seeds `seed`, `seed` + 1, ... (mod 2^63). Without `seed` the first seed is random.

        Raises:
            RequestError: unknown model, a limit is exceeded, or there is no chat template.
            MolaError: a sampling value is out of range, or a prompt has no tokens.
        """
        adapter = self.adapter(request.model) if adapter is _MISSING else adapter
        settings = decoding_settings(1, request.temperature, request.top_p, request.top_k)
        self._check_stops(request.stops())
        num_prompts = 1 if isinstance(request, ChatRequest) else len(request.prompts())
        num_choices = num_prompts * (request.n or 1)
        if num_choices > self._limits.max_choices:
            raise RequestError(
                400,
                f"`n` times the number of prompts must be at most {self._limits.max_choices}: got {num_choices}. "
                "Send several requests.",
                param="n",
            )
        seed = secrets.randbelow(_NUM_SEEDS) if request.seed is None else request.seed
        stops = self.stops(request, adapter)
        jobs: list[Job] = []
        for prompt in self._encode(request, adapter):
            predicting.check_token_ids(self._limits.num_embeddings, [prompt])
            decoding = settings | {"max_new_tokens": self._num_new_tokens(request, len(prompt))}
            for _ in range(request.n or 1):
                sampling = Sampling(
                    decoding,
                    (seed + len(jobs)) % _NUM_SEEDS if settings["do_sample"] else None,
                    request.presence_penalty or 0.0,
                    request.frequency_penalty or 0.0,
                    request.num_logprobs(),
                )
                jobs.append(Job(adapter, prompt, sampling, stops))
        return jobs

    def stops(self, request: ChatRequest | CompletionRequest, adapter: str | None) -> list[str]:
        """What ends an answer besides the base model's end token: `stop`, the adapter's, the end of a chat's turn."""
        chat = None if adapter is None else self.chats.get(adapter)
        ends = [chat.end_token] if chat and chat.end_token in self._special_tokens else []
        turn_ends = self._turn_ends(chat) if isinstance(request, ChatRequest) else []
        return list(dict.fromkeys([*request.stops(), *ends, *turn_ends]))

    def _find_turn_ends(self, chat: Chat | None) -> list[str]:
        """The token that ends an answer in the chat template, in a list; the list is empty if it cannot be found."""
        try:
            ids = get_template(CHAT, self._tokenizer, *(chat or ())).ending(self._tokenizer)[:1]
        except MolaError:  # there is no chat template, or it refuses the conversation that shows the end
            return []
        return list(self._tokenizer.convert_ids_to_tokens(ids))

    def _encode(self, request: ChatRequest | CompletionRequest, adapter: str | None) -> list[list[int]]:
        """Token ids of each prompt."""
        if isinstance(request, CompletionRequest):
            check_unicode(request.prompts())
            return predicting.encode_prompts(self._tokenizer, request.prompts())
        chat = None if adapter is None else self.chats.get(adapter)
        if not (chat or self._tokenizer.chat_template):
            problem = "neither the base model nor the adapter has a chat template for `messages`"
            raise RequestError(
                400, f"{problem}. Send the text itself as `prompt` to /v1/completions.", param="messages"
            )
        messages = [message.for_template() for message in request.messages]
        check_unicode(message["content"] for message in messages)
        template: dict[str, Any] = {"chat_template": chat.template} if chat else {}
        if chat and chat.end_token:  # the template may write the end token
            template["eos_token"] = chat.end_token
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template)
        except TemplateError as error:
            message = f"`messages` do not fit the model's chat template: {error}"
            raise RequestError(400, message, param="messages") from None
        # The template writes the begin token itself, if the model needs one.
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise MolaError("`messages` must hold at least one token: got none. Write some text.")
        return [ids]

    def _num_new_tokens(self, request: ChatRequest | CompletionRequest, prompt_tokens: int) -> int:
        """Maximum length of the answer in tokens: the request's number, else the largest that the limits allow.

        Raises:
            RequestError: the request asks for more than the limits allow, or the prompt leaves no room for an answer.
        """
        asked, limits = request.num_new_tokens(), self._limits
        if asked is not None and asked > limits.max_tokens:
            message = f"`max_tokens` must be at most {limits.max_tokens} on this server: got {asked}."
            raise RequestError(400, message, param="max_tokens")
        longest, limit = limits.max_positions, f"the model's {limits.max_positions} positions"
        if limits.max_total_tokens is not None and (longest is None or limits.max_total_tokens < longest):
            longest = limits.max_total_tokens
            limit = f"{longest} tokens, this server's `max_batch_total_tokens`"
        room = limits.max_tokens if longest is None else longest - prompt_tokens
        if (asked or 1) > room:
            raise RequestError(
                400,
                f"prompt and answer must fit into {limit}: the prompt has {prompt_tokens} tokens, and `max_tokens` is "
                f"{asked or 'not given (at least 1 is needed)'}. Shorten the prompt or lower `max_tokens`.",
                code="context_length_exceeded",
                param="max_tokens" if prompt_tokens < (longest or 0) else "prompt",
            )
        return min(limits.max_tokens, room) if asked is None else asked

    def _check_stops(self, stops: Sequence[str]) -> None:
        for stop in stops:
            token = next((token for token in self._special_tokens if token in stop and token != stop), None)
            if token is not None:
                raise RequestError(
                    400,
                    f"`stop` mixes text with the special token {token!r}, which is never part of an answer: got "
                    f"{stop[:_MAX_ECHO]!r}. Pass either the token or the text.",
                    param="stop",
                )


def check_unicode(texts: Iterable[str]) -> None:
    """Refuse texts with half a surrogate pair, which JSON allows but tokenizers cannot read."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise RequestError(400, "the text is not valid Unicode: it has half a surrogate pair.") from None
