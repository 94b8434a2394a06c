"""Every backend against the reference in float64: values and all gradients, over shapes, dtypes, dropout and top_k.

`test_reference` compares the reference with the formula.

`MOLA_REQUIRE_KERNELS=cpu_train,cpu_decode` makes a failure of what is skipped where these backends cannot run: on a
machine that has their instructions, or in a job that is there to test them.
"""

import itertools
import os
from typing import NamedTuple

import pytest
import torch

from mola.tuner.kernels.api import Backend
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.dispatch import BACKENDS
from mola.tuner.kernels.dropout import drop, sample_dropout_mask
from mola.tuner.kernels.reference import Reference

from .inputs import LEAVES, in_float64, leaves, make_inputs

BY_NAME = {backend.name: backend for backend in BACKENDS}
REQUIRED = set(filter(None, os.environ.get("MOLA_REQUIRE_KERNELS", "").split(",")))
# Of the error's norm to the value's, and of the largest error to the largest value. Sums of bfloat16 numbers lose bits
# wherever one of them is rounded to 8.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


class Sizes(NamedTuple):
    """Of one case: input, output features, experts, rank."""

    shape: tuple[int, ...]
    out: int
    num_experts: int
    r: int


ROUND = Sizes((4, 16, 64), 96, 8, 8)
# The oddest sizes that each backend takes.
ODD = {"cpu_train": Sizes((3, 7, 96), 160, 5, 3), "grouped": Sizes((3, 7, 24), 40, 5, 8)}
DTYPES = {
    "cpu_train": (torch.float32, torch.bfloat16),
    "cpu_decode": (torch.float32, torch.bfloat16),
    "grouped": (torch.float32, torch.bfloat16),
    "triton": (torch.bfloat16, torch.float16),
}
WITH_GRADIENTS = ("reference", "dense", "grouped", "cpu_train")
WITHOUT = ("gathered", "decode", "cpu_decode")


def sizes_of(name):
    return {"round": ROUND, "odd": ODD.get(name, Sizes((3, 7, 13), 11, 5, 3))}


def grid(names, **axes):
    """Rows of the grid as parameters of a test."""
    rows = []
    for name in names:
        dtypes = DTYPES.get(name, (torch.float64, torch.float32, torch.bfloat16))
        if name == "reference":
            dtypes = (torch.float32, torch.bfloat16)  # in float64 it is the other side
        sizes = sizes_of(name).items()
        for (label, size), dtype, top_k, *rest in itertools.product(sizes, dtypes, (1, 2, "all"), *axes.values()):
            labels = [f"{key}_{value}" for key, value in zip(axes, rest, strict=True)]
            row = name, size, dtype, size.num_experts if top_k == "all" else top_k, *rest
            rows.append(pytest.param(*row, id="-".join([name, label, str(dtype)[6:], f"top_{top_k}", *labels])))
    return rows


def backend_for(name, inputs):
    """The backend, or a skip that says what this machine lacks; a failure where it is required."""
    reason = BY_NAME[name].why_unsupported(inputs)
    if reason is None:
        return BY_NAME[name]
    message = f"{name}: {reason}"
    if name in REQUIRED:
        pytest.fail(f"MOLA_REQUIRE_KERNELS: {message}")
    assert name.startswith("cpu_"), f"only native backends may depend on the machine: {message}"
    assert "here" in reason, f"the grid must hold what the backend takes: {message}"
    pytest.skip(message)


def with_mask(inputs, dropout):
    """Inputs with a dropout mask: None, booleans, or what this machine samples (a seed where there is numba)."""
    torch.manual_seed(3)
    if dropout == "sampled":
        mask, keep_probability = sample_dropout_mask(inputs.x, 0.3)
        settings = inputs.settings._replace(scaling=inputs.settings.scaling / keep_probability)
        return inputs._replace(dropout_mask=mask, settings=settings)
    if dropout == "none":
        return inputs._replace(dropout_mask=None)
    return inputs._replace(dropout_mask=torch.rand(inputs.x.shape, device=inputs.x.device) > 0.3)


def expected_of(inputs, function):
    """The reference in float64, of the same numbers and the same mask."""
    exact = in_float64(inputs)
    if inputs.dropout_mask is not None:
        exact = exact._replace(dropout_mask=drop(torch.ones_like(inputs.x), inputs.dropout_mask).detach().bool())
    return function(Reference(), exact)


