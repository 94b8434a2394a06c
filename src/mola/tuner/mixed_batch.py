"""Rows of one batch with different adapters: PEFT's `adapter_names` in `forward` and `generate`.

Rows are sorted by adapter. The base layer maps all of them at once, then each adapter that is present adds its experts
to its own rows, as it would alone. Nothing is recorded of the routers, which happens in training only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mola.errors import MolaError
from mola.tuner.kernels.dispatch import row_table
from mola.tuner.kernels.gemm import linear
from mola.tuner.layer import MolaLinear
from mola.tuner.stacked import StackedParameters

_MIXED_BY_PEFT = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # inside its own wrappers
BASE = "__base__"  # PEFT's name for the model without an adapter


class _Sorted(NamedTuple):
    """Rows sorted by adapter: names and their numbers of rows, and the way there and back; None where it is none."""

    adapters: list[str]
    sizes: list[int]
    order: torch.Tensor | None
    inverse: torch.Tensor | None


class MixedBatch:
    """The adapters of the rows in one call of a model; for that time it is every layer's `mixed_batch`.

    Args:
        names: adapter of each row, or "__base__".
        copies: how many rows `generate` makes of each, side by side.
    """

    def __init__(self, names: list[str], copies: int = 1) -> None:
        self._names, self._copies = names, copies
        self._width = 1  # tokens of each row in the call that runs
        self._sorted: dict[tuple[int, torch.device], _Sorted] = {}
        self._tables: dict[tuple[Any, ...], Any] = {}  # for few tokens: where each row's experts lie

    def of_rows(self, num_rows: int) -> list[str]:
        """Adapter of each of so many rows, which may be tokens: some models pass a layer all of them in one dimension.

        Raises:
            MolaError: they are not as many as names, nor what `generate` makes of those, nor the tokens of either.
        """
        for copies in (1, self._copies):
            for times in (copies, copies * self._width):
                if num_rows == times * len(self._names):
                    return [name for name in self._names for _ in range(times)]
        raise MolaError(  # PEFT's words, and those below: code that looks for them is to find them
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self._names)} and {num_rows} respectively."
        )

    def forward(self, layer: MolaLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What `MolaLinear.forward` gives, each row with its adapter."""
        adapters, sizes, order, inverse = self._sort(len(x), x.device)
        is_recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        frozen = None if args or kwargs or is_recorded else layer.frozen_linear(x)
        result = layer.base_layer(x, *args, **kwargs) if frozen is None else linear(x, *frozen)
        table = None if frozen is None else self._table(layer, x)
        if table is not None:
            return table.add(result, x)
        if not any(name in layer.scaling for name in adapters):
            return result
        if order is not None:
            x, result = x.index_select(0, order), result.index_select(0, order)
        parts = [
            layer.add_experts(name, rows, base).to(base.dtype) if name in layer.scaling else base
            for name, rows, base in zip(adapters, x.split(sizes), result.split(sizes), strict=True)
        ]
        result = torch.cat(parts)
        return result if inverse is None else result.index_select(0, inverse)

    def _table(self, layer: MolaLinear, x: torch.Tensor) -> Any:
        key = id(layer), x.shape, x.dtype
        if key not in self._tables:
            self._tables[key] = row_table(layer, self.of_rows(len(x)), x)
        return self._tables[key]

    def _sort(self, num_rows: int, device: torch.device) -> _Sorted:
        # Once for all layers: a GPU would be waited for in each.
        key = num_rows, device
        if key not in self._sorted:
            names = self.of_rows(num_rows)
            adapters = sorted(set(names))
            order = sorted(range(num_rows), key=names.__getitem__)
            inverse = sorted(range(num_rows), key=order.__getitem__)
            ways = (None, None) if order == inverse == [*range(num_rows)] else (order, inverse)
            tensors = (None if way is None else torch.tensor(way, device=device) for way in ways)
            self._sorted[key] = _Sorted(adapters, [names.count(name) for name in adapters], *tensors)
        return self._sorted[key]

    def see(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook before the model: how many tokens a row has."""
        inputs = [args[0] if args else None, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds"))]
        given = next((each for each in inputs if torch.is_tensor(each) and each.dim() > 1), None)
        self._width = 1 if given is None else given.shape[1]

    def tell(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hook before PEFT's wrappers (of `modules_to_save` and the like), which know their own adapters only."""
        names = self.of_rows(len(args[0])) if args else self._names
        return args, {**kwargs, "adapter_names": [name if name in module._adapters else BASE for name in names]}


def _changes_base(config: Any) -> bool:
    """Whether rows without the adapter would be computed with a part of it."""
    return getattr(config, "bias", "none") != "none" or bool(getattr(config, "layer_replication", None))


class RowAdapters:
    """A context in which each row of a model's forward passes has its adapter; it may be entered again and again.

    Args:
        tuner: the `MolaModel`, with the adapters it has now.
        names: adapter of each row, or "__base__".
        options: what the model is called with; of `generate` they say how many rows become of one.

    Raises:
        MolaError: the model is in training mode or an adapter is merged, names are not those of adapters, or one of
            these has changed the base model for all rows.
    """

    def __init__(self, tuner: Any, names: Any, options: Mapping[str, Any] | None = None) -> None:
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise MolaError(
                f"`adapter_names` must be a list with an adapter's name, or {BASE!r}, per row: got {names!r}."
            )
        if tuner.training:
            raise MolaError(
                "Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first."
            )
        unknown = sorted({*names} - {*tuner.peft_config, BASE})
        if unknown:
            raise MolaError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                f"`adapter_names` may have {', '.join(tuner.peft_config)}, and {BASE} for rows without an adapter."
            )
        modules = list(tuner.model.modules())
        if any(isinstance(module, BaseTunerLayer) and module.merged for module in modules):
            raise MolaError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if any(isinstance(module, StackedParameters) and {*names} & {*module.settings} for module in modules):
            raise MolaError(
                "Cannot pass `adapter_names` with adapters that have `target_parameters`: a base model has one "
                "weight for all rows. Call the model once per adapter, with `set_adapter`."
            )
        for name, config in tuner.peft_config.items():
            if _changes_base(config) and {*names} != {name}:
                raise MolaError(
                    f"Cannot pass `adapter_names` of others than {name!r} beside it: its `bias` or `layer_replication` "
                    "is the base model's, which is one for all rows. Load the others into a model without it."
                )
        self._model = tuner.model
        self._batch = MixedBatch(list(names), _copies(tuner.model, options or {}))
        self._layers = [module for module in modules if isinstance(module, (MolaLinear, StackedParameters))]
        self._wrappers = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
        self._handles: list[Any] = []
        self._woken: list[Any] = []

    @staticmethod
    def suits(tuner: Any) -> bool:
        """Whether a tuner is ours: other methods have their own way, or none."""
        return getattr(tuner, "prefix", None) == "mola_"

    def __enter__(self) -> None:
        tell = self._batch.tell
        self._handles = [each.register_forward_pre_hook(tell, with_kwargs=True) for each in self._wrappers]
        self._handles.append(self._model.register_forward_pre_hook(self._batch.see, with_kwargs=True))
        # PEFT 0.18 switches wrappers off where the active adapter has none, and then ignores the names as well.
        is_off = all(layer.disable_adapters for layer in self._layers)
        self._woken = [] if is_off else [each for each in self._wrappers if each._disable_adapters]
        for each in self._woken:
            each._disable_adapters = False
        for layer in self._layers:
            layer.mixed_batch = self._batch

    def __exit__(self, *error: Any) -> None:
        for layer in self._layers:
            layer.mixed_batch = None
        for each in self._woken:
            each._disable_adapters = True
        for handle in self._handles:
            handle.remove()


