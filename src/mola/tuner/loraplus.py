"""LoRA+ (arXiv 2402.12354): a higher learning rate for `B`, which starts at zero, than for `A`.

PEFT's own function looks for parameters called `lora_B`, so it would give all parameters of a mixture one rate.
"""

from __future__ import annotations

import math
import re

from torch import nn
from torch.optim import Optimizer

from mola.errors import MolaError

_IS_B = re.compile(r"\.(mola_B|lora_B\.)")


def split_groups(optimizer: Optimizer, model: nn.Module, loraplus_lr_ratio: float) -> Optimizer:
    """Move every `B` of an optimiser into parameter groups with a higher learning rate, before the first step.

    Args:
        optimizer: the optimiser of `model`; it is changed and returned.
        model: a model with a mixture or a LoRA.
        loraplus_lr_ratio: learning rate of the new group / learning rate of the old one; the paper uses 16.

    Raises:
        MolaError: the ratio is not above 0, or the optimiser has no trainable B.
    """
    if not 0 < loraplus_lr_ratio < math.inf:
        raise MolaError(f"`loraplus_lr_ratio` must be a number above 0, got {loraplus_lr_ratio!r}.")
    ids_of_B = {id(parameter) for name, parameter in model.named_parameters() if _IS_B.search(name)}
    moved = 0
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in ids_of_B]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids_of_B]
            optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * loraplus_lr_ratio})
            moved += len(chosen)
    if not moved:
        raise MolaError("`loraplus_lr_ratio` is for mixtures and LoRAs: the optimiser has no trainable `B`.")
    return optimizer
