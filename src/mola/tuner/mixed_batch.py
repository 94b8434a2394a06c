"""Rows of one batch with different adapters: PEFT's `adapter_names` in `forward` and `generate`.

Rows are sorted by adapter. The base layer computes all rows at once. Each adapter adds the output of its experts to its
own rows. Only evaluation mode allows this, so no router output is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mola.errors import MolaError
from mola.tuner.kernels.dispatch import try_row_table
from mola.tuner.kernels.gemm import linear
from mola.tuner.layer import MolaLinear
from mola.tuner.stacked import StackedParameters

# PEFT's wrapper of a module trained in full can compute these modules row by row.
_MIXED_BY_PEFT = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BASE = "__base__"  # PEFT's name for rows without an adapter


class _RowOrder(NamedTuple):
    """Rows sorted by adapter.

    Attributes:
        adapters: names of the adapters, sorted.
        sizes: number of rows of each adapter.
        order: indices that sort the rows; None if the rows were sorted already.
        original_order: indices that restore the order before sorting; None if the rows were sorted already.
    """

    adapters: list[str]
    sizes: list[int]
    order: torch.Tensor | None
    original_order: torch.Tensor | None


class MixedBatch:
    """The adapter of each row in one call of a model; `mixed_batch` of every layer during the call.

    Args:
        names: adapter of each row, or "__base__".
        copies: number of copies that `generate` makes of each row, such as beams; the copies lie side by side.
    """

    def __init__(self, names: list[str], copies: int = 1) -> None:
        self._names, self._copies = names, copies
        self._tokens_per_row = 1
        self._row_orders: dict[tuple[int, torch.device], _RowOrder] = {}
        self._row_tables: dict[tuple[Any, ...], Any] = {}  # results of `try_row_table`, by layer and shape

    def adapters_of_rows(self, num_rows: int) -> list[str]:
        """Adapter of each row of a layer's input.

        The input may have one row per name, or `copies` rows per name, or each token of these rows as a row of its own.

        Raises:
            MolaError: the number of rows is none of these.
        """
        for copies in (1, self._copies):
            for rows_per_name in (copies, copies * self._tokens_per_row):
                if num_rows == rows_per_name * len(self._names):
                    return [name for name in self._names for _ in range(rows_per_name)]
        raise MolaError(  # in PEFT's words, since programs search for them
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self._names)} and {num_rows} respectively."
        )

    def forward(self, layer: MolaLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of `MolaLinear.forward`, with each row's own adapter."""
        adapters, sizes, order, original_order = self._row_order(len(x), x.device)
        must_call_base_layer = bool(args or kwargs) or torch.is_grad_enabled() or torch.compiler.is_compiling()
        weight_and_bias = None if must_call_base_layer else layer.frozen_linear(x)
        result = layer.base_layer(x, *args, **kwargs) if weight_and_bias is None else linear(x, *weight_and_bias)
        # For few tokens there is a table, whose native function adds the outputs of all adapters at once.
        table = None if weight_and_bias is None else self._row_table(layer, x)
        if table is not None:
            return table.add(result, x)
        if not any(name in layer.scaling for name in adapters):
            return result
        # Without a table, each adapter adds its output to its own rows.
        if order is not None:
            x, result = x.index_select(0, order), result.index_select(0, order)
        parts = [
            layer.add_expert_output(name, rows, base).to(base.dtype) if name in layer.scaling else base
            for name, rows, base in zip(adapters, x.split(sizes), result.split(sizes), strict=True)
        ]
        result = torch.cat(parts)
        return result if original_order is None else result.index_select(0, original_order)

    def _row_table(self, layer: MolaLinear, x: torch.Tensor) -> Any:
        key = id(layer), x.shape, x.dtype
        if key not in self._row_tables:
            self._row_tables[key] = try_row_table(layer, self.adapters_of_rows(len(x)), x)
        return self._row_tables[key]

    def _row_order(self, num_rows: int, device: torch.device) -> _RowOrder:
        # Cached for all layers, because a GPU waits while the indices are moved to it.
        key = num_rows, device
        if key not in self._row_orders:
            names = self.adapters_of_rows(num_rows)
            adapters = sorted(set(names))
            order = sorted(range(num_rows), key=names.__getitem__)
            original_order = sorted(range(num_rows), key=order.__getitem__)
            is_sorted = order == original_order == [*range(num_rows)]
            tensors = (None if is_sorted else torch.tensor(way, device=device) for way in (order, original_order))
            self._row_orders[key] = _RowOrder(adapters, [names.count(name) for name in adapters], *tensors)
        return self._row_orders[key]

    def count_tokens(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: note how many tokens a row has."""
        inputs = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        given = next((each for each in inputs if torch.is_tensor(each) and each.dim() > 1), None)
        self._tokens_per_row = 1 if given is None else given.shape[1]

    def pass_adapter_names(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of PEFT's wrappers of `modules_to_save`: pass the wrapper the adapter of every row.

        Rows whose adapter does not train this module use the base model's module.
        """
        names = self.adapters_of_rows(len(args[0])) if args else self._names
        return args, {**kwargs, "adapter_names": [name if name in module._adapters else BASE for name in names]}


class RowAdapters:
    """A context in which each row of a model's forward passes has its adapter; it may be entered repeatedly.

    Args:
        tuner: the `MolaModel`, with the adapters it has now.
        names: adapter of each row, or "__base__".
        options: arguments of the call; those of `generate` may set the number of rows that it makes of one.

    Raises:
        MolaError: the model is in training mode or an adapter is merged, a name is not that of an adapter, or an
            adapter changes the base model for all rows.
    """

    def __init__(self, tuner: Any, names: Any, options: Mapping[str, Any] | None = None) -> None:
        modules = list(tuner.model.modules())
        _check_can_mix(tuner, names, modules)
        self._model = tuner.model
        self._batch = MixedBatch(list(names), _rows_per_input(tuner.model, options or {}))
        self._layers = [module for module in modules if isinstance(module, (MolaLinear, StackedParameters))]
        self._wrappers = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
        self._handles: list[Any] = []
        self._enabled: list[Any] = []

    @staticmethod
    def supports(tuner: Any) -> bool:
        """Whether a tuner of PEFT is a `MolaModel`."""
        return getattr(tuner, "prefix", None) == "mola_"

    def __enter__(self) -> None:
        hooks: list[Any] = [(wrapper, self._batch.pass_adapter_names) for wrapper in self._wrappers]
        hooks.append((self._model, self._batch.count_tokens))
        self._handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
        # PEFT 0.18 disables wrappers that lack the active adapter, and disabled wrappers ignore `adapter_names`.
        if not all(layer.disable_adapters for layer in self._layers):
            self._enabled = [wrapper for wrapper in self._wrappers if wrapper._disable_adapters]
        for wrapper in self._enabled:
            wrapper._disable_adapters = False
        for layer in self._layers:
            layer.mixed_batch = self._batch

    def __exit__(self, *error: Any) -> None:
        for layer in self._layers:
            layer.mixed_batch = None
        for wrapper in self._enabled:
            wrapper._disable_adapters = True
        for handle in self._handles:
            handle.remove()
        self._enabled, self._handles = [], []


def why_not_mixed(tuner: Any) -> str | None:
    """None if rows of one batch can have different adapters of a `PeftModel`'s tuner, else the reason."""
    configs = tuner.peft_config.values()
    if any(getattr(config, "target_parameters", None) for config in configs):
        return "`target_parameters` change weights that all rows share"
    wrappers = [module for module in tuner.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for wrapper in wrappers:
        if not isinstance(wrapper.original_module, _MIXED_BY_PEFT):
            return f"PEFT does not mix trained modules that are {type(wrapper.original_module).__name__}"
    if RowAdapters.supports(tuner):
        return None
    if any({*tuner.peft_config} - wrapper._adapters for wrapper in wrappers):
        return "PEFT mixes trained modules only if every adapter has them"
    if any(config.peft_type != "LORA" or config.use_dora for config in configs):
        return "this method of PEFT has one active adapter for all rows"
    return None


def _check_can_mix(tuner: Any, names: Any, modules: list[nn.Module]) -> None:
    """Raise MolaError if rows cannot have these adapters, in PEFT's words if PEFT has the same error."""
    if tuner.training:
        raise MolaError("Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first.")
    if unknown := {*names} - {*tuner.peft_config, BASE}:
        raise MolaError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(map(str, unknown)))}. "
            f"`adapter_names` may have {', '.join(tuner.peft_config)}, and {BASE} for rows without an adapter."
        )
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
        if getattr(config, "bias", "none") != "none" and {*names} != {name}:
            raise MolaError(
                f"Cannot pass `adapter_names` that combine {name!r} with others: its `bias` changes the base model, "
                f"which all rows share. Load the other adapters into a model without {name!r}."
            )


def _rows_per_input(model: nn.Module, options: Mapping[str, Any]) -> int:
    """Number of rows that `generate` makes of one input for a decoder: one per beam or returned sequence."""
    configs = [options.get("generation_config"), getattr(model, "generation_config", None)]

    def first_set(name: str) -> int:
        values = [options.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value), 1)

    return max(first_set("num_beams"), first_set("num_return_sequences"))
