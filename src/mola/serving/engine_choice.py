"""Which engine generates the answers, and how many tokens its cache may hold."""

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
from mola.generation.batching.engine import BatchEngine, SingleEngine
from mola.generation.batching.forward import Adapters, Forward, why_not_batched
from mola.generation.batching.skills import Skills

logger = logging.getLogger(__name__)

_CACHE_SHARE = 4  # keys and values get one part in four of the free memory

# Files with a container's memory limit and memory usage, for both versions of Linux's control groups.
_CONTAINER_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def choose_engine(
    adapters: Adapters | Skills,
    tokenizer: PreTrainedTokenizerBase,
    max_batch_size: int,
    max_prefill_tokens: int,
    max_total_tokens: int | None,
) -> tuple[BatchEngine | SingleEngine, int | None]:
    """Make the engine of a server.

    Args:
        adapters: the model's adapters.
        tokenizer: the model's tokenizer.
        max_batch_size: number of answers generated side by side; with 1, they are generated one after the other.
        max_prefill_tokens: number of prompt tokens read between two tokens of running answers.
        max_total_tokens: number of tokens in all answers together; None for the number that fits into a quarter of the
            free memory.

    Returns:
        The engine, and the maximum number of tokens of a prompt and its answer together; None for no limit.

    Raises:
        MolaError: `max_total_tokens` is given although answers are generated one after the other, or the model cannot
            generate with its adapters.
    """
    reason = "`max_batch_size` is 1" if max_batch_size == 1 else why_not_batched(adapters.model)
    if reason is not None:
        if max_total_tokens is not None:
            raise MolaError(
                "`max_batch_total_tokens` limits answers side by side, but this server generates them one after the "
                f"other: {reason}. Leave it out."
            )
        if max_batch_size > 1:
            logger.warning("Answers of this model are generated one after the other: %s.", reason)
        predicting.may_use_cache(adapters.model)  # raises if the adapter cannot generate at all
        return SingleEngine(adapters, tokenizer), None
    with predicting.inference_state(adapters.model):
        token_bytes = Forward(adapters).bytes_per_token()
    if max_total_tokens is None:
        max_total_tokens = max(1, _free_memory(adapters.model) // _CACHE_SHARE // token_bytes)
    if isinstance(adapters.model, PeftModel) and not adapters.can_mix:
        logger.warning("Answers with different adapters of this kind take turns: they cannot share a batch.")
    logger.info(
        "Up to %d answers side by side, %d tokens together (%d bytes for each token).",
        max_batch_size,
        max_total_tokens,
        token_bytes,
    )
    end_token_ids = predicting.end_token_ids(adapters.model, tokenizer)
    engine = BatchEngine(adapters, end_token_ids, max_batch_size, max_prefill_tokens, max_total_tokens)
    return engine, max_total_tokens


def _free_memory(model: Any) -> int:
    """Free bytes on a model's device; in a container at most what the container's limit leaves."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *free_memory_of_container()])


def free_memory_of_container(files: Sequence[tuple[str, str]] = _CONTAINER_FILES) -> list[int]:
    """Bytes that a container's limit leaves, for each pair of `files` that states a limit."""
    free = []
    for limit, used in files:
        with contextlib.suppress(OSError, ValueError):  # the file is missing, or it says "max"
            free.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return free
