"""How experts start.

| `init_lora_weights` | `A_e` | `B_e` |
| --- | --- | --- |
| True | uniform within `1 / sqrt(in)` | zero |
| "gaussian" | normal, standard deviation `1 / r` | zero |
| "orthogonal" | rows of a random orthogonal matrix | its other rows, so that `B_e A_e = 0` |
| "principal" | right singular vectors of the base weight, the largest dealt in turn to all experts | zero |
| False | as True | uniform within `1 / sqrt(r)`: no longer the base model |

"gaussian" and "orthogonal" are PEFT's, for every expert by itself. "principal" takes PiSSA's directions (arXiv
2404.02948) and leaves the base weight as it is: PiSSA takes the adapter's product out of the base weight, which is
the same for every token, while a mixture's product is not.
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
_ITERATIONS = 4  # of the subspace iteration; PiSSA's authors found 4 to be enough for training
_REASONS = {
    "pissa": "PiSSA changes the base weight, which a mixture cannot take back; 'principal' has its directions",
    "eva": "EVA needs data and chooses ranks; 'principal' takes directions from the weights",
    "loftq": "LoftQ makes up for a quantised weight by one update that is always there; routed experts are not",
}


def check_initialization(value: Any) -> None:
    """Raise MolaError for a value that is none of `INITIALIZATIONS`; with a reason if PEFT's LoRA knows it."""
    if isinstance(value, (bool, str)) and value in INITIALIZATIONS:
        return
    reason = next((f": {why}" for name, why in _REASONS.items() if str(value).startswith(name)), "")
    raise MolaError(f"`init_lora_weights` must be one of {list(INITIALIZATIONS)}, got {value!r}{reason}.")


def check_shapes(method: bool | str, num_experts: int, r: int, features: tuple[int, int], module: str) -> None:
    """Check that experts of these shapes can start like this.

    Args:
        method: one of `INITIALIZATIONS`.
        num_experts: of the module.
        r: rank of each.
        features: sizes of the module's input and output.
        module: its name.

    Raises:
        MolaError: they cannot.
    """
    if method == "orthogonal" and r % 2:
        raise MolaError(
            f"`init_lora_weights` 'orthogonal' needs an even rank: {module!r} has {r}. Take {r + 1}, or another start."
        )
    if method == "principal" and num_experts * r > min(features):
        raise MolaError(
            f"`init_lora_weights` 'principal' has as many directions as the weight, {min(features)} for {module!r}: "
            f"{num_experts} experts of rank {r} are {num_experts * r}. Take fewer or smaller ones, or another start."
        )


@torch.no_grad()
def initialize(
    method: bool | str,
    experts_A: torch.Tensor,
    experts_B: torch.Tensor,
    router: torch.Tensor | None,
    base_layer: nn.Module,
) -> None:
    """Fill experts and router of one module; routers are uniform within `1 / sqrt(in)` (kaiming, a = sqrt 5).

    Args:
        method: one of `INITIALIZATIONS`.
        experts_A: `(E, r, in)`.
        experts_B: `(E, r, out)`.
        router: `(E, in)`; None for one expert.
        base_layer: the linear that they adapt.
    """
    _, r, in_features = experts_A.shape
    # Written out, because kaiming_uniform_ on the stack would take r * in for the fan-in.
    bound = 1.0 / math.sqrt(in_features)
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
        # Rows of one orthogonal matrix for A, its other rows for B: their product is zero.
        for stack, half in ((experts_A, rows[0::2]), (experts_B, rows[1::2])):
            stack[expert].copy_(half.t() @ torch.randn(r // 2, stack.shape[2]) / 10.0)


def can_be_read(base_layer: nn.Module) -> bool:
    """Whether a layer has plain weights, or such as PEFT can unpack."""
    weight = getattr(base_layer, "weight", None)
    makers = {type(each).__module__.partition(".")[0] for each in (base_layer, weight)}
    is_plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    return is_plain or bool(makers & {"bitsandbytes", "hqq", "torchao"})


def _principal(experts_A: torch.Tensor, base_layer: nn.Module) -> None:
    num_experts, r, in_features = experts_A.shape
    if experts_A.device.type == "meta":
        return
    if not can_be_read(base_layer):  # of a saved adapter, whose values come from its file
        bound = 1.0 / math.sqrt(in_features)
        experts_A.uniform_(-bound, bound)
        return
    weight: Any = dequantize_module_weight(base_layer)
    weight = (weight.t() if isinstance(base_layer, Conv1D) else weight).to(experts_A.device, torch.float32)
    wanted = num_experts * r
    V = torch.svd_lowrank(weight, q=min(wanted + 8, *weight.shape), niter=_ITERATIONS)[2][:, :wanted]
    # As long as rows are that start at random: the same learning rate suits both.
    length = 1.0 / math.sqrt(3.0)
    experts_A.copy_(V.t().view(r, num_experts, in_features).transpose(0, 1) * length)