def run(backend: Backend, inputs):
    """Output, logits and gradients; a loss reads both."""
    output, logits, indices = compute(backend, inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device).view(output.shape)
    loss = (output.double() * weights).sum() + (logits.double() ** 2).sum() * 0.1
    gradients = torch.autograd.grad(loss, leaves(inputs))
    names = [f"gradient of {name}" for name in LEAVES if getattr(inputs, name) is not None]
    return {"output": output, "logits": logits, "choice": chosen(indices), **dict(zip(names, gradients, strict=True))}


def chosen(indices):
    return None if indices is None else indices.sort(0).values


def run_without_gradients(backend: Backend, inputs):
    with torch.no_grad():
        output, logits, indices = compute(backend, inputs)
    return {"output": output, "logits": logits, "choice": chosen(indices)}


def check(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value is not None:
            assert value.shape == expected[name].shape, name
            exact, error = expected[name].double(), (value.double() - expected[name].double()).abs()
            assert error.norm() <= tolerance * exact.norm(), f"{name}: {error.norm() / exact.norm():.2g} of its norm"
            assert error.max() <= 2 * tolerance * exact.abs().max(), f"{name}: {error.max() / exact.abs().max():.2g}"


@pytest.fixture
def ran(monkeypatch):
    """Counts calls of a backend's two passes."""

    def count(backend):
        calls = []
        for part in ("forward", "backward"):
            original = getattr(backend, part)
            monkeypatch.setattr(
                backend, part, lambda *a, part=part, original=original: calls.append(part) or original(*a), raising=True
            )
        return calls

    return count


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "top_k", "dropout", "fused"),
    grid(WITH_GRADIENTS, dropout=("none", "booleans", "sampled"), fused=(True, False)),
)
def test_values_and_gradients(name, sizes, dtype, top_k, dropout, fused, ran):
    shape, out, num_experts, r = sizes
    inputs = make_inputs(shape, num_experts, dtype, r=r, out=out, top_k=top_k, fused=fused, bias=True)
    inputs = with_mask(inputs, dropout)
    backend = backend_for(name, inputs)
    calls = ran(backend)
    found = run(backend, inputs)
    assert calls == (["forward"] if backend.uses_autograd else ["forward", "backward"])
    assert None not in found.values()
    check(found, expected_of(inputs, run), TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "sizes", "dtype", "top_k", "fused"), grid(WITHOUT, fused=(True, False)))
def test_values_without_gradients(name, sizes, dtype, top_k, fused, ran):
    shape, out, num_experts, r = sizes
    inputs = make_inputs(shape, num_experts, dtype, r=r, out=out, top_k=top_k, fused=fused, bias=True)
    if name == "cpu_decode":
        inputs = inputs._replace(settings=inputs.settings._replace(needs_router_output=False))
    with torch.no_grad():
        backend = backend_for(name, inputs)
    calls = ran(backend)
    found = run_without_gradients(backend, inputs)
    assert calls == ["forward"]
    assert (found["logits"] is None) == (name == "cpu_decode")
    check(found, expected_of(inputs, run_without_gradients), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["dense", "grouped", "cpu_train"])
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "params_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.float32),  # autocast
        (torch.bfloat16, torch.bfloat16, torch.float32),  # autocast of a bfloat16 base
        (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_dtypes_that_differ(name, x_dtype, dtype, params_dtype):
    shape, out, num_experts, r = ROUND
    options = {"r": r, "out": out, "fused": False, "x_dtype": x_dtype, "params_dtype": params_dtype}
    inputs = make_inputs(shape, num_experts, dtype, **options)
    found = run(backend_for(name, inputs), inputs)
    check(found, expected_of(inputs, run), TOLERANCE[torch.bfloat16])
    assert [found[f"gradient of {leaf}"].dtype for leaf in ("x", "experts_A")] == [x_dtype, params_dtype]


@pytest.mark.parametrize("name", ["dense", "grouped", "cpu_train"])
def test_a_loss_of_the_logits_alone(name):
    """As of a balance loss whose output nobody uses."""
    shape, out, num_experts, r = ROUND
    inputs = make_inputs(shape, num_experts, torch.float32, r=r, out=out)
    backend, exact = backend_for(name, inputs), in_float64(inputs)
    for one, two in ((backend, inputs), (Reference(), exact)):
        logits = compute(one, two).logits
        gradients = torch.autograd.grad((logits.double() ** 2).sum(), [two.x, two.router])
        if one is backend:
            found = gradients
    for one, two in zip(found, gradients, strict=True):
        torch.testing.assert_close(one.double(), two, atol=1e-3, rtol=1e-4)
