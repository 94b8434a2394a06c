"""Few tokens without gradients on the CPU by the native function of `mola.tuner.native`, where there is numba."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mola.tuner.few_tokens import is_few
from mola.tuner.owners import owner_of
from mola.tuner.pieces import PLAIN, have_addresses, import_native, is_watched
from mola.tuner.products import fast_linear, linear, wants_onednn


class NativeFewTokens:
    """The part of `MolaLinear` that computes few tokens natively; what it reads of the layer is declared here."""

    training: bool
    adapter_layer_names: tuple[str, ...]
    scaling: dict[str, float]
    top_k: dict[str, int]
    _modules: Any
    _add_experts: Any

    def _forward_few(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor | None:
        """The output for few tokens without gradients; None where there is no native function for it."""
        if self.training or torch.is_grad_enabled() or not is_few(x):
            return None
        if torch.compiler.is_compiling():
            return self._forward_few_compiled(adapter_name, x)
        # Taken from where they lie: for every token and linear, a detour through `__getattr__` can be measured.
        parts = self._modules
        experts_A, experts_B, router = (parts[name]._parameters.get(adapter_name) for name in self.adapter_layer_names)
        if experts_A is None or experts_B is None or router is None:
            return None
        dropout = parts["mola_dropout"]._modules[adapter_name]
        if not _is_native(x, experts_A, experts_B, router, dropout) or not have_addresses(
            x, experts_A, experts_B, router
        ):
            return None
        output = self._base_output(x)
        if type(output) is not torch.Tensor or output.dtype != x.dtype:
            return self._add_experts(adapter_name, x, output).to(output.dtype)
        add_few(output, x, experts_A, experts_B, router, self.scaling[adapter_name], self.top_k[adapter_name])
        return output

    def _forward_few_compiled(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor | None:
        experts_B = self._modules["mola_B"]._parameters.get(adapter_name)  # and nothing else: see `mola.tuner.owners`
        if torch.compiler.is_exporting() or experts_B is None or len(experts_B) == 1:
            return None
        if not has_native_update(x.dtype, experts_B.dtype):
            return None
        base = self._modules["base_layer"]
        if type(base) is nn.Linear and not is_watched(base) and wants_onednn(x, base.weight):
            return torch.ops.mola.linear_few(x, base.weight, base.bias, experts_B)
        output = self._base_output(x)
        if type(output) is not torch.Tensor or output.dtype != x.dtype:
            return self._add_experts(adapter_name, x, output).to(output.dtype)
        torch.ops.mola.add_few(output, x, experts_B)
        return output

    def _base_output(self, x: torch.Tensor) -> torch.Tensor:
        base = self._modules["base_layer"]
        if type(base) is not nn.Linear or is_watched(base):
            return base(x).clone(memory_format=torch.contiguous_format)  # somebody else may hold it
        return linear(x, base.weight, base.bias)


def _is_native(x, experts_A, experts_B, router, dropout) -> bool:
    """Whether there is a native function for these tensors as they are."""
    return (
        not dropout.training
        and router.dtype is torch.float32
        and experts_A.dtype is experts_B.dtype
        and has_native_update(x.dtype, experts_A.dtype)
    )


def add_few(
    output: torch.Tensor,
    x: torch.Tensor,
    experts_A: torch.Tensor,
    experts_B: torch.Tensor,
    router: torch.Tensor,
    scaling: float,
    top_k: int,
) -> None:
    """Add the update of a mixture to the base output, in place.

    Args:
        output: base output, contiguous `(..., out)`, in the format of `x`.
        x: `(..., in)`.
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.
        router: `(E, in)`, float32.
        scaling: `lora_alpha / r`.
        top_k: experts per token.

    Raises:
        RuntimeError: there is no native function for such tensors, see `has_native_update`.
        ValueError: the output has another shape.
    """
    num_experts, r, in_features = experts_A.shape
    out_features = experts_B.size(2)
    kernel = _kernel(x.dtype, experts_A.dtype)
    if kernel is None or not output.is_contiguous():
        raise RuntimeError("mola::add_few needs numba, and a contiguous output in float32 or bfloat16.")
    if router.shape != (num_experts, in_features) or x.size(-1) != in_features or len(experts_B) != num_experts:
        raise RuntimeError(
            f"mola::add_few: {x.shape}, {experts_A.shape}, {experts_B.shape}, {router.shape} do not fit."
        )
    if output.shape != (*x.shape[:-1], out_features):
        raise ValueError(f"The base layer's output has shape {tuple(output.shape)}, input {tuple(x.shape)}.")
    # Held by names until the call is over. Written out: this is called for every token and linear.
    x, router, experts_A, experts_B = (
        x.contiguous(),
        router.contiguous(),
        experts_A.contiguous(),
        experts_B.contiguous(),
    )
    kernel(
        x.data_ptr(),
        router.data_ptr(),
        experts_A.data_ptr(),
        experts_B.data_ptr(),
        output.data_ptr(),
        x.numel() // in_features,
        num_experts,
        r,
        in_features,
        out_features,
        scaling,
        top_k,
    )


def _add_few_of(output: torch.Tensor, x: torch.Tensor, experts_B: torch.Tensor) -> None:
    owner = owner_of(experts_B)
    name = owner.adapter_name
    experts_A: Any = owner.experts_a.get(name)
    router: Any = owner.router.get(name)
    if (
        type(experts_A) in PLAIN
        and type(router) in PLAIN
        and experts_A.is_cpu
        and router.is_cpu
        and _is_native(x, experts_A, experts_B, router, owner.dropout[name])
    ):
        add_few(output, x, experts_A, experts_B, router, owner.scaling[name], owner.top_k[name])
    else:  # as without a compiler, with dropout too
        layer: Any = owner.layer()
        output.copy_(layer._add_experts(name, x, output))


def _linear_few(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, experts_B: torch.Tensor):
    output = fast_linear(x, weight, bias)  # of which compilers could know only how to call it for constants
    _add_few_of(output, x, experts_B)
    return output


# For compilers: the update of the layer that B belongs to, and base output and update in one. With the decorator
# `torch.library.custom_op` a call takes longer.
_LIBRARY = torch.library.Library("mola", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_LIBRARY.define("add_few(Tensor(a!) output, Tensor x, Tensor experts_B) -> ()", tags=_TAGS)
_LIBRARY.impl("add_few", _add_few_of, "CPU")
_LIBRARY.impl("add_few", lambda *arguments: None, "Meta")
_LIBRARY.define("linear_few(Tensor x, Tensor weight, Tensor? bias, Tensor experts_B) -> Tensor", tags=_TAGS)
_LIBRARY.impl("linear_few", _linear_few, "CPU")
_LIBRARY.impl("linear_few", lambda x, weight, *others: x.new_empty(*x.shape[:-1], len(weight)), "Meta")


@torch.compiler.assume_constant_result
def has_native_update(values: torch.dtype, weights: torch.dtype) -> bool:
    """Whether there is a native function for these formats of the input and of A and B; a compiler may ask."""
    return _kernel(values, weights) is not None


def _kernel(values: torch.dtype, weights: torch.dtype) -> Any:
    """`mola.tuner.native.kernel`; None without numba."""
    native = import_native("mola.tuner.native")
    return None if native is None else native.kernel(values, weights)
