"""The door to what is compiled: `kernels/cpu` by numba (the extra `cpu`), `kernels/gpu` by Triton, which torch brings.

Without either all works, more slowly.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from typing import Any

_FOLDER = "mola.tuner.kernels"
_log_once = functools.cache(logging.getLogger(__name__).log)


@functools.cache
def load(name: str, folder: str = "cpu") -> Any:
    """A module of `kernels/cpu` or another folder; None, and one line in the log, where it cannot be used."""
    try:
        return importlib.import_module(f"{_FOLDER}.{folder}.{name}")
    except ModuleNotFoundError as error:
        if error.name == "numba":
            _log_once(logging.INFO, "Without numba, mola is slower on a CPU: pip install 'mola-peft[cpu]'.")
        elif error.name == "triton":
            package = "triton-windows" if sys.platform == "win32" else "triton"
            _log_once(logging.WARNING, f"Without Triton, mola is slower on a GPU: pip install {package}.")
        elif error.name != f"{_FOLDER}.{folder}":
            raise
    except ImportError as error:  # numba refuses versions of numpy that it does not know
        what, where = ("Triton", "GPU") if folder == "gpu" else ("numba", "CPU")
        _log_once(logging.WARNING, f"{what} cannot be used, so mola is slower on this {where}: {error}")
    return None


@functools.cache
def is_interpreting() -> bool:
    """Whether Triton's kernels run on the CPU, to be tested: `TRITON_INTERPRET=1` in the environment."""
    return os.environ.get("TRITON_INTERPRET") == "1"
