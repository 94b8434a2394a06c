"""Calls a backend, with its gradients: the one autograd function of all backends."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from mola.errors import MolaError
from mola.tuner.kernels.api import Backend, Grads, Mixture, MixtureInputs
from mola.tuner.kernels.dropout import sample_dropout_mask
from mola.tuner.kernels.tensors import autocast_is_on

_FIELDS = MixtureInputs._fields
# Positions of the inputs of `Grads` among the arguments of `_MixtureFunction.forward`; the first one is the backend.
_GRADIENTS = [1 + _FIELDS.index(name) for name in Grads._fields]


def compute(backend: Backend, inputs: MixtureInputs) -> Mixture:
    """Compute the mixture with a backend, and record it for autograd.

    Second derivatives exist only for backends with `uses_autograd`; for others, asking for them is an error.
    """
    if backend.uses_autograd:
        return backend.forward(inputs)[0]
    settings = inputs.settings
    if settings.dropout and inputs.dropout_mask is None:
        mask, keep_probability = sample_dropout_mask(inputs.x, settings.dropout)
        settings = settings._replace(scaling=settings.scaling / keep_probability)
        inputs = inputs._replace(dropout_mask=mask, settings=settings)
    if torch.is_grad_enabled():
        return Mixture(*_MixtureFunction.apply(backend, *inputs))
    return backend.infer(inputs)


class _MixtureFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: Backend, *fields: Any):
        inputs = MixtureInputs(*fields)
        mixture, saved = backend.forward(inputs)
        assert saved is not None
        ctx.mark_non_differentiable(mixture.expert_indices)
        ctx.set_materialize_grads(False)
        kept = inputs.weight, inputs.experts_A, inputs.experts_B, inputs.router, inputs.dropout_mask
        ctx.save_for_backward(saved.x, *kept, *saved.tensors)
        ctx.backend, ctx.settings, ctx.x_dtype = backend, inputs.settings, inputs.x.dtype
        ctx.result_dtype = None if inputs.base_output is None else inputs.base_output.dtype
        return tuple(mixture)

    @staticmethod
    def backward(ctx, grad_output, grad_logits, _):
        if torch.is_grad_enabled():  # a second derivative would be wrong without an error
            raise MolaError(
                "second derivatives through a mixture of experts are not supported: leave out `create_graph=True`."
            )
        # Read once: activation checkpointing raises when tensors are unpacked twice.
        x, weight, experts_A, experts_B, router, mask, *saved = ctx.saved_tensors
        parameters = experts_A, experts_B, router
        inputs = MixtureInputs(x, None, weight, None, *parameters, mask, ctx.settings)
        if grad_output is None:
            grad_output = x.new_zeros(*x.shape[:-1], inputs.experts_B.shape[2])
        wanted = Grads(*(ctx.needs_input_grad[position] for position in _GRADIENTS))
        # The dtypes are those of the forward pass, even if `backward()` is called under a different autocast.
        device = x.device.type
        with torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext():
            grads = ctx.backend.backward(inputs, tuple(saved), grad_output, grad_logits, wanted)
        grad_x = None if grads.x is None else grads.x.view(x.shape).to(ctx.x_dtype)
        grads_of_parameters = [
            None if grad is None else grad.view(parameter.shape).to(parameter.dtype)
            for grad, parameter in zip(grads[1:], parameters, strict=True)
        ]
        grad_result = grad_output.to(ctx.result_dtype) if weight is None else None
        return None, grad_x, grad_result, None, None, *grads_of_parameters, None, None
