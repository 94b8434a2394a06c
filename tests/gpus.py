"""Which tests see a GPU: those that are chosen with `-m gpu`, since what others assert of numbers holds on a CPU."""

import os
import re
import sys
from collections.abc import Sequence
from itertools import pairwise


def asks_for_gpu(words: Sequence[str]) -> bool:
    """Whether pytest's command line chooses tests with the mark `gpu`."""
    marks = [mark for word, mark in pairwise(words) if word == "-m"]
    marks += [word.removeprefix("-m") for word in words if word.startswith("-m") and word != "-m"]
    return any(re.search(r"(?<!not )\bgpu\b", each) for each in marks)


def hidden() -> dict[str, str]:
    """Environment for this process, to be set before an import looks for a GPU.

    Workers of pytest-xdist have another command line, and get it from their parent.
    """
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    return {} if is_worker or asks_for_gpu(sys.argv) else {"CUDA_VISIBLE_DEVICES": ""}
