"""Packing: several short samples in one row of a batch, without padding between them and without seeing each other."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from peft import PeftModel

from mola.data.tokenized import IGNORED
from mola.errors import MolaError

Batch = dict[str, Any]
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}  # of logits, relative to their norm


def pack_samples(dataset: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Rows of at most `max_length` tokens, each made of whole samples.

    Each sample goes into the fullest row that has room for it, the longest samples first (best fit decreasing).

    Args:
        dataset: `input_ids` and `labels` of each sample, none longer than `max_length`.
        max_length: tokens of a row.

    Returns:
        `input_ids`, `labels` and `position_ids`, which begin at 0 in each sample, and `length`. The first token of a
        sample has no label: the token before it belongs to a different sample.
    """
    lengths = [len(ids) for ids in dataset["input_ids"]]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(room, (lengths[index], -1))
        free, row = room.pop(place) if place < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (free - lengths[index], row))

    def packed() -> Any:
        for row in rows:
            samples = dataset[sorted(row)]
            ids, labels = samples["input_ids"], samples["labels"]
            yield {
                "input_ids": [token for each in ids for token in each],
                "labels": [label for each in labels for label in (IGNORED, *each[1:])],
                "position_ids": [position for each in ids for position in range(len(each))],
                "length": sum(map(len, ids)),
            }

    return datasets.Dataset.from_list(list(packed()))


class PackedBatches:
    """A collator for packed rows; it hands rows that are not packed to the collator that it wraps.

    The batch has no attention mask: Transformers finds the samples by their `position_ids`. Padding has positions from
    0 on, so it is a sample of its own, without labels. With FlashAttention all rows become one, without padding.

    Args:
        collate: collator for rows that are not packed, such as those of an evaluation.
        pad_token_id: id of the padding.
        has_one_row: whether all rows become one.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Batch], pad_token_id: int, has_one_row: bool) -> None:
        self._collate = collate
        self._padding = {"input_ids": pad_token_id, "labels": IGNORED}
        self._has_one_row = has_one_row

    def __call__(self, samples: Sequence[Any]) -> Batch:
        """One batch: `input_ids`, `labels` and `position_ids`, each `(rows, tokens)`."""
        if "position_ids" not in samples[0]:
            return self._collate(samples)
        rows: Sequence[Any] = samples
        names = ("input_ids", "labels", "position_ids")
        if self._has_one_row:
            rows = [{name: [value for sample in samples for value in sample[name]] for name in names}]
        longest = max(len(row["input_ids"]) for row in rows)
        batch: Batch = {}
        for name in names:
            padded = []
            for row in rows:
                missing = longest - len(row[name])
                filler = list(range(missing)) if name == "position_ids" else [self._padding[name]] * missing
                padded.append(torch.tensor([*row[name], *filler]))
            batch[name] = torch.stack(padded)
        # Transformers looks for samples only where no cache is made.
        return {**batch, "use_cache": False}


def uses_flash_attention(model: PeftModel) -> bool:
    """Whether a model computes attention with FlashAttention."""
    return "flash" in str(getattr(model.config, "_attn_implementation", None))


def check_packing(model: PeftModel, mixed_dtype: torch.dtype | None) -> None:
    """Raise if a model computes two packed samples differently from the same samples alone.

    Models with a recurrent state, and models that ignore `position_ids`, would let a sample see those before it.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().num_embeddings
    samples = [torch.randint(size, (length,), generator=generator).tolist() for length in (9, 7)]
    rows = [{"input_ids": ids, "labels": ids, "position_ids": list(range(len(ids)))} for ids in samples]
    packed = {name: [value for row in rows for value in row[name]] for name in rows[0]}
    collate = PackedBatches(lambda _: {}, 0, has_one_row=False)
    name = type(model.get_base_model()).__name__

    def logits(row: Any) -> torch.Tensor:
        batch = {key: value.to(device) if key != "use_cache" else value for key, value in collate([row]).items()}
        del batch["labels"]
        return model(**batch).logits[0].float()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, mixed_dtype, enabled=mixed_dtype is not None):
            together, alone = logits(packed), torch.cat([logits(row) for row in rows])
    except (TypeError, ValueError, RuntimeError) as error:
        raise MolaError(f"`packing` does not work with {name}: {error}. Leave it out.") from error
    finally:
        model.train(was_training)
    dtype = mixed_dtype or next(model.parameters()).dtype
    difference = float((together - alone).norm() / alone.norm())
    if difference > _TOLERANCE.get(dtype, 0.05):
        raise MolaError(
            f"`packing` does not work with {name}: logits of packed samples differ by {difference:.2g} of their norm, "
            "because this model lets a sample see those before it. Leave `packing` out."
        )
