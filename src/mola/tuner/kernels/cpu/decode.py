"""Few tokens without gradients on a CPU: one native function reads the chosen experts only, see `jit_decode`.

A layer calls `try_decode`, and a batch with several adapters calls `try_row_table`. Both bypass the table of backends,
because building a backend's inputs takes longer than the arithmetic of a mixture.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from mola.tuner.kernels import native
from mola.tuner.kernels.api import NOT_PLAIN, OTHER_ROUTER, Mixture, MixtureInputs
from mola.tuner.kernels.decode import Decode, is_decode, why_not_decode
from mola.tuner.kernels.gemm import linear, uses_onednn
from mola.tuner.kernels.tensors import are_plain_cpu_tensors, has_hooks
from mola.tuner.routing import DEFAULT_ROUTER

_NO_FUNCTION = "no native function for these dtypes, or no numba here"


class CpuDecode(Decode):
    """Computes the chosen experts only, in one native function."""

    name = "cpu_decode"
    casts_its_inputs = True

    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """None for plain tensors in float32 or bfloat16, without gradients and router output; else the reason."""
        x, settings = inputs.x, inputs.settings
        if torch.compiler.is_compiling():
            return "a compiler has an operator for this"
        if not is_available():  # checked early: without numba, every token and linear comes here
            return _NO_FUNCTION
        reason = why_not_decode(inputs)
        if reason is not None:
            return reason
        if settings.needs_router_output or settings.jitter:
            return "router outputs or jitter are wanted"
        if settings.router != DEFAULT_ROUTER:
            return OTHER_ROUTER
        reason = _why_not_native(x, inputs.experts_A, inputs.experts_B, inputs.router)
        if reason is None and inputs.base_output is not None and inputs.base_output.dtype is not x.dtype:
            return "the dtypes of base output and input differ"
        return reason

    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, None]:
        """Compute the base output, then add the update in place with the native function."""
        if inputs.weight is not None:
            output = linear(inputs.x, inputs.weight, inputs.bias)
        else:
            assert inputs.base_output is not None
            output = inputs.base_output.clone(
                memory_format=torch.contiguous_format
            )  # the original may be used elsewhere
        settings = inputs.settings
        add_update(
            output, inputs.x, inputs.experts_A, inputs.experts_B, inputs.router, settings.scaling, settings.top_k
        )
        return Mixture(output), None


CPU_DECODE = CpuDecode()


def try_decode(layer: Any, adapter_name: str, x: torch.Tensor) -> torch.Tensor | None:
    """The output of a layer for few tokens, computed like `CpuDecode`; None if no native function fits the layer.

    Args:
        layer: a `MolaLinear`.
        adapter_name: its only active adapter.
        x: `(..., in)`.
    """
    if layer.training or not is_decode(x):
        return None
    parts = layer._modules
    experts_B = parts["mola_B"]._parameters.get(adapter_name)
    if experts_B is None or experts_B.is_meta:
        return None
    is_compiling, matrices = torch.compiler.is_compiling(), None
    if is_compiling:
        # Compiled code compares everything that it reads of the layer before every call, so it reads B alone.
        if torch.compiler.is_exporting() or len(experts_B) == 1 or not has_kernel(x.dtype, experts_B.dtype):
            return None
    else:
        matrices = native_matrices(layer, adapter_name, x, experts_B)
        if matrices is None:
            return None
    base = parts["base_layer"]
    if type(base) is not nn.Linear or has_hooks(base):
        output = base(x).clone(memory_format=torch.contiguous_format)  # the original may be used elsewhere
    elif is_compiling and uses_onednn(x, base.weight):
        return torch.ops.mola.linear_decode(x, base.weight, base.bias, experts_B)
    else:
        output = linear(x, base.weight, base.bias)
    if type(output) is not torch.Tensor or output.dtype != x.dtype:
        return layer.add_expert_output(adapter_name, x, output).to(output.dtype)
    if matrices is None:
        torch.ops.mola.decode(output, x, experts_B)
    else:
        experts_A, router = matrices
        add_update(output, x, experts_A, experts_B, router, layer.scaling[adapter_name], layer.top_k[adapter_name])
    return output


def native_matrices(layer: Any, adapter_name: str, x: torch.Tensor, experts_B: torch.Tensor) -> tuple[Any, Any] | None:
    """A and router of a layer's adapter; None if the native function cannot compute the adapter for `x`."""
    parts = layer._modules
    experts_A = parts["mola_A"]._parameters.get(adapter_name)
    router = parts["mola_router"]._parameters.get(adapter_name)
    if (
        experts_A is not None
        and router is not None
        and layer.settings[adapter_name].router == DEFAULT_ROUTER
        and not parts["mola_dropout"]._modules[adapter_name].training
        and _why_not_native(x, experts_A, experts_B, router) is None
    ):
        return experts_A, router
    return None


def _why_not_native(x: torch.Tensor, experts_A: torch.Tensor, experts_B: torch.Tensor, router: Any) -> str | None:
    """None if the native function can read these tensors, else the reason."""
    if router.dtype is not torch.float32:
        return OTHER_ROUTER
    if not are_plain_cpu_tensors(x, experts_A, experts_B, router):  # before anything is compiled
        return NOT_PLAIN
    return _NO_FUNCTION if experts_A.dtype is not experts_B.dtype or _kernel(x.dtype, experts_A.dtype) is None else None


