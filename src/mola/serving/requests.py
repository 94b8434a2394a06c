"""Request bodies: their fields and types, and the fields of OpenAI's interface that this server refuses."""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mola.errors import MolaError

_MAX_STOPS = 4  # like OpenAI's server
_MAX_STOP_LENGTH = 500  # characters: the text is compared with every stop at every token
_MAX_LOGPROBS = 20
_IGNORED_FIELDS = ("user", "metadata")  # they name the caller, who does not affect the answers

_Item = TypeVar("_Item")
# `fail_fast` stops at the first wrong item: one error for each of a million items would take too much memory.
_NonEmptyList = Annotated[list[_Item], Field(min_length=1, fail_fast=True)]


class _StrictModel(BaseModel):
    """Refuses unknown fields that are not null or false. (Some clients send every field that exists.)"""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unset_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if k in cls.model_fields or not (v is None or v is False)}


class TextPart(_StrictModel):
    """One part of a message."""

    type: Literal["text"]
    text: str


class Message(_StrictModel):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | _NonEmptyList[TextPart]

    def for_template(self) -> dict[str, str]:
        """The message in the form that chat templates read."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class StreamOptions(_StrictModel):
    """What a stream holds besides the text."""

    include_usage: bool | None = None


class AnswerRequest(_StrictModel):
    """Fields that chats and completions have in common."""

    # Fields that are not supported, with the values that would change nothing and are therefore accepted.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"logit_bias": ({},)}

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
    def _refuse_unsupported_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = {name: value for name, value in body.items() if name not in _IGNORED_FIELDS}
        for name, harmless in cls.unsupported.items():
            value = body.pop(name, None)
            if value is not None and value not in harmless:
                raise MolaError(f"`{name}` is not supported by this server. Leave it out.")
        return body

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > _MAX_STOPS:
            raise MolaError(f"`stop` must have at most {_MAX_STOPS} texts: got {len(texts)}.")
        if (longest := max(map(len, texts), default=0)) > _MAX_STOP_LENGTH:
            raise MolaError(f"`stop` must have texts of at most {_MAX_STOP_LENGTH} characters: got {longest}.")
        if not all(texts):
            raise MolaError("`stop` must not hold an empty text, which would end every answer at once. Leave it out.")
        return stop

    @model_validator(mode="after")
    def _check_stream_options(self) -> "AnswerRequest":
        if self.stream_options is not None and not self.stream:
            raise MolaError("`stream_options` needs `stream` true. Leave it out, or stream.")
        return self

    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def num_new_tokens(self) -> int | None:
        """Maximum length of the answer in tokens; None if the request does not say."""
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        """Number of the most probable tokens to send with each token; None for no log-probabilities at all."""
        raise NotImplementedError

    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(AnswerRequest):
    """Body of `/v1/chat/completions`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = AnswerRequest.unsupported | {
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none",),
        "parallel_tool_calls": (False, True),
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "store": (False,),
    }

    messages: _NonEmptyList[Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise MolaError(f"`max_tokens` {old} and `max_completion_tokens` {new} disagree. Pass one of them.")
        if self.top_logprobs and not self.logprobs:
            raise MolaError(f"`top_logprobs` needs `logprobs` true: got {self.top_logprobs}. Pass both, or neither.")
        return self

    def num_logprobs(self) -> int | None:
        """The field `top_logprobs`, or 0, if `logprobs` is true; else None."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def num_new_tokens(self) -> int | None:
        """Maximum length of the answer in tokens, `max_completion_tokens` or `max_tokens`; None if neither is given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(AnswerRequest):
    """Body of `/v1/completions`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = AnswerRequest.unsupported | {
        "echo": (False,),
        "best_of": (1,),
        "suffix": ("",),
    }

    prompt: str | _NonEmptyList[str]
    logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)

    def num_logprobs(self) -> int | None:
        """The field `logprobs`, which is a number in completions."""
        return self.logprobs

    def prompts(self) -> list[str]:
        """Texts to continue."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


class UnloadRequest(_StrictModel):
    """Body of `/v1/unload_lora_adapter`, with vLLM's names."""

    lora_name: str = Field(min_length=1)


class LoadRequest(UnloadRequest):
    """Body of `/v1/load_lora_adapter`, with vLLM's names."""

    lora_path: str
    load_inplace: bool = False
