"""`StackedParameters`: a base model's own experts, stacked in one parameter, each with one LoRA."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from mola.architecture.allocation import StackShape
from mola.architecture.targets import is_transposed
from mola.errors import MolaError
from mola.tuner.initialization import initialize
from mola.tuner.layer import ExpertSettings, offloaded_error


class StackedParameters(nn.Module, BaseTunerLayer):
    r"""A module that holds the base model's own experts, with one LoRA per expert, like `target_parameters` of PEFT.

    A parameter of the module stacks the weights `W_n` of the base model's `N` experts. The forward pass uses

        W_n + (lora_alpha / r) * B_n A_n

    instead of `W_n`. The base model's router chooses among its experts. There is no mixture and no router of mola.

    Parameters per adapter `a` and parameter `p`: `mola_A_p[a]: (N, r, in)` and `mola_B_p[a]: (N, r, out)`.
    """

    other_param_names = ("settings",)
    cast_input_dtype_enabled = True  # PEFT reads it from every layer
    mixed_batch: Any = None  # set during calls with `adapter_names`, which exclude the adapters of this module

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names: tuple[str, ...] = ()
        self.settings: dict[str, dict[str, ExpertSettings]] = {}  # by adapter and parameter
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def update_layer(
        self, adapter_name: str, stack: StackShape, settings: ExpertSettings, *, inference_mode: bool = False
    ) -> None:
        """Add the LoRAs of one adapter for one parameter; the caller sets `num_experts` of the settings to 1."""
        self.settings.setdefault(adapter_name, {})[stack.parameter] = settings
        for part, features in (("A", stack.in_features), ("B", stack.out_features)):
            name = f"mola_{part}_{stack.parameter}"
            if name not in self.adapter_layer_names:
                setattr(self, name, nn.ParameterDict({}))
                self.adapter_layer_names += (name,)
            getattr(self, name)[adapter_name] = nn.Parameter(torch.empty(stack.count, settings.r, features))
        A, B = self._factors(adapter_name, stack.parameter)
        initialize(settings.init_lora_weights, A, B, None, self.base_layer)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        dtype = getattr(self.base_layer, stack.parameter).dtype
        for part in "AB":  # like PEFT, which casts to float32 later
            factors = getattr(self, f"mola_{part}_{stack.parameter}")
            factors[adapter_name] = nn.Parameter(factors[adapter_name].detach().to(dtype))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _factors(self, adapter_name: str, parameter: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self, f"mola_A_{parameter}")[adapter_name], getattr(self, f"mola_B_{parameter}")[adapter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for parameter in self.settings.get(adapter_name, {}):
            weight = getattr(self.base_layer, parameter)
            for part in "AB":
                factors = getattr(self, f"mola_{part}_{parameter}")
                old = factors[adapter_name]
                if not old.is_meta:
                    factors[adapter_name] = nn.Parameter(old.detach().to(device or weight.device))
                    factors[adapter_name].requires_grad_(old.requires_grad)

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with its parameters changed by the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        is_off = self.disable_adapters or self.merged or self.mixed_batch is not None
        names = [] if is_off else [name for name in self.active_adapters if name in self.settings]
        if not names:
            return self.base_layer(*args, **kwargs)
        # accelerate's hook would replace the updated weights by those of the base, without an error.
        if hasattr(self.base_layer, "_hf_hook") and any(each.is_meta for each in self.parameters()):
            raise offloaded_error()
        weights: dict[str, torch.Tensor] = {}
        for name in names:
            weights |= self._updated(name, weights)
        return torch.func.functional_call(self.base_layer, weights, args, kwargs, tie_weights=False)

    def _updated(self, adapter_name: str, weights: dict[str, torch.Tensor], sign: int = 1) -> dict[str, torch.Tensor]:
        """The parameters of one adapter plus its update; parameters that `weights` lacks are the base's."""
        updated = {}
        for parameter, settings in self.settings.get(adapter_name, {}).items():
            weight = weights.get(parameter, getattr(self.base_layer, parameter))
            A, B = (factor.to(weight.dtype) for factor in self._factors(adapter_name, parameter))
            left, right = (A, B) if is_transposed(self.base_layer, weight) else (B, A)
            stack = weight.view(len(A), left.shape[2], right.shape[2])
            # Without autocast, which would change the dtype of the product.
            with contextlib.nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
                update = torch.baddbmm(stack, left.transpose(1, 2), right, alpha=sign * settings.scaling)
            updated[parameter] = update.view_as(weight)
        return updated

    # ------------------------------------------------------------------ merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters to the base's parameters.

        Raises:
            MolaError: with `safe_merge`, a merged parameter is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.settings:
                merged = self._updated(name, {})
                if safe_merge and not all(torch.isfinite(weight).all() for weight in merged.values()):
                    raise MolaError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken.")
                self._write(merged)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract all merged updates from the base's parameters."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._write(self._updated(self.merged_adapters.pop(), {}, sign=-1))

    def _write(self, weights: dict[str, torch.Tensor]) -> None:
        for parameter, weight in weights.items():
            getattr(self.base_layer, parameter).data = weight

    def extra_repr(self) -> str:
        """Parameters and rank of every adapter, for `print(model)`."""
        own = [(name, *item) for name, each in self.settings.items() for item in each.items()]
        return ", ".join(f"{name}: {parameter} r={settings.r}" for name, parameter, settings in own)
