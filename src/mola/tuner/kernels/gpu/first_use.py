"""Before a kernel is used on a device, its results are compared with the reference in float64, once per kind of call.

If a kernel is wrong with this GPU, driver or compiler, the log says so, and a different backend trains.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from mola.tuner.kernels import native
from mola.tuner.kernels.api import Backend, Grads, MixtureInputs
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.dropout import drop, sample_dropout_mask
from mola.tuner.kernels.reference import Reference

logger = logging.getLogger(__name__)

_TOKENS, _FEATURES, _OUT = 67, 96, 80  # small, and no multiples of the kernels' tiles
_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 5e-3}  # largest error, as a share of the largest value
_LEAVES = "x", *Grads._fields[1:]
_found: dict[tuple[Any, ...], str | None] = {}


def why_wrong(backend: Backend, inputs: MixtureInputs) -> str | None:
    """None if a backend agrees with the reference for inputs of this kind, else what went wrong.

    The comparison runs once for each device, dtypes, number of experts, rank and `top_k`. It cannot run while a CUDA
    graph is captured.
    """
    (num_experts, r, _), settings = inputs.experts_A.shape, inputs.settings
    key = inputs.x.device, settings.dtype, inputs.experts_A.dtype, num_experts, r, settings.top_k
    if key not in _found:
        if inputs.x.is_cuda and torch.cuda.is_current_stream_capturing():
            return "was not tried before a CUDA graph was captured"
        reason = _compare_with_reference(backend, inputs)
        if reason is not None:
            logger.warning("The kernel %s is not used on %s: %s.", backend.name, inputs.x.device, reason)
        _found[key] = reason
    return _found[key]


def _compare_with_reference(backend: Backend, inputs: MixtureInputs) -> str | None:
    """None if the backend and the reference agree on random inputs, else what differs, or the backend's error."""
    try:
        device = inputs.x.device
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),  # `manual_seed` seeds all devices
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            # Replaces the hooks of a checkpointed layer around this call, which would count these tensors as its own.
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        ):
            torch.manual_seed(0)
            for dropout in (0.0, 0.3):
                random = _random_inputs(inputs, dropout)
                with native.load("launch", "gpu").poisoned():
                    found = _results(backend, random)
                expected = _results(Reference(), _in_float64(random))
                for name, actual, exact in zip(("output", "logits", *_LEAVES), found, expected, strict=True):
                    error = (actual.double() - exact).abs().max() / exact.abs().max()
                    if not error <= _TOLERANCE[inputs.settings.dtype]:
                        return f"its {name} differs from the reference by {error:.2g} of the largest value"
    except Exception as error:  # any error of compiler or driver: other backends need neither
        return f"{type(error).__name__}: {error}"
    return None


def _random_inputs(inputs: MixtureInputs, dropout: float) -> MixtureInputs:
    """Random inputs with the same dtypes, experts and rank, which require gradients."""
    num_experts, r, _ = inputs.experts_A.shape
    dtype, device, settings = inputs.settings.dtype, inputs.x.device, inputs.settings

    def draw(*shape: int, dtype: torch.dtype = inputs.experts_A.dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype).requires_grad_()

    x = draw(_TOKENS, _FEATURES, dtype=dtype)
    weight = draw(_OUT, _FEATURES, dtype=dtype).detach()
    experts_A, experts_B = draw(num_experts, r, _FEATURES), draw(num_experts, r, _OUT)
    router = draw(num_experts, _FEATURES, dtype=torch.float32)
    mask = sample_dropout_mask(x, dropout)[0] if dropout else None
    settings = settings._replace(scaling=6.0, dropout=0.0, jitter=0.0, needs_router_output=True)
    return MixtureInputs(x, None, weight, None, experts_A, experts_B, router, mask, settings)


def _in_float64(inputs: MixtureInputs) -> MixtureInputs:
    """Copies of the inputs in float64, which require gradients, with the same dropout mask as booleans."""
    changed = {name: getattr(inputs, name).detach().double().requires_grad_() for name in _LEAVES}
    changed["weight"] = inputs.weight.double() if inputs.weight is not None else None
    if inputs.dropout_mask is not None:
        changed["dropout_mask"] = drop(torch.ones_like(inputs.x), inputs.dropout_mask).bool()
    settings = inputs.settings._replace(dtype=torch.float64)
    return inputs._replace(**changed, settings=settings)


def _results(backend: Backend, inputs: MixtureInputs) -> list[torch.Tensor]:
    """Output, logits and all gradients of a loss that depends on both."""
    output, logits, _ = compute(backend, inputs)
    assert logits is not None
    weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float64).view(output.shape)
    loss = (output.double() * weights).sum() + 0.1 * logits.double().square().sum()
    gradients = torch.autograd.grad(loss, [getattr(inputs, name) for name in _LEAVES])
    return [output.detach(), logits.detach(), *gradients]
