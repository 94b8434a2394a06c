"""Which native functions there are on this machine, as marks."""

import importlib
import importlib.util
import shutil

import pytest
import torch

HAS_NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="needs numba (the extra `cpu`)")
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="needs a build of torch with oneDNN for the CPU"
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="needs a C++ compiler (install g++), and no space in the path to PyTorch, which it cannot pass on",
)
needs_fake_devices = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a build of PyTorch with CUDA has no fake CUDA devices where there is no GPU",
)


def has_vectors(dtype):
    """Whether the processor has the vectors that products in a dtype are made of."""
    if not HAS_NUMBA:
        return False
    jit_instructions = importlib.import_module("mola.tuner.kernels.cpu.jit_instructions")
    return jit_instructions.has_vectors(is_bf16=dtype == torch.bfloat16)


def needs_vectors(dtype):
    return pytest.mark.skipif(not has_vectors(dtype), reason=f"no native products in {dtype} on this processor")


TRAINED = [dtype for dtype in (torch.float32, torch.bfloat16) if has_vectors(dtype)]
TRAINED_OR_SKIPPED = [
    pytest.param(dtype, id=str(dtype), marks=needs_vectors(dtype)) for dtype in (torch.float32, torch.bfloat16)
]
