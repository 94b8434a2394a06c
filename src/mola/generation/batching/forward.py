"""One forward pass over rows of different lengths and adapters, and which models allow it."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mola._compat import cache_argument, set_adapter_to_infer
from mola.generation import predicting
from mola.generation.batching.cache import RowCache
from mola.generation.batching.skills import Skills
from mola.tuner.mixed_batch import BASE, RowAdapters, why_not_mixed

logger = logging.getLogger(__name__)

# Number of combinations of adapters whose `RowAdapters` are kept. While prompts are read, two combinations alternate.
_MAX_KEPT_BATCHES = 8
_LAYER_TYPES = (DynamicLayer, DynamicSlidingWindowLayer)  # the cache layers that `RowCache` can replace
_UNKNOWN: Any = object()


def why_not_batched(model: Any) -> str | None:
    """None if the answers of a model can share a batch, else the reason why they must take turns."""
    if predicting.prompt_learning_configs(model):
        return "its adapter puts tokens before the prompt"
    if any(map(is_activated_lora, getattr(model, "peft_config", {}).values())):
        return "its adapter begins at certain tokens of the prompt"
    base = predicting.base_of(model)
    if predicting.max_length_of_batched_rope(base.config) is not None:
        return "its position embeddings depend on the longest row of a batch"
    parameters = inspect.signature(base.forward).parameters
    missing = [name for name in ("attention_mask", "position_ids", "logits_to_keep") if name not in parameters]
    if missing or cache_argument(base) is None:
        return f"its `forward` takes no {', '.join(missing) or 'cache'}"
    others = {type(layer).__name__ for layer in _cache_layers(base) if type(layer) not in _LAYER_TYPES}
    return f"its cache has layers that cannot be replaced: {', '.join(sorted(others))}" if others else None


def is_activated_lora(config: Any) -> bool:
    """Whether an adapter is an activated LoRA, which begins at its invocation tokens in the prompt."""
    return bool(getattr(config, "alora_invocation_tokens", None))


def _cache_layers(base: Any) -> list[Any]:
    return DynamicCache(config=base.config).layers


class Adapters:
    """Activates adapters of a model, one for all rows or one for each row.

    Call `refresh` after the model has gained or lost an adapter.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        """Update what is known of the model's adapters."""
        self._disabled = ExitStack()  # holds the context of `disable_adapter` while the base model answers
        self._row_adapters: dict[tuple[str, ...], RowAdapters] = {}
        is_adapted = isinstance(self.model, PeftModel)
        self._active = self.model.active_adapter if is_adapted else None  # None for the base model
        self.can_mix = is_adapted and self._can_mix()

    def _can_mix(self) -> bool:
        """Whether rows with different adapters can share a forward pass."""
        if predicting.prompt_learning_configs(self.model) or why_not_mixed(self.model.base_model) is not None:
            return False
        if RowAdapters.supports(self.model.base_model):
            return True
        # PEFT's own mixing fails for some models, such as those that flatten rows and tokens. A trial shows which.
        names = [*self.model.peft_config, BASE]
        ids = torch.zeros(len(names), 2, dtype=torch.long, device=predicting.device_of(self.model))
        try:
            with predicting.inference_state(self.model):
                self.model(input_ids=ids, adapter_names=names)
        except Exception as error:
            logger.info("Rows with different adapters take turns: %s", error)
            return False
        return True

    def delete(self, name: str) -> None:
        """Remove an adapter from the model."""
        others = [other for other in self.model.peft_config if other != name]
        if not others:  # a `PeftModel` needs at least one adapter
            self.model = self.model.base_model.unload()
            vars(self.model).pop("peft_config", None)  # PEFT 0.18 leaves it on the model
            return
        if self.model.active_adapter == name:
            set_adapter_to_infer(self.model, others[0])
        self.model.delete_adapter(name)

    def restore(self) -> None:
        """Switch adapters on again, if they are off.

        PEFT makes an adapter trainable when it switches it on, and a GPU packs trainable weights at every use. So the
        model is frozen again.
        """
        self._disabled.close()
        self.model.requires_grad_(False)

    @contextmanager
    def activate(self, names: Sequence[str | None], is_lasting: bool) -> Iterator[dict[str, Any]]:
        """Give each row its adapter during a `with` block; None stands for the base model.

        Args:
            names: adapter of each row.
            is_lasting: whether these rows will go through the model again. If so, and if they share one adapter, it is
                faster to switch the whole model to this adapter.

        Yields:
            Further arguments with which the model must be called.
        """
        first = names[0]
        have_same_adapter = all(name == first for name in names)
        if have_same_adapter and (is_lasting or first == self._active or not self.can_mix):
            self._switch(first)
            yield {}
            return
        if self._active is None:  # all adapters are disabled: switch to any of them, because mixing needs them enabled
            self._switch(next(name for name in self.model.peft_config))
        peft_names = [BASE if name is None else name for name in names]
        if not RowAdapters.supports(self.model.base_model):  # PEFT mixes them
            yield {"adapter_names": peft_names}
            return
        key = tuple(peft_names)
        if key not in self._row_adapters:
            if len(self._row_adapters) == _MAX_KEPT_BATCHES:
                self._row_adapters.clear()
            self._row_adapters[key] = RowAdapters(self.model.base_model, peft_names)
        with self._row_adapters[key]:
            yield {}

    def _switch(self, name: str | None) -> None:
        """Make one adapter active for all rows; None for the base model."""
        if name == self._active:
            return
        self.restore()
        self._active = _UNKNOWN  # in case the switch fails
        if name is None:
            self._disabled.enter_context(self.model.disable_adapter())
        elif self.model.active_adapter != name:
            set_adapter_to_infer(self.model, name)
        self._active = name