def add_update(
    output: torch.Tensor,
    x: torch.Tensor,
    experts_A: torch.Tensor,
    experts_B: torch.Tensor,
    router: Any,
    scaling: float,
    top_k: int,
) -> None:
    """Add the update of a mixture to the base output, in place.

    `output: (..., out)` is contiguous and in the dtype of `x`. The other arguments are those of `MixtureInputs`.

    Raises:
        RuntimeError: there is no native function for these tensors, or their shapes do not fit.
        ValueError: the output's shape does not fit.
    """
    num_experts, r, in_features = experts_A.shape
    out_features = experts_B.size(2)
    kernel = _kernel(x.dtype, experts_A.dtype)
    if kernel is None or not output.is_contiguous():
        raise RuntimeError("mola::decode needs numba, and a contiguous output in float32 or bfloat16.")
    fit = router.shape == (num_experts, in_features) and experts_B.shape[:2] == (num_experts, r)
    if not fit or x.size(-1) != in_features:
        raise RuntimeError(f"mola::decode: {x.shape}, {experts_A.shape}, {experts_B.shape}, {router.shape} do not fit.")
    if output.shape != (*x.shape[:-1], out_features):
        raise ValueError(f"The base layer's output has shape {tuple(output.shape)}, input {tuple(x.shape)}.")
    # These names keep the copies alive until the call is over. No loop: this runs for every token and linear.
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


class RowTable(NamedTuple):
    """The experts of each row of a batch, by their addresses.

    Attributes:
        kernel: the native function, see `mola.tuner.kernels.cpu.jit_decode.rows_kernel`.
        experts: addresses and sizes of each row's experts, int64 `(rows, 6)`.
        scalings: float32 `(rows,)`.
        no_router: zeros, the router of adapters with one expert, whose gate is 1; the table keeps them alive.
    """

    kernel: Any
    experts: torch.Tensor
    scalings: torch.Tensor
    no_router: torch.Tensor

    def add(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add each row's update to the base output `(rows, ..., out)`, in place; the output is contiguous."""
        x, sizes = x.contiguous(), (len(x), x.numel() // (len(x) * x.shape[-1]), x.shape[-1], output.shape[-1])
        self.kernel(x.data_ptr(), output.data_ptr(), self.experts.data_ptr(), self.scalings.data_ptr(), *sizes)
        return output


def try_row_table(layer: Any, names: list[str], x: torch.Tensor) -> RowTable | None:
    """The table of a layer's experts for a batch whose rows have different adapters; None without a native function.

    Args:
        layer: a `MolaLinear`.
        names: the adapter of each row; an adapter that the layer does not have adds nothing.
        x: `(rows, ..., in)`.
    """
    parts, functions = layer._modules, native.load("jit_decode")
    no_router = torch.zeros(layer.in_features, dtype=torch.float32, device="cpu")
    entries, kernels = {}, set()
    for name in set(names):
        experts_A, experts_B = (parts[part]._parameters.get(name) for part in ("mola_A", "mola_B"))
        if experts_A is None:
            entries[name] = [0] * 6, 0.0
            continue
        num_experts, r, _ = experts_A.shape
        tensors = parts["mola_router"]._parameters.get(name, no_router.unsqueeze(0)), experts_A, experts_B
        shapes = (num_experts, x.shape[-1]), (num_experts, r, x.shape[-1]), (num_experts, r, layer.out_features)
        is_usual = layer.settings[name].router == DEFAULT_ROUTER and not parts["mola_dropout"]._modules[name].training
        if not is_usual or layer.training or _why_not_native(x, experts_A, experts_B, tensors[0]) is not None:
            return None
        if not all(each.is_contiguous() and each.shape == shape for each, shape in zip(tensors, shapes, strict=True)):
            return None
        addresses = [each.data_ptr() for each in tensors]
        entries[name] = [*addresses, num_experts, r, layer.top_k[name]], layer.scaling[name]
        kernels.add(functions.rows_kernel(x.dtype, experts_A.dtype))
    if len(kernels) != 1:
        return None
    experts, scalings = zip(*map(entries.__getitem__, names), strict=True)
    # These tensors must be on the CPU, whatever torch's default device is.
    return RowTable(
        kernels.pop(),
        torch.tensor(experts, dtype=torch.int64, device="cpu"),
        torch.tensor(scalings, dtype=torch.float32, device="cpu"),
        no_router,
    )


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Whether there are native functions at all; `torch.compile` can trace this."""
    return native.load("jit_decode") is not None


@torch.compiler.assume_constant_result
def has_kernel(values: torch.dtype, weights: torch.dtype) -> bool:
    """Whether there is a native function for these dtypes of the input and of A and B; `torch.compile` can trace it."""
    return _kernel(values, weights) is not None


def _kernel(values: torch.dtype, weights: torch.dtype) -> Any:
    functions = native.load("jit_decode")
    return None if functions is None else functions.kernel(values, weights)
