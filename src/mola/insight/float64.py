"""Sums in float64, which MPS does not have."""

import torch


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on its device or, from MPS, on the CPU: moved first, or MPS itself would cast it."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