def why_not_mixed(tuner: Any) -> str | None:
    """Why rows of one batch cannot have different adapters of a `PeftModel`'s tuner; None if they can."""
    configs = tuner.peft_config.values()
    if any(getattr(config, "target_parameters", None) for config in configs):
        return "`target_parameters` change weights that all rows share"
    wrappers = [module for module in tuner.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for wrapper in wrappers:
        if not isinstance(wrapper.original_module, _MIXED_BY_PEFT):
            return f"PEFT does not mix trained modules that are {type(wrapper.original_module).__name__}"
    if RowAdapters.suits(tuner):
        return None
    if any({*tuner.peft_config} - wrapper._adapters for wrapper in wrappers):
        return "PEFT mixes trained modules only where every adapter has them"
    if any(config.peft_type != "LORA" or config.use_dora for config in configs):
        return "this method of PEFT has one active adapter for all rows"
    return None


def _copies(model: nn.Module, options: Mapping[str, Any]) -> int:
    """How many rows `generate` makes of one: an encoder sees one, decoders one per beam or returned sequence."""
    configs = [options.get("generation_config"), getattr(model, "generation_config", None)]  # fields of None: the next
    return max(
        next(filter(None, [options.get(name), *(getattr(config, name, None) for config in configs)]), 1)
        for name in ("num_beams", "num_return_sequences")
    )
