"""What is refused in `ServeOptions`: values out of range, options that contradict each other, adapters with neighbours.

The functions know them as `Any`, since they are called by the module that defines them.
"""

import contextlib
import logging
import os
from typing import Any

from mola.errors import MolaError
from mola.models.adapters import changes_base, check_adapter

logger = logging.getLogger(__name__)

_OWN_FILES = 64  # a process's own: model, libraries, log
_LEAST = {
    "max_batch_size": 1,
    "max_batch_prefill_tokens": 1,
    "max_batch_total_tokens": 2,
    "max_tokens": 1,
    "max_choices": 1,
    "max_waiting": 0,
    "max_body_bytes": 1,
    "max_connections": 1,
}


def check_numbers(options: Any) -> None:
    """Refuse what is out of range, and what contradicts each other."""
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise MolaError(f"`{name}` must be at least {least}: got {value}.")
    if options.max_connections <= options.max_waiting:
        raise MolaError(
            f"`max_connections` must be more than `max_waiting`, {options.max_waiting}, or so many can never wait: got "
            f"{options.max_connections}. Raise it, or lower `max_waiting`."
        )
    if options.adapter_root is not None and not os.path.isdir(options.adapter_root):
        raise MolaError(f"`adapter_root` must be a folder: got {options.adapter_root!r}. Check the path.")
    if options.max_batch_size == 1:
        if options.max_batch_total_tokens is not None:
            raise MolaError(
                f"`max_batch_total_tokens` ({options.max_batch_total_tokens}) needs answers side by side, and "
                "`max_batch_size` is 1. Leave one of the two out."
            )
        if options.max_batch_prefill_tokens != type(options).max_batch_prefill_tokens:
            logger.warning("`max_batch_prefill_tokens` is not used: with `max_batch_size` 1 prompts are read whole.")
    if not 0 < options.client_timeout < float("inf"):
        raise MolaError(f"`client_timeout` must be a positive number of seconds: got {options.client_timeout}.")
    if not 0 <= options.shutdown_timeout < float("inf"):
        raise MolaError(f"`shutdown_timeout` must be 0 or a positive number: got {options.shutdown_timeout}.")
    if not 0 <= options.port < 2**16:
        raise MolaError(f"`port` must be from 0 to 65535: got {options.port}.")


def warn_of_few_files(max_connections: int) -> None:
    """Where the system says how many files a process may open."""
    with contextlib.suppress(ImportError):  # Windows has no such number
        import resource

        allowed, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2 * max_connections + _OWN_FILES
        if allowed != resource.RLIM_INFINITY and allowed < needed:
            logger.warning(
                "`max_connections` %d may need %d open files, this process may open %d; clients then wait until others "
                "leave. Raise the limit (`ulimit -n %d`), or lower `max_connections`.",
                *(max_connections, needed, allowed, needed),
            )


def check_neighbours(folders: dict[str, str], adapter_root: str | None) -> bool:
    """Look at every adapter's files; whether the only one is such that nothing can be served beside it.

    Raises:
        MolaError: one of them is broken, or such a one has neighbours.
    """
    for name, folder in folders.items():
        reason = changes_base(check_adapter(folder))
        if reason is None:
            continue
        if len(folders) > 1 or adapter_root is not None:
            raise MolaError(
                f"`adapter` {folder!r} {reason}, which would be so for the base model and all other adapters too. "
                "Serve it alone: leave out the others and `adapter_root`."
            )
        logger.warning("The base model has no name here: %r %s.", name, reason)
        return True
    return False
