"""Asking a model: encoding, batches, greedy decoding.

- Batches go from the longest prompt to the shortest: little padding, and memory runs out at once or never.
- Padding is on the left and done here, so the tokenizer's own state is neither used nor changed.
- The model's `generation_config` is set aside while decoding, but for its end tokens: what else a checkpoint ships
  (sampling, repetition penalties, length limits) must not change a result.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from mola.data.templates import Template
from mola.data.tokenized import encode_with_border
from mola.errors import MolaError, NotFiniteError
from mola.generation.virtual_tokens import may_cache
from mola.models.base_model import max_positions


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], template: Template | None = None
) -> list[list[int]]:
    """Token ids of each prompt with the tokenizer's begin token, never with its end token.

    The `template` of the prompts may have special tokens of its own instead.

    Raises:
        MolaError: a prompt has no token at all, or is no Unicode text.
    """
    for prompt in prompts:
        if re.search("[\ud800-\udfff]", prompt):  # bytes that are no UTF-8, as Python reads them
            raise MolaError(f"`prompt` must be Unicode text, saved as UTF-8: got {prompt[:80]!r}. Write it as such.")
    encoded = [
        list(ids) for ids in tokenizer(list(prompts), add_special_tokens=_adds_special_tokens(template))["input_ids"]
    ]
    for prompt, ids in zip(prompts, encoded, strict=True):
        # A tokenizer set to append the end token would make the model start a new text.
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
            ids.pop()
        if not ids:
            raise MolaError(f"`prompt` must hold at least one token: got {prompt[:80]!r}. Pass some text.")
    return encoded


def encode_before_answer(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], template: Template | None = None
) -> list[list[int]]:
    """As `encode_prompts`, with the tokens that a prompt has where an answer follows, as it does in training.

    A prompt that ends in blanks may end in another token than before a letter: two line breaks are one token of
    GPT-2's vocabulary at the end of a text, and two before a word. Slow tokenizers encode both parts by themselves.
    """
    encoded = encode_prompts(tokenizer, prompts, template)
    # A chat template's is trained as it is encoded alone, and where it is not the two are encoded apart.
    if not tokenizer.is_fast or not _adds_special_tokens(template):
        return encoded
    answered = encode_with_border(tokenizer, [(prompt, "A") for prompt in prompts], _adds_special_tokens(template))
    return [
        ids[:start] if start > prefix and not _loses_text(tokenizer, alone, ids[:start]) else alone
        for alone, (ids, prefix, start) in zip(encoded, answered, strict=True)
    ]


def _loses_text(tokenizer: PreTrainedTokenizerBase, alone: list[int], before: list[int]) -> bool:
    """Whether `before` lacks more than blanks of a prompt: a mark that is one token with the letter, as `:A`."""
    pairs = enumerate(zip(alone, before, strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), min(len(alone), len(before)))
    whole, kept = (str(tokenizer.decode(ids[shared:])) for ids in (alone, before))
    return bool(whole.removeprefix(kept).strip())


def _adds_special_tokens(template: Template | None) -> bool:
    return template is None or template.adds_special_tokens


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and the model's own, such as one that ends a turn and no text."""
    config = getattr(base_of(model), "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(token_id for token_id in found if token_id is not None))


def prompt_learning(model: Any) -> list[Any]:
    """Configurations of a model's adapters that put virtual tokens before a prompt."""
    return [config for config in getattr(model, "peft_config", {}).values() if config.is_prompt_learning]


def positions_left(model: Any) -> int | None:
    """Longest text a loaded model takes: virtual tokens that an adapter puts before it have positions, too."""
    limit = max_positions(model.config)
    taken = [config.num_virtual_tokens or 0 for config in prompt_learning(model)]
    return limit if limit is None else limit - max(taken, default=0)


def longest_of_one_rope(config: Any) -> int | None:
    """Tokens beyond which position embeddings of a batch depend on its longest row; None if they never do.

    Transformers chooses the frequencies of RoPE of the types `dynamic` and `longrope` once for all rows.
    """
    config = config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found] if "rope_type" in found else [each for each in found.values() if isinstance(each, Mapping)]
    for each in kinds:
        if each.get("rope_type") in ("dynamic", "longrope"):
            length = each.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return length or config.max_position_embeddings
    return None


