"""From prompts to text in batches: token ids, lengths, padding, and `generate` with mola's settings alone.

- Batches are ordered from the longest prompt to the shortest. This needs little padding, and if memory runs out, it
  runs out in the first batch.
- Prompts are padded on the left here, so the tokenizer's own padding side is neither used nor changed.
- Only the end tokens of the model's `generation_config` are used. The other settings of a checkpoint (sampling,
  repetition penalty, length limits) must not change a result.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from mola._compat import cache_argument, generation_reads_cache_keyword
from mola.data.templates import Template
from mola.data.tokenized import encode_segments
from mola.errors import MolaError, NotFiniteError
from mola.models.base_model import max_positions

logger = logging.getLogger(__name__)

_PREFIX_METHODS = ("PREFIX_TUNING", "CARTRIDGE", "MULTITASK_PROMPT_PREFIX")
_warned_methods: set[PeftType] = set()


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], template: Template | None = None
) -> list[list[int]]:
    """Token ids of each prompt.

    The tokenizer adds its begin token, unless the `template` writes its special tokens itself. An end token that the
    tokenizer appends is removed: after it, the model would start a new text.

    Raises:
        MolaError: a prompt has no tokens.
    """
    encoded = tokenizer(list(prompts), add_special_tokens=_adds_special_tokens(template))["input_ids"]
    encoded = [list(ids) for ids in encoded]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
            ids.pop()
        if not ids:
            raise MolaError(f"`prompt` must have at least one token: got {prompt[:80]!r}. Pass some text.")
    return encoded


def encode_before_answer(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], template: Template | None = None
) -> list[list[int]]:
    """Token ids of each prompt, encoded as in training, where an answer follows the prompt.

    The end of a prompt may have different tokens in training than in `encode_prompts`: in GPT-2's vocabulary two line
    breaks at the end of a text are one token, and before a word they are two. Slow tokenizers encode prompt and answer
    separately in training, so for slow tokenizers both functions agree.
    """
    encoded = encode_prompts(tokenizer, prompts, template)
    # The prompt of a chat template has the same tokens in training as without an answer.
    if not tokenizer.is_fast or not _adds_special_tokens(template):
        return encoded
    answered = encode_segments(tokenizer, [(prompt, "A") for prompt in prompts], _adds_special_tokens(template))
    return [
        ids[:start] if start > prefix and not _loses_text(tokenizer, alone, ids[:start]) else alone
        for alone, (ids, prefix, (start,)) in zip(encoded, answered, strict=True)
    ]


def _loses_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], shortened_ids: list[int]) -> bool:
    """Whether more than blanks at the end of a prompt is missing from `shortened_ids`, the tokens before its answer.

    Example: if `:A` is one token, the tokens before the answer `A` lack the `:` that ends the prompt.
    """
    num_shared = 0
    while num_shared < min(len(prompt_ids), len(shortened_ids)) and prompt_ids[num_shared] == shortened_ids[num_shared]:
        num_shared += 1
    prompt_end, shortened_end = (str(tokenizer.decode(ids[num_shared:])) for ids in (prompt_ids, shortened_ids))
    return bool(prompt_end.removeprefix(shortened_end).strip())


def _adds_special_tokens(template: Template | None) -> bool:
    return template is None or template.adds_special_tokens


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's end token, and those of the model, such as the end of a turn."""
    config = getattr(base_of(model), "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token_id for token_id in found if token_id is not None))


def prompt_learning_configs(model: Any) -> list[Any]:
    """Configurations of those adapters of a model that put virtual tokens before a prompt."""
    return [config for config in getattr(model, "peft_config", {}).values() if config.is_prompt_learning]


def positions_left(model: Any) -> int | None:
    """Length of the longest text in tokens: the model's positions less those of virtual tokens; None for no limit."""
    limit = max_positions(model.config)
    num_virtual = [config.num_virtual_tokens or 0 for config in prompt_learning_configs(model)]
    return None if limit is None else limit - max(num_virtual, default=0)


def max_length_of_batched_rope(config: Any) -> int | None:
    """Number of tokens above which the position embeddings of a batch depend on its longest row; None if they never do.

    Transformers chooses the frequencies of RoPE of the types `dynamic` and `longrope` once for all rows.
    """
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    # The parameters are one set for the whole model, or one set for each type of layer.
    sets = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, Mapping)]
    for rope in sets:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            length = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return length or config.max_position_embeddings
    return None


def check_lengths(
    names: Sequence[Any], prompts: Sequence[Sequence[int]], num_new_tokens: int, limit: int | None
) -> None:
    """Refuse prompts that leave no room for `num_new_tokens`; messages call each prompt by its name in `names`.

    Raises:
        MolaError: prompt and new tokens together are longer than `limit`, the number of the model's positions.
    """
    for name, ids in zip(names, prompts, strict=True):
        if limit is not None and len(ids) + num_new_tokens > limit:
            raise MolaError(
                f"`max_new_tokens` and prompt must fit into the model's {limit} positions: sample {name!r} "
                f"has {len(ids)} prompt tokens, and {num_new_tokens} are to be generated. Lower `max_new_tokens`, "
                "shorten or leave out the sample, or use a model with a longer context."
            )


def num_embeddings(model: Any) -> int | None:
    """Number of token ids that a model has embeddings for; None if the model does not say."""
    embeddings = getattr(base_of(model), "get_input_embeddings", lambda: None)()
    for name in ("original_module", "base_layer"):  # inside PEFT's wrappers
        embeddings = getattr(embeddings, name, embeddings)
    return getattr(embeddings, "num_embeddings", None)


