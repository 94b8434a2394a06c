"""`MolaLinear`: one linear map with its frozen weight, its router and its LoRA experts.

The formula is in the docstring of `MolaLinear`. `forward` collects the tensors of one call in `mixture_inputs`, and
`mola.tuner.kernels.dispatch.mixture` chooses the backend that computes the formula.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from mola.errors import MolaError
from mola.tuner.initialization import initialize
from mola.tuner.kernels.api import FrozenLinear, MixtureInputs, MixtureSettings
from mola.tuner.kernels.dispatch import drop_cached_copies, mixture, register_layer, try_decode
from mola.tuner.kernels.tensors import autocast_is_on, has_hooks
from mola.tuner.merging import SingleExpertMerging
from mola.tuner.router_statistics import RouterOutput
from mola.tuner.routing import DEFAULT_ROUTER, ROUTERS, Routing, router_logits


@dataclass(frozen=True)
class ExpertSettings:
    """Settings of one adapter for one module: fields of `MolaConfig` with the values for this module."""

    r: int
    num_experts: int
    top_k: int
    lora_alpha: float
    lora_dropout: float = 0.0
    router: str = DEFAULT_ROUTER
    router_jitter_noise: float = 0.0
    init_lora_weights: bool | str = True
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@contextlib.contextmanager
def keep_requires_grad(module: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of all parameters after the block.

    Use it around assignments to a `ParameterDict`, which make the assigned parameters trainable.
    """
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    yield
    for name, parameter in module.named_parameters():
        if flags.get(name, parameter.requires_grad) != parameter.requires_grad:
            parameter.requires_grad_(flags[name])


def offloaded_error() -> MolaError:
    """The error for using experts that accelerate has offloaded."""
    return MolaError(
        "the experts are not in memory: the model was offloaded to the CPU or a disk, and accelerate restores weights "
        "only when a module's own `forward` runs, which mola bypasses. Load the whole model onto one device, for "
        "example with device_map={'': 0}."
    )


