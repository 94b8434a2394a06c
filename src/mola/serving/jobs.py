"""From a checked request to jobs: which adapter, which tokens, how to decode; every limit is applied here."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from mola.data.templates import CHAT, get_template
from mola.errors import MolaError
from mola.generation import predicting
from mola.generation.batching.sampling import Sampling
from mola.generation.decoding import decoding_settings
from mola.models.prompts import Chat
from mola.serving.errors import RequestError
from mola.serving.requests import AnswerRequest, ChatRequest, CompletionRequest
from mola.serving.writing import special_tokens

_SEEDS = 2**63
_SPELLED = 1 << 16  # tokens whose text is kept
_MISSING: Any = object()


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int  # of one answer
    max_choices: int  # answers: prompts times `n`
    positions: int | None  # longest sequence of the model; None for no limit
    max_total_tokens: int | None = None  # prompt and answer, for which the cache has room; None for no limit
    num_tokens: int | None = None  # ids that the model knows; None if it does not say


@dataclass(frozen=True)
class Job:
    """One answer to be generated."""

    adapter: str | None  # the model's name for it; None for the base model alone
    prompt: Sequence[int]  # token ids
    sampling: Sampling
    stops: Sequence[str]  # texts that end the answer


class JobMaker:
    """Makes jobs for one loaded model.

    Args:
        tokenizer: of the base model.
        adapters: name in requests -> the model's name for it, None for the base.
        limits: of a request.
        chats: the model's name for an adapter -> its own way of chatting; the others have the base model's.
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
        self.spell = lru_cache(_SPELLED)(self._spell)
        self._turn_end = lru_cache(self._turn_end)  # type: ignore[method-assign]
        self._special = special_tokens(tokenizer)
        self._before = list(
            tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        )  # a token to spell others behind
        self._text_before = str(tokenizer.decode(self._before))

    @property
    def names(self) -> list[str]:
        """Names that requests may use as `model`."""
        return list(self.adapters)

    def _spell(self, token_id: int, is_first: bool) -> tuple[str, list[int] | None]:
        """The text of one token and its bytes; for a part of a character the tokenizer's own name, and None.

        `is_first`: whether an answer begins with it, where some tokenizers leave out a space.
        """
        if is_first:
            text = str(self._tokenizer.decode([token_id]))
        else:
            text = self.decode([token_id])
        if "\ufffd" in text:
            return str(self._tokenizer.convert_ids_to_tokens(token_id)), None
        return text, list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that follow others."""
        return str(self._tokenizer.decode([*self._before, *token_ids])).removeprefix(self._text_before)

    def adapter(self, name: str) -> str | None:
        """The model's name for the adapter of a request; a `RequestError` with 404 if there is none of this name."""
        found = self.adapters.get(name, _MISSING)  # once: it may be taken out at any time
        if found is _MISSING:
            raise RequestError(
                404,
                f"`model` {name[:200]!r} does not exist here. The models are {', '.join(self.adapters)}.",
                code="model_not_found",
                param="model",
            )
        return found

    def make(self, request: ChatRequest | CompletionRequest) -> list[Job]:
        """Every answer that a request asks for: for each prompt `n`, in the order of the choices' numbers.

        Sampled choices use the seeds `seed`, `seed` + 1, ... (mod 2^63); without `seed` they start anywhere.

        Raises:
            RequestError: unknown model, a limit exceeded, no chat template.
            MolaError: a sampling value out of range, or a prompt without tokens.
        """
        adapter = self.adapter(request.model)
        settings = decoding_settings(1, request.temperature, request.top_p, request.top_k)
        self._check_stops(request.stops())
        count = request.n or 1
        num_prompts = 1 if isinstance(request, ChatRequest) else len(request.prompts())
        if num_prompts * count > self._limits.max_choices:
            raise RequestError(
                400,
                f"`n` times the number of prompts must be at most {self._limits.max_choices}: "
                f"got {num_prompts * count}. Send several requests.",
                param="n",
            )
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
        jobs: list[Job] = []
        stops = [*request.stops(), *self._own_ends(adapter, is_chat=isinstance(request, ChatRequest))]
        for ids in self._encode(request, adapter):
            self._check_known(ids)
            decoding = settings | {"max_new_tokens": self._new_tokens(request, len(ids))}
            for _ in range(count):
                sampling = Sampling(
                    decoding,
                    (seed + len(jobs)) % _SEEDS if settings["do_sample"] else None,
                    request.presence_penalty or 0.0,
                    request.frequency_penalty or 0.0,
                    request.num_logprobs(),
                )
                jobs.append(Job(adapter, ids, sampling, stops))
        return jobs

    def _check_known(self, ids: Sequence[int]) -> None:
        """A token without an embedding would be the end of a GPU's process, and of all answers in it."""
        known = self._limits.num_tokens
        if known is not None and max(ids) >= known:
            raise RequestError(
                400, f"the text has a token that the model does not know: id {max(ids)} of {known}. Leave it out."
            )

    def _own_ends(self, adapter: str | None, is_chat: bool) -> list[str]:
        """Tokens that end an answer besides the base model's: of an adapter with its own, and of a turn in a chat."""
        own = self.chats.get(adapter) if adapter is not None else None
        ends = [own.end_token] if own and own.end_token in self._special else []
        return list(dict.fromkeys([*ends, *(self._turn_end(own) if is_chat else [])]))

    def _turn_end(self, chat: Chat | None) -> list[str]:
        """With what the chat template ends an answer, as `mola generate` knows it; nothing if it does not tell."""
        try:
            ids = get_template(CHAT, self._tokenizer, *(chat or ())).ending(self._tokenizer)[:1]
        except MolaError:  # there is no template, or it writes no such conversation
            return []
        return [str(self._tokenizer.convert_ids_to_tokens(token_id)) for token_id in ids]

    def _encode(self, request: AnswerRequest, adapter: str | None) -> list[list[int]]:
        if isinstance(request, CompletionRequest):
            return predicting.encode_prompts(self._tokenizer, request.prompts())
        assert isinstance(request, ChatRequest)
        own = None if adapter is None else self.chats.get(adapter)
        if not (own or self._tokenizer.chat_template):
            raise RequestError(
                400,
                "there is no chat template of base model or adapter, so `messages` have no form they know. Send the "
                "text itself as `prompt` to /v1/completions.",
                param="messages",
            )
        messages = [message.plain() for message in request.messages]
        form: dict[str, Any] = {"chat_template": own.template} if own else {}
        if own and own.end_token:  # templates may write it
            form["eos_token"] = own.end_token
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **form)
        except TemplateError as error:
            raise RequestError(
                400, f"`messages` do not fit the model's chat template: {error}", param="messages"
            ) from None
        # The template writes the begin token itself where the model wants one.
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise MolaError("`messages` must hold at least one token: got none. Write some text.")
        return [ids]

    def _new_tokens(self, request: AnswerRequest, prompt_tokens: int) -> int:
        asked, most = request.new_tokens(), self._limits.max_tokens
        positions, total = self._limits.positions, self._limits.max_total_tokens
        if asked is not None and asked > most:
            raise RequestError(
                400, f"`max_tokens` must be at most {most} on this server: got {asked}.", param="max_tokens"
            )
        longest, what = positions, "the model's {} positions"
        if total is not None and (positions is None or total < positions):
            longest, what = total, "{} tokens, this server's `max_batch_total_tokens`"
        room = most if longest is None else longest - prompt_tokens
        if (asked or 1) > room:
            raise RequestError(
                400,
                f"prompt and answer must fit into {what.format(longest)}: the prompt has {prompt_tokens} "
                f"tokens, and `max_tokens` is {asked or 'not given (at least 1 is needed)'}. Shorten the prompt or "
                "lower `max_tokens`.",
                code="context_length_exceeded",
                param="max_tokens" if prompt_tokens < (longest or 0) else "prompt",
            )
        return min(most, room) if asked is None else asked

    def _check_stops(self, stops: Sequence[str]) -> None:
        for stop in stops:
            inside = [token for token in self._special if token in stop and token != stop]
            if inside:
                raise RequestError(
                    400,
                    f"`stop` mixes text with the special token {inside[0]!r}, which answers never show: got "
                    f"{stop[:80]!r}. Pass the token or the text alone.",
                    param="stop",
                )
