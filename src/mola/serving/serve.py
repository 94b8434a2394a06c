"""`mola serve`: an HTTP server with OpenAI's interface for a base model and its adapters.

- `main` is the command; `running_server` is the same inside a program.
- Answers run side by side in one batch; see `mola.generation.batching`.
"""

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from mola.errors import MolaError
from mola.generation import predicting
from mola.generation.batching.forward import Adapters
from mola.models.loading import check_adapter_fits
from mola.models.options import ModelOptions, check_model, model_for, tokenizer_for
from mola.models.prompts import own_chats, warn_of_unknown_tokens
from mola.options.fields import START, Group, option
from mola.serving.addresses import bind, is_loopback
from mola.serving.option_checks import check_neighbours, check_numbers, warn_of_few_files

if TYPE_CHECKING:
    from mola.serving.server import Server

logger = logging.getLogger(__name__)

_KEY_VARIABLE = "MOLA_API_KEY"
_FULL = "vLLM answers more at once, with one adapter: pip install 'mola-peft[vllm]', `mola serve --engine vllm`."


@dataclass
class ServeOptions(ModelOptions):
    """Options of `mola serve`."""

    _start: ClassVar = START
    adapter: list[str] | None = option(
        None,
        "Adapters, each NAME=FOLDER or FOLDER, which is then named after its last part; those of several flags and of "
        "a recipe add up.",
        action="extend",
    )
    engine: str = option("mola", "Who answers: mola, or vllm, whose own server is started with at most one adapter.")
    base_name: str | None = option(None, "Name of the base model in requests; by default the last part of a folder.")
    host: str = option("127.0.0.1", "Address to listen on; by default this machine alone can connect.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Token that clients must send; better in the environment, as MOLA_API_KEY."},
    )

    adapter_root: str | None = option(
        None, "Folder below which adapters may be loaded while the server runs; needs a token."
    )

    _batch: ClassVar = Group("batch")
    max_batch_size: int = option(32, "Answers made side by side; 1 makes one after the other.")
    max_batch_prefill_tokens: int = option(256, "Tokens of prompts read between two tokens of running answers.")
    max_batch_total_tokens: int | None = option(
        None,
        "Answers side by side times the longest, prompt included; by default what a quarter of free memory holds.",
    )

    _limits: ClassVar = Group("limits")
    max_tokens: int = option(1024, "Longest answer a request may ask for, in tokens.")
    max_choices: int = option(16, "Most answers of one request: prompts times n.")
    max_waiting: int = option(128, "Requests besides `max_batch_size` of them; further ones get status 429.")
    max_body_bytes: int = option(1 << 20, "Longest body of a request.")
    max_connections: int = option(256, "Connections at the same time; further ones are sent away with status 503.")
    client_timeout: float = option(
        60.0, "Seconds in which a client must have sent a request in full, and must take what is sent to it."
    )
    shutdown_timeout: float = option(30.0, "Seconds that running answers get to finish when the server is stopped.")


def main(options: ServeOptions) -> int:
    """Run the command until SIGINT or SIGTERM; the exit code is 1 if the server did not start.

    Raises:
        MolaError: wrong options, before the model is loaded.
    """
    if options.engine == "vllm":
        from mola.serving.vllm_command import run_vllm

        check_numbers(options)
        return run_vllm(options, base_name(options), adapter_folders(options), _api_key(options))
    with _prepared(options) as (server, bound, _):
        from mola.serving.server import signals_end_quietly

        with signals_end_quietly():
            return 0 if server.run_on(bound) else 1