def check_token_ids(known: int | None, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse tokens without an embedding. On a GPU such tokens would end the process.

    Args:
        known: the model's `num_embeddings`.
        prompts: token ids of each prompt.

    Raises:
        MolaError: a prompt has a token without an embedding.
    """
    highest = max(map(max, prompts))
    if known is not None and highest >= known:
        raise MolaError(
            f"`prompt` must have tokens that the model knows: one has the id {highest}, the model has {known}. Leave "
            "that token out, or use the tokenizer that belongs to the model."
        )


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The indices of `lengths` in batches of at most `batch_size`, longest first; equal lengths keep their order."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def left_pad(
    sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (1 = real token), both `(len(sequences), longest)`, padded on the left."""
    tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_token_id, padding_side="left")
    masks = [torch.ones_like(tensor) for tensor in tensors]
    mask = pad_sequence(masks, batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad rows with.

    Raises:
        MolaError: the tokenizer has no special token to pad with.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise MolaError("`tokenizer` has neither a padding, an unknown nor an end token. Set its `pad_token` to any token.")


def base_of(model: Any) -> Any:
    """The Transformers model inside a `PeftModel`; any other model is returned unchanged."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def device_of(model: Any) -> torch.device:
    """The device of a model's first parameter."""
    return next(model.parameters()).device


def check_device(device: torch.device) -> None:
    """Raise an error if a GPU can no longer compute, which happens after a failed assertion in a kernel."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def last_positions(count: int, device: torch.device) -> torch.Tensor:
    """Indices of the last `count` positions, for a model's argument `logits_to_keep`.

    With a number instead of indices, models use a slice, whose rows lie apart in memory. For such a slice PyTorch
    copies the weights of the head once for each row of the batch on a CPU: for 25 prompts this took longer than all
    layers together.
    """
    return torch.arange(-count, 0, device=device)


def accepts_positions(model: Any) -> bool:
    """Whether a model can compute logits only at certain positions, its argument `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(base_of(model).forward).parameters


@contextmanager
def inference_state(model: Any) -> Iterator[None]:
    """Eval mode, no gradients, and a `generation_config` with end tokens alone; the block restores all of them."""
    base = base_of(model)
    training = [(module, module.training) for module in model.modules()]
    generation_config = base.generation_config
    base.generation_config = GenerationConfig(eos_token_id=getattr(generation_config, "eos_token_id", None))
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: tensors that a model caches must be usable in training
            yield
    finally:
        base.generation_config = generation_config
        for module, was_training in training:
            module.training = was_training


def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    streamer: Any = None,
    logits_processor: Any = None,
    ends: Sequence[int] = (),
    **decoding: Any,
) -> list[str]:
    """New text after each prompt, without special tokens. Call it inside `inference_state`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        streamer: receives the tokens of a single prompt.
        logits_processor: processors that see float32 logits before temperature, top-k and top-p.
        ends: ids of tokens that end an answer, in addition to the end tokens of the tokenizer and the model.
        decoding: fields of `GenerationConfig`, such as `max_new_tokens`.

    Raises:
        MolaError: a token has no embedding, or the installed PEFT cannot generate with the adapter.
        NotFiniteError: logits are NaN.
    """
    nan_check = _NanCheck()
    config = GenerationConfig(
        pad_token_id=pad_token_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys([*end_token_ids(model, tokenizer), *ends])) or None,
        use_cache=may_use_cache(model),
        **decoding,
    )
    check_token_ids(num_embeddings(model), prompts)
    ids, mask = left_pad(prompts, pad_token_id(tokenizer), device_of(model))
    arguments: dict[str, Any] = {"logits_processor": LogitsProcessorList([nan_check, *(logits_processor or ())])}
    if len(prompts) > 1 and config.num_beams == 1 and accepts_positions(model):  # beam search would repeat the indices
        arguments["logits_to_keep"] = last_positions(1, ids.device)
    sequences = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer, **arguments
    )
    nan_check.raise_if_found()
    return tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)


class _NanCheck(LogitsProcessor):
    """Notes whether any logits were NaN. It does not wait for a GPU until `raise_if_found`."""

    def __init__(self) -> None:
        self._has_nan: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        found = scores.isnan().any()
        self._has_nan = found if self._has_nan is None else self._has_nan | found
        return scores

    def raise_if_found(self) -> None:
        if self._has_nan is not None and bool(self._has_nan):
            raise NotFiniteError(
                "the logits of an answer must be numbers: some are NaN. Pass --dtype float32 or bfloat16, and check "
                "that the weights of `base_model` are finite."
            )


def may_use_cache(model: Any) -> bool:
    """Whether `generate` may cache keys and values.

    Since Transformers 5.24 models call their cache `cache`, and PEFT 0.21 still looks for `past_key_values`. Therefore
    PEFT adds virtual tokens again at every step, which is correct only without a cache. The keys and values of a prefix
    do not reach the model at all.

    Raises:
        MolaError: the active adapter is a prefix, whose keys and values would not reach the model.
    """
    if not isinstance(model, PeftModel):
        return True
    # While the adapter is disabled, PEFT replaces the model's `forward` by that of the base model.
    if getattr(vars(model).get("forward"), "__self__", model) is not model:
        return True
    config = model.active_peft_config
    if not config.is_prompt_learning:
        return True
    if cache_argument(model.get_base_model()) != "cache" or generation_reads_cache_keyword():
        return True
    method = PeftType(config.peft_type)
    if method.value in _PREFIX_METHODS:
        raise MolaError(
            f"`adapter` of type {method.value} cannot generate text: the installed PEFT does not hand its prefix "
            "to models of Transformers 5.24 or newer. Install an older Transformers, or a newer PEFT."
        )
    if method not in _warned_methods:
        _warned_methods.add(method)
        logger.warning(
            "Generation is slow: with the virtual tokens of %s, the installed PEFT cannot use the cache of "
            "Transformers 5.24 or newer.",
            method.value,
        )
    return False
