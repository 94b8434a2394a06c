"""One forward pass over rows of different lengths, each with its adapter; and for which models that can be done."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mola._compat import cache_argument, set_adapter_to_infer
from mola.generation.batching.cache import RowCache
from mola.generation.predicting import base_of, inference_state, last_positions, longest_of_one_rope, prompt_learning
from mola.tuner.mixed_batch import BASE, RowAdapters, why_not_mixed

logger = logging.getLogger(__name__)


def why_not_batched(model: Any) -> str | None:
    """Why answers of a model are made one after the other; None if rows can come and go."""
    if isinstance(model, PeftModel) and prompt_learning(model):
        return "its adapter puts tokens before the prompt"
    if isinstance(model, PeftModel) and any(waits_for_tokens(config) for config in model.peft_config.values()):
        return "its adapter begins at certain tokens of the prompt"
    base = base_of(model)
    if longest_of_one_rope(base.config) is not None:
        return "its position embeddings depend on the longest row of a batch"
    taken = inspect.signature(base.forward).parameters
    missing = [each for each in ("attention_mask", "position_ids", "logits_to_keep") if each not in taken]
    if missing or cache_argument(base) is None:
        return f"its `forward` takes no {', '.join(missing) or 'cache'}"
    others = {type(each).__name__ for each in _layers(base) if type(each) not in _KINDS}
    return f"its cache has layers of another kind: {', '.join(sorted(others))}" if others else None


def waits_for_tokens(config: Any) -> bool:
    """Whether it is an activated LoRA, which looks for its invocation tokens in what a forward pass is given."""
    return bool(getattr(config, "alora_invocation_tokens", None))


_UNKNOWN: Any = object()
_REMEMBERED = 8  # rows of which it is known how to compute them: while prompts are read in parts two alternate
_KINDS = (DynamicLayer, DynamicSlidingWindowLayer)


def _layers(base: Any) -> list[Any]:
    return DynamicCache(config=base.config).layers


class Adapters:
    """Which adapters the next forward passes use; call `changed` when the model gained or lost one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.changed()

    def changed(self) -> None:
        """Look at the model again."""
        self._off = ExitStack()
        self._rows: dict[tuple[str, ...], RowAdapters] = {}
        is_adapted = isinstance(self.model, PeftModel)
        self._active = self.model.active_adapter if is_adapted else None
        self.can_mix = is_adapted and self._can_mix()

    def _can_mix(self) -> bool:
        if prompt_learning(self.model) or why_not_mixed(self.model.base_model) is not None:
            return False
        if RowAdapters.supports(self.model.base_model):
            return True
        # PEFT's own refuses some models, such as those that pass layers all tokens in one dimension: found by trying.
        names = [*self.model.peft_config, BASE]
        ids = torch.zeros(len(names), 2, dtype=torch.long, device=next(self.model.parameters()).device)
        try:
            with inference_state(self.model):
                self.model(input_ids=ids, adapter_names=names)
        except Exception as error:  # of whatever kind: such rows take turns
            logger.info("Rows with different adapters take turns: %s", error)
            return False
        return True

    def delete(self, name: str) -> None:
        """Take an adapter out of the model."""
        others = [other for other in self.model.peft_config if other != name]
        if not others:  # PEFT's model cannot do without any
            self.model = self.model.base_model.unload()
            vars(self.model).pop("peft_config", None)  # PEFT 0.18 leaves it
            return
        if self.model.active_adapter == name:
            set_adapter_to_infer(self.model, others[0])
        self.model.delete_adapter(name)

    def leave(self) -> None:
        """Switch adapters on, if they are off; frozen, for PEFT has them trained then, and a GPU packs such anew."""
        self._off.close()
        self.model.requires_grad_(False)

    @contextmanager
    def using(self, names: Sequence[str | None], will_stay: bool) -> Iterator[dict[str, Any]]:
        """Arguments of the model with which each row has its adapter, None for none.

        If all have the same, `will_stay` says whether switching the whole model pays.
        """
        first = names[0]
        is_one = all(name == first for name in names)
        if is_one and (will_stay or first == self._active or not self.can_mix):
            self._switch(first)
            yield {}
            return
        if self._active is None:
            self._switch(next(name for name in self.model.peft_config))
        texts = [BASE if name is None else name for name in names]
        if not RowAdapters.supports(self.model.base_model):  # PEFT's own
            yield {"adapter_names": texts}
            return
        if tuple(texts) not in self._rows:
            if len(self._rows) == _REMEMBERED:
                self._rows.clear()
            self._rows[tuple(texts)] = RowAdapters(self.model.base_model, texts)
        with self._rows[tuple(texts)]:
            yield {}

    def _switch(self, name: str | None) -> None:
        if name == self._active:
            return
        self.leave()
        self._active = _UNKNOWN  # if what follows fails
        if name is None:
            self._off.enter_context(self.model.disable_adapter())
        elif self.model.active_adapter != name:
            set_adapter_to_infer(self.model, name)
        self._active = name


class Forward:
    """Forward passes of a model that `why_not_batched` has nothing against."""

    def __init__(self, adapters: Adapters) -> None:
        model = adapters.model
        base = base_of(model)
        self._adapters = adapters  # whose model may become another
        self._num_layers = len(_layers(base))
        self._cache_name = str(cache_argument(base))
        self._device = next(model.parameters()).device
        self._last = last_positions(1, self._device)

    def new_cache(self) -> RowCache:
        """An empty cache."""
        return RowCache(self._num_layers)

    def bytes_per_token(self) -> int:
        """Memory that a token of a row takes in the cache, found by trying."""
        cache = self.new_cache()
        self(cache, [[0]], [1], {})
        return cache.bytes_per_token()

    def __call__(
        self, cache: RowCache, new: Sequence[Sequence[int]], lengths: Sequence[int], arguments: dict[str, Any]
    ) -> torch.Tensor:
        """Read new tokens of every row; their keys and values join the cache.

        Args:
            cache: of these rows; comes back longer by the longest of `new`.
            new: token ids of each row. Where they differ in number the cache must be empty.
            lengths: tokens of each row after this pass.
            arguments: further ones of the model.

        Returns:
            Logits after the last token of each row, float32, `(rows, vocabulary)`.
        """
        width = max(map(len, new))
        columns = cache.columns + width
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in new], device=self._device)
        unused = torch.tensor([[columns - length] for length in lengths], device=self._device)
        places = torch.arange(columns, device=self._device).expand(len(new), -1)
        # Without rows that begin later there is nothing to hide, and the model takes its shorter way.
        mask = None if min(lengths) == columns else places >= unused
        positions = (places[:, cache.columns :] - unused).clamp(min=0)
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
