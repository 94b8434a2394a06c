"""LoRA+ (arXiv 2402.12354): a higher learning rate for `B`, which starts at zero, than for `A`.

PEFT's own helper knows `B` by the name of LoRA's and would give a mixture one rate for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mola.errors import MolaError


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: Callable[..., Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser of all trained parameters, as `peft.optimizers.create_loraplus_optimizer` makes one for LoRA.

    Args:
        model: with a mixture.
        optimizer_cls: class of the optimiser.
        lr: learning rate of `A`, of routers and of what else is trained.
        loraplus_lr_ratio: learning rate of `B` / `lr`; the paper takes 16.
        **kwargs: for the class.

    Raises:
        MolaError: the ratio is not above 0, or the model has no trained `mola_B`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return split_groups(optimizer_cls([{"params": trained}], lr=lr, **kwargs), model, loraplus_lr_ratio)


def split_groups(optimizer: Optimizer, model: nn.Module, loraplus_lr_ratio: float) -> Optimizer:
    """Give every `B` of an optimiser, before its first step, a group of its own with its own learning rate.

    Args:
        optimizer: holds trained parameters of `model`; it is changed.
        model: with a mixture.
        loraplus_lr_ratio: factor on the learning rate of its group.

    Returns:
        The optimiser.

    Raises:
        MolaError: as `create_loraplus_optimizer`.
    """
    if not 0 < loraplus_lr_ratio < math.inf:
        raise MolaError(f"`loraplus_lr_ratio` must be a number above 0, got {loraplus_lr_ratio!r}.")
    of_B = {id(parameter) for name, parameter in model.named_parameters() if ".mola_B" in name}
    moved = 0
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in of_B]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_B]
            optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * loraplus_lr_ratio})
            moved += len(chosen)
    if not moved:
        raise MolaError("`loraplus_lr_ratio` is for mixtures: the optimiser has no trained `mola_B` of this model.")
    return optimizer
