"""Machine errors: a full or read-only disk, too little memory, a process of the run that has ended."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from mola.errors import MolaError

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_RUST_ERROR = re.compile(r"(?:.*: )?(.*) \(os error (\d+)\)")  # from safetensors and tokenizers
_TORCH_WRITE_ERROR = re.compile(r"write\(\): fd|basic_ios::clear|(?!.*Reader).*inline_container\.cc")
_NO_MEMORY = re.compile(
    r"can't allocate memory: you tried to allocate (\d+) bytes|not enough memory|out of memory|out-of-memory"
    r"|No executable batch size"  # accelerate's, when even a batch of one sample does not fit
)
_GIB = 1 << 30


def write_error_reason(error: BaseException) -> str | None:
    """None if an error is not about writing a file, else the reason, with the file's name if the error has it.

    Knows the errors of Python, safetensors, tokenizers and torch.
    """
    if isinstance(error, OSError):
        if error.errno not in _NOT_WRITABLE:
            return None
        return f"{os.strerror(error.errno)}{f': {error.filename}' if error.filename else ''}"
    text = " ".join(str(error).split())
    found = _RUST_ERROR.search(text)
    if found and int(found[2]) in _NOT_WRITABLE:
        return found[1]
    if isinstance(error, RuntimeError) and _TORCH_WRITE_ERROR.match(text):
        reason = text.partition("failed with ")[2] or text.partition("strerror: ")[2]
        return reason or "torch could not write all of a file, the disk may be full"
    return None


def memory_error_reason(error: BaseException) -> str | None:
    """None if an error from Python or torch is not about too little memory (CPU or GPU), else what the error says."""
    if isinstance(error, MemoryError):
        return "no memory left"
    text = " ".join(str(error).split())
    found = _NO_MEMORY.search(text)
    if found is None or not isinstance(error, RuntimeError):
        return None
    if found[1]:
        return f"{int(found[1]) / _GIB:.1f} GiB could not be allocated"
    return ". ".join(text.split(". ")[:2]) if text.startswith("CUDA") else "no memory left"


def lost_process_reason(error: BaseException) -> str | None:
    """None if an error is not about a lost process of the run, else its first line.

    Such an error comes from torch if a different process has ended or does not answer: a `DistError` from torch's own
    communication, or a `RuntimeError` from gloo that names gloo's files.
    """
    is_from_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    is_from_gloo = isinstance(error, RuntimeError) and ("gloo/" in str(error) or "by peer" in str(error))
    return (str(error).strip() or "no answer").splitlines()[0] if is_from_torch or is_from_gloo else None


@contextlib.contextmanager
def explain_write_errors(
    what: str, advice: str = "Free some space, or choose a folder you can write to."
) -> Iterator[None]:
    """Turn a write error in the block into a `MolaError` with advice; `what` names the option or the file."""
    try:
        yield
    except Exception as error:
        reason = write_error_reason(error)
        if reason is None:
            raise
        raise MolaError(f"{what} cannot be written: {reason}. {advice}") from error


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn an error about too little memory in the block into a `MolaError` with advice."""
    try:
        yield
    except Exception as error:
        lack = memory_error_reason(error)
        if lack is None:
            raise
        raise MolaError(f"out of memory: {lack}. {advice}") from error
