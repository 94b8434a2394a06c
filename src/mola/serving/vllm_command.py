"""`mola serve --engine vllm`: replaces this process by vLLM's own server; see docs/guides/vllm.md."""

import dataclasses
import importlib.util
import json
import logging
import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mola._process import SET
from mola.checkpoints.adapter_settings import adapter_settings
from mola.checkpoints.plain_lora import check_plain_lora
from mola.errors import MolaError
from mola.models.adapters import check_adapter
from mola.models.base_model import check_base_model
from mola.models.prompts import CHAT_TEMPLATE, Chat, end_token_of, own_chats
from mola.tuner import MolaConfig

logger = logging.getLogger(__name__)

_SERVER = "vllm.entrypoints.openai.api_server"
KEY_VARIABLE = "VLLM_API_KEY"
SUPPORTED_OPTIONS = (
    "base_model",
    "adapter",
    "base_name",
    "host",
    "port",
    "api_key",
    "dtype",
    "trust_remote_code",
    "max_tokens",
    "engine",
)
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts as `--max-lora-rank`
_UNSUPPORTED_SETTINGS = {
    "modules_to_save": "modules trained in full",
    "target_parameters": "experts of stacked parameters",
    "trainable_token_indices": "trained embeddings",
}
_ADVICE = "Serve this adapter with `mola serve`, without --engine vllm."
# Like in mola's server, answers are greedy unless a request asks for sampling, whatever the base model's defaults are.
_GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def run_vllm(options: Any, base_name: str, adapters: Mapping[str, str], api_key: str | None) -> int:
    """Replace this process by vLLM's server.

    Args:
        options: the options of `mola serve`.
        base_name: the base model's name in requests, if there is no adapter.
        adapters: name in requests -> folder.
        api_key: token that clients must send. vLLM gets the token as an environment variable, because
            other users can read the command.

    Returns:
        The exit code, on systems that cannot replace a process.

    Raises:
        MolaError: vLLM is missing, or it cannot serve what the options ask for.
    """
    command = [sys.executable, *vllm_arguments(options, base_name, adapters)]
    check_installed()
    check_base_model(options.base_model)
    for folder in adapters.values():
        (check_adapter if _is_lora(folder) else check_servable)(folder)
    for name, chat in own_chats(adapters).items():
        command += _chat_arguments(adapters[name], chat, options.base_model)
    environment = {name: value for name, value in os.environ.items() if name not in SET}
    if api_key is not None:
        environment[KEY_VARIABLE] = api_key
    logger.info("Running: %s", shlex.join(command))
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def check_installed() -> None:
    """Raise if vLLM is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise MolaError("`engine` vllm needs vLLM, for Linux. Run: pip install 'mola-peft[vllm]'")


def check_servable(folder: str) -> MolaConfig:
    """Check that vLLM can serve the mixture in a folder; return its configuration.

    Raises:
        MolaError: the folder holds no complete adapter, its adapter is no mixture, or trains more than linears.
    """
    found = check_adapter(folder)
    if found["peft_type"] != "MOLA":
        raise MolaError(
            f"`adapter` must be a mixture for vLLM's load format `mola`: {folder!r} is of type {found['peft_type']!r}. "
            "For a LoRA leave the load format out: `mola serve --engine vllm` passes it as `--lora-modules`."
        )
    config = MolaConfig.from_pretrained(folder)
    for name, content in _UNSUPPORTED_SETTINGS.items():
        if value := getattr(config, name):
            raise MolaError(f"`{name}` must be empty for vLLM: {folder!r} has {content}, {value!r}. {_ADVICE}")
    if config.bias != "none":
        raise MolaError(f"`bias` must be 'none' for vLLM: {folder!r} has {config.bias!r}, trained biases. {_ADVICE}")
    return config


def _is_lora(folder: str) -> bool:
    return adapter_settings(folder)["peft_type"] == "LORA"


def _chat_arguments(folder: str, chat: Chat, base_model: str) -> list[str]:
    """Arguments of vLLM's server for an adapter that has its own chat template."""
    base_end = end_token_of(base_model)
    if chat.end_token is not None and chat.end_token != base_end:
        logger.warning(
            "%r ends its answers with %r, but vLLM's server stops at the base model's end token, %s. Clients must send "
            "the adapter's end token as `stop`.",
            folder,
            chat.end_token,
            "which is not known before it starts" if base_end is None else repr(base_end),
        )
    path = Path(folder, CHAT_TEMPLATE)
    if path.is_file():
        return ["--chat-template", str(path)]
    logger.warning(
        "%r has its chat template in tokenizer_config.json, which vLLM's server does not read. Write the template to "
        "%s in the same folder.",
        folder,
        CHAT_TEMPLATE,
    )
    return []


def vllm_arguments(options: Any, base_name: str, adapters: Mapping[str, str]) -> list[str]:
    """Arguments of Python that start vLLM's server; see `run_vllm` for the parameters.

    Raises:
        MolaError: there are several adapters, or an option has no counterpart in vLLM's server.
    """
    check_options(options, SUPPORTED_OPTIONS)
    address = ["--host", options.host, "--port", str(options.port)]
    if adapters and all(map(_is_lora, adapters.values())):
        return [*server_arguments(options, [base_name]), *address, *lora_arguments(adapters)]
    if len(adapters) > 1:
        raise MolaError(
            f"`adapter` must be one mixture, or LoRAs, with `engine` vllm: got {', '.join(adapters)}. Start a server "
            "for each, on its own port, or leave out `engine`: mola's server serves all mixtures."
        )
    if adapters and options.base_name is not None:
        raise MolaError(
            f"`base_name` must be left out with `engine` vllm and a mixture, got {options.base_name!r}: the base "
            "model is not served beside the mixture."
        )
    words = server_arguments(options, [next(iter(adapters), base_name)])
    words += address
    for folder in adapters.values():
        words += ["--load-format", "mola", "--model-loader-extra-config", json.dumps({"adapter": folder})]
    return words


def lora_arguments(adapters: Mapping[str, str | Path]) -> list[str]:
    """Arguments of vLLM's server for LoRAs, by their names in requests.

    Raises:
        MolaError: vLLM would compute something else.
    """
    highest = 1
    for folder in adapters.values():
        settings = check_plain_lora(folder, "`adapter` for vLLM")
        highest = max(highest, settings["r"])
        for name in ("rank_pattern", "alpha_pattern"):
            if settings.get(name):
                raise MolaError(f"`{name}` must be empty: vLLM ignores that of {str(folder)!r}. {_ADVICE}")
    rank = next((rank for rank in _RANKS if rank >= highest), highest)
    modules = [json.dumps({"name": name, "path": os.path.abspath(path)}) for name, path in adapters.items()]
    return ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", *modules]


def check_options(options: Any, supported: Collection[str]) -> None:
    """Refuse options that are neither `supported` nor at their defaults.

    Raises:
        MolaError: an option has no counterpart in vLLM's server.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in supported and value != field.default:
            raise MolaError(
                f"`{field.name}` must be left out with `engine` vllm, whose server has no such option: got {value!r}. "
                "vLLM's own command, which the log shows, accepts vLLM's options."
            )


def server_arguments(options: Any, names: Sequence[str]) -> list[str]:
    """Arguments of Python for vLLM's server with the base model under some names, without an address or an adapter."""
    defaults = _GREEDY | {"max_new_tokens": options.max_tokens}
    words = ["-m", _SERVER, "--model", options.base_model, "--served-model-name", *names, "--dtype", options.dtype]
    words += ["--override-generation-config", json.dumps(defaults)]
    return [*words, "--trust-remote-code"] if options.trust_remote_code else words
