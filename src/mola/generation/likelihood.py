"""How probable a model finds the end of texts: likelihood of a question's options."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mola.data.templates import Template
from mola.generation.predicting import check_known, device_of, encode_prompts, last_positions, left_pad, pad_token_id


def option_log_probabilities(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    template: Template | None = None,
    prompts: Sequence[str] = (),
) -> list[list[float]]:
    """Log-probability of the end of each text, given what all texts of its sample start with, one text per option.

    With the token ids `t_1 .. t_n` of one text, the first `c` shared by all texts of the sample:
        score = sum_{i > c} log p(t_i | t_1 .. t_{i-1})
    Texts are tokenised whole, so a letter gets the token it has in running text (" A", not "A"), unless the `template`
    of the `prompts` that they begin with is encoded apart. Call it inside `inference_state`.
    """
    encoded = _encoded(tokenizer, texts, template, prompts)
    shared = [_shared_length(options) for options in encoded]
    # Options usually differ in their last token only: then one row serves all options of a sample.
    contexts: dict[tuple[int, ...], int] = {}
    for options in encoded:
        for ids in options:
            contexts.setdefault(tuple(ids[:-1]), len(contexts))
    tail = max(len(ids) - start for options, start in zip(encoded, shared, strict=True) for ids in options)
    log_probabilities: dict[int, torch.Tensor] = {}
    for part in _passes(list(contexts), is_alone=len(texts) == 1):
        found = _last_log_probabilities(model, tokenizer, part, min(tail, max(map(len, part))))
        log_probabilities |= {contexts[context]: row for context, row in zip(part, found, strict=True)}
    scores = []
    for options, start in zip(encoded, shared, strict=True):
        rows = [log_probabilities[contexts[tuple(ids[:-1])]] for ids in options]
        # Rows end with the prediction of the last token, so positions count from the right.
        scores.append(
            [
                sum(float(row[i - len(ids), ids[i]]) for i in range(start, len(ids)))
                for row, ids in zip(rows, options, strict=True)
            ]
        )
    return scores


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    template: Template | None,
    prompts: Sequence[str],
) -> list[list[list[int]]]:
    """Token ids of all texts, as they are in training."""
    may_be_whole = template is None or (tokenizer.is_fast and not template.is_encoded_apart)
    whole = [encode_prompts(tokenizer, options, template) for options in texts] if may_be_whole else []
    if template is None or (may_be_whole and template.adds_special_tokens):
        return whole
    found = []
    for row, (prompt, options) in enumerate(zip(prompts, texts, strict=True)):
        (asked,) = encode_prompts(tokenizer, [prompt], template)
        if may_be_whole and all(ids[: len(asked)] == asked for ids in whole[row]):  # no token reaches across
            found.append(whole[row])
        else:
            rest = tokenizer([text[len(prompt) :] for text in options], add_special_tokens=False)["input_ids"]
            found.append([[*asked, *ids] for ids in rest])
    return found


def _passes(contexts: Sequence[tuple[int, ...]], is_alone: bool) -> list[list[tuple[int, ...]]]:
    """Contexts of each forward pass: all of them, or of a sample that is asked alone, those of one length together.

    Samples are asked alone where the model sees padding, which shorter ones would have.
    """
    if not is_alone:
        return [list(contexts)]
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for context in contexts:
        by_length.setdefault(len(context), []).append(context)
    return list(by_length.values())


def _shared_length(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens all sequences share, at most one less than the shortest."""
    limit = min(len(sequence) for sequence in sequences) - 1
    for index in range(limit):
        if len({sequence[index] for sequence in sequences}) > 1:
            return index
    return limit


def _last_log_probabilities(
    model: Any, tokenizer: PreTrainedTokenizerBase, contexts: Sequence[Sequence[int]], count: int
) -> torch.Tensor:
    """Log-probabilities of the next token at the last `count` positions: `(len(contexts), count, vocab)`."""
    check_known(model, contexts)
    ids, mask = left_pad(contexts, pad_token_id(tokenizer), device_of(model))
    # Learned position embeddings must not count the padding.
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    kept = last_positions(count, ids.device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept).logits
    return torch.log_softmax(logits[:, -count:].float(), dim=-1).cpu()
