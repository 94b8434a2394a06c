"""Without numba all works, and one line says so."""

import importlib
import logging
import re

import pytest
import torch
from torch import nn

from mola.tuner.kernels import native
from mola.tuner.layer import ExpertSettings, MolaLinear


@pytest.fixture
def forgotten():
    """What was loaded is forgotten, before and after: tests after this one have numba again."""
    remembering = native.load, native._log_once
    for function in remembering:
        function.cache_clear()
    yield
    for function in remembering:
        function.cache_clear()


@pytest.mark.parametrize(
    ("error", "level", "message"),
    [
        (ModuleNotFoundError("No module named 'numba'", name="numba"), logging.INFO, r"pip install 'mola-peft\[cpu\]'"),
        (ImportError("Numba needs NumPy 9.9 or less"), logging.WARNING, "Numba needs NumPy 9.9 or less"),
    ],
    ids=["no numba", "broken numba"],
)
def test_without_native_functions_a_layer_computes_the_same(error, level, message, monkeypatch, caplog, forgotten):
    torch.manual_seed(0)
    base = nn.Linear(32, 64).requires_grad_(False)
    layer = MolaLinear(base, "default", ExpertSettings(4, 4, 2, 6.0, lora_dropout=0.1, init_lora_weights=False))
    x = torch.randn(3, 32)

    def compute():
        layer.eval()
        with torch.no_grad():
            few = layer(x)
        (gradient,) = torch.autograd.grad(layer(x).sin().sum(), layer.mola_B["default"])
        layer.train()(x).sum().backward()  # with dropout
        return few, gradient

    expected = compute()
    asked, real = [], importlib.import_module

    def fail(name):
        asked.append(name)
        raise error

    native.load.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    with caplog.at_level(logging.INFO):
        found = compute(), compute()
    monkeypatch.setattr(importlib, "import_module", real)
    assert {name.rpartition(".")[2] for name in asked} >= {"jit_decode", "jit_train", "jit_gates", "jit_dropout"}
    torch.testing.assert_close(found, (expected, expected), atol=1e-5, rtol=1e-5)
    lines = [record for record in caplog.records if "numba" in record.message]
    assert [line.levelno for line in lines] == [level]
    assert re.search(message, lines[0].message)


def test_another_module_that_is_missing_is_an_error(monkeypatch, forgotten):
    def fail(name):
        raise ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="llvmlite"):
        native.load("jit_decode")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 3, 64])
def test_the_default_device_of_torch_is_none_of_a_layer_on_the_cpu(num_tokens, training):
    """Native functions take addresses: of a tensor elsewhere there is none here."""
    torch.manual_seed(0)
    settings = ExpertSettings(4, 8, 2, 8.0, lora_dropout=0.1, init_lora_weights=False)
    layer = MolaLinear(nn.Linear(64, 32), "default", settings).train(training)
    x = torch.randn(num_tokens, 64)

    def run():
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            output = layer(x)
        return [output, *torch.autograd.grad(output.sum(), [*layer.mola_A.values()])] if training else [output]

    expected = run()
    torch.set_default_device("meta")
    try:
        found = run()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
