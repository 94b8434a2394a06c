"""Loads compiled code: modules of `kernels/cpu` by numba (the extra `cpu`), of `kernels/gpu` by Triton.

Without numba or Triton mola computes the same with operators of torch, which is slower.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from typing import Any

_log_once = functools.cache(logging.getLogger(__name__).log)


@functools.cache
def load(name: str, folder: str = "cpu") -> Any:
    """Import a module of `kernels/cpu` or `kernels/gpu`; None, and one line in the log, if its compiler is missing."""
    try:
        return importlib.import_module(f"mola.tuner.kernels.{folder}.{name}")
    except ModuleNotFoundError as error:
        if error.name == "numba":
            _log_once(logging.INFO, "Without numba, mola is slower on a CPU: pip install 'mola-peft[cpu]'.")
        elif error.name == "triton":
            package = "triton-windows" if sys.platform == "win32" else "triton"
            _log_once(logging.WARNING, f"Without Triton, mola is slower on a GPU: pip install {package}.")
        else:
            raise
    except ImportError as error:  # such as numba's, with a version of numpy that it does not support
        compiler, device = ("Triton", "GPU") if folder == "gpu" else ("numba", "CPU")
        _log_once(logging.WARNING, f"{compiler} cannot be used, so mola is slower on this {device}: {error}")
    return None


@functools.cache
def is_interpreting() -> bool:
    """Whether Triton's kernels run on the CPU, for tests: `TRITON_INTERPRET=1` in the environment."""
    return os.environ.get("TRITON_INTERPRET") == "1"
