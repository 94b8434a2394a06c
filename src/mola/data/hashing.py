"""Eight bytes for a text, an example or its instruction: enough to find equal ones among millions of rows."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def hash_text(text: str) -> int:
    """Eight bytes for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def hash_example(example: Mapping[str, Any]) -> int:
    """Eight bytes for instruction, input and output together."""
    return hash_text(json.dumps([example["instruction"], example["input"], example["output"]]))


def hash_instruction(example: Mapping[str, Any]) -> int:
    """Eight bytes for instruction and input together; 0 without an instruction."""
    instruction = example["instruction"]
    return 0 if instruction is None else hash_text(json.dumps([instruction, example["input"]]))


def hash_head(example: Mapping[str, Any]) -> int:
    """`hash_instruction`; of a text without one `hash_example`."""
    return hash_instruction(example) or hash_example(example)


def distinct_questions(examples: Iterable[Mapping[str, Any]]) -> NDArray[np.uint64]:
    """`hash_head` of the examples, sorted, each once."""
    return np.unique(np.fromiter(map(hash_head, examples), np.uint64))


def count_shared(splits: Iterable[NDArray[np.uint64]]) -> int:
    """Values other than 0 that occur in more than one split."""
    values, counts = np.unique(np.concatenate([np.unique(part) for part in splits]), return_counts=True)
    return int(((counts > 1) & (values != 0)).sum())
