"""Initial values of experts and routers.

| `init_lora_weights` | `A_e` | `B_e` |
| --- | --- | --- |
| True | uniform within `1 / sqrt(in)` | zero |
| "gaussian" | normal, standard deviation `1 / r` | zero |
| "orthogonal" | from every second row of a random orthogonal matrix | from its other rows, so that `B_e A_e = 0` |
| "principal" | right singular vectors of the base weight, the largest dealt in turn to all experts | zero |
| False | as True | uniform within `1 / sqrt(r)`: the initial model differs from the base model |

"gaussian" and "orthogonal" are PEFT's, applied to every expert. "principal" uses PiSSA's directions (arXiv
2404.02948) and does not change the base weight: PiSSA subtracts the adapter's product from the base weight, but the
product of a mixture differs from token to token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from mola.errors import MolaError

INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "principal")
_SUBSPACE_ITERATIONS = 4  # PiSSA's authors found 4 to be enough for training


def check_initialization(value: Any) -> None:
    """Raise MolaError for a value that is not in `INITIALIZATIONS`."""
    if not (isinstance(value, (bool, str)) and value in INITIALIZATIONS):
        raise MolaError(f"`init_lora_weights` must be one of {list(INITIALIZATIONS)}, got {value!r}.")


def check_shapes(method: bool | str, num_experts: int, r: int, features: tuple[int, int], module: str) -> None:
    """Raise MolaError for an odd rank with "orthogonal", or more directions than the weight has with "principal".

    `features` are the sizes of the input and the output of the module.
    """
    if method == "orthogonal" and r % 2:
        raise MolaError(
            f"`init_lora_weights` 'orthogonal' needs an even rank: {module!r} has {r}. Choose {r + 1}, or a "
            "different initialisation."
        )
    if method == "principal" and num_experts * r > min(features):
        raise MolaError(
            f"`init_lora_weights` 'principal' has at most {min(features)} directions for {module!r}, but {num_experts} "
            f"experts of rank {r} need {num_experts * r}. Choose fewer experts or a smaller rank."
        )


@torch.no_grad()
def initialize(
    method: bool | str,
    experts_A: torch.Tensor,
    experts_B: torch.Tensor,
    router: torch.Tensor | None,
    base_layer: nn.Module,
) -> None:
    """Fill experts and router of one module with their initial values.

    The router is uniform within `1 / sqrt(in)` (kaiming, a = sqrt 5). The table at the top of this module has the
    experts' values. Shapes: `experts_A` is `(E, r, in)`, `experts_B` is `(E, r, out)`, `router` is `(E, in)`, or None
    for one expert.
    """
    _, r, in_features = experts_A.shape
    bound = 1.0 / math.sqrt(in_features)  # `kaiming_uniform_` would use r * in as the fan-in of the stack
    experts_B.zero_()
    if method == "gaussian":
        experts_A.normal_(std=1.0 / r)
    elif method == "orthogonal":
        _orthogonal(experts_A, experts_B)
    elif method == "principal":
        _principal(experts_A, base_layer)
    else:
        experts_A.uniform_(-bound, bound)
    if router is not None:
        router.uniform_(-bound, bound)
    if method is False:
        experts_B.uniform_(-1.0 / math.sqrt(r), 1.0 / math.sqrt(r))


def _orthogonal(experts_A: torch.Tensor, experts_B: torch.Tensor) -> None:
    num_experts, r, _ = experts_A.shape
    for expert in range(num_experts):
        rows = torch.linalg.qr(torch.randn(r, r)).Q
        # The rows of an orthogonal matrix are orthogonal to each other, so the product of the two halves is zero.
        for stack, half in ((experts_A, rows[0::2]), (experts_B, rows[1::2])):
            stack[expert].copy_(half.t() @ torch.randn(r // 2, stack.shape[2]) / 10.0)


def can_unpack_weight(base_layer: nn.Module) -> bool:
    """Whether a layer's weight is a plain tensor, or packed by a library whose weights PEFT can unpack."""
    weight = getattr(base_layer, "weight", None)
    libraries = {type(each).__module__.partition(".")[0] for each in (base_layer, weight)}
    is_plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    return is_plain or bool(libraries & {"bitsandbytes", "hqq", "torchao"})


def _principal(experts_A: torch.Tensor, base_layer: nn.Module) -> None:
    num_experts, r, in_features = experts_A.shape
    if experts_A.device.type == "meta":
        return
    if not can_unpack_weight(base_layer):  # only for a saved adapter, whose file replaces these values
        bound = 1.0 / math.sqrt(in_features)
        experts_A.uniform_(-bound, bound)
        return
    weight: Any = dequantize_module_weight(base_layer)
    weight = (weight.t() if isinstance(base_layer, Conv1D) else weight).to(experts_A.device, torch.float32)
    wanted = num_experts * r
    V = torch.svd_lowrank(weight, q=min(wanted + 8, *weight.shape), niter=_SUBSPACE_ITERATIONS)[2][:, :wanted]
    length = 1.0 / math.sqrt(3.0)  # expected length of a row with uniform values, so that the same learning rate fits
    experts_A.copy_(V.t().view(r, num_experts, in_features).transpose(0, 1) * length)
