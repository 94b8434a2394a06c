"""`MolaLinear`: one linear map with its frozen weight, its router and its LoRA experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from mola.errors import MolaError
from mola.tuner.dropout import draw_kept
from mola.tuner.merging import SingleExpertMerging
from mola.tuner.mixture import FrozenLinear, MixtureSettings, add_mixture
from mola.tuner.native_few import NativeFewTokens
from mola.tuner.owners import register
from mola.tuner.pieces import is_watched, reading_chosen_pays, update_of_chosen
from mola.tuner.routing import Routing, dense_gates, jitter, router_logits, top_k_softmax
from mola.tuner.statistics import RouterOutput

if TYPE_CHECKING:
    from mola.tuner.router_losses import RouterLosses
    from mola.tuner.statistics import RouterObserver


@dataclass(frozen=True)
class ExpertSettings:
    """What one adapter asks of one module; the per-layer lists of the config are already resolved."""

    r: int
    num_experts: int
    top_k: int
    lora_alpha: float
    lora_dropout: float = 0.0
    router_jitter_noise: float = 0.0
    init_lora_weights: bool = True

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`."""
        return self.lora_alpha / self.r


class MolaLinear(nn.Module, NativeFewTokens, SingleExpertMerging, BaseTunerLayer):
    r"""A linear map with a mixture of LoRA experts (paper, section 3.1).

    With `x: (..., in)`, `E` experts of rank `r` and a router of its own:

        z = x Wr^T                               router logits, float32
        g = softmax over the top_k largest z     zero for the others
        y = x W^T + b + sum_e g_e * (lora_alpha / r) * B_e A_e dropout(x)

    The research code draws one dropout mask per expert; here the experts of a module share one mask
    per call, so that all experts are computed by one matrix product. The router sees `x` undropped.
    With one expert the layer is LoRA and has no router.

    Parameters per adapter `a`: `mola_A[a]: (E, r, in)`, `mola_B[a]: (E, r, out)` and, for `E > 1`,
    `mola_router[a]: (E, in)` in float32.

    Example:
        >>> import torch, mola
        >>> from mola.tuner.layer import ExpertSettings, MolaLinear
        >>> layer = MolaLinear(torch.nn.Linear(8, 4), "default", ExpertSettings(2, 3, 2, 16.0))
        >>> layer(torch.zeros(5, 8)).shape
        torch.Size([5, 4])
    """

    adapter_layer_names = ("mola_A", "mola_B", "mola_router")
    other_param_names = ("settings", "scaling", "r", "num_experts", "top_k", "mola_dropout", "router_outputs")

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
        # Filled by assignment in a training forward when the model's `router_losses` asks for it.
        self.router_outputs: dict[str, RouterOutput] = {}
        self.router_losses: RouterLosses | None = None
        self.observer: RouterObserver | None = None  # set while one looks on: see mola.insight.router_recorder
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # what PEFT's `disable_input_dtype_casting` switches off
        self._disable_adapters = False
        self._active_adapter = adapter_name
        register(self)
        self.update_layer(adapter_name, settings, inference_mode=inference_mode)

    def update_layer(self, adapter_name: str, settings: ExpertSettings, *, inference_mode: bool = False) -> None:
        """Add the experts and the router of one adapter."""
        shape = settings.num_experts, settings.r
        self.settings[adapter_name] = settings
        self.scaling[adapter_name] = settings.scaling
        self.r[adapter_name] = settings.r
        self.num_experts[adapter_name] = settings.num_experts
        self.top_k[adapter_name] = settings.top_k
        dropout = nn.Dropout(settings.lora_dropout) if settings.lora_dropout > 0 else nn.Identity()
        self.mola_dropout[adapter_name] = dropout
        self.mola_A[adapter_name] = nn.Parameter(torch.empty(*shape, self.in_features))
        self.mola_B[adapter_name] = nn.Parameter(torch.empty(*shape, self.out_features))
        if settings.num_experts > 1:
            self.mola_router[adapter_name] = nn.Parameter(torch.empty(settings.num_experts, self.in_features))
        self.reset_parameters(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str) -> None:
        """`A_e` and router uniform within `1 / sqrt(in)` (kaiming, a = sqrt 5), `B_e` zero."""
        # Written out, because kaiming_uniform_ on the stack would take r * in for the fan-in.
        bound = 1.0 / math.sqrt(self.in_features)
        self.mola_A[adapter_name].uniform_(-bound, bound)
        if adapter_name in self.mola_router:
            self.mola_router[adapter_name].uniform_(-bound, bound)
        if self.settings[adapter_name].init_lora_weights:
            self.mola_B[adapter_name].zero_()
        else:
            bound = 1.0 / math.sqrt(self.r[adapter_name])
            self.mola_B[adapter_name].uniform_(-bound, bound)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        router = self.mola_router.get(adapter_name)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if router is not None:
            # The router stays float32 on a half-precision base: put back the values from before the cast.
            moved = self.mola_router[adapter_name]
            self.mola_router[adapter_name] = nn.Parameter(
                router.detach().to(moved.device), requires_grad=moved.requires_grad
            )

    # ------------------------------------------------------------------ forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map `(..., in)` to `(..., out)`; further arguments go to the base layer."""
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.scaling]
        if len(names) == 1 and not args and not kwargs:
            output = self._forward_few(names[0], x)
            if output is not None:
                return output
            if not torch.compiler.is_compiling() and self._is_fusable(names[0], x):
                base: Any = self.base_layer
                return self._add_fused(names[0], x, FrozenLinear(base.weight, base.bias), x.dtype)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in names:
            result = self._add_experts(name, x, result)
        return result.to(dtype)

    def _is_fusable(self, adapter_name: str, x: torch.Tensor) -> bool:
        """Whether base and experts can be one computation: a plain frozen linear, in the experts' number format."""
        base, device = self.base_layer, x.device.type
        if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter or base.weight.requires_grad:
            return False
        if is_watched(base):
            return False
        if base.bias is not None and (base.bias.requires_grad or base.bias.dtype != x.dtype):
            return False
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.mola_A[adapter_name].dtype
        return x.dtype == base.weight.dtype == dtype and not self._needs_plain(adapter_name)

    def _needs_plain(self, adapter_name: str) -> bool:
        return self.num_experts[adapter_name] == 1 or torch.compiler.is_compiling() or self._jitters(adapter_name)

    def _add_experts(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        experts_A = self.mola_A[adapter_name]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            x = self._cast_input_dtype(x, experts_A.dtype)
            dtype = x.dtype
        if self.num_experts[adapter_name] == 1:
            return self._add_one_expert(adapter_name, x, result)
        if self._needs_plain(adapter_name):
            return self._add_plain(adapter_name, x, result)
        return self._add_fused(adapter_name, x, result, dtype)

    def _add_one_expert(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        # The copy has LoRA's memory layout, which keeps results equal to PEFT's LoRA to the last bit.
        weight_B = self.mola_B[adapter_name][0].t().contiguous()
        hidden = F.linear(self.mola_dropout[adapter_name](x), self.mola_A[adapter_name][0])
        return result + F.linear(hidden, weight_B) * self.scaling[adapter_name]

    def _add_fused(
        self, adapter_name: str, x: torch.Tensor, base: torch.Tensor | FrozenLinear, dtype: torch.dtype
    ) -> torch.Tensor:
        dropout, kept, scaling = self.mola_dropout[adapter_name], None, self.scaling[adapter_name]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            kept, probability = draw_kept(x, dropout.p)
            scaling /= probability
        output, logits, expert_indices = add_mixture(
            base,
            x,
            self.mola_A[adapter_name],
            self.mola_B[adapter_name],
            self.mola_router[adapter_name],
            kept,
            MixtureSettings(self.top_k[adapter_name], scaling, dtype),
        )
        if self._collects:  # asked here too: transposing what nobody wants takes time
            self._leave_behind(adapter_name, logits.t(), expert_indices.t())
        return output

    def _add_plain(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The same in plain operators: for compilers, and for jitter."""
        experts_A, experts_B = self.mola_A[adapter_name], self.mola_B[adapter_name]
        routing = self.route(adapter_name, x)
        scaling = self.scaling[adapter_name]
        dropped = self.mola_dropout[adapter_name](x).reshape(-1, self.in_features)
        if not torch.is_grad_enabled() and reading_chosen_pays(routing, dropped, len(experts_A)):
            update = update_of_chosen(dropped, experts_A, experts_B, routing, scaling)
            return result + update.view(result.shape)
        gates = dense_gates(routing, self.num_experts[adapter_name]) * scaling
        hidden = F.linear(dropped, experts_A.flatten(0, 1))  # (N, E*r)
        hidden = hidden.unflatten(1, experts_A.shape[:2]) * gates.to(hidden.dtype).unsqueeze(-1)  # (N, E, r)
        update = hidden.flatten(1) @ experts_B.flatten(0, 1)  # (N, out)
        return result + update.view(result.shape)

    def _jitters(self, adapter_name: str) -> bool:
        return self.training and self.settings[adapter_name].router_jitter_noise > 0

    def route(self, adapter_name: str, x: torch.Tensor) -> Routing:
        """Choose experts for `x: (..., in)`; leaves logits and choices behind if the model asked for them."""
        settings = self.settings[adapter_name]
        if self._jitters(adapter_name):
            x = jitter(x, settings.router_jitter_noise)
        logits = self.router_logits(adapter_name, x)
        routing = top_k_softmax(logits, settings.top_k)
        self._leave_behind(adapter_name, logits, routing.expert_indices)
        return routing

    @property
    def _collects(self) -> bool:
        listeners = self.router_losses, self.observer
        return self.training and any(each is not None and each.collecting for each in listeners)

    def _leave_behind(self, adapter_name: str, logits: torch.Tensor, expert_indices: torch.Tensor) -> None:
        # Kept as they are: the sums are taken outside, where gradient checkpointing does not recompute.
        output = RouterOutput(logits, expert_indices)
        if self.training and self.router_losses is not None and self.router_losses.collecting:
            self.router_outputs[adapter_name] = output
        if self.training and self.observer is not None and self.observer.collecting:
            self.observer.see(adapter_name, output)

    def router_logits(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Router logits of `x: (..., in)`: float32 `(N, E)`.

        Raises:
            MolaError: the adapter has one expert here, hence no router.
        """
        if adapter_name not in self.mola_router:
            raise MolaError(f"Adapter {adapter_name!r} has no router in this module: it has one expert.")
        return router_logits(x, self.mola_router[adapter_name])

    def __getstate__(self) -> dict[str, Any]:
        # Router outputs belong to a running forward pass; with their graph they can not be copied or pickled.
        return {**self.__dict__, "router_outputs": {}, "observer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register(self)

    def extra_repr(self) -> str:
        """Experts, top_k and rank of every adapter, for `print(model)`."""
        return ", ".join(
            f"{name}: num_experts={s.num_experts}, top_k={s.top_k}, r={s.r}" for name, s in self.settings.items()
        )

    def __repr__(self) -> str:
        return "mola." + super().__repr__()
