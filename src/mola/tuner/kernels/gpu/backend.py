"""All experts at once on a GPU. cuBLAS computes the products, and one Triton kernel in each pass what lies between.

- The router is part of A's product: its float32 weight is split into three parts of 16 bits, whose sum has the bits of
  float32. So no float32 copy of `x` is made, TF32 has no effect, and the experts are those that float32 would choose.
- Dropout is drawn from a seed on the device; no mask is stored.
- Without gradients, packed weights are reused, see `_packed`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mola.tuner.kernels import native
from mola.tuner.kernels.api import OTHER_ROUTER, Backend, Grads, Mixture, MixtureInputs, Saved
from mola.tuner.kernels.dense import why_no_own_backward
from mola.tuner.kernels.dropout import drop, is_gpu_seed
from mola.tuner.kernels.gates import keep_losses_only
from mola.tuner.kernels.gemm import addmm_, base_output
from mola.tuner.kernels.gpu import first_use
from mola.tuner.kernels.tensors import PLAIN_TYPES, as_rows
from mola.tuner.routing import DEFAULT_ROUTER

_CAPABILITY = (8, 0)  # the first compute capability with bfloat16
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_EXPERTS = 64


class Triton(Backend):
    """Computes all experts on a GPU, with Triton between the products."""

    name = "triton"
    device_type = "cuda"

    def why_unsupported(self, inputs: MixtureInputs) -> str | None:
        """None for dtypes of 16 bits on a GPU since Ampere where the kernels were correct, else the reason."""
        settings, x, experts_A = inputs.settings, inputs.x, inputs.experts_A
        reason = why_no_own_backward(inputs) or _why_not_on(x.device)
        if reason is not None:
            return reason
        if settings.router != DEFAULT_ROUTER or inputs.router.dtype is not torch.float32:
            return OTHER_ROUTER
        if settings.dtype not in _DTYPES or x.dtype is not settings.dtype:
            return f"needs input and products in bfloat16 or float16, here {x.dtype} and {settings.dtype}"
        if len(experts_A) > _MAX_EXPERTS:
            return f"at most {_MAX_EXPERTS} experts"
        tensors = x, experts_A, inputs.experts_B, inputs.router
        if any(type(each) not in PLAIN_TYPES or each.device != x.device for each in tensors) or not x.numel():
            return "needs plain tensors on one device, and at least one token"
        return first_use.why_wrong(self, inputs)

    def forward(self, inputs: MixtureInputs) -> tuple[Mixture, Saved]:
        """Pack the weights for this pass only, since training changes them, and compute the mixture."""
        _packed_of.pop(inputs.experts_A, None)
        return _forward(inputs, *_pack(inputs))

    def infer(self, inputs: MixtureInputs) -> Mixture:
        """Compute the mixture; reuses cached packed copies of frozen weights."""
        return _forward(inputs, *_packed(inputs))[0]

    def backward(self, inputs: MixtureInputs, saved, grad_output, grad_logits, wanted: Grads) -> Grads:
        """Like `Dense.backward`."""
        launch, mask, settings = native.load("launch", "gpu"), inputs.dropout_mask, inputs.settings
        gated, weights, packed, matrix_B = saved
        x, rows = as_rows(inputs.x), as_rows(grad_output).to(settings.dtype)
        matrix_B = inputs.experts_B.flatten(0, 1) if matrix_B is None else matrix_B
        grad_both = launch.gates_backward(torch.mm(matrix_B, rows.t()), gated, weights, grad_logits, settings.scaling)
        keep_losses_only(grad_both[len(gated) :], grad_logits, settings)
        rank_size, params = len(gated), inputs.experts_A.dtype
        A_and_router = packed[: len(grad_both)]  # A and the router's first part, which is its weight rounded to 16 bits
        grad_x = grad_A = grad_B = grad_router = None
        if wanted.experts_B:
            grad_B = _mm(gated, rows, inputs.experts_B.dtype)
        if mask is None and (wanted.experts_A or wanted.router):
            both = _mm(grad_both, x, params)
            grad_A, grad_router = both[:rank_size], both[rank_size:]
        elif mask is not None:
            grad_A = _mm(grad_both[:rank_size], drop(x, mask), params) if wanted.experts_A else None
            grad_router = _mm(grad_both[rank_size:], x, torch.float32) if wanted.router else None
        if wanted.x:
            grad_x = None if inputs.weight is None else rows @ inputs.weight
            if mask is None:
                grad_x = _mm_add(grad_x, grad_both.t(), A_and_router)
            else:
                grad_x = _drop_add(torch.mm(grad_both[:rank_size].t(), A_and_router[:rank_size]), mask, grad_x)
                grad_x = _mm_add(grad_x, grad_both[rank_size:].t(), A_and_router[rank_size:])
        return Grads(grad_x, grad_A, grad_B, grad_router)


def _why_not_on(device: torch.device) -> str | None:
    """None if the kernels can run on a device, else the reason."""
    launch = native.load("launch", "gpu") if device.type == "cuda" or native.is_interpreting() else None
    if launch is None:
        return "needs a GPU and Triton"
    if launch.IS_INTERPRETED or _capability(device) >= _CAPABILITY:
        return None
    return "needs a GPU of compute capability 8.0 or newer"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _mm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b` of matrices in 16 bits, returned in their dtype or in float32; sums are in float32 either way."""
    if a.dtype is dtype:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))  # on a CPU torch has no product with a different output dtype


