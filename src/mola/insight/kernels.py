"""`mola.kernels_report`: which backend computes each adapted linear, and why no faster backend does."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mola.errors import MolaError
from mola.tuner.kernels.api import Backend, FrozenLinear, MixtureInputs, MixtureSettings
from mola.tuner.kernels.dispatch import BACKENDS, cast_float32_input, explain, forced_backend
from mola.tuner.layer import MolaLinear
from mola.tuner.stacked import StackedParameters

TOKENS = {"training": 512, "decode": 1}


class KernelChoice(NamedTuple):
    """The backend for a group of modules with equal shapes and settings.

    Attributes:
        mode: "training" (512 tokens, with gradients) or "decode" (one token, without gradients).
        backend: its name; "none" if `MOLA_KERNEL` names one that cannot compute these modules.
        num_modules: number of modules in the group.
        num_experts: the distinct numbers of experts of these modules, in rising order.
        reasons: why each backend that the table lists before `backend` is not used; only backends that serve this mode
            and device are named.
    """

    mode: str
    backend: str
    num_modules: int
    num_experts: list[int]
    reasons: dict[str, str]

    def __str__(self) -> str:
        experts = ", ".join(map(str, self.num_experts))
        line = f"{self.mode}: {self.backend} for {self.num_modules} modules (experts: {experts})"
        return line + "".join(f"; not {name}: {reason}" for name, reason in self.reasons.items())


def kernels_report(
    model: nn.Module, adapter_name: str | None = None, modes: str | Sequence[str] = tuple(TOKENS)
) -> list[KernelChoice]:
    """Which backend computes a model's modules on this machine, for training and for one generated token.

    Args:
        model: a model with MoLA layers; it is neither run nor changed.
        adapter_name: name of an adapter; default: the first active one.
        modes: "training", "decode", or a sequence of these. The first call with "decode" compiles its native
            functions.

    Returns:
        One entry for each mode, backend and set of reasons.

    Raises:
        MolaError: the model has no MoLA layer with that adapter, or a mode is unknown.
    """
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or not {*modes} <= {*TOKENS}:
        raise MolaError(f"`modes` must be one or several of {', '.join(TOKENS)}: got {modes!r}.")
    calls = []
    for layer in model.modules():
        if isinstance(layer, MolaLinear):
            name = adapter_name or layer.active_adapters[0]
            if name in layer.mola_A:
                calls += [(mode, _inputs_of(layer, name, mode)) for mode in modes]
    stacks = (layer for layer in model.modules() if isinstance(layer, StackedParameters))
    if not calls and not any(adapter_name is None or adapter_name in layer.settings for layer in stacks):
        wanted = "an adapter of mola" if adapter_name is None else f"the adapter {adapter_name!r}"
        raise MolaError(f"`model` must have {wanted} for a report on its kernels: no module has one.")
    return kernel_choices(calls)


def kernel_choices(calls: Iterable[tuple[str, MixtureInputs]]) -> list[KernelChoice]:
    """The choices for pairs of a mode and inputs. Only shapes and dtypes of the inputs matter, not their values."""
    num_experts: dict[tuple, list[int]] = defaultdict(list)
    choices: dict[tuple, tuple] = {}
    for mode, inputs in calls:
        key = mode, *(_shape_and_dtype(each) for each in inputs)
        if key not in choices:
            choices[key] = mode, *_choice(mode, inputs)
        num_experts[choices[key]].append(len(inputs.experts_A))
    return [
        KernelChoice(mode, backend, len(experts), sorted(set(experts)), dict(reasons))
        for (mode, backend, reasons), experts in sorted(num_experts.items(), key=lambda item: item[0][0], reverse=True)
    ]


def inputs_for_shapes(
    mode: str, in_features: int, out_features: int, num_experts: int, r: int, settings: MixtureSettings
) -> MixtureInputs:
    """Uninitialised inputs of a frozen linear with float32 experts, on the CPU.

    `mode` is "training" or "decode". `settings.dtype` is the dtype of the products and of the base layer.
    """
    x = torch.empty(1, TOKENS[mode], in_features, dtype=settings.dtype)
    weight = torch.empty(out_features, in_features, dtype=settings.dtype)
    experts_A, experts_B = (torch.empty(num_experts, r, size) for size in (in_features, out_features))
    router = torch.empty(num_experts, in_features) if num_experts > 1 else None
    return MixtureInputs(x, None, weight, None, experts_A, experts_B, router, None, settings)


def _inputs_of(layer: MolaLinear, adapter_name: str, mode: str) -> MixtureInputs:
    experts_A = layer.mola_A[adapter_name]
    weight: Any = getattr(layer.get_base_layer(), "weight", None)
    # The packed weights of a quantised layer do not have the dtype of its input.
    is_plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    dtype = weight.dtype if is_plain else experts_A.dtype
    x = torch.empty(1, TOKENS[mode], layer.in_features, dtype=dtype, device=experts_A.device)
    with torch.set_grad_enabled(mode == "training"):
        base: FrozenLinear | torch.Tensor | None = layer.frozen_linear(x)
    if base is None:
        base = x.new_empty(*x.shape[:-1], layer.out_features)
    inputs = layer.mixture_inputs(adapter_name, x, base)
    settings, own = inputs.settings, layer.settings[adapter_name]
    if mode == "training":
        settings = settings._replace(dropout=own.lora_dropout, jitter=own.router_jitter_noise)
    else:
        settings = settings._replace(dropout=0.0, jitter=0.0, needs_router_output=False)
    return inputs._replace(settings=settings)


def _choice(mode: str, inputs: MixtureInputs) -> tuple[str, tuple[tuple[str, str], ...]]:
    inputs = cast_float32_input(inputs)
    forced = None if inputs.router is None else forced_backend()
    with torch.set_grad_enabled(mode == "training"):
        if forced is not None:
            reason = forced.why_unsupported(inputs)
            why = "is set" if reason is None else f"{forced.name}: {reason}"
            return forced.name if reason is None else "none", (("MOLA_KERNEL", why),)
        explained = explain(inputs)
    chosen = next(name for name, reason in explained if reason is None)
    reasons = []
    for backend, (name, reason) in zip(BACKENDS, explained, strict=True):
        if name == chosen:
            break
        if reason is not None and _serves(backend, mode, inputs.x.device.type) and inputs.router is not None:
            reasons.append((name, reason))
    return chosen, tuple(reasons)


def _serves(backend: Backend, mode: str, device_type: str) -> bool:
    """Whether a backend is meant for a mode on a device: backends with a backward pass train, the others decode."""
    has_backward = type(backend).backward is not Backend.backward
    is_on_device = backend.device_type in (None, device_type)
    return is_on_device and not backend.uses_autograd and has_backward == (mode == "training")


def _shape_and_dtype(value: Any) -> Any:
    return (value.shape, value.dtype, type(value)) if isinstance(value, torch.Tensor) else value
