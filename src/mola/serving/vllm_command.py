"""`mola serve --engine vllm`: the command of vLLM's own server, in place of this process; see docs/vllm.md.

Options of mola's server that it has no counterpart for are refused.
"""

import dataclasses
import importlib.util
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from mola._process import SET
from mola.errors import MolaError
from mola.models.loading import check_adapter, check_base_model

logger = logging.getLogger(__name__)

_SERVER = "vllm.entrypoints.openai.api_server"
_KEY_VARIABLE = "VLLM_API_KEY"
_HONOURED = (
    *("base_model", "adapter", "base_name", "host", "port", "api_key", "dtype", "trust_remote_code", "max_tokens"),
    "engine",
)
# As mola's server: greedy unless a request asks for sampling, and nothing of the base model's own taste.
_GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def run_vllm(options: Any, base_name: str, adapters: Mapping[str, str], api_key: str | None) -> int:
    """Become vLLM's server.

    Args:
        options: of `mola serve`.
        base_name: the base model's name in requests, where there is no adapter.
        adapters: name in requests -> folder.
        api_key: token that clients must send; goes into the environment, for command lines can be read by others.

    Returns:
        The exit code, where the process cannot be replaced.

    Raises:
        MolaError: vLLM is missing, or an option is not for it.
    """
    command = [sys.executable, *vllm_arguments(options, base_name, adapters)]
    if importlib.util.find_spec("vllm") is None:
        raise MolaError("`engine` vllm needs vLLM, for Linux. Run: pip install 'mola-peft[vllm]'")
    check_base_model(options.base_model)
    for folder in adapters.values():
        check_adapter(folder)
    environment = {name: value for name, value in os.environ.items() if name not in SET}
    if api_key is not None:
        environment[_KEY_VARIABLE] = api_key
    logger.info("Running: %s", shlex.join(command))
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def vllm_arguments(options: Any, base_name: str, adapters: Mapping[str, str]) -> list[str]:
    """Arguments of Python; as for `run_vllm`.

    Raises:
        MolaError: an option is given that vLLM's server has no counterpart for, or there are several adapters.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in _HONOURED and value != field.default:
            raise MolaError(
                f"`{field.name}` must be left out with `engine` vllm, whose server has no such option: got {value!r}. "
                "vLLM's own command, which the log shows, takes vLLM's options."
            )
    if len(adapters) > 1:
        raise MolaError(
            f"`adapter` must be one with `engine` vllm: got {', '.join(adapters)}. Start a server for each, on its "
            "own port, or leave out `engine`: mola's server has all of them."
        )
    if adapters and options.base_name is not None:
        raise MolaError(
            f"`base_name` must be left out with `engine` vllm and an adapter, got {options.base_name!r}: the base "
            "model is not served beside it."
        )
    if options.port == 0:
        raise MolaError("`port` must be from 1 to 65535 with `engine` vllm, which does not tell a free one: got 0.")
    name = next(iter(adapters), base_name)
    limits = _GREEDY | {"max_new_tokens": options.max_tokens}
    words = ["-m", _SERVER, "--model", options.base_model, "--served-model-name", name]
    words += ["--host", options.host, "--port", str(options.port), "--dtype", options.dtype]
    words += ["--override-generation-config", json.dumps(limits)]
    words += ["--trust-remote-code"] if options.trust_remote_code else []
    for folder in adapters.values():
        words += ["--load-format", "mola", "--model-loader-extra-config", json.dumps({"adapter": folder})]
    return words
