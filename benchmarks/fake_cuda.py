"""Fake tensors of device cuda on a machine without a GPU: whole training steps, whose operators can be counted.

PyTorch's fake tensors have shapes and dtypes, but no numbers. A build of torch without CUDA knows no CUDA devices.
`fake_cuda.cpp` makes torch believe that one exists; it must be loaded before torch is imported.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

_SOURCE = Path(__file__).with_suffix(".cpp")
_CACHE = Path(__file__).parents[1] / ".cache"


def leave(code: int) -> NoReturn:
    """End the process at once, because PyTorch would fail to shut down a CUDA that does not exist."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@functools.cache
def load() -> None:
    """Make devices of type cuda exist in this process. The first call compiles the library, which takes some seconds.

    Raises:
        RuntimeError: torch was imported before, there is no C++ compiler, or a build with CUDA has no GPU.
    """
    if "torch" in sys.modules:
        raise RuntimeError("`load` must be called before torch is imported: run this in a process of its own.")
    folder = Path(str(importlib.metadata.distribution("torch").locate_file("torch")))
    if list((folder / "lib").glob("*torch_cuda*")):
        import torch

        if torch.cuda.is_available():
            return
        raise RuntimeError("fake CUDA devices need a GPU, or a build of PyTorch without CUDA: this one has CUDA.")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("fake CUDA devices need a C++ compiler: install g++, or name one in CXX.")
    key = _SOURCE.read_bytes() + importlib.metadata.version("torch").encode() + str(folder).encode()
    library = _CACHE / f"fake_cuda-{hashlib.sha256(key).hexdigest()[:12]}.so"
    if not library.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.so")
        include, libraries = folder / "include", folder / "lib"
        command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{include}", str(_SOURCE), "-o", str(partial)]
        command += [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"fake CUDA devices cannot be compiled by {compiler}: {done.stderr.strip()[:500]}")
        partial.replace(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