def check_lengths(
    names: Sequence[Any], prompts: Sequence[Sequence[int]], num_new_tokens: int, limit: int | None
) -> None:
    """Refuse prompts that leave no room for `num_new_tokens`; `names` is what to call each in the message.

    Raises:
        MolaError: prompt and new tokens together are longer than `limit`, the `max_positions` of the model.
    """
    for name, ids in zip(names, prompts, strict=True):
        if limit is not None and len(ids) + num_new_tokens > limit:
            raise MolaError(
                f"`max_new_tokens` and prompt must fit into the model's {limit} positions: sample {name!r} "
                f"has {len(ids)} prompt tokens and {num_new_tokens} to come. Lower `max_new_tokens`, "
                "shorten or leave out the sample, or use a model with a longer context."
            )


def num_tokens(model: Any) -> int | None:
    """How many ids a model knows; None if it does not say. A GPU dies of others, a tokenizer may have them."""
    embeddings = getattr(base_of(model), "get_input_embeddings", lambda: None)()
    for name in ("original_module", "base_layer"):  # below what PEFT trains
        embeddings = getattr(embeddings, name, embeddings)
    return getattr(embeddings, "num_embeddings", None)


def check_known(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        MolaError: as said.
    """
    known, highest = num_tokens(model), max(map(max, prompts))
    if known is not None and highest >= known:
        raise MolaError(
            f"`prompt` must be of tokens that the model knows: one has the id {highest}, the model has {known}. Leave "
            "that token out, or use the tokenizer that the model was trained with."
        )


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every index once, in batches of at most `batch_size`, longest first; equal lengths keep their order."""
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


def base_of(model: Any) -> Any:
    """The model of Transformers below PEFT's, if there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_device(device: torch.device) -> None:
    """Raise where a GPU computes nothing any more, as after an assertion in a kernel: every later call would fail."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def last_positions(count: int, device: torch.device) -> torch.Tensor:
    """The last `count` positions, as `logits_to_keep` of a model that takes indices.

    For a number a model takes a slice. Its rows lie apart in memory, and for such rows PyTorch copies the weights of
    the head on a CPU, once for each sample: for 25 prompts this took longer than all layers together.
    """
    return torch.arange(-count, 0, device=device)


@contextmanager
def inference_state(model: Any) -> Iterator[None]:
    """Eval mode, no gradients, and a `generation_config` with end tokens alone; everything is put back afterwards."""
    base = base_of(model)
    training = [(module, module.training) for module in model.modules()]
    generation_config = base.generation_config
    base.generation_config = GenerationConfig(eos_token_id=getattr(generation_config, "eos_token_id", None))
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: tensors a model caches must stay usable in training
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
    """New text after each prompt, special tokens left out; call it inside `inference_state`.

    `ends` are tokens that end an answer besides those of tokenizer and model. `decoding` are fields of
    `GenerationConfig`, such as `max_new_tokens`; a streamer takes one prompt only. The processors see float32 logits
    before sampling values are applied.
    """
    numbers = _Numbers()
    config = GenerationConfig(
        pad_token_id=pad_token_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys([*end_token_ids(model, tokenizer), *ends])) or None,
        use_cache=may_cache(model),
        **decoding,
    )
    check_known(model, prompts)
    ids, mask = left_pad(prompts, pad_token_id(tokenizer), device_of(model))
    further: dict[str, Any] = {"logits_processor": LogitsProcessorList([numbers, *(logits_processor or ())])}
    if len(prompts) > 1 and config.num_beams == 1 and _takes_indices(model):  # beams would repeat the indices
        further["logits_to_keep"] = last_positions(1, ids.device)
    sequences = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer, **further
    )
    numbers.check()
    return tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)


class _Numbers(LogitsProcessor):
    """Whether all logits were numbers: the largest of others is no answer. Nothing waits for it in between."""

    def __init__(self) -> None:
        self._none: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        found = scores.isnan().any()
        self._none = found if self._none is None else self._none | found
        return scores

    def check(self) -> None:
        """Raise a `NotFiniteError` if they were not."""
        if self._none is not None and bool(self._none):
            raise NotFiniteError(
                "the logits of an answer must be numbers: some are NaN. Pass --dtype float32 or bfloat16, and look "
                "whether the weights of `base_model` are finite."
            )


def _takes_indices(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(base_of(model).forward).parameters


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Some token to fill rows with.

    Raises:
        MolaError: the tokenizer has none.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise MolaError(
        "`tokenizer` has neither a padding, an unknown nor an end token. Set its `pad_token` to some token."
    )


def device_of(model: Any) -> torch.device:
    """Where a model's first parameter is."""
    return next(model.parameters()).device
