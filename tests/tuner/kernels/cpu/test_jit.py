"""What is compiled is kept on disk, used as long as its sources stay, and the same as what was just compiled."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mola
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.cpu.decode import CPU_DECODE
from mola.tuner.kernels.reference import Reference

from ..inputs import make_inputs
from ..native import TRAINED

numba = pytest.importorskip("numba", reason="needs numba (the extra `cpu`)")

COMPUTE = """
import hashlib, torch
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.cpu.decode import CPU_DECODE
from mola.tuner.kernels.cpu.train import CpuTrain
from mola.tuner.kernels.dense import Dense
from mola.tuner.kernels.dropout import sample_dropout_mask
from tests.tuner.kernels.inputs import leaves, make_inputs

torch.set_num_threads(1)
torch.manual_seed(0)


def show(*tensors):
    for tensor in tensors:
        print(hashlib.sha256(tensor.detach().view(torch.uint8).numpy().tobytes()).hexdigest())


for shape, num_experts in (((40, 32), 4), ((2, 3, 64), 3), ((9, 576), 8)):
    inputs = make_inputs(shape, num_experts, torch.float32, out=96)
    with torch.no_grad():
        quiet = inputs._replace(settings=inputs.settings._replace(needs_router_output=False))
        show(compute(CPU_DECODE, quiet).output)
    for dtype in (torch.float32, torch.bfloat16):
        for backend in (Dense(), CpuTrain()):
            for mask in (None, sample_dropout_mask(inputs.x, 0.3)[0]):
                each = make_inputs(shape, num_experts, dtype, out=96)._replace(dropout_mask=mask)
                if backend.why_unsupported(each) is None:
                    mixture = compute(backend, each)
                    show(*mixture, *torch.autograd.grad(mixture.output.float().sin().sum(), leaves(each)))
"""


def run(script, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_code_just_compiled_and_code_from_the_disk_make_the_same_bits(tmp_path):
    first, second = (run(COMPUTE, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert len(first.split()) == 3 * (1 + (2 + len(TRAINED)) * 2 * 7)
    assert first == second
    codes, indices = ([*tmp_path.rglob(f"*.{ending}")] for ending in ("nbc", "nbi"))
    assert len(codes) == len(indices) > 0  # what shares an index may be taken for one another, see `compiled`


@pytest.mark.slow
def test_code_on_the_disk_is_not_used_when_a_source_changes_that_it_was_compiled_from(tmp_path):
    """numba alone compares the source of the outermost function, here in `jit_gates.py`."""
    shutil.copytree(Path(mola.__file__).parent, tmp_path / "mola", ignore=shutil.ignore_patterns("__pycache__"))
    script = """
import torch
from mola.tuner.kernels.api import MixtureSettings
from mola.tuner.kernels.gates import apply_gates
torch.set_num_threads(1)
settings = MixtureSettings(2, 1.0, torch.float32)
print(apply_gates(torch.ones(1, 8), torch.ones(2, 8), torch.ones(2, 1), settings).weights.sum().item())
"""
    weights = []
    for factor in ("scaling", "scaling * 3"):
        source = tmp_path / "mola" / "tuner" / "kernels" / "cpu" / "jit.py"
        text = source.read_text(encoding="utf-8")
        assert "/ total * scaling" in text
        source.write_text(text.replace("/ total * scaling", f"/ total * {factor}"), encoding="utf-8")
        weights.append(float(run(script, NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=str(tmp_path))))
    assert weights == [1.0, 3.0]


@pytest.mark.slow
def test_damaged_code_on_the_disk_is_not_used(tmp_path):
    script = """
import logging, torch
from mola.tuner.kernels import native
logging.basicConfig()
print(native.load("jit_decode").kernel(torch.float32, torch.float32) is not None)
"""
    assert run(script, NUMBA_CACHE_DIR=str(tmp_path)) == "True\n"
    for ending in ("nbc", "nbi"):
        for path in tmp_path.rglob(f"*.{ending}"):
            path.write_bytes(b"")
        assert run(script, NUMBA_CACHE_DIR=str(tmp_path)) == "True\n"


@pytest.mark.slow
def test_where_numba_compiles_nothing_there_are_no_native_functions():
    script = """
from mola.tuner.kernels import native
assert native.load("jit_decode") is native.load("jit_train") is None
"""
    run(script, NUMBA_DISABLE_JIT="1")


@torch.no_grad()
@pytest.mark.slow
def test_code_that_cannot_be_kept_on_disk_is_compiled_all_the_same(monkeypatch, caplog):
    jit_decode = importlib.import_module("mola.tuner.kernels.cpu.jit_decode")
    real = numba.njit

    def without_a_folder(*arguments, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*arguments, **options)

    monkeypatch.setattr(numba, "njit", without_a_folder)
    jit_decode.kernel.cache_clear()
    try:
        inputs = make_inputs((3, 16), 4, torch.float32)
        inputs = inputs._replace(settings=inputs.settings._replace(needs_router_output=False))
        torch.testing.assert_close(compute(CPU_DECODE, inputs).output, compute(Reference(), inputs).output)
        assert "no locator available" in caplog.text
    finally:
        jit_decode.kernel.cache_clear()


def test_numbers_are_rounded_to_bfloat16_as_torch_rounds_them():
    """To the nearest, ties to the even one; infinities and NaN stay."""
    jit = importlib.import_module("mola.tuner.kernels.cpu.jit")

    @numba.njit
    def rounded(values, target):
        for i in range(len(values)):
            target[i] = jit.narrow(values[i], target[i])

    random = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3.0
    ties = (torch.arange(1, 513, dtype=torch.int32) << 15 | 0x3F800000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-40])
    values = torch.cat([random, ties, -ties, special])
    found = torch.empty(len(values), dtype=torch.int16)
    rounded(values.numpy(), found.numpy().view("uint16"))
    expected = values.bfloat16()
    torch.testing.assert_close(found.view(torch.bfloat16), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.view(torch.bfloat16).signbit()[~values.isnan()], expected.signbit()[~values.isnan()])
