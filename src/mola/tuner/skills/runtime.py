"""Runs a base model with skills: each turn asks the skill that knows, and keeps it until its answer is complete.

A turn begins with a call of `generate`, or with a forward pass whose cache is empty or missing. The decision is made
before this pass: the layers below the decision's layer read the user's content alone, without template and earlier
turns. It is stored on the cache of keys and values, so that later passes with this cache need none.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError
from mola.tuner.skills.content import ContentFinder
from mola.tuner.skills.decision import Decider, Decisions, suggest_threshold
from mola.tuner.skills.loras import DEFAULT_MAX_LOADED, LoraStore
from mola.tuner.skills.lower_layers import decoder_layers, settled_layer
from mola.tuner.skills.prompts import Prompts, cache_in, tokens_in_cache
from mola.tuner.skills.reading import read_prompts
from mola.tuner.skills.rows import RowLoras, Rows
from mola.tuner.skills.statistics import GeneralStatistics, SkillStatistics

_CACHE_ROWS = "mola_skills"  # attribute of a cache: the skills of the rows that computed it
_SEVERAL: Rows = ()  # its value if a row was computed by different skills in turn


@dataclass
class _Turn:
    """One call of `generate`.

    Attributes:
        num_prompts: number of prompts; `generate` may make several rows of each.
        rows: the skills of each prompt; None if the caller named them.
    """

    num_prompts: int
    rows: Rows | None = None


class SkillsRuntime:
    """The skills of a base model; it stands at `model.skills`. Call it and the model on one thread.

    Args:
        model: the base model of Transformers, in eval mode, without adapters.
        layer: the decision reads the input of this layer.
        finder: finds the tokens of the user's content in a prompt.
        general: statistics of general text.
        threshold: see `Decider`.
        max_loaded: maximum number of LoRAs in memory.

    Attributes:
        reject_rate: sets the threshold whenever skills come or go, see `suggest_threshold`; None if it is fixed.
        last_names: who answered in the last turn, one name per prompt; None stands for the base model.
        last_decisions: the last turn's decisions; None if its skills were named by the caller.

    Raises:
        MolaError: the model is no causal language model with a list of layers, or has no such layer.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        finder: ContentFinder,
        general: GeneralStatistics,
        threshold: float,
        max_loaded: int = DEFAULT_MAX_LOADED,
    ) -> None:
        layers = decoder_layers(model)
        self.layer, self.threshold = settled_layer(layer, len(layers)), threshold
        self.reject_rate: float | None = None
        self.last_names: list[str | None] = []
        self.last_decisions: Decisions | None = None
        self._model, self._finder, self._general = model, finder, general
        self._stacks = LayerStacks.of(model)
        self._statistics: dict[str, SkillStatistics] = {}
        self._decider: Decider | None = None  # made when it is needed first
        self._store = LoraStore(model, max_loaded)
        self._loras = RowLoras(self._store)
        self._named: Rows | None = None
        self._turn: _Turn | None = None
        # These are of the running pass.
        self._runs = False
        self._rows: Rows = ()
        layers[layer].register_forward_pre_hook(self._check_runs)
        vars(model)["forward"] = _Around(model.forward, self._forward)
        vars(model)["generate"] = _Around(model.generate, self._generate)
        vars(model)["skills"] = self

    @property
    def names(self) -> list[str]:
        """Names of the skills, sorted."""
        return self._store.names

    @property
    def asked(self) -> list[str]:
        """Names of the skills that a decision may choose, sorted: all that are not retired."""
        return sorted(self._statistics)

    @property
    def is_named(self) -> bool:
        """Whether the caller names the skills, in a block of `use`."""
        return self._named is not None

    @property
    def max_loaded(self) -> int:
        """Maximum number of LoRAs in memory."""
        return self._store.max_loaded

    def loaded(self) -> list[str]:
        """Names of the skills in memory, least recently asked first."""
        return self._store.loaded

    def add(
        self, name: str, folder: str | os.PathLike[str], statistics: SkillStatistics, sha256: str | None = None
    ) -> None:
        """Add a skill. Its tensors are read when it is asked for first.

        Args:
            name: a new name.
            folder: its LoRA in PEFT's format.
            statistics: of its prompts, measured at this runtime's layer.
            sha256: of the LoRA's file of tensors, which is then compared when they are read.

        Raises:
            MolaError: the name is taken, or the LoRA does not fit the model or has parts that a skill cannot have.
        """
        linears = self._store.add(name, folder, sha256)
        self._loras.adapt(linears)
        self._statistics[name] = statistics
        self._settle_threshold()

    def retire(self, name: str) -> None:
        """Let no decision choose a skill any more. Rows may still name it, until it is removed.

        Raises:
            MolaError: there is no such skill.
        """
        self._store.check_names([name])
        if self._statistics.pop(name, None) is not None:
            self._settle_threshold()

    def remove(self, name: str) -> None:
        """Remove a skill. A row that it is answering ends with an error; see `retire`.

        Raises:
            MolaError: there is no such skill.
        """
        self.retire(name)
        self._store.remove(name)
        self._loras.forget()

    @contextmanager
    def use(self, names: str | list[str | None] | None) -> Iterator[None]:
        """Ask the named skills in a `with` block, without a decision.

        Args:
            names: one name for all rows, or a list with the name of each row; None is the base model.

        Raises:
            MolaError: there is no such skill.
        """
        rows = tuple(names) if isinstance(names, list) else (names,)
        self._store.check_names(name for name in rows if name is not None)
        before, self._named = self._named, rows
        try:
            yield
        finally:
            self._named = before

    @torch.no_grad()
    def decide(self, prompt_ids: Sequence[Sequence[int]]) -> Decisions:
        """Which skills prompts ask, from the layers below the decision alone.

        Args:
            prompt_ids: token ids of each prompt, without padding.
        """
        if self._decider is None:
            self._decider = Decider(self._general, self._statistics, self.threshold)
        self._loras.clear_rows()
        return self._decider.decide(read_prompts(self._model, self.layer, self._finder, prompt_ids))

    # ------------------------------------------------------------------ decisions

    def _settle_threshold(self) -> None:
        self._decider = None
        if self.reject_rate is not None:
            self.threshold = suggest_threshold(self._general, self._statistics, self.reject_rate)

    def _rows_decided(self, prompts: Prompts) -> Rows:
        """The skills of each prompt of a turn that begins."""
        prompt_ids = prompts.token_ids()
        decisions = self.decide(prompt_ids) if self._statistics else None  # None if all skills are retired
        self.last_decisions = decisions
        self.last_names = [None] * len(prompt_ids) if decisions is None else list(decisions.names)
        return tuple(self.last_names)

    def _check_runs(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._runs and not self._store.is_empty:
            raise MolaError(
                "a model with skills must be called as a whole: its decoder was called alone, so nobody has decided "
                "which skills its rows ask. Call the model itself."
            )

    # ------------------------------------------------------------------ calls of the model

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the model's `forward`."""
        given = {**dict(zip(inspect.signature(forward).parameters, args, strict=False)), **kwargs} if args else kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None or self._store.is_empty:
            return forward(*args, **kwargs)
        self._check_checkpointing()
        num_rows, num_tokens = tokens.shape[:2]
        rows = self._known_rows(given, num_rows)
        if rows is None:
            rows = self._rows_decided(Prompts.of_call(given))
        cache, self._runs = cache_in(given), True
        try:
            self._set_rows(rows, num_rows, num_tokens)
            is_mixed = cache is not None and _is_of_others(cache, self._rows)
            output = forward(*args, **kwargs)
        finally:
            self._runs = False
            self._loras.clear_rows()
        cache = cache_in(output) if cache is None else cache
        if cache is not None:
            setattr(cache, _CACHE_ROWS, _SEVERAL if is_mixed else self._rows)
        return output

    def _set_rows(self, rows: Rows, num_rows: int, num_tokens: int) -> None:
        """Give each row of a pass its LoRAs; `rows` has one entry per prompt."""
        copies = num_rows // len(rows)
        self._rows = tuple(row for row in rows for _ in range(copies))
        self._loras.set_rows(self._rows, num_tokens)

    def _copies(self, num_rows: int) -> int:
        """Number of rows, such as beams, that `generate` makes of each prompt. They lie side by side."""
        num_prompts = num_rows if self._turn is None else self._turn.num_prompts
        if num_rows % num_prompts:
            raise MolaError(
                f"a pass of `generate` must have the same number of rows for each prompt: got {num_rows} rows for "
                f"{num_prompts} prompts."
            )
        return num_rows // num_prompts

    def _known_rows(self, given: Mapping[str, Any], num_rows: int) -> Rows | None:
        """The skills of each prompt; None if this pass begins a turn."""
        if self._turn is not None and self._turn.rows is not None:
            return self._turn.rows
        if self._named is not None:
            return self._rows_named(num_rows // self._copies(num_rows))
        cache = cache_in(given)
        if self._turn is not None or cache is None or not tokens_in_cache(cache):
            return None
        rows = getattr(cache, _CACHE_ROWS, ())
        if len(rows) != num_rows:
            raise MolaError(
                "a pass with a filled cache continues a turn, and this cache does not say which skills its rows ask. "
                "Call `generate` with the whole prompt, or name the skills: `with model.skills.use(names)`."
            )
        return rows

    def _rows_named(self, num_prompts: int) -> Rows:
        assert self._named is not None
        rows = self._named * num_prompts if len(self._named) == 1 else self._named
        if len(rows) != num_prompts:
            raise MolaError(
                f"`use` must name the skill of each row: got {len(rows)} names, and the batch has {num_prompts} rows."
            )
        self.last_decisions, self.last_names = None, list(rows)
        return rows

    def _check_checkpointing(self) -> None:
        if not (torch.is_grad_enabled() and self._model.training):
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in self._model.modules()):
            raise MolaError(
                "a model with skills cannot be trained with gradient checkpointing, which computes layers again when "
                "the skills of their rows are forgotten. Switch it off."
            )

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the model's `generate`."""
        given = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        ids = given["inputs"] if given.get("inputs") is not None else given.get("input_ids")
        prompts = ids if ids is not None else given.get("inputs_embeds")
        # Assisted generation may call `generate` within `generate`.
        if self._turn is not None or prompts is None or self._store.is_empty:
            return generate(*args, **kwargs)
        self._turn = _Turn(len(prompts))
        try:
            if self._named is None:
                self._begin(self._turn, {**given, "input_ids": ids})
            return generate(*args, **kwargs)
        finally:
            self._turn = None

    def _begin(self, turn: _Turn, given: Mapping[str, Any]) -> None:
        """Decide who is asked in a turn."""
        cache, config = cache_in(given), self._model.generation_config
        num_before = 0 if cache is None else tokens_in_cache(cache)
        if num_before:
            _check_whole(given, num_before)
        turn.rows = self._rows_decided(Prompts.of_generate(given, config))
        if num_before:
            _keep_or_empty(cache, turn.rows)


class _Around:
    """Stands in place of a model's method, whose signature it has."""

    def __init__(self, method: Callable[..., Any], call: Callable[..., Any]) -> None:
        self._method, self._call = method, call

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._method, *args, **kwargs)


