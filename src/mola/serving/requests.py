"""Bodies of requests: fields, types, and what is refused because it would otherwise be ignored."""

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mola.errors import MolaError

_MOST_STOPS = 4  # as OpenAI has it
_LONGEST_STOP = 500  # characters: every token is looked at for the beginnings of all of them
_MOST_LOGPROBS = 20
_LONGEST_PLACE = 4096  # characters of a name or path of an adapter
_FREE_OF_EFFECT = ("user", "metadata")  # they name the caller; answers do not depend on them
_LONGEST_ECHO = 80  # characters of a wrong value that a message repeats

_Item = TypeVar("_Item")
# At the first wrong item: an error for each of a million would take the memory of a thousand requests.
_Some = Annotated[list[_Item], Field(min_length=1, fail_fast=True)]


class _Strict(BaseModel):
    """Refuses fields that it does not know, unless they are null or false: clients send all that there are."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if k in cls.model_fields or not (v is None or v is False)}


class TextPart(_Strict):
    """One part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | _Some[TextPart]

    def plain(self) -> dict[str, str]:
        """The message as chat templates want it."""
        content = self.content
        return {"role": self.role, "content": content if isinstance(content, str) else "".join(p.text for p in content)}


class StreamOptions(_Strict):
    """What a stream says besides the text."""

    include_usage: bool | None = None


class AnswerRequest(_Strict):
    """What both kinds of requests share.

    `neutral` are fields of OpenAI's that would change an answer and do not exist here, with the values that ask for
    nothing: these pass, any other value is refused.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"logit_bias": ({},)}

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int | None = Field(None, ge=1, lt=2**31)
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_ignored(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        _check_characters(body)
        body = {name: value for name, value in body.items() if name not in _FREE_OF_EFFECT}
        for name, values in cls.neutral.items():
            value = body.pop(name, None)
            # Types as well: False == 0 is no reason to let a wrong type pass.
            if value is not None and not any(
                value == v and isinstance(value, bool) == isinstance(v, bool) for v in values
            ):
                raise MolaError(
                    f"`{name}` is not supported by this server: got {str(value)[:_LONGEST_ECHO]!r}. Leave it out."
                )
        return body

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > _MOST_STOPS:
            raise MolaError(f"`stop` takes at most {_MOST_STOPS} texts: got {len(texts)}.")
        if (longest := max(map(len, texts), default=0)) > _LONGEST_STOP:
            raise MolaError(f"`stop` takes texts of at most {_LONGEST_STOP} characters: got {longest}. Shorten them.")
        if not all(texts):
            raise MolaError("`stop` must not hold an empty text: every answer would end at once. Leave it out.")
        return stop

    @model_validator(mode="after")
    def _check_stream_options(self) -> "AnswerRequest":
        if self.stream_options is not None and not self.stream:
            raise MolaError("`stream_options` needs `stream` true. Leave it out, or stream.")
        return self

    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def new_tokens(self) -> int | None:
        """Tokens asked for; None if the request does not say."""
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        """Log-probabilities to tell besides that of each token; None for none at all."""
        raise NotImplementedError

    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(AnswerRequest):
    """Body of `/v1/chat/completions`."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = AnswerRequest.neutral | {
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none",),
        "parallel_tool_calls": (False, True),
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "store": (False,),
    }

    messages: _Some[Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise MolaError(f"`max_tokens` {both[0]} and `max_completion_tokens` {both[1]} disagree. Pass one of them.")
        if self.top_logprobs and not self.logprobs:
            raise MolaError(f"`top_logprobs` needs `logprobs` true: got {self.top_logprobs}. Pass both, or neither.")
        return self

    def num_logprobs(self) -> int | None:
        """As `top_logprobs` says, if `logprobs` is on."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def new_tokens(self) -> int | None:
        """Tokens asked for, under the new or the old name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(AnswerRequest):
    """Body of `/v1/completions`."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = AnswerRequest.neutral | {
        "echo": (False,),
        "best_of": (1,),
        "suffix": ("",),
    }

    prompt: str | _Some[str]
    logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)

    def num_logprobs(self) -> int | None:
        """As `logprobs` says."""
        return self.logprobs

    def prompts(self) -> list[str]:
        """The texts to continue."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


class UnloadRequest(_Strict):
    """Body of `/v1/unload_lora_adapter`, with vLLM's names."""

    lora_name: str = Field(max_length=_LONGEST_PLACE)

    @model_validator(mode="before")
    @classmethod
    def _refuse_half_characters(cls, body: Any) -> Any:
        if isinstance(body, dict):
            _check_characters(body)
        return body


class LoadRequest(UnloadRequest):
    """Body of `/v1/load_lora_adapter`, with vLLM's names."""

    lora_path: str = Field(max_length=_LONGEST_PLACE)
    load_inplace: bool = False


def _check_characters(body: dict[str, Any]) -> None:
    """JSON can write half a surrogate pair; neither tokenizers nor answers can."""
    try:
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise MolaError("the body holds half a surrogate pair, which is no Unicode text. Send whole ones.") from None
    except RecursionError:
        raise MolaError("the body is nested too deeply.") from None
