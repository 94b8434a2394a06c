"""The likelihood of text: of a question's options as the end of a text, and of all tokens that count in the loss."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mola.data.templates import Template
from mola.data.tokenized import IGNORED
from mola.generation.predicting import (
    accepts_positions,
    check_token_ids,
    device_of,
    encode_prompts,
    last_positions,
    left_pad,
    num_embeddings,
    pad_token_id,
)

Batch = dict[str, torch.Tensor]


def option_log_probabilities(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    template: Template | None = None,
    prompts: Sequence[str] = (),
) -> list[list[float]]:
    """Log-probability of the end of each text, given the beginning that all texts of its sample share.

    `texts[i]` holds one text for each option of sample `i`. With the token ids `t_1 .. t_n` of one text, of which the
    first `c` are shared by all texts of the sample:

        score = sum_{i > c} log p(t_i | t_1 .. t_{i-1})

    Texts are tokenised as a whole, so a letter has the token that it has in running text (" A", not "A"). If the
    `template` encodes prompt and answer separately, each text begins with the token ids of its prompt in `prompts`.
    Call this function inside `inference_state`.
    """
    encoded = _encode(tokenizer, texts, template, prompts)
    num_shared = [_num_shared_tokens(options) for options in encoded]
    # The options of a sample usually differ in their last token only. If so, one context serves all of them.
    contexts: dict[tuple[int, ...], int] = {}
    for options in encoded:
        for ids in options:
            contexts.setdefault(tuple(ids[:-1]), len(contexts))
    tail = max(len(ids) - start for options, start in zip(encoded, num_shared, strict=True) for ids in options)
    log_probabilities: dict[int, torch.Tensor] = {}
    for batch in _context_batches(list(contexts), is_single_sample=len(texts) == 1):
        rows = _last_log_probabilities(model, tokenizer, batch, min(tail, max(map(len, batch))))
        log_probabilities |= {contexts[context]: row for context, row in zip(batch, rows, strict=True)}
    scores = []
    for options, start in zip(encoded, num_shared, strict=True):
        option_rows = [log_probabilities[contexts[tuple(ids[:-1])]] for ids in options]
        # The last entry of a row predicts the last token of a text, so positions count from the end.
        scores.append(
            [
                sum(float(row[i - len(ids), ids[i]]) for i in range(start, len(ids)))
                for row, ids in zip(option_rows, options, strict=True)
            ]
        )
    return scores


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    template: Template | None,
    prompts: Sequence[str],
) -> list[list[list[int]]]:
    """Token ids of all texts, encoded as in training."""
    may_be_whole = template is None or (tokenizer.is_fast and not template.is_encoded_apart)
    whole = [encode_prompts(tokenizer, options, template) for options in texts] if may_be_whole else []
    if template is None or (may_be_whole and template.adds_special_tokens):
        return whole
    encoded = []
    for index, (prompt, options) in enumerate(zip(prompts, texts, strict=True)):
        (prompt_ids,) = encode_prompts(tokenizer, [prompt], template)
        # No token may reach from the prompt into the answer.
        if may_be_whole and all(ids[: len(prompt_ids)] == prompt_ids for ids in whole[index]):
            encoded.append(whole[index])
        else:
            answers = tokenizer([text[len(prompt) :] for text in options], add_special_tokens=False)["input_ids"]
            encoded.append([[*prompt_ids, *ids] for ids in answers])
    return encoded


def _context_batches(contexts: Sequence[tuple[int, ...]], is_single_sample: bool) -> list[list[tuple[int, ...]]]:
    """The contexts of each forward pass.

    Several samples share one pass. For models that cannot ignore padding, callers pass one sample at a time; the
    contexts of this sample are computed without padding, those of equal length together.
    """
    if not is_single_sample:
        return [list(contexts)]
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for context in contexts:
        by_length.setdefault(len(context), []).append(context)
    return list(by_length.values())


def _num_shared_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Number of tokens at the beginning that all sequences share, at most one less than the shortest sequence has."""
    limit = min(len(sequence) for sequence in sequences) - 1
    for index in range(limit):
        if len({sequence[index] for sequence in sequences}) > 1:
            return index
    return limit


def _last_log_probabilities(
    model: Any, tokenizer: PreTrainedTokenizerBase, contexts: Sequence[Sequence[int]], count: int
) -> torch.Tensor:
    """Log-probabilities of the next token at the last `count` positions: `(len(contexts), count, vocabulary)`."""
    check_token_ids(num_embeddings(model), contexts)
    ids, mask = left_pad(contexts, pad_token_id(tokenizer), device_of(model))
    # Padding must not count in the positions of learned position embeddings.
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    kept = last_positions(count, ids.device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept).logits
    return torch.log_softmax(logits[:, -count:].float(), dim=-1).cpu()


def needed_logits(labels: torch.Tensor) -> Batch:
    """`logits_to_keep` and `shift_labels` for `labels: (samples, tokens)`; empty if no token counts in the loss."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    kept = (shifted != IGNORED).any(0).nonzero().squeeze(1)
    return {"logits_to_keep": kept, "shift_labels": shifted[:, kept].contiguous()} if len(kept) else {}


def label_losses(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> list[tuple[float, int]]:
    """Loss of each text in nats, summed over the tokens that count, and the number of these tokens.

    With the token ids `t_1 .. t_n` of one text and its labels `l_1 .. l_n`, of which `l_i` is `t_i` or `IGNORED`:

        loss = - sum_{i > 1, l_i = t_i} log p(t_i | t_1 .. t_{i-1})

    Texts are padded on the right, behind every token that counts. The model computes logits only at positions whose
    next token counts in some text, and one text at a time is converted to float32. Call this function inside
    `inference_state`.
    """
    check_token_ids(num_embeddings(model), ids)
    rows, targets = ([torch.tensor(each) for each in sequences] for sequences in (ids, labels))
    padded = pad_sequence(rows, batch_first=True, padding_value=pad_token_id(tokenizer))
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    needed = needed_logits(pad_sequence(targets, batch_first=True, padding_value=IGNORED))
    if not needed:
        return [(0.0, 0)] * len(rows)
    # Positions count from the end, because some adapters put virtual tokens before the text.
    positions = needed["logits_to_keep"] - padded.shape[1]
    device = device_of(model)
    more = {"logits_to_keep": positions.to(device)} if accepts_positions(model) else {}
    logits = model(input_ids=padded.to(device), attention_mask=mask.to(device), **more).logits
    losses = []
    for index, target in enumerate(needed["shift_labels"]):
        counts = target != IGNORED
        kept = counts.nonzero().squeeze(1) if more else positions[counts]
        values = F.cross_entropy(logits[index, kept.to(device)].float(), target[counts].to(device), reduction="none")
        losses.append((float(values.double().sum()), int(counts.sum())))
    return losses