@contextlib.contextmanager
def running_server(options: ServeOptions) -> Iterator[str]:
    """A server in a thread of this program, for the length of a `with` block.

    Args:
        options: as of the command.

    Yields:
        Its address, such as `http://127.0.0.1:8000`; clients of OpenAI's want `/v1` after it.

    Raises:
        MolaError: wrong options, before the model is loaded.
    """
    with _prepared(options) as (server, bound, url):
        thread = threading.Thread(target=server.run_on, args=[bound], name="mola-serve")
        thread.start()
        try:
            while thread.is_alive() and not server.started:
                time.sleep(0.01)
            if not server.started:
                raise RuntimeError("the server did not start; its log says why")
            yield url
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _prepared(options: ServeOptions) -> Iterator[tuple["Server", Any, str]]:
    """Everything checked and loaded: the server, its socket and its address."""
    if options.engine != "mola":
        raise MolaError(f"`engine` must be mola, or vllm in the command `mola serve`: got {options.engine!r}.")
    from transformers.utils.import_utils import is_fastapi_available, is_uvicorn_available

    if not (is_fastapi_available() and is_uvicorn_available() and find_spec("prometheus_client")):
        raise MolaError(
            "`mola serve` needs fastapi, uvicorn and prometheus-client. Run: pip install 'mola-peft[serve]'"
        )
    from mola.serving.app import build_app
    from mola.serving.connections import Connection
    from mola.serving.engines import engine_for
    from mola.serving.guard import Checks
    from mola.serving.jobs import JobMaker, Limits
    from mola.serving.metrics import Metrics
    from mola.serving.queue import AnswerQueue
    from mola.serving.server import Server, url_of
    from mola.serving.shelf import Shelf

    check_numbers(options)
    warn_of_few_files(options.max_connections)
    api_key = _api_key(options)
    if options.adapter_root is not None and api_key is None:
        raise MolaError(f"`adapter_root` lets clients change what is served, so it needs a token. Set {_KEY_VARIABLE}.")
    check_model(options)
    folders = adapter_folders(options)
    alone = check_neighbours(folders, options.adapter_root)
    chats = own_chats(folders)
    tokenizer = tokenizer_for(options)
    for name, chat in chats.items():
        warn_of_unknown_tokens(folders[name], chat, tokenizer)
    with bind(options.host, options.port) as bound:
        # Names inside the model are ours: PEFT takes no dots, requests do.
        inside = {name: f"served{number}" for number, name in enumerate(folders)}
        model = model_for(options, {inside[name]: folder for name, folder in folders.items()})
        names = inside if alone else {base_name(options): None, **inside}
        adapters, metrics = Adapters(model), Metrics()
        batch = options.max_batch_size, options.max_batch_prefill_tokens, options.max_batch_total_tokens
        engine, total = engine_for(adapters, tokenizer, *batch)
        known = predicting.positions_left(model), total, predicting.num_tokens(model)
        limits = Limits(options.max_tokens, options.max_choices, *known)
        jobs = JobMaker(tokenizer, names, limits, {inside[name]: chat for name, chat in chats.items()})
        running = options.max_batch_size if total else 1
        queue = AnswerQueue(adapters, engine, tokenizer, running, options.max_waiting, metrics, _FULL)
        metrics.watch(queue.counts)
        checks = Checks(api_key, options.max_body_bytes, is_local=api_key is None and is_loopback(options.host))

        def check(folder: str) -> None:
            check_adapter_fits(options.base_model, folder, options.trust_remote_code, options.gguf_file)

        app = build_app(jobs, queue, Shelf(options.adapter_root, jobs, queue, adapters, check), metrics, checks)
        if api_key is None and not is_loopback(options.host):
            logger.warning(
                "Anyone who reaches %s can use this server: `host` is not this machine alone and no token is set. "
                "Set %s.",
                options.host,
                _KEY_VARIABLE,
            )
        url = url_of(bound)
        greeting = f"Serving {', '.join(names)} on {url}"
        protocol = functools.partial(Connection, options.max_connections, options.client_timeout)
        yield Server(app, queue, protocol, options.shutdown_timeout, greeting), bound, url


def base_name(options: ServeOptions) -> str:
    """Name of the base model in requests."""
    if options.base_name is not None:
        return options.base_name
    return _last_part(options.base_model) if os.path.isdir(options.base_model) else options.base_model


def adapter_folders(options: ServeOptions) -> dict[str, str]:
    """Name in requests -> folder of every adapter, in the order given.

    Raises:
        MolaError: an empty name or folder, or a name twice.
    """
    taken = base_name(options)
    if not taken:
        raise MolaError("`base_name` must not be empty. Leave it out to name the model after its folder.")
    folders: dict[str, str] = {}
    for text in options.adapter or []:
        # A folder may have an equals sign in its own name; `Path.is_dir` fails for what no file can be called.
        name, equals, folder = ("", "", text) if os.path.isdir(text) else text.partition("=")
        if not equals:
            name, folder = _last_part(text), text
        if not name or not folder:
            raise MolaError(f"`adapter` must be NAME=FOLDER or FOLDER: got {text!r}.")
        if name in folders or name == taken:
            whose = "the base model" if name == taken else repr(folders[name])
            raise MolaError(f"`adapter` {folder!r} is named {name!r}, as is {whose}. Name it: OTHER_NAME={folder}.")
        folders[name] = folder
    return folders


def _last_part(folder: str) -> str:
    """The name a folder goes by: of a link its own, of `.` the real one."""
    return os.path.basename(os.path.abspath(folder))


def _api_key(options: ServeOptions) -> str | None:
    """The token; the option wins over the environment."""
    source, key = ("`api_key`", options.api_key)
    if key is None:
        source, key = (f"the environment variable {_KEY_VARIABLE}", os.environ.get(_KEY_VARIABLE))
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        # The message does not repeat it: it may be a token with one wrong character.
        raise MolaError(f"{source} must be a token of visible ASCII characters, at least one. Pass such a one.")
    return key