class MolaLinear(nn.Module, SingleExpertMerging, BaseTunerLayer):
    r"""A linear map with a mixture of LoRA experts (paper, section 3.1).

    With `x: (..., in)`, `E` experts of rank `r` and a router of its own:

        z = x Wr^T                               router logits, float32
        g = softmax over the top_k largest z     zero for the others
        y = x W^T + b + sum_e g_e * scaling * B_e A_e dropout(x)

    `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`. The router's input has no dropout. The
    experts of a module share one dropout mask per call, so that one matrix
    product computes all experts; the research code draws one mask per expert. With one expert the layer is LoRA and has
    no router.

    Parameters of adapter `a`: `mola_A[a]: (E, r, in)`, `mola_B[a]: (E, r, out)` and, for `E > 1`,
    `mola_router[a]: (E, in)` in float32.

    Examples:
        >>> import torch, mola
        >>> from mola.tuner.layer import ExpertSettings, MolaLinear
        >>> layer = MolaLinear(torch.nn.Linear(8, 4), "default", ExpertSettings(2, 3, 2, 16.0))
        >>> layer(torch.zeros(5, 8)).shape
        torch.Size([5, 4])
    """

    # Attributes that PEFT reads: dictionaries with one entry per adapter.
    adapter_layer_names = ("mola_A", "mola_B", "mola_router")
    other_param_names = (
        "settings",
        "scaling",
        "r",
        "num_experts",
        "top_k",
        "mola_dropout",
        "router_outputs",
        "router_calls",
    )
    mixed_batch: Any = None  # a `MixedBatch` during calls with `adapter_names`

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        settings: ExpertSettings,
        *,
        layer_index: int | None = None,
        inference_mode: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        features: Any = _get_in_out_features(self.get_base_layer())
        self.in_features: int = features[0]
        self.out_features: int = features[1]
        self.layer_index = layer_index
        self.mola_A = nn.ParameterDict({})
        self.mola_B = nn.ParameterDict({})
        self.mola_router = nn.ParameterDict({})
        self.mola_dropout = nn.ModuleDict({})
        self.settings: dict[str, ExpertSettings] = {}
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.num_experts: dict[str, int] = {}
        self.top_k: dict[str, int] = {}
        # Router output by adapter, recorded in forward passes in training mode while `router_losses` is collecting.
        self.router_outputs: dict[str, RouterOutput] = {}
        self.router_calls: dict[str, int] = {}  # calls of this module in the forward pass; 1 if missing
        self.router_losses: Any = None  # the `RouterLosses` of the model
        self.observer: Any = None  # a recorder of `mola.insight` while it observes this layer
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` switches this off
        self._disable_adapters = False
        self._active_adapter = adapter_name
        register_layer(self)
        self.update_layer(adapter_name, settings, inference_mode=inference_mode)

    def update_layer(self, adapter_name: str, settings: ExpertSettings, *, inference_mode: bool = False) -> None:
        """Add the experts and the router of one adapter."""
        shape = settings.num_experts, settings.r
        self.set_settings(adapter_name, settings)
        dropout = nn.Dropout(settings.lora_dropout) if settings.lora_dropout > 0 else nn.Identity()
        self.mola_dropout[adapter_name] = dropout
        self.mola_A[adapter_name] = nn.Parameter(torch.empty(*shape, self.in_features))
        self.mola_B[adapter_name] = nn.Parameter(torch.empty(*shape, self.out_features))
        if settings.num_experts > 1:
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            router = torch.empty(settings.num_experts, self.in_features, dtype=dtype)
            self.mola_router[adapter_name] = nn.Parameter(router)
        elif adapter_name in self.mola_router:  # an earlier adapter of this name had several experts
            del self.mola_router[adapter_name]
        self.reset_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._cast_experts(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_settings(self, adapter_name: str, settings: ExpertSettings) -> None:
        """Replace the settings of an adapter and keep its weights."""
        self.settings[adapter_name] = settings
        self.scaling[adapter_name] = settings.scaling
        self.r[adapter_name] = settings.r
        self.num_experts[adapter_name] = settings.num_experts
        self.top_k[adapter_name] = settings.top_k

    def reset_parameters(self, adapter_name: str) -> None:
        """Draw new values for experts and router, with the initialisation that `init_lora_weights` names."""
        method = self.settings[adapter_name].init_lora_weights
        router = self.mola_router.get(adapter_name)
        initialize(method, self.mola_A[adapter_name], self.mola_B[adapter_name], router, self.get_base_layer())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Keep the dtype: PEFT's method would cast to the base's dtype, even weights that were just loaded in float32.
        dicts = [each for each in (self.mola_A, self.mola_B, self.mola_router) if adapter_name in each]
        originals = [parameters[adapter_name] for parameters in dicts]
        with keep_requires_grad(self):
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            for parameters, original in zip(dicts, originals, strict=True):
                parameters[adapter_name] = nn.Parameter(original.detach().to(parameters[adapter_name].device))

    def _cast_experts(self, adapter_name: str) -> None:
        """Cast new experts to the base's dtype, like PEFT, unless the base is quantised. Routers stay in float32."""
        weight = getattr(self.get_base_layer(), "weight", None)
        if weight is None or not weight.is_floating_point() or weight.dtype.itemsize < 2:  # packed or float8
            return
        with keep_requires_grad(self):
            for experts in (self.mola_A, self.mola_B):
                experts[adapter_name] = nn.Parameter(experts[adapter_name].detach().to(weight.dtype))

    # ------------------------------------------------------------------ forward

    def train(self, mode: bool = True) -> MolaLinear:
        """Like `nn.Module.train`. Before training, which changes the experts, kernels drop their cached copies."""
        if mode:
            drop_cached_copies(self.mola_A.values())
        return super().train(mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map `(..., in)` to `(..., out)`; further arguments go to the base layer."""
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.mixed_batch is not None:
            return self.mixed_batch.forward(self, x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.scaling]
        if len(names) == 1 and not args and not kwargs:
            # For few tokens without gradients on a CPU, a native function adds the experts to the base output.
            output = try_decode(self, names[0], x)
            if output is not None:
                return output
            # A backend computes the base layer together with the experts if the base layer is plain and frozen.
            if not torch.compiler.is_compiling() and (base := self.frozen_linear(x)) is not None:
                return self.add_expert_output(names[0], x, base).to(x.dtype)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in names:
            result = self.add_expert_output(name, x, result)
        return result.to(dtype)

    def frozen_linear(self, x: torch.Tensor) -> FrozenLinear | None:
        """Weight and bias, for a backend to compute `x W^T + b`; None if the base layer itself must be called.

        The base layer must be an `nn.Linear` without hooks, in the dtype of `x` and of autocast, and frozen while
        gradients are recorded.
        """
        base: Any = self._modules["base_layer"]
        if type(base) is not nn.Linear or has_hooks(base):
            return None
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if type(weight) is not nn.Parameter or weight.dtype is not x.dtype:
            return None
        if bias is not None and bias.dtype is not x.dtype:
            return None
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        device = x.device.type
        if autocast_is_on(device) and torch.get_autocast_dtype(device) is not x.dtype:
            return None
        return FrozenLinear(weight, bias)

    def add_expert_output(self, adapter_name: str, x: torch.Tensor, base: torch.Tensor | FrozenLinear) -> torch.Tensor:
        """Base output plus the experts' output of one adapter: `(..., out)`, in the wider dtype of the two outputs.

        Args:
            adapter_name: the adapter.
            x: `(..., in)`.
            base: the base output `(..., out)`, or a frozen base layer for the backend to compute.
        """
        inputs = self.mixture_inputs(adapter_name, x, base)
        output, logits, expert_indices = mixture(inputs)
        if inputs.settings.needs_router_output and logits is not None and expert_indices is not None:
            self._record(adapter_name, RouterOutput(logits.t(), expert_indices.t()))
        return output

    def mixture_inputs(self, adapter_name: str, x: torch.Tensor, base: torch.Tensor | FrozenLinear) -> MixtureInputs:
        """The inputs of a backend; arguments as in `add_expert_output`."""
        # `_modules` instead of attributes: `__getattr__` takes measurable time for every linear and every token.
        parts: Any = self._modules
        experts_A, experts_B = (_tensor(parts[each], adapter_name) for each in ("mola_A", "mola_B"))
        if experts_A.is_meta and not x.is_meta:
            raise offloaded_error()
        dropout = parts["mola_dropout"]._modules[adapter_name]
        if autocast_is_on(x.device.type) and x.dtype is not torch.float64:  # autocast does not cast float64
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            dtype = experts_A.dtype if self.cast_input_dtype_enabled else x.dtype
        expert_settings = self.settings[adapter_name]
        settings = MixtureSettings(
            self.top_k[adapter_name],
            self.scaling[adapter_name],
            dtype,
            dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
            expert_settings.router_jitter_noise if self.training else 0.0,
            expert_settings.router,
            needs_router_output=self._records_router_output(),
        )
        result, weight, bias = (None, *base) if isinstance(base, FrozenLinear) else (base, None, None)
        router = _tensor(parts["mola_router"], adapter_name)
        return MixtureInputs(
            x, result, weight, bias, experts_A, experts_B, router, dropout_mask=None, settings=settings
        )

    def _records_router_output(self) -> bool:
        recorders = self.router_losses, self.observer
        return self.training and any(each is not None and each.collecting for each in recorders)

    def _record(self, adapter_name: str, output: RouterOutput) -> None:
        # Statistics are computed after the forward pass: gradient checkpointing would repeat work that is done here.
        if self.observer is not None and self.observer.collecting:
            self.observer.observe(adapter_name, output)
        if self.router_losses is not None and self.router_losses.collecting:
            before = self.router_outputs.get(adapter_name)
            if before is not None:  # this module runs several times in this forward pass
                self.router_calls[adapter_name] = self.router_calls.get(adapter_name, 1) + 1
                output = RouterOutput(*(torch.cat(parts) for parts in zip(before, output, strict=True)))
            self.router_outputs[adapter_name] = output

    def route(self, adapter_name: str, x: torch.Tensor) -> Routing:
        """Chosen experts and gates for `x: (..., in)`, both `(N, top_k)`, without jitter.

        Raises:
            MolaError: see `router_logits`.
        """
        logits = self.router_logits(adapter_name, x)
        return ROUTERS[self.settings[adapter_name].router](logits, self.top_k[adapter_name], -1)

    def router_logits(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Router logits for `x: (..., in)`: float32 `(N, E)`.

        Raises:
            MolaError: the module does not have this adapter, or the adapter has only one expert here, so no router.
        """
        if adapter_name not in self.settings:
            known = ", ".join(self.settings)
            raise MolaError(f"`adapter_name` must be one of {known} in this module: got {adapter_name!r}.")
        if adapter_name not in self.mola_router:
            raise MolaError(f"Adapter {adapter_name!r} has no router in this module, which has only one expert.")
        return router_logits(x, self.mola_router[adapter_name])

    def __getstate__(self) -> dict[str, Any]:
        # A copy leaves out the router outputs, which hold an autograd graph, and the two recorders, which would drag
        # the whole model into the copy. A copied `RouterLosses` connects itself to the copied layers.
        return {**self.__dict__, "router_outputs": {}, "router_calls": {}, "observer": None, "router_losses": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register_layer(self)

    def extra_repr(self) -> str:
        """Experts, top_k and rank of every adapter, for `print(model)`."""
        return ", ".join(
            f"{name}: num_experts={s.num_experts}, top_k={s.top_k}, r={s.r}" for name, s in self.settings.items()
        )

    def __repr__(self) -> str:
        return "mola." + super().__repr__()


def _tensor(module: nn.Module, name: str) -> Any:
    """A parameter of a module, read without `__getattr__`; None if the module has no parameter of this name."""
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found  # copies by nn.DataParallel have plain tensors