def _mm_add(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Add `a @ b` to `total` in place if there is one."""
    return torch.mm(a, b) if total is None else addmm_(total, a, b)


def _drop_add(rows: torch.Tensor, mask: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    """`rows` with zeros for dropped elements, added to `total` in place if there is one."""
    if total is None or not is_gpu_seed(mask):
        dropped = drop(rows, mask)
        return dropped if total is None else total.add_(dropped)
    return native.load("launch", "gpu").drop(rows, mask, total)


def _forward(inputs: MixtureInputs, packed: torch.Tensor, matrix_B: torch.Tensor) -> tuple[Mixture, Saved]:
    """The mixture and the tensors for its gradient, from the two matrices that `_pack` returns."""
    settings, rows, mask = inputs.settings, as_rows(inputs.x), inputs.dropout_mask
    num_experts, rank_size = len(inputs.experts_A), len(matrix_B)
    if mask is None:
        products = _mm(packed, rows.t(), torch.float32)
        hidden, router_products = products[:rank_size], products[rank_size:]
    else:
        hidden = torch.mm(packed[:rank_size], drop(rows, mask).t())
        router_products = _mm(packed[rank_size:], rows.t(), torch.float32)
    launch = native.load("launch", "gpu")
    gates = launch.gates_forward(router_products, hidden, num_experts, settings.top_k, settings.scaling, settings.dtype)
    output = base_output(inputs, inputs.x)
    addmm_(output.view(-1, output.shape[-1]), gates.gated.t(), matrix_B)
    saved = gates.gated, gates.weights, packed, None if matrix_B.dtype is inputs.experts_B.dtype else matrix_B
    return Mixture(output, gates.logits, gates.expert_indices), Saved(inputs.x, saved)


def _pack(inputs: MixtureInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices in the dtype of the products: A with the router below it, and B.

    The router is split into three 16-bit parts, whose sum keeps its float32 precision.
    """
    dtype = inputs.settings.dtype
    packed = native.load("launch", "gpu").pack(inputs.experts_A, inputs.router, dtype)
    return packed, inputs.experts_B.flatten(0, 1).to(dtype)


_packed_of: Any = WeakTensorKeyDictionary()


def _packed(inputs: MixtureInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `_pack`, but frozen weights are packed once and reused until one of them changes.

    A change is noticed by the weight's version. Fused optimisers and writes to `.data` change no version, so trainable
    weights are packed for every pass, and weights that are frozen later are packed anew after any pass with gradients.
    A CUDA graph packs in every replay.
    """
    weights = inputs.experts_A, inputs.experts_B, inputs.router
    if any(each.requires_grad for each in weights):
        _packed_of.pop(inputs.experts_A, None)
        return _pack(inputs)
    is_capturing = inputs.x.is_cuda and torch.cuda.is_current_stream_capturing()
    if is_capturing or any(each.is_inference() for each in weights):
        return _pack(inputs)
    state = inputs.settings.dtype, _stream(inputs.x), *((each.data_ptr(), each._version) for each in weights)
    found = _packed_of.get(inputs.experts_A)
    if found is None or found[0] != state:
        found = _packed_of[inputs.experts_A] = state, _pack(inputs)
    return found[1]


def drop_cached_copies(experts: Iterable[torch.Tensor]) -> None:
    """Forget the packed weights of these A. Call it before training.

    A different backend may compute the training, and the optimiser may not change the versions of the weights.
    """
    for experts_A in experts:
        _packed_of.pop(experts_A, None)


def _stream(tensor: torch.Tensor) -> int:
    """The current stream of operators, because weights that a different stream packs may not be ready yet."""
    if not tensor.is_cuda or not torch.cuda.is_initialized():  # not initialized: fake tensors on a machine without GPU
        return 0
    return torch.cuda.current_stream(tensor.device).stream_id
