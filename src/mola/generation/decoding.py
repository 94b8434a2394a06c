"""From one prompt to a text. Decoding is greedy unless the caller asks for sampling, whatever the base model sets."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mola.data.templates import Template
from mola.errors import MolaError
from mola.generation import predicting
from mola.options.fields import check_seed

_MIN_TEMPERATURE = 1e-30  # logits divided by a smaller number may become infinite


def decoding_settings(
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    do_sample: bool | None = None,
) -> dict[str, Any]:
    """Check decoding values and turn them into arguments of `transformers.GenerationConfig`.

    Args:
        max_new_tokens: at least 1.
        temperature: at least 0; 0 is greedy. None means 1 when sampling.
        top_p: in (0, 1]; None keeps all tokens.
        top_k: at least 1; None keeps all tokens.
        do_sample: None samples if and only if `temperature`, `top_p` or `top_k` is given and the temperature is not 0.

    Raises:
        MolaError: a value is out of range, or contradicts `do_sample`.
    """
    if max_new_tokens < 1:
        raise MolaError(f"`max_new_tokens` must be at least 1: got {max_new_tokens}.")
    if temperature is not None and temperature != 0 and not _MIN_TEMPERATURE <= temperature < float("inf"):
        raise MolaError(f"`temperature` must be 0 (greedy) or at least {_MIN_TEMPERATURE:g}: got {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise MolaError(f"`top_p` must be above 0 and at most 1: got {top_p}. Pass 1 to keep all tokens.")
    if top_k is not None and top_k < 1:
        raise MolaError(f"`top_k` must be at least 1: got {top_k}. Leave it out to keep all tokens.")
    given: dict[str, Any] = {}
    if temperature is not None:
        given["temperature"] = float(temperature)  # Transformers accepts no integers
    if top_p is not None:
        given["top_p"] = float(top_p)
    if top_k is not None:
        given["top_k"] = top_k
    if do_sample and temperature == 0:
        raise MolaError("`do_sample` needs a `temperature` above 0: got 0, which is greedy. Leave out one of the two.")
    if do_sample is False and given and temperature != 0:
        values = ", ".join(f"`{name}` {value}" for name, value in given.items())
        raise MolaError(f"`do_sample` is off, so {values} would do nothing. Leave out `do_sample` or these values.")
    if do_sample is None:
        do_sample = bool(given) and temperature != 0
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": 1}
    if do_sample:
        # `top_k` 0 keeps all tokens; Transformers' own default keeps 50.
        settings.update({"temperature": 1.0, "top_p": 1.0, "top_k": 0}, **given)
    return settings


def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    do_sample: bool | None = None,
    seed: int | None = None,
    streamer: Any = None,
    before_answer: bool = False,
    template: Template | None = None,
) -> str:
    """Text that the model generates after `prompt`, without the prompt and without special tokens.

    Args:
        model: loaded causal language model. Its state is the same before and after the call.
        tokenizer: its tokenizer.
        prompt: text to continue.
        max_new_tokens: maximum length of the new text in tokens, at least 1.
        temperature: sampling temperature; with 0, which is greedy, `top_p` and `top_k` have no effect.
        top_p: sample from the most probable tokens that hold this probability, in (0, 1].
        top_k: sample from this many most probable tokens, at least 1.
        do_sample: None samples if `temperature`, `top_p` or `top_k` is given and the temperature is not 0.
        seed: makes sampling repeatable and leaves torch's own random state unchanged. None draws from that state.
            Greedy decoding draws no random numbers.
        streamer: an object such as a `transformers.TextStreamer`, which receives the tokens as they are generated.
        before_answer: whether the prompt comes from a template. If so, it is encoded as in training, where an answer
            follows the prompt.
        template: the template of the prompt; see `mola.models.prompts.template_for`. A chat template has its own
            special tokens and its own end token.

    Raises:
        MolaError: a value is out of range, `template` is not a `Template`, or the prompt is too long for the model.
    """
    if template is not None and not isinstance(template, Template):
        raise MolaError(
            "`template` must be a Template, such as mola.models.prompts.template_for('chat', tokenizer): got "
            f"{template!r}."
        )
    if seed is not None:
        check_seed(seed)
    settings = decoding_settings(max_new_tokens, temperature, top_p, top_k, do_sample)
    limit = predicting.positions_left(model)
    encoded = encode_prompt(tokenizer, prompt, max_new_tokens, limit, before_answer, template)
    ends = [] if template is None else template.ending(tokenizer)[:1]
    with seeded(seed), predicting.inference_state(model):
        return predicting.generate_batch(model, tokenizer, [encoded], streamer=streamer, ends=ends, **settings)[0]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    limit: int | None,
    before_answer: bool,
    template: Template | None,
) -> list[int]:
    """Token ids of a prompt whose answer must fit into `limit` positions; see `generate_text` for the other parameters.

    Raises:
        MolaError: the prompt has no tokens, or leaves no room for its answer.
    """
    encode = predicting.encode_before_answer if before_answer else predicting.encode_prompts
    encoded = encode(tokenizer, [prompt], template)
    predicting.check_lengths(["prompt"], encoded, max_new_tokens, limit)
    return encoded[0]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw the random numbers of a seed in a block, and restore torch's random state after it.

    With None the block draws from torch's own state.
    """
    if seed is None:
        yield
        return
    # `fork_rng` restores the random states of CPU and CUDA, but not those of MPS and XPU.
    other_devices: list[Any] = []
    if torch.backends.mps.is_available():
        other_devices.append(torch.mps)
    if torch.xpu.is_available():
        other_devices.append(torch.xpu)
    states = [device.get_rng_state() for device in other_devices]
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for device, state in zip(other_devices, states, strict=True):
                device.set_rng_state(state)
