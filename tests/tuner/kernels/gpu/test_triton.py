"""Runs `cases` in a process of its own: in Triton's interpreter on any machine, and compiled where there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import ALL_CASES

from tests.gpus import asks_for_gpu

from ..native import needs_compiler, needs_fake_devices, needs_triton

CASES = Path(__file__).with_name("cases.py")
PROJECT = Path(__file__).parents[4]


def run(*arguments, **environment):
    own = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(PROJECT / ".cache" / "triton")}
    environment = {**os.environ, **own, **environment}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def run_cases(expression, **environment):
    output = run("pytest", "-q", "-p", "no:cacheprovider", str(CASES), "-m", expression, **environment)
    assert " passed" in output


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("part", ["not slow", "slow"])
def test_in_the_interpreter(part):
    run_cases(part, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_cases_on_a_gpu_see_it():
    """Others are asserted of a CPU, and see none."""
    assert asks_for_gpu(["pytest", "-q", "-m", ALL_CASES])
    assert asks_for_gpu(["pytest", "-mgpu"])
    others = (["-q"], ["-m", "not gpu"], ["-m", "not slow and not gpu"], ["-mslow"], ["tests/ecosystem/test_gpu.py"])
    assert not any(map(asks_for_gpu, others))


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and `pytest -m gpu`: other runs hide it")
def test_on_a_gpu():
    run_cases(ALL_CASES)


@needs_triton
@needs_compiler
@needs_fake_devices
@pytest.mark.slow
def test_whole_steps_on_fake_cuda_tensors_never_wait_for_the_device():
    output = run("tests.tuner.kernels.gpu.fake")
    assert output.count("no sync") == 10


@pytest.mark.slow
@needs_triton
@needs_compiler
@needs_fake_devices
def test_launches_per_linear():
    """At most as many as LoRA asks for without dropout and when it decodes; docs/research/performance.md has all."""
    rows = json.loads(run("benchmarks.launches", "--json"))
    found = {(row["provider"], row["adapters"], row["dropout"]): row for row in rows}
    total = {key: row["forward"] + row["backward"] for key, row in found.items()}
    assert total["triton", "bfloat16", 0.0] <= 12
    assert total["triton", "bfloat16", 0.05] <= 18
    for adapters in ("bfloat16", "float32"):
        assert total["triton", adapters, 0.0] <= total["lora", adapters, 0.0] < total["dense", adapters, 0.0]
        assert found["triton", adapters, 0.0]["decode"] <= 4 < found["lora", adapters, 0.0]["decode"]
    # No copy of the input in float32 is among them.
    casts = [name for row in rows if row["provider"] == "triton" for name in row["names"]["forward"] if "copy" in name]
    assert len(casts) == 2  # of B, where it is in float32


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA's GPUs is for Linux")
def test_compiled_for_two_architectures_nothing_is_spilled():
    rows = json.loads(run("benchmarks.resources", "--json"))
    assert {row["architecture"] for row in rows} == {80, 90}
    assert {row["kernel"] for row in rows} == {"pack", "gates_forward", "gates_backward", "drop"}
    for row in rows:
        print(row)
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] <= 128, row
        assert row["shared_bytes"] <= 4096, row
