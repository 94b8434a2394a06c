"""vLLM's entry to mola: registers the load format `mola`; see docs/guides/vllm.md.

vLLM imports this module and calls `register` in every process, whatever vLLM serves. So the module imports mola only
when a model is loaded in this format.
"""

from __future__ import annotations

import logging
from typing import Any

FORMAT = "mola"
_registered = False


def register() -> None:
    """Register the load format. Further calls change nothing."""
    global _registered
    if _registered:
        return
    try:
        from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader
    except ImportError as error:  # vLLM can still serve other models
        logging.getLogger(__name__).warning(
            "This version of vLLM does not support the load format %r: %s", FORMAT, error
        )
        return

    class Loader(BaseModelLoader):
        """Imports and creates the real loader when vLLM needs one."""

        def __new__(cls, load_config: Any) -> Any:
            import vllm

            from mola.integrations.vllm_server import check_version

            check_version(vllm.__version__)
            from mola.integrations.vllm_server.loader import MixtureLoader

            return MixtureLoader(load_config)

    register_model_loader(FORMAT)(Loader)
    _registered = True
