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
from typing import Any, NamedTuple

from mola.checkpoints.skills_folder import SkillsFolder, read_skills
from mola.errors import MolaError
from mola.generation import predicting
from mola.generation.batching.forward import Adapters
from mola.generation.batching.skills import Skills
from mola.models.adapters import changes_base, check_adapter
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.models.prompts import Chat, own_chats, warn_of_unknown_tokens
from mola.options.fields import check_positive
from mola.serving.model_names import chats_of_skills, greeting, skill_model_names, skills_folder, warn_of_templates
from mola.serving.options import ServeOptions, last_part, split_adapter
from mola.tuner.skills.loras import DEFAULT_MAX_LOADED

logger = logging.getLogger(__name__)

_KEY_VARIABLE = "MOLA_API_KEY"
_EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def main(options: ServeOptions) -> int:
    """Run the command until SIGINT or SIGTERM; the exit code is 1 if the server did not start.

    Raises:
        MolaError: wrong options, before the model is loaded.
    """
    if options.engine == "vllm":
        return _run_vllm(options)
    with _prepared_server(options) as (server, bound, _):
        from mola.serving.server import ignore_signals_after_shutdown

        with ignore_signals_after_shutdown():
            return 0 if server.run_on(bound) else 1


def _run_vllm(options: ServeOptions) -> int:
    folders, api_key = adapter_folders(options), _api_key(options)
    if skills_folder(folders) is None:
        from mola.serving.vllm_command import run_vllm

        return run_vllm(options, base_name(options), folders, api_key)
    from mola.serving.vllm_command import check_installed

    check_installed()
    from mola.serving.vllm_skills import run_vllm_skills

    _check_root(options, api_key)
    ((name, folder),) = folders.items()
    return run_vllm_skills(options, name, folder, base_name(options), api_key)


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
    _check_root(options, api_key)
    check_model(options)
    folders = adapter_folders(options)
    if options.max_loaded_skills is not None and skills_folder(folders) is None:
        raise MolaError(f"`max_loaded_skills` needs a skills folder: got {options.max_loaded_skills} and none.")
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


class _Served(NamedTuple):
    """A loaded model and the names under which requests ask it."""

    adapters: Adapters | Skills
    names: dict[str, str | None]  # name in requests -> the model's name for the adapter, None for the base model
    chats: dict[str, Chat]  # the model's name for an adapter -> its own chat format
    skills_folder: SkillsFolder | None = None


def _load_server(options: ServeOptions, folders: dict[str, str], api_key: str | None, url: str) -> Any:
    """Load the model with its adapters or skills and build the `Server`."""
    from mola.serving.adapter_loading import AdapterLoader
    from mola.serving.app import build_app
    from mola.serving.engine_choice import choose_engine
    from mola.serving.jobs import JobMaker, Limits
    from mola.serving.metrics import Metrics
    from mola.serving.request_queue import RequestQueue
    from mola.serving.server import Server
    from mola.serving.skill_loading import SkillLoader
    from mola.serving.stream_writer import TokenDecoder

    tokenizer = tokenizer_for(options)
    load = _load_adapters if skills_folder(folders) is None else _load_skills
    adapters, names, chats, served_skills = load(options, folders, tokenizer)
    model, metrics = adapters.model, Metrics()
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
    jobs = JobMaker(tokenizer, names, limits, chats)
    decoder = TokenDecoder(tokenizer, predicting.end_token_ids(model, tokenizer))
    max_running = options.max_batch_size if max_total_tokens else 1
    queue = RequestQueue(adapters, engine, decoder, max_running, options.max_waiting, metrics)

    loader: AdapterLoader | SkillLoader
    if served_skills is not None:
        metrics.watch_skills(lambda: len(model.skills.loaded()))
        root = options.adapter_root
        loader = SkillLoader(root, served_skills, jobs.adapters, queue.add_skill, queue.remove_skill, jobs.chats)
    else:
        assert isinstance(adapters, Adapters)
        loader = AdapterLoader(options.adapter_root, options, jobs, queue, adapters)
    app = build_app(jobs, queue, loader, decoder, metrics, api_key, options.max_body_bytes)
    return Server(app, queue, options.max_connections, options.shutdown_timeout, greeting(names, url))


def _load_adapters(options: ServeOptions, folders: dict[str, str], tokenizer: Any) -> _Served:
    """Load the base model with PEFT's adapters."""
    has_base = not _changes_base_model(options, folders)
    chats = own_chats(folders)
    for name, chat in chats.items():
        warn_of_unknown_tokens(folders[name], chat, tokenizer)
    # PEFT allows no dots in an adapter's name, but requests may use names with dots.
    inner_names = {name: f"served{number}" for number, name in enumerate(folders)}
    model = model_for(options, {inner_names[name]: folder for name, folder in folders.items()})
    names: dict[str, str | None] = {base_name(options): None} if has_base else {}
    names |= inner_names
    return _Served(Adapters(model), names, {inner_names[name]: chat for name, chat in chats.items()})


def _load_skills(options: ServeOptions, folders: dict[str, str], tokenizer: Any) -> _Served:
    """Load the base model with the skills of a folder."""
    ((name, folder),), max_loaded = folders.items(), options.max_loaded_skills
    served = read_skills(folder)
    names = skill_model_names(name, served, base_name(options))
    warn_of_templates(served)
    model = model_for(options, folder, DEFAULT_MAX_LOADED if max_loaded is None else max_loaded)
    return _Served(Skills(model), names, chats_of_skills(served, tokenizer), served)


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


def _check_root(options: ServeOptions, api_key: str | None) -> None:
    if options.adapter_root is not None and api_key is None:
        raise MolaError(f"`adapter_root` lets clients change what is served, so it needs a token. Set {_KEY_VARIABLE}.")


def _api_key(options: ServeOptions) -> str | None:
    """The token that clients must send; the option wins over the environment variable. None if neither is set."""
    source, key = "`api_key`", options.api_key
    if key is None:
        source, key = f"the environment variable {_KEY_VARIABLE}", os.environ.get(_KEY_VARIABLE)
    # An empty token would protect nothing, and no client could send a token with blanks or characters outside ASCII.
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise MolaError(f"{source} must be a token of visible ASCII characters, at least one.")
    return key
