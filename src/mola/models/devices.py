"""The device to compute on and the dtype of the base weights."""

import re
from pathlib import Path

import torch

from mola.errors import MolaError
from mola.models.options import DTYPE_NAMES, check_dtype

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to compute on: `device` such as `"cuda:1"` if given, else CUDA, else MPS, else the CPU.

    Raises:
        MolaError: this machine has no such device.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MolaError(
            f"`device` must be a device of this machine: got {str(device)!r} ({reason}). "
            "Pass 'cpu', 'cuda', 'cuda:N' or 'mps', or leave it out to use the best one available."
        ) from error
    return resolved


def cpu_has_native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16, AMX or Arm's BF16)."""
    names = {"avx512_bf16", "amx_bf16", "arm_bf16", "bf16"}
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # older torch has no such function
    if capabilities is not None:
        return any(bool(capabilities().get(name)) for name in names)
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    return bool(flags) and not names.isdisjoint(flags[0].split())


def resolve_dtype(name: str, device: str | torch.device) -> tuple[torch.dtype, str]:
    """Choose the dtype of the base weights.

    `"auto"` is bfloat16 if the device computes it natively (CUDA since Ampere, recent CPUs), float16 on
    MPS, float32 elsewhere.

    Returns:
        The dtype, and the text for the log: its name, and for `"auto"` the reason.

    Raises:
        MolaError: `name` is neither `"auto"` nor one of `DTYPES`.
    """
    kind = torch.device(device).type
    if name in DTYPES:
        return DTYPES[name], name
    check_dtype(name)
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16: the GPU supports it"
        return torch.float32, "float32: the GPU has no native bfloat16 (pass float16 for less memory)"
    if kind == "mps":
        return torch.float16, "float16: the fast type of MPS"
    if kind == "cpu" and cpu_has_native_bfloat16():
        return torch.bfloat16, "bfloat16: the CPU computes it natively"
    return torch.float32, f"float32: no native bfloat16 on this {kind} device"
