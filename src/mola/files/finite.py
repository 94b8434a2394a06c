"""Weights that are read from a file must be numbers to compute with."""

from collections.abc import Mapping

import torch

from mola.errors import MolaError


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights, by name, that are NaN or infinite: every output would be. `where` names their file."""
    for name, tensor in tensors.items():
        count = _count_not_finite(tensor, name, where)
        if count:
            raise MolaError(
                f"{where} must hold finite numbers: {count} of {tensor.numel()} values of {name!r} are not finite. The "
                "training has diverged, or the file is damaged: use an earlier checkpoint, or train again with a "
                "lower `learning_rate`."
            )


def _count_not_finite(tensor: torch.Tensor, name: str, where: str) -> int:
    if not tensor.is_floating_point():
        return 0
    try:
        # Of the formats of 8 bits only some can be asked.
        values = tensor.float() if tensor.element_size() == 1 else tensor
    except NotImplementedError as error:
        raise MolaError(
            f"{where} must hold numbers to compute with: {name!r} is {tensor.dtype}. Save the adapter in float32."
        ) from error
    return values.numel() - int(torch.isfinite(values).sum())
