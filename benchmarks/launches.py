"""`python -m benchmarks.launches`: counts the kernels that a GPU runs for one adapted linear, without a GPU.

It counts the operators on fake CUDA tensors, without views and allocations, and Triton's kernels. With small batches
and in decoding, launching kernels takes longer than their work.
"""

# ruff: noqa: E402 - devices of type cuda must exist before torch is imported

from __future__ import annotations

from benchmarks import fake_cuda

fake_cuda.load()

import argparse
import contextlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.errors import in_one_line
from mola.errors import MolaError
from mola.files.terminal import make_table_console
from mola.tuner.kernels import native
from mola.tuner.kernels.api import Backend, MixtureInputs, MixtureSettings
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.dense import Dense

IN, OUT, R, TOP_K = 4096, 11008, 8, 2
ADAPTERS = (torch.bfloat16, torch.float32)
DROPOUT = (0.0, 0.05)
_NO_KERNELS = (
    "prim.",
    "aten.promote_types",
    "aten.empty",
    "aten.new_empty",
    "aten._unsafe_view",
    "aten.detach",
    "aten.lift_fresh",
)


class _Launches(TorchDispatchMode):
    """Records the names of the kernels that a GPU would run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not str(func).startswith(_NO_KERNELS):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Kernel:
    """Replaces a kernel of Triton: a launch is recorded and computes nothing."""

    def __init__(self, name: str, launches: Callable[[], list[str]]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **constants: self.launches().append(f"triton.{self.name}")


def count(provider: str, num_experts: int, adapters: torch.dtype, dropout: float, *, decode: bool) -> list[list[str]]:
    """Names of the kernels in a forward and a backward pass; with `decode`, those in the second of two forward passes.

    Args:
        provider: frozen, lora, dense or triton.
        num_experts: experts of a mixture.
        adapters: dtype of A and B; float32 is computed under autocast.
        dropout: dropout on the experts' input.
        decode: whether to count decoding, with one token and without gradients.
    """
    with FakeTensorMode(), torch.random.fork_rng([]), autocast(adapters):
        x = torch.empty(1 if decode else 512, IN, device="cuda", dtype=torch.bfloat16, requires_grad=not decode)
        forward, parameters = _build(provider, num_experts, adapters, 0.0 if decode else dropout, trained=not decode)
        passes: list[list[str]] = [[]]
        with torch.set_grad_enabled(not decode), triton_counted(lambda: passes[-1]):
            for _ in range(2 if decode else 1):
                with _Launches() as ahead:
                    passes[-1] = ahead.names
                    output = forward(x)
            if not decode:
                grad = torch.empty_like(output)
                with _Launches() as back:
                    passes.append(back.names)
                    torch.autograd.grad(output, [x, *parameters], grad)
    return passes


def _build(
    provider: str, num_experts: int, adapters: torch.dtype, dropout: float, *, trained: bool
) -> tuple[Any, list[Any]]:
    weight = torch.empty(OUT, IN, device="cuda", dtype=torch.bfloat16)
    if provider == "frozen":
        return lambda x: nn.functional.linear(x, weight), []
    if provider == "lora":
        model = _lora(adapters, dropout)
        return model, [parameter for parameter in model.parameters() if parameter.requires_grad]
    experts_A, experts_B = (
        torch.empty(num_experts, R, size, device="cuda", dtype=adapters, requires_grad=trained) for size in (IN, OUT)
    )
    router = torch.empty(num_experts, IN, device="cuda", requires_grad=trained)
    settings = MixtureSettings(TOP_K, 2.0, torch.bfloat16, dropout)
    backend: Backend = Dense() if provider == "dense" else _triton()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return compute(
            backend, MixtureInputs(x, None, weight, None, experts_A, experts_B, router, None, settings)
        ).output

    return forward, [experts_A, experts_B, router]


def _lora(adapters: torch.dtype, dropout: float) -> nn.Module:
    with unset_fake_temporarily():
        base = nn.Sequential(OrderedDict(linear=nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)))
        config = LoraConfig(r=R, lora_dropout=dropout, target_modules=["linear"])
        model = get_peft_model(base, config, autocast_adapter_dtype=adapters is torch.float32).train()
    make_fake(model)
    return model


def make_fake(model: nn.Module) -> None:
    """Put fake CUDA tensors in the place of a model's parameters and buffers."""
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None:
                fake = torch.empty(each.shape, device="cuda", dtype=each.dtype)
                module._parameters[name] = nn.Parameter(fake, each.requires_grad)
        for name, each in module._buffers.items():
            if each is not None:
                module._buffers[name] = torch.empty(each.shape, device="cuda", dtype=each.dtype)


def _triton() -> Backend:
    module = native.load("backend", "gpu")
    if native.load("launch", "gpu") is None:
        raise MolaError("the provider triton needs Triton: pip install triton.")
    return module.Triton()


@contextlib.contextmanager
def triton_counted(launches: Callable[[], list[str]]) -> Iterator[None]:
    """Replace Triton's kernels by kernels that are counted, and torch's queries to a CUDA driver by constants."""
    launch = native.load("launch", "gpu")
    names = () if launch is None else ("pack", "gates_forward", "gates_backward", "drop")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(launch.jit, name, _Kernel(name, launches)))
        if launch is not None:
            stack.enter_context(patch.object(launch, "_is_dropout_right", lambda device: True))
        stack.enter_context(patch.object(torch.cuda, "device_of", contextlib.nullcontext))
        stack.enter_context(patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        yield


@contextlib.contextmanager
def autocast(adapters: torch.dtype) -> Iterator[None]:
    """Autocast of fake CUDA tensors to bfloat16, if the adapters are in float32."""
    # `torch.autocast` cannot be used, because it queries a CUDA driver.
    torch.set_autocast_enabled("cuda", adapters is torch.float32)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def measure(num_experts: int) -> list[dict[str, Any]]:
    """One row for each combination of provider, adapter dtype and dropout."""
    rows = []
    for provider in ("frozen", "lora", "dense", "triton"):
        for adapters in ADAPTERS:
            (decode,) = count(provider, num_experts, adapters, 0.0, decode=True)
            for dropout in DROPOUT:
                ahead, back = count(provider, num_experts, adapters, dropout, decode=False)
                row = {"provider": provider, "num_experts": num_experts, "adapters": str(adapters).split(".")[1]}
                row |= {"dropout": dropout, "forward": len(ahead), "backward": len(back), "decode": len(decode)}
                rows.append(row | {"names": {"forward": ahead, "backward": back, "decode": decode}})
    return rows


@in_one_line("benchmarks.launches")
def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--num_experts", type=int, default=8, help="experts of a mixture; top_k is 2")
    parser.add_argument("--json", action="store_true", help="rows as JSON, with the names of all kernels")
    options = parser.parse_args(arguments)
    rows = measure(options.num_experts)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table(title=f"Kernels per linear, {options.num_experts} experts")
    columns = ("provider", "adapters", "dropout", "forward", "backward", "decode")
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    make_table_console().print(table)
    return 0


if __name__ == "__main__":
    fake_cuda.leave(main())