class Forward:
    """Forward passes of a model for which `why_not_batched` is None."""

    def __init__(self, adapters: Adapters | Skills) -> None:
        base = predicting.base_of(adapters.model)
        self._adapters = adapters  # its model may be replaced when an adapter is loaded or removed
        self._num_layers = len(_cache_layers(base))
        self._cache_name = str(cache_argument(base))
        self._device = predicting.device_of(adapters.model)
        self._last = predicting.last_positions(1, self._device)

    def new_cache(self) -> RowCache:
        """An empty cache."""
        return RowCache(self._num_layers)

    def bytes_per_token(self) -> int:
        """Memory that one token of one row needs in the cache, measured by a forward pass."""
        cache = self.new_cache()
        self(cache, [[0]], [1], {})
        return cache.bytes_per_token()

    def __call__(
        self, cache: RowCache, new_ids: Sequence[Sequence[int]], lengths: Sequence[int], arguments: dict[str, Any]
    ) -> torch.Tensor:
        """Read new tokens of every row and add their keys and values to the cache.

        Args:
            cache: the cache of these rows; it grows by the length of the longest of `new_ids`.
            new_ids: new token ids of each row. If their numbers differ between the rows, the cache must be empty.
            lengths: number of tokens in each row after this pass.
            arguments: further arguments for the model.

        Returns:
            Logits after the last token of each row, float32, `(rows, vocabulary)`.
        """
        width = max(map(len, new_ids))
        num_columns = cache.columns + width
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in new_ids], device=self._device)
        num_unused = torch.tensor([[num_columns - length] for length in lengths], device=self._device)
        columns = torch.arange(num_columns, device=self._device).expand(len(new_ids), -1)
        # Without a mask the model computes faster.
        mask = None if min(lengths) == num_columns else columns >= num_unused
        positions = (columns[:, cache.columns :] - num_unused).clamp(min=0)
        output = self._adapters.model(
            input_ids=ids,
            attention_mask=None if mask is None else mask.long(),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=self._last,
            **{self._cache_name: cache},
            **arguments,
        )
        return output.logits[:, -1].float()
