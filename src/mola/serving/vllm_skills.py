"""`mola serve --engine vllm` with a skills folder: vLLM's own multi-LoRA server behind a proxy that decides.

vLLM runs in a process of its own, which only this user reaches. The proxy holds the base model's layers below the
decision, and is what clients see; see `mola.serving.skills_proxy`.
"""

import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import httpx

from mola._process import SET
from mola.checkpoints.skills_folder import SkillsFolder, read_skills
from mola.errors import MolaError
from mola.models.from_options import check_model, model_for, tokenizer_for
from mola.serving.model_names import (
    chats_of_skills,
    greeting,
    listed,
    name_behind,
    skill_model_names,
    warn_of_templates,
)
from mola.serving.server import Server, bind, ignore_signals_after_shutdown, url_of
from mola.serving.skill_loading import SkillLoader
from mola.serving.skills_proxy import SkillsProxy
from mola.serving.vllm_command import KEY_VARIABLE, SUPPORTED_OPTIONS, check_options, lora_arguments, server_arguments
from mola.tuner.skills.loras import DEFAULT_MAX_LOADED
from mola.tuner.skills.lower_layers import decoder_layers

logger = logging.getLogger(__name__)

_OPTIONS = ("device", "adapter_root", "max_loaded_skills", "max_body_bytes", "max_connections", "shutdown_timeout")
_MAX_LORAS = 16  # in one batch of vLLM, which reserves memory for them; more than these take turns
_KILL_AFTER = 20.0  # seconds that vLLM gets to end
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def run_vllm_skills(options: Any, name: str, folder: str, base_name: str, api_key: str | None) -> int:
    """Run vLLM's server and the proxy until SIGINT or SIGTERM.

    Args:
        options: the options of `mola serve`.
        name: name of the skills folder in requests.
        folder: the skills folder.
        base_name: name of the base model in requests.
        api_key: token that clients must send.

    Returns:
        The exit code: 1 if vLLM ended by itself.

    Raises:
        MolaError: vLLM is missing, or it cannot serve what the options ask for.
    """
    check_options(options, (*SUPPORTED_OPTIONS, *_OPTIONS))
    skills = read_skills(folder)
    names = skill_model_names(name, skills, base_name)
    names_behind: dict[str | None, str] = {None: base_name}
    names_behind |= {skill: name_behind(skill, skills.adapter(skill)) for skill in skills.names}
    options = copy(options)
    options.device = options.device or "cpu"  # vLLM reserves most of a GPU's memory
    check_model(options)
    warn_of_templates(skills)
    with bind(options.host, options.port) as bound, tempfile.TemporaryDirectory(prefix="mola-vllm-") as private:
        socket = os.path.join(private, "socket")
        command = [sys.executable, *vllm_skills_arguments(options, names_behind, skills, socket)]
        with _running(command, _environment(api_key, options.adapter_root)) as vllm:
            model = load_lower_layers(options, folder)  # while vLLM starts
            vllm.wait_until_ready(socket)
            headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
            client = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=socket, limits=httpx.Limits(max_connections=None)),
                base_url="http://vllm",
                headers=headers,
                timeout=None,
            )
            tokenizer = tokenizer_for(options)
            if own := chats_of_skills(skills, tokenizer):
                logger.warning(
                    "vLLM's server writes all chats with the base model's chat template. These skills have their own: "
                    "%s. Send their prompts as text to /v1/completions.",
                    listed([*own]),
                )
            proxy = SkillsProxy(client, names, names_behind, model, tokenizer)
            loader = SkillLoader(options.adapter_root, skills, proxy.names, proxy.add_skill, proxy.remove_skill)
            app = proxy.app(loader, api_key, options.max_body_bytes)
            message = greeting(names, url_of(bound))
            server = Server(app, vllm, options.max_connections, options.shutdown_timeout, message)
            vllm.on_end(server)
            with ignore_signals_after_shutdown():
                return 0 if server.run_on(bound) and not vllm.has_failed else 1


def vllm_skills_arguments(
    options: Any, names_behind: Mapping[str | None, str], skills: SkillsFolder, socket: str
) -> list[str]:
    """Arguments of Python that start vLLM's server with the LoRAs of a skills folder, on a Unix domain socket."""
    max_loaded = options.max_loaded_skills or DEFAULT_MAX_LOADED
    may_grow = options.adapter_root is not None
    max_loras = min(_MAX_LORAS, max_loaded, _MAX_LORAS if may_grow else len(skills.names))
    words = [*server_arguments(options, [names_behind[None]]), "--uds", socket]
    words += ["--max-loras", str(max_loras), "--max-cpu-loras", str(max_loaded)]
    return words + lora_arguments({names_behind[name]: skills.adapter(name) for name in skills.names})


def _environment(api_key: str | None, adapter_root: str | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in SET}
    environment |= {} if api_key is None else {KEY_VARIABLE: api_key}
    return environment | ({} if adapter_root is None else {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})


def load_lower_layers(options: Any, folder: str) -> Any:
    """The model with its skills, without the memory of the layers that the decision does not need."""
    model: Any = model_for(options, folder)
    for layer in decoder_layers(model)[model.skills.layer :]:
        layer.to("meta")
    return model


class _Vllm:
    """vLLM's process, with the methods of a queue that `Server` calls."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self._is_stopping = process, False

    @property
    def has_failed(self) -> bool:
        """Whether the process has ended by itself."""
        return not self._is_stopping and self._process.poll() is not None

    def wait_until_ready(self, socket: str) -> None:
        """Wait until the server answers.

        Raises:
            MolaError: the process ends first.
        """
        with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://vllm") as client:
            while (code := self._process.poll()) is None:
                try:
                    if client.get("/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
        raise MolaError(f"`engine` vllm: vLLM's server ended with exit code {code} before it was ready; see its log.")

    def on_end(self, server: Server) -> None:
        """Stop `server` when the process ends."""

        def watch() -> None:
            code = self._process.wait()
            if not self._is_stopping:
                logger.critical("vLLM's server ended with exit code %d; its log says why.", code)
                server.should_exit = True

        threading.Thread(target=watch, name="mola-watch-vllm", daemon=True).start()

    def stop(self) -> None:
        """Nothing to do: the proxy accepts no more requests, and the running ones finish."""

    def abort(self) -> None:
        """End all answers."""
        self._is_stopping = True
        self._process.terminate()

    def close(self) -> None:
        """End the process, and wait for its end."""
        self.abort()
        try:
            self._process.wait(_KILL_AFTER)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def _running(command: list[str], environment: Mapping[str, str]) -> Iterator[_Vllm]:
    """Run a command during a `with` block; it also ends if this process is killed."""
    logger.info("Running: %s", shlex.join(command))

    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)

    # A session of its own: Ctrl-C reaches this process alone, which lets running answers finish.
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
    vllm = _Vllm(process)
    try:
        yield vllm
    finally:
        vllm.close()
