"""The door to `kernels/cpu`, whose functions numba compiles: the extra `cpu`. Without it all works, more slowly."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

_FOLDER = "mola.tuner.kernels.cpu"
_log_once = functools.cache(logging.getLogger(__name__).log)


@functools.cache
def load(name: str) -> Any:
    """A module of `kernels/cpu`; None, and one line in the log, where it cannot be used."""
    try:
        return importlib.import_module(f"{_FOLDER}.{name}")
    except ModuleNotFoundError as error:
        if error.name == "numba":
            _log_once(logging.INFO, "Without numba, mola is slower on a CPU: pip install 'mola-peft[cpu]'.")
        elif error.name != _FOLDER:
            raise
    except ImportError as error:  # numba refuses versions of numpy that it does not know
        _log_once(logging.WARNING, f"numba cannot be used, so mola is slower on this CPU: {error}")
    return None
