"""`mola serve`: an HTTP server with OpenAI's interface for a base model and its adapters.

- `main` is the command. `running_server` runs the same server inside a program.
- Answers are generated side by side in one batch; see `mola.generation.batching`.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from mola.errors import MolaError
from mola.generation import predicting
from mola.generation.batching.forward import Adapters
from mola.models.adapters import changes_base, check_adapter
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.prompts import own_chats, warn_of_unknown_tokens
from mola.options.fields import check_positive
from mola.serving.options import ServeOptions, last_part, split_adapter

logger = logging.getLogger(__name__)

_KEY_VARIABLE = "MOLA_API_KEY"
_EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def main(options: ServeOptions) -> int:
    """Run the command until SIGINT or SIGTERM; the exit code is 1 if the server did not start.

    Raises:
        MolaError: wrong options, before the model is loaded.
    """
    if options.engine == "vllm":
        from mola.serving.vllm_command import run_vllm

        return run_vllm(options, base_name(options), adapter_folders(options), _api_key(options))
    with _prepared_server(options) as (server, bound, _):
        from mola.serving.server import ignore_signals_after_shutdown

        with ignore_signals_after_shutdown():
            return 0 if server.run_on(bound) else 1


@contextlib.contextmanager
def running_server(options: ServeOptions) -> Iterator[str]:
    """Run a server in a thread of this program during a `with` block.

    Args:
        options: the options of `mola serve`.

    Yields:
        The server's address, such as `http://127.0.0.1:8000`. OpenAI's clients need `/v1` appended to it.

    Raises:
        MolaError: wrong options, before the model is loaded.
    """
    with _prepared_server(options) as (server, bound, url):
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
def _prepared_server(options: ServeOptions) -> Iterator[tuple[Any, Any, str]]:
    """Check the options and load the model; yield the `Server`, its bound socket and its URL."""
    if options.engine != "mola":
        raise MolaError(f"`engine` must be mola, or vllm in the command `mola serve`: got {options.engine!r}.")
    if not all(map(find_spec, _EXTRA)):
        raise MolaError(
            "`mola serve` needs fastapi, uvicorn and prometheus-client. Run: pip install 'mola-peft[serve]'"
        )
    from mola.serving.server import bind, is_loopback, url_of

    # With sizes below 1 no answer would ever begin.
    check_positive(max_batch_size=options.max_batch_size, max_batch_prefill_tokens=options.max_batch_prefill_tokens)
    api_key = _api_key(options)
    if options.adapter_root is not None and api_key is None:
        raise MolaError(f"`adapter_root` lets clients change what is served, so it needs a token. Set {_KEY_VARIABLE}.")
    check_model(options)
    folders = adapter_folders(options)
    if api_key is None and not is_loopback(options.host):
        logger.warning(
            "Anyone who reaches %s can use this server: it accepts connections from other machines and needs no token. "
            "Set %s.",
            options.host,
            _KEY_VARIABLE,
        )
    with bind(options.host, options.port) as bound:
        url = url_of(bound)
        yield _load_server(options, folders, api_key, url), bound, url


def _load_server(options: ServeOptions, folders: dict[str, str], api_key: str | None, url: str) -> Any:
    """Load the model with its adapters and build the `Server`."""
    from mola.serving.adapter_loading import AdapterLoader
    from mola.serving.app import build_app
    from mola.serving.engine_choice import choose_engine
    from mola.serving.jobs import JobMaker, Limits
    from mola.serving.metrics import Metrics
    from mola.serving.request_queue import RequestQueue
    from mola.serving.server import Server
    from mola.serving.stream_writer import TokenDecoder

    has_base = not _changes_base_model(options, folders)
    chats = own_chats(folders)
    tokenizer = tokenizer_for(options)
    for name, chat in chats.items():
        warn_of_unknown_tokens(folders[name], chat, tokenizer)
    # PEFT allows no dots in an adapter's name, but requests may use names with dots.
    inner_names = {name: f"served{number}" for number, name in enumerate(folders)}
    model = model_for(options, {inner_names[name]: folder for name, folder in folders.items()})
    names = {base_name(options): None, **inner_names} if has_base else inner_names

    adapters, metrics = Adapters(model), Metrics()
    engine, max_total_tokens = choose_engine(
        adapters,
        tokenizer,
        options.max_batch_size,
        options.max_batch_prefill_tokens,
        options.max_batch_total_tokens,
    )
    limits = Limits(
        options.max_tokens,
        options.max_choices,
        predicting.positions_left(model),
        max_total_tokens,
        predicting.num_embeddings(model),
    )
    jobs = JobMaker(tokenizer, names, limits, {inner_names[name]: chat for name, chat in chats.items()})
    decoder = TokenDecoder(tokenizer, predicting.end_token_ids(model, tokenizer))
    max_running = options.max_batch_size if max_total_tokens else 1
    queue = RequestQueue(adapters, engine, decoder, max_running, options.max_waiting, metrics)

    loader = AdapterLoader(options.adapter_root, options, jobs, queue, adapters)
    app = build_app(jobs, queue, loader, decoder, metrics, api_key, options.max_body_bytes)
    greeting = f"Serving {', '.join(names)} on {url}"
    return Server(app, queue, options.max_connections, options.shutdown_timeout, greeting)


def _changes_base_model(options: ServeOptions, folders: dict[str, str]) -> bool:
    """Whether an adapter changes the base model itself, as trained biases do. Such an adapter must be served alone.

    Raises:
        MolaError: an adapter that changes the base model is not the only adapter.
    """
    for name, folder in folders.items():
        reason = changes_base(check_adapter(folder))
        if reason is None:
            continue
        if len(folders) > 1 or options.adapter_root is not None:
            raise MolaError(
                f"`adapter` {folder!r} {reason}, which would change the base model and all other adapters. Serve it "
                "alone: leave out the other adapters and `adapter_root`."
            )
        logger.warning("The base model has no name here: %r %s.", name, reason)
        return True
    return False


def base_name(options: ServeOptions) -> str:
    """Name of the base model in requests."""
    if options.base_name is not None:
        return options.base_name
    return last_part(options.base_model) if os.path.isdir(options.base_model) else options.base_model


def adapter_folders(options: ServeOptions) -> dict[str, str]:
    """The folder of every adapter by its name in requests, in the order given.

    Raises:
        MolaError: a name or folder is empty, or two adapters have the same name.
    """
    name_of_base = base_name(options)
    folders: dict[str, str] = {}
    for text in options.adapter or []:
        name, folder = split_adapter(text)
        if name in folders or name == name_of_base:
            other = "the base model" if name == name_of_base else repr(folders[name])
            raise MolaError(
                f"`adapter` {folder!r} has the name {name!r}, which {other} already has. Rename it: NEW_NAME={folder}."
            )
        folders[name] = folder
    return folders


def _api_key(options: ServeOptions) -> str | None:
    """The token that clients must send; the option wins over the environment variable. None if neither is set."""
    source, key = "`api_key`", options.api_key
    if key is None:
        source, key = f"the environment variable {_KEY_VARIABLE}", os.environ.get(_KEY_VARIABLE)
    # An empty token would protect nothing, and no client could send a token with blanks or characters outside ASCII.
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise MolaError(f"{source} must be a token of visible ASCII characters, at least one.")
    return key
