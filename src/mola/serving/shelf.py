"""Adapters that come and go while the server runs. Requests in flight keep the one they began with."""

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from starlette.concurrency import run_in_threadpool

from mola._compat import set_adapter_to_infer
from mola.errors import MolaError
from mola.files.failures import lack_of_memory
from mola.generation.batching.forward import Adapters, waits_for_tokens
from mola.models.adapters import attach, changes_base, check_adapter
from mola.models.prompts import own_chat
from mola.serving.errors import RequestError
from mola.serving.jobs import JobMaker
from mola.serving.queue import AnswerQueue

logger = logging.getLogger(__name__)

# What may keep rows with different adapters from going through the model together, see `why_not_mixed`.
_TURNS = ("modules_to_save", "target_parameters", "trainable_token_indices", "use_dora")


class Shelf:
    """Loads and unloads adapters.

    Args:
        root: folder that holds every adapter which may be loaded; None for no loading at all.
        jobs: knows the adapters' names.
        queue: has the model.
        adapters: of the model.
        check: raises a `MolaError` for a folder whose adapter does not fit.
    """

    def __init__(self, root: str | None, jobs: JobMaker, queue: AnswerQueue, adapters: Adapters, check: Any) -> None:
        self._root = None if root is None else Path(root).resolve()
        self._jobs, self._queue, self._adapters, self._check = jobs, queue, adapters, check
        self._count = 0

    async def load(self, name: str, path: str, in_place: bool) -> None:
        """Serve the adapter in a folder below the root under a name; `in_place` replaces one of this name.

        Raises:
            RequestError: not allowed here, or the name is taken.
            MolaError: no adapter there, or it does not fit.
        """
        folder = self._folder(path)
        if not name.strip():
            raise RequestError(400, "`lora_name` must not be empty.", param="lora_name")
        self._check_name(name, in_place)
        config = await run_in_threadpool(check_adapter, folder)
        if (reason := changes_base(config)) is not None:
            raise RequestError(
                400,
                f"this adapter {reason}, which would be so for all others too. Serve it alone, by `--adapter`.",
                param="lora_path",
            )
        try:
            settings = PeftConfig.from_pretrained(folder)
        except (ValueError, TypeError, KeyError) as error:  # PEFT believes what the file says
            raise MolaError(f"`lora_path` must hold settings that PEFT can use: {error}") from error
        if settings.is_prompt_learning or waits_for_tokens(settings):
            raise RequestError(
                400,
                "adapters that put tokens before the prompt, or begin at certain tokens of it, cannot be loaded into a "
                "server that runs: name them in `--adapter`.",
                param="lora_path",
            )
        chat = await run_in_threadpool(own_chat, folder)
        self._count += 1
        inside = f"loaded{self._count}"  # PEFT takes no dots, requests do
        try:
            await self._queue.call(functools.partial(self._attach, inside, folder, config))
        except Exception as error:
            if (lack := lack_of_memory(error)) is None:
                raise
            logger.warning("Out of memory: %s.", lack)
            raise RequestError(503, "the server's memory did not suffice for this adapter.") from error
        try:
            self._check_name(name, in_place)  # others may have been quicker
        except RequestError:
            await self._queue.remove(inside)
            raise
        before = self._jobs.adapters.get(name)
        if chat is not None:
            self._jobs.chats[inside] = chat
        self._jobs.adapters[name] = inside
        if before is not None:
            await self._leave(before)

    async def unload(self, name: str) -> None:
        """Take a name out at once, and its adapter out of memory when the last answer with it has ended.

        Raises:
            RequestError: not allowed here, no such adapter, it is the base model, or PEFT cannot take it out.
        """
        self._allowed()
        inside = self._jobs.adapter(name)
        if inside is None:
            raise RequestError(400, f"`lora_name` {name!r} is the base model, which stays.", param="lora_name")
        if not hasattr(self._adapters.model.base_model, "unload"):
            raise RequestError(
                400,
                f"{name!r} puts tokens before the prompt, and PEFT cannot take such adapters out of a model. It stays "
                "until the server is started without it.",
                param="lora_name",
            )
        del self._jobs.adapters[name]
        await self._leave(inside)

    async def _leave(self, inside: str) -> None:
        await self._queue.remove(inside)
        self._jobs.chats.pop(inside, None)

    def _check_name(self, name: str, in_place: bool) -> None:
        if name not in self._jobs.adapters:
            return
        if self._jobs.adapters[name] is None:
            raise RequestError(400, f"`lora_name` {name!r} is the base model's. Pass another.", param="lora_name")
        if not in_place:
            raise RequestError(
                400,
                f"`lora_name` {name!r} is taken. Pass another, or `load_inplace` true to replace it.",
                param="lora_name",
            )

    def _allowed(self) -> Path:
        if self._root is None:
            raise RequestError(
                403, "adapters cannot be loaded or unloaded here: the server was started without `--adapter_root`."
            )
        return self._root

    def _folder(self, path: str) -> str:
        root = self._allowed()
        try:
            folder = (root / path).resolve()
        except (OSError, ValueError, RuntimeError):  # null characters, circles of links
            folder = root.parent
        if folder == root or not folder.is_relative_to(root):
            raise RequestError(
                400, "`lora_path` must be a folder below the server's `--adapter_root`.", param="lora_path"
            )
        return os.fspath(folder)

    def _attach(self, inside: str, folder: str, config: Mapping[str, Any]) -> None:
        # Here and not beside answers being made: models without weights are built under another default dtype, which is
        # one for all threads.
        self._check(folder)
        if self._queue.is_mixed and (name := next((each for each in _TURNS if config.get(each)), None)):
            raise RequestError(
                409,
                f"beside an adapter with `{name}` answers may have to take turns, and some with different adapters are "
                "being made together. Try again when they have ended, or name it in `--adapter`.",
                param="lora_path",
            )
        model = self._adapters.model
        try:
            model = attach(model, inside, folder)
        except Exception:
            if isinstance(model, PeftModel) and inside in model.peft_config:
                model.delete_adapter(inside)
            raise
        # PEFT makes trained tokens of the last one the active ones, where embeddings are tied.
        set_adapter_to_infer(model, model.active_adapter)
        self._adapters.model = model.requires_grad_(False).eval()