def _check_whole(given: Mapping[str, Any], num_before: int) -> None:
    """Raise MolaError if `generate` with a filled cache was not given the whole prompt."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is not None and ids.shape[1] > num_before and (mask is None or mask.shape[1] == ids.shape[1]):
        return
    raise MolaError(
        f"a turn with a filled cache needs the whole prompt to decide which skills are asked: the cache has "
        f"{num_before} tokens, and `input_ids` {0 if ids is None else ids.shape[1]}. Pass all tokens, those in the "
        "cache too, or name the skills: `with model.skills.use(names)`."
    )


def _is_of_others(cache: Any, rows: Rows) -> bool:
    """Whether a filled cache was computed by other skills than the rows of a pass ask."""
    before = getattr(cache, _CACHE_ROWS, (None,) * len(rows))
    return before != rows and tokens_in_cache(cache) > 0  # in this order: asking a cache may wait for a GPU


def _keep_or_empty(cache: Any, rows: Rows) -> None:
    """Empty a filled cache that other skills have computed, so that `generate` reads the whole prompt again.

    Raises:
        MolaError: the cache cannot be emptied.
    """
    before = getattr(cache, _CACHE_ROWS, (None,))  # a cache that does not say was computed by the base model
    if before and len({*before, *rows}) == 1:
        return
    try:
        cache.crop(-tokens_in_cache(cache))
    except Exception as error:  # each kind of cache has its own
        raise MolaError(
            f"the cache was computed by other skills than this prompt asks, and cannot be emptied ({error}). Leave it "
            "out."
        ) from error
