"""Counts of subnormal numbers: those too small for the normal range, which many processors compute slowly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mola.tuner.layer import MolaLinear


def is_subnormal(tensor: torch.Tensor) -> torch.Tensor:
    """Where a number is not zero, and smaller than the smallest normal one of its format."""
    return (tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)


@dataclass
class Numbers:
    """Counts of numbers that were looked at, and of subnormal ones."""

    total: int = 0
    subnormal: int = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Look at all numbers of a tensor."""
        self.total += tensor.numel()
        self.subnormal += int(is_subnormal(tensor).sum())

    def row(self, name: str) -> dict[str, Any]:
        """Counts, and the share of subnormal numbers."""
        share = self.subnormal / max(self.total, 1)
        return {f"{name}_numbers": self.total, f"{name}_subnormal": self.subnormal, f"{name}_subnormal_share": share}


class RankSpace(TorchDispatchMode):
    """Looks at what operators write while a layer computes, forward or backward, if it is of rank size or smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = Numbers()
        self.most: int | None = None  # numbers of a tensor of rank size; None outside layers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views write nothing, and what is allocated but not yet written holds anything.
        if self.most is not None and not func.is_view and "empty" not in func.__name__:
            for each in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(each, torch.Tensor) and each.is_floating_point() and each.numel() <= self.most:
                    self.numbers.add(each)
        return result

    def before(self, module: MolaLinear, inputs: tuple[torch.Tensor, ...]) -> None:
        """Forward hook: a layer begins."""
        name = module.active_adapters[0]
        self.most = module.num_experts[name] * (module.r[name] + 1) * inputs[0].shape[:-1].numel()

    def after(self, module: MolaLinear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Forward hook: a layer ends; the node that computes its gradient is watched as well."""
        most, self.most = self.most, None
        node: Any = output.grad_fn
        node.register_prehook(lambda _: setattr(self, "most", most))
        node.register_hook(lambda *_: setattr(self, "most", None))
