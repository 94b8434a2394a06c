"""Which engine makes the answers, and how much it may hold at once."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mola.errors import MolaError
from mola.generation import predicting
from mola.generation.batching.engine import BatchEngine
from mola.generation.batching.forward import Adapters, Forward, why_not_batched
from mola.generation.batching.single import SingleEngine
from mola.generation.virtual_tokens import may_cache

logger = logging.getLogger(__name__)

_SHARE = 4  # of free memory, one part is for keys and values


def engine_for(
    adapters: Adapters, tokenizer: PreTrainedTokenizerBase, max_batch_size: int, prefill: int, total: int | None
) -> tuple[Any, int | None]:
    """An engine, and the tokens that one answer may have with its prompt; None for as many as the model takes.

    Args:
        adapters: of the model.
        tokenizer: of the model.
        max_batch_size: answers side by side.
        prefill: tokens of prompts read between two tokens of running answers.
        total: tokens that all may have together; None for what a quarter of free memory holds.

    Raises:
        MolaError: `total` is given where answers are made one after the other, or the adapters cannot be generated
            with.
    """
    reason = "`max_batch_size` is 1" if max_batch_size == 1 else why_not_batched(adapters.model)
    if reason is not None:
        if total is not None:
            raise MolaError(
                f"`max_batch_total_tokens` needs answers side by side, which do not run here: {reason}. Leave it out."
            )
        if max_batch_size > 1:
            logger.warning("Answers of this model are made one after the other: %s.", reason)
        may_cache(adapters.model)
        return SingleEngine(adapters, tokenizer), None
    with predicting.inference_state(adapters.model):
        size = Forward(adapters).bytes_per_token()
    if total is None:
        total = max(1, _free_memory(adapters.model) // _SHARE // size)
    if isinstance(adapters.model, PeftModel) and not adapters.can_mix:
        logger.warning("Answers with different adapters of this kind are not made side by side, but by turns.")
    logger.info("Up to %d answers side by side, %d tokens together (%d bytes each).", max_batch_size, total, size)
    ends = predicting.end_token_ids(adapters.model, tokenizer)
    return BatchEngine(adapters, ends, max_batch_size, prefill, total), total


def _free_memory(model: Any) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *room_of_containers()])


# What a container may have and has, for both versions of Linux's control groups.
_CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def room_of_containers(files: Sequence[tuple[str, str]] = _CONTAINERS) -> list[int]:
    """Bytes that a container's limit leaves, one for each pair of `files` that says it."""
    found = []
    for limit, used in files:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return found
