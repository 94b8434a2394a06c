"""From one prompt to a text. Sampling happens if and only if it was asked for, whatever the base model ships."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mola.data.templates import Template
from mola.errors import MolaError
from mola.generation import predicting
from mola.options.fields import check_seed

_COLDEST = 1e-30  # logits divided by less may be no numbers any more


def decoding_settings(
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    do_sample: bool | None = None,
) -> dict[str, Any]:
    """Checked settings as `transformers.GenerationConfig` wants them.

    Args:
        max_new_tokens: at least 1.
        temperature: at least 0; 0 is greedy; None is 1 when sampling.
        top_p: in (0, 1]; None keeps all tokens.
        top_k: at least 1; None keeps all tokens.
        do_sample: None samples if and only if one of the three is given and the temperature is not 0.

    Returns:
        Keyword arguments.

    Raises:
        MolaError: a value out of range, or values that contradict `do_sample`.
    """
    if max_new_tokens < 1:
        raise MolaError(f"`max_new_tokens` must be at least 1: got {max_new_tokens}.")
    if temperature is not None and temperature != 0 and not _COLDEST <= temperature < float("inf"):
        raise MolaError(f"`temperature` must be 0 (greedy) or a number from {_COLDEST:g} on: got {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise MolaError(f"`top_p` must be above 0 and at most 1: got {top_p}. Pass 1 to keep all tokens.")
    if top_k is not None and top_k < 1:
        raise MolaError(f"`top_k` must be at least 1: got {top_k}. Leave it out to keep all tokens.")
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    # Transformers takes no whole numbers for the first two.
    given = {name: value if name == "top_k" else float(value) for name, value in given.items() if value is not None}
    if do_sample and temperature == 0:
        raise MolaError("`do_sample` needs a `temperature` above 0: got 0, which is greedy. Leave one out.")
    if do_sample is False and given and temperature != 0:
        raise MolaError(
            f"`do_sample` is off, so {', '.join(f'`{name}` {value}' for name, value in given.items())} would "
            "do nothing. Leave out `do_sample` or these."
        )
    if do_sample is None:
        do_sample = bool(given) and temperature != 0
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": 1}
    if do_sample:
        # 0 means "no limit" to Transformers, whose own default is 50.
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
    """Text the model writes after `prompt`, without the prompt and without special tokens.

    Args:
        model: loaded causal language model; comes back in the state it was in.
        tokenizer: its tokenizer.
        prompt: text to continue.
        max_new_tokens: see `decoding_settings`, as for the next four.
        temperature: 0 is greedy; `top_p` and `top_k` then have no effect.
        top_p: nucleus sampling.
        top_k: sampling from the most probable tokens.
        do_sample: None samples if one of the three is given and the temperature is not 0.
        seed: makes sampling repeatable and leaves torch's own random state alone; None draws from it. Greedy decoding
            has no use for it.
        before_answer: the prompt is that of a template: its last tokens are those that it had in training.
        template: that template, see `mola.models.prompts.template_for`; special tokens and end of a chat template are
            its own.
        streamer: receives the tokens while they come, such as a `transformers.TextStreamer`.

    Returns:
        The new text.

    Raises:
        MolaError: a value out of range, a template that is none, or a prompt too long for the model.
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
    encoded = encoded_prompt(tokenizer, prompt, max_new_tokens, limit, before_answer, template)
    ends = [] if template is None else template.ending(tokenizer)[:1]
    with seeded(seed), predicting.inference_state(model):
        return predicting.generate_batch(model, tokenizer, [encoded], streamer=streamer, ends=ends, **settings)[0]


def encoded_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    limit: int | None,
    before_answer: bool,
    template: Template | None,
) -> list[int]:
    """Token ids of a prompt that leaves room for its answer within `limit` positions; the rest as `generate_text`.

    Raises:
        MolaError: it has no token, is no Unicode text, or leaves no room.
    """
    encode = predicting.encode_before_answer if before_answer else predicting.encode_prompts
    encoded = encode(tokenizer, [prompt], template)
    predicting.check_lengths(["prompt"], encoded, max_new_tokens, limit)
    return encoded[0]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Random numbers of a seed for the block, and torch's own state after it; None draws from that."""
    if seed is None:
        yield
        return
    # `fork_rng` keeps CPU and CUDA; of several GPUs it would warn that they are many.
    there = {torch.mps: torch.backends.mps.is_available(), torch.xpu: torch.xpu.is_available()}
    others: list[Any] = [module for module, is_there in there.items() if is_there]
    states = [each.get_rng_state() for each in others]
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for each, state in zip(others, states, strict=True):
                each.set_rng_state(state)
