"""Chooses the backend that computes a mixture: the first of `BACKENDS` that can, unless a later one is faster.

`MOLA_KERNEL=name` in the environment, read once, forces one backend; if it cannot compute the inputs, an error says
why. Layers with one expert always use the backend `lora`, even if a different backend is forced.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F

from mola.errors import MolaError
from mola.tuner.kernels import native
from mola.tuner.kernels.api import Backend, Mixture, MixtureInputs
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.cpu import decode as cpu_decode
from mola.tuner.kernels.cpu.decode_operator import register_layer as register_layer
from mola.tuner.kernels.cpu.train import CpuTrain
from mola.tuner.kernels.decode import Decode, is_decode
from mola.tuner.kernels.dense import Dense
from mola.tuner.kernels.gpu.backend import Triton
from mola.tuner.kernels.gpu.backend import drop_cached_copies as drop_cached_copies
from mola.tuner.kernels.grouped import Grouped
from mola.tuner.kernels.reference import Gathered, Lora, Reference
from mola.tuner.kernels.tensors import autocast_is_on

_VARIABLE = "MOLA_KERNEL"

BACKENDS: tuple[Backend, ...] = (
    cpu_decode.CPU_DECODE,
    Lora(),
    Gathered(),
    Decode(),
    Triton(),
    CpuTrain(),
    Grouped(),
    Dense(),
    Reference(),
)
_BACKENDS_FOR_GPUS = tuple(backend for backend in BACKENDS if backend.device_type != "cpu")
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def try_decode(layer, adapter_name: str, x: torch.Tensor) -> torch.Tensor | None:
    """The output of a layer for few tokens. See `mola.tuner.kernels.cpu.decode.try_decode` for the arguments.

    None if no native function fits the call, as in training or with many tokens, or if `MOLA_KERNEL` is set. The caller
    then calls `mixture`.
    """
    if not cpu_decode.is_available() or _forced_name():
        return None
    return cpu_decode.try_decode(layer, adapter_name, x)


def try_row_table(layer, names: list[str], x: torch.Tensor) -> Any:
    """For a batch whose rows use different adapters and have few tokens: a table of the matrices of each row's adapter.

    See `mola.tuner.kernels.cpu.decode.try_row_table` for the arguments and the table's form. None if no native
    function fits the batch, or if `MOLA_KERNEL` is set. The caller then computes one adapter after the other.
    """
    if not cpu_decode.is_available() or _forced_name() or not is_decode(x):
        return None
    return cpu_decode.try_row_table(layer, names, x)


def mixture(inputs: MixtureInputs) -> Mixture:
    """Compute a mixture with the backend that `select` returns.

    Raises:
        MolaError: `MOLA_KERNEL` names an unknown backend, or one that cannot compute these inputs.
    """
    inputs = cast_float32_input(inputs)
    backend = select(inputs)
    return compute(backend, inputs if backend.casts_its_inputs else cast_inputs(inputs))


def cast_float32_input(inputs: MixtureInputs) -> MixtureInputs:
    """Under autocast on a GPU, cast a float32 input to the dtype of the matrix products, `settings.dtype`.

    LayerNorm returns float32 under autocast; without autocast it returns the base's dtype. The cast gives a router the
    same input in training with autocast as in inference without it. Layers with one expert leave the
    cast to autocast, like PEFT's LoRA.
    """
    if inputs.router is None:
        return inputs
    x, dtype = inputs.x, inputs.settings.dtype
    is_wide = x.dtype is torch.float32 and dtype in (torch.bfloat16, torch.float16)
    # Triton's interpreter stands in for a GPU in tests.
    acts_as_gpu = x.device.type == "cuda" or (not torch.compiler.is_compiling() and native.is_interpreting())
    return inputs._replace(x=x.to(dtype)) if is_wide and acts_as_gpu and autocast_is_on(x.device.type) else inputs


def select(inputs: MixtureInputs) -> Backend:
    """The backend that computes these inputs.

    Raises:
        MolaError: `MOLA_KERNEL` names an unknown backend, or one that cannot compute these inputs.
    """
    forced = forced_backend()
    if forced is not None and inputs.router is not None:
        reason = forced.why_unsupported(inputs)
        if reason is not None:
            raise MolaError(
                f"{_VARIABLE}={forced.name} cannot compute input {tuple(inputs.x.shape)} with experts "
                f"{tuple(inputs.experts_A.shape)}: {reason}. Unset {_VARIABLE} to let mola choose."
            )
        return forced
    for backend in _BACKENDS_FOR_GPUS if inputs.x.is_cuda else BACKENDS:
        if backend.why_unsupported(inputs) is None and backend.why_slower(inputs) is None:
            return backend
    raise AssertionError("`reference` computes every input with a router, and `lora` every input without")


def explain(inputs: MixtureInputs) -> list[tuple[str, str | None]]:
    """The name of every backend in the order of `BACKENDS`, and why it would not be used; None if it could be used."""
    return [(backend.name, backend.why_unsupported(inputs) or backend.why_slower(inputs)) for backend in BACKENDS]


def forced_backend() -> Backend | None:
    """The backend that `MOLA_KERNEL` names; None if the variable is not set.

    Raises:
        MolaError: there is no backend of this name.
    """
    name = _forced_name()
    if name and name not in _BY_NAME:
        raise MolaError(f"The environment variable {_VARIABLE} must be one of {', '.join(_BY_NAME)}, got {name!r}.")
    return _BY_NAME.get(name)


@torch.compiler.assume_constant_result
def _forced_name() -> str:
    return _read_variable()


@functools.cache
def _read_variable() -> str:
    return os.environ.get(_VARIABLE, "")


def cast_inputs(inputs: MixtureInputs) -> MixtureInputs:
    """Cast the input to the dtype of the matrix products, for a backend whose `casts_its_inputs` is False.

    If the input or the base weight has a different dtype, the base output is computed here and passed on instead of it.
    Under autocast the input stays as it is: autocast casts it for the products, and the router reads the original.
    """
    x, weight, dtype = inputs.x, inputs.weight, inputs.settings.dtype
    if weight is not None and (weight.dtype is not dtype or x.dtype is not dtype):
        inputs = inputs._replace(base_output=F.linear(x, weight, inputs.bias), weight=None, bias=None)
    if x.dtype is not dtype and not autocast_is_on(x.device.type):
        inputs = inputs._replace(x=x.to(dtype))
    return inputs
