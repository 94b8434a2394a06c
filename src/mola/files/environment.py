"""What a result was made with: versions of the software and a description of the machine."""

import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from mola._version import __version__


def software_versions() -> dict[str, str]:
    """Versions of mola, torch, transformers, peft and Python; also of numba and Triton if they are installed."""
    libraries = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    for name in ("numba", "triton"):  # they draw different dropout masks than torch
        with suppress(metadata.PackageNotFoundError):
            libraries[name] = metadata.version(name)
    return {"mola": __version__, **libraries, "python": platform.python_version()}


def machine_description(device: Any = None) -> dict[str, Any]:
    """Names of the processor (`cpu`) and the GPU (`gpu`, None without one), and the number of torch's `threads`.

    Args:
        device: the `torch.device` that computed; `gpu` is None if this is not a GPU. By default the first GPU is named.
    """
    import torch

    is_used = torch.cuda.is_available() and (device is None or device.type == "cuda")
    gpu = torch.cuda.get_device_name(device) if is_used else None
    return {"cpu": _cpu_name(), "gpu": gpu, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    # On Linux `platform.processor()` is empty or only the architecture.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
