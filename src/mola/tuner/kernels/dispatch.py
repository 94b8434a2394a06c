"""Which backend computes a mixture: the first of `BACKENDS` that supports its inputs, and is not slower.

`MOLA_KERNEL=name` in the environment forces one; what it cannot compute is an error that says why. Layers with one
expert are LoRA whatever is forced.
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
from mola.tuner.kernels.decode import Decode, is_decode
from mola.tuner.kernels.dense import Dense
from mola.tuner.kernels.grouped import Grouped
from mola.tuner.kernels.reference import Gathered, Lora, Reference
from mola.tuner.kernels.tensors import autocast_is_on

_CHOICE = "MOLA_KERNEL"
# Without numba and Triton as yet.
_cpu_decode, _cpu_train, _gpu = native.load("decode"), native.load("train"), native.load("backend", "gpu")

BACKENDS: tuple[Backend, ...] = (
    *(() if _cpu_decode is None else (_cpu_decode.CPU_DECODE,)),
    Lora(),
    Gathered(),
    Decode(),
    *(() if _gpu is None else (_gpu.Triton(),)),
    *(() if _cpu_train is None else (_cpu_train.CpuTrain(),)),
    Grouped(),
    Dense(),
    Reference(),
)
_FOR_GPUS = tuple(backend for backend in BACKENDS if backend.device_type != "cpu")  # others need not be asked
# Lets compiled graphs find a layer by its B.
register = (lambda layer: None) if _cpu_decode is None else _cpu_decode.register
# Before the experts of a layer are trained.
forget = (lambda experts: None) if _gpu is None else _gpu.forget
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def decode_layer(layer, adapter_name: str, x: torch.Tensor) -> torch.Tensor | None:
    """A layer's output for few tokens, on a short way; None where there is none, or `MOLA_KERNEL` is set."""
    if _cpu_decode is None or not _cpu_decode.is_available() or _choice():
        return None
    return _cpu_decode.decode_layer(layer, adapter_name, x)


def row_table(layer, names: list[str], x: torch.Tensor) -> Any:
    """What adds the updates of rows with different adapters at once; None where nothing does, as above."""
    if _cpu_decode is None or not _cpu_decode.is_available() or _choice() or not is_decode(x):
        return None
    return _cpu_decode.row_table(layer, names, x)


def mixture(inputs: MixtureInputs) -> Mixture:
    """The mixture by the backend that `select` names.

    Raises:
        MolaError: as `select`.
    """
    inputs = narrowed(inputs)
    backend = select(inputs)
    return compute(backend, inputs if backend.casts_inputs else cast_inputs(inputs))


def narrowed(inputs: MixtureInputs) -> MixtureInputs:
    """On a GPU, an input in float32 that autocast would cast for the products, cast once for router and products.

    LayerNorm under autocast gives float32 there, where it gives the base's own dtype without: routers see the same.
    One expert is left to autocast, as PEFT's LoRA is.
    """
    if inputs.router is None:
        return inputs
    x, dtype = inputs.x, inputs.settings.dtype
    is_wide = x.dtype is torch.float32 and dtype in (torch.bfloat16, torch.float16)
    is_gpu = x.device.type == "cuda" or (not torch.compiler.is_compiling() and native.is_interpreting())
    return inputs._replace(x=x.to(dtype)) if is_wide and is_gpu and autocast_is_on(x.device.type) else inputs


def select(inputs: MixtureInputs) -> Backend:
    """The backend for some inputs.

    Raises:
        MolaError: `MOLA_KERNEL` names none, or one that does not support these inputs.
    """
    forced = forced_backend()
    if forced is not None and inputs.router is not None:
        reason = forced.supports(inputs)
        if reason is not None:
            raise MolaError(
                f"{_CHOICE}={forced.name} cannot compute input {tuple(inputs.x.shape)} with experts "
                f"{tuple(inputs.experts_A.shape)}: {reason}. Unset {_CHOICE} to let mola choose."
            )
        return forced
    for backend in _FOR_GPUS if inputs.x.is_cuda else BACKENDS:
        if backend.supports(inputs) is None and backend.is_slower(inputs) is None:
            return backend
    raise AssertionError("the reference backend supports what no other does")


def explain(inputs: MixtureInputs) -> list[tuple[str, str | None]]:
    """Every backend's name, and why it is not chosen for these inputs (None if it could be), in the order of choice."""
    return [(backend.name, backend.supports(inputs) or backend.is_slower(inputs)) for backend in BACKENDS]


def forced_backend() -> Backend | None:
    """The backend that `MOLA_KERNEL` names, if it is set.

    Raises:
        MolaError: there is no such backend.
    """
    name = _choice()
    if name and name not in _BY_NAME:
        raise MolaError(f"The environment variable {_CHOICE} must be one of {', '.join(_BY_NAME)}, got {name!r}.")
    return _BY_NAME.get(name)


@torch.compiler.assume_constant_result
def _choice() -> str:
    return _read_choice()


@functools.cache
def _read_choice() -> str:
    return os.environ.get(_CHOICE, "")


def cast_inputs(inputs: MixtureInputs) -> MixtureInputs:
    """Inputs in the dtype of the products; autocast casts for itself, and leaves the router what it sees."""
    x, weight, dtype = inputs.x, inputs.weight, inputs.settings.dtype
    if weight is not None and (weight.dtype is not dtype or x.dtype is not dtype):
        inputs = inputs._replace(result=F.linear(x, weight, inputs.bias), weight=None, bias=None)
    if x.dtype is not dtype and not autocast_is_on(x.device.type):
        inputs = inputs._replace(x=x.to(dtype))
    return inputs
