"""Adapters that are loaded and unloaded while the server runs. Running requests keep the adapter they began with."""

import asyncio
import functools
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel
from starlette.concurrency import run_in_threadpool

from mola._compat import set_adapter_to_infer
from mola.generation.batching.forward import Adapters, is_activated_lora
from mola.models.adapters import attach, changes_base, check_adapter
from mola.models.loading import check_adapter_fits
from mola.models.options import ModelOptions
from mola.models.prompts import own_chat
from mola.serving.adapter_root import AdapterRoot, wrong_folder, wrong_name
from mola.serving.jobs import JobMaker
from mola.serving.request_queue import RequestQueue
from mola.serving.responses import RequestError

# With an adapter that has one of these, rows with different adapters may not share a batch; see `why_not_mixed`.
_MAY_PREVENT_MIXING = ("modules_to_save", "target_parameters", "trainable_token_indices", "use_dora")


class AdapterLoader:
    """Loads and unloads the adapters of a server.

    Args:
        root: folder below which adapters may be loaded; None if clients may not load any.
        base: options of the base model, which adapters must fit.
        jobs: holds the adapters' names and chat formats.
        queue: the queue that owns the model.
        adapters: the model's adapters.
    """

    def __init__(
        self, root: str | None, base: ModelOptions, jobs: JobMaker, queue: RequestQueue, adapters: Adapters
    ) -> None:
        self._root = AdapterRoot(root)
        self._base, self._jobs, self._queue, self._adapters = base, jobs, queue, adapters
        self._num_loaded = 0
        self._loading = asyncio.Lock()  # two loads at once could choose the same name

    async def load(self, name: str, path: str, in_place: bool) -> None:
        """Load the adapter in a folder below the root under a name; `in_place` replaces an adapter with the same name.

        Raises:
            RequestError: loading is not allowed, the name is taken, or the adapter cannot be loaded into a running
                server.
            MolaError: the folder holds no adapter, or one that does not fit.
        """
        folder = self._root.folder(path)
        async with self._loading:
            replaced = self._jobs.adapters.get(name)
            if name in self._jobs.adapters and replaced is None:
                raise wrong_name(f"`lora_name` {name!r} is the name of the base model. Pass a different name.")
            if replaced is not None and not in_place:
                advice = "Pass a different name, or `load_inplace` true to replace the adapter."
                raise wrong_name(f"`lora_name` {name!r} is taken. {advice}")
            config = await run_in_threadpool(_check_loadable, folder)
            chat = await run_in_threadpool(own_chat, folder)
            self._num_loaded += 1
            inner_name = f"loaded{self._num_loaded}"  # names in requests may have dots, PEFT's may not
            await self._queue.call(functools.partial(self._attach, inner_name, folder, config))
            replaced = self._jobs.adapters.get(name)  # a client may have unloaded it meanwhile
            if chat is not None:
                self._jobs.chats[inner_name] = chat
            self._jobs.adapters[name] = inner_name
        if replaced is not None:
            await self._remove(replaced)

    async def unload(self, name: str) -> None:
        """Remove a name at once, and its adapter from memory when the last answer that uses the adapter has ended.

        Raises:
            RequestError: unloading is not allowed, there is no such adapter, or it is the base model.
        """
        self._root.check_allowed()
        inner_name = self._jobs.adapter(name)
        if inner_name is None:
            raise wrong_name(f"`lora_name` {name!r} is the base model, which cannot be unloaded.")
        del self._jobs.adapters[name]
        await self._remove(inner_name)

    async def _remove(self, inner_name: str) -> None:
        await self._queue.remove(inner_name)
        self._jobs.chats.pop(inner_name, None)

    def _attach(self, inner_name: str, folder: str, config: Mapping[str, Any]) -> None:
        """Load an adapter into the model; runs on the engine's thread.

        `check_adapter_fits` runs on this thread, too: it builds a model without weights, for which Transformers changes
        the default dtype of all threads.
        """
        base = self._base
        check_adapter_fits(base.base_model, folder, base.trust_remote_code, base.gguf_file)
        setting = next((name for name in _MAY_PREVENT_MIXING if config.get(name)), None)
        if setting is not None and self._queue.is_mixed:
            raise RequestError(
                409,
                f"with an adapter that has `{setting}`, answers may have to take turns, and answers with different "
                "adapters are being generated together now. Try again when those answers have ended, or name the "
                "adapter in `--adapter`.",
                param="lora_path",
            )
        model = self._adapters.model
        try:
            model = attach(model, inner_name, folder)
        except Exception:
            if isinstance(model, PeftModel) and inner_name in model.peft_config:
                model.delete_adapter(inner_name)
            raise
        # With tied embeddings PEFT activates the trained token embeddings of the adapter that was loaded last.
        set_adapter_to_infer(model, model.active_adapter)
        self._adapters.model = model.requires_grad_(False).eval()


def _check_loadable(folder: str) -> Mapping[str, Any]:
    """Check that an adapter can be loaded into a running server; return its configuration."""
    config = check_adapter(folder)
    if (reason := changes_base(config)) is not None:
        raise wrong_folder(
            f"this adapter {reason}, which would change the base model for all other adapters. Serve it alone, with "
            "`--adapter`."
        )
    settings = PeftConfig.from_pretrained(folder)
    if settings.is_prompt_learning or is_activated_lora(settings):
        raise wrong_folder(
            "an adapter that puts tokens before the prompt, or begins at certain tokens of the prompt, cannot be "
            "loaded into a running server. Name it in `--adapter`."
        )
    return config
