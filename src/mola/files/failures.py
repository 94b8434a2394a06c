"""Failures of the machine, not of the code: a full or read-only disk, too little memory, a process that was killed.

- `why_not_written`, `lack_of_memory`, `lost_process`: what an error says about it, or None.
- `writing`, `within_memory`: such an error in a block becomes a `MolaError` that says what to do.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from mola.errors import MolaError

_NOT_WRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
}
_OF_RUST = re.compile(r"(.*) \(os error (\d+)\)")
# The last two are of Transformers and accelerate, which look for a batch size that fits.
_NO_MEMORY = re.compile(
    r"can't allocate memory: you tried to allocate (\d+) bytes|not enough memory|out of memory|out-of-memory"
    r"|No executable batch size"
)
_GIB = 1 << 30


def why_not_written(error: BaseException) -> str | None:
    """Why a file could not be written, if that is what an error of Python, safetensors, tokenizers or torch says.

    With the file's name where it is known; None for any other error.
    """
    if isinstance(error, OSError):
        if error.errno not in _NOT_WRITABLE:
            return None
        place = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
        return f"{os.strerror(error.errno)}{place}"
    text = " ".join(str(error).split())
    # Neither is a kind of OSError, and no import: preparing data needs no torch.
    if type(error).__name__ == "SafetensorError" and "serializing: I/O error" in text:
        return text.partition("I/O error: ")[2]
    if type(error) is Exception:  # which is all that tokenizers has, for errors of the system too
        found = _OF_RUST.fullmatch(text)
        return found[1] if found and int(found[2]) in _NOT_WRITABLE else None
    if not isinstance(error, RuntimeError):
        return None
    if text.startswith("write(): fd"):
        return text.partition("failed with ")[2]
    if text.startswith("basic_ios::clear") or ("inline_container.cc" in text and "Reader" not in text):
        # After half a file torch only says that a stream has failed, or that its length is not what it should be.
        return text.partition("strerror: ")[2] or "torch could not write all of a file, the disk may be full"
    return None


def lack_of_memory(error: BaseException) -> str | None:
    """What an error of Python or torch says about too little memory, of the machine or of a GPU; None for any other."""
    if isinstance(error, MemoryError):
        return "no memory left"
    if not isinstance(error, RuntimeError):
        return None
    text = " ".join(str(error).split())
    found = _NO_MEMORY.search(text)
    if found is None:
        return None
    if found.group(1):
        return f"{int(found.group(1)) / _GIB:.1f} GiB could not be allocated"
    return ". ".join(text.split(". ")[:2]) if text.startswith("CUDA") else "no memory left"


def lost_process(error: BaseException) -> str | None:
    """What an error of torch says about another process of a run that has ended or does not answer.

    Returns:
        The first line of the error; None for any other error.
    """
    # No import, as above: every error of torch's own communication is a DistError, those of gloo only name its files.
    is_of_torch = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    is_of_gloo = isinstance(error, RuntimeError) and ("gloo/" in str(error) or "by peer" in str(error))
    return (str(error).strip() or "no answer").splitlines()[0] if is_of_torch or is_of_gloo else None


@contextlib.contextmanager
def writing(what: str, advice: str = "Free some space, or choose a folder you can write to.") -> Iterator[None]:
    """Turn an error of writing `what`, an option or a file, in the block into one with advice; others pass."""
    try:
        yield
    except Exception as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        raise MolaError(f"{what} cannot be written: {reason}. {advice}") from error


@contextlib.contextmanager
def within_memory(advice: str) -> Iterator[None]:
    """Turn an error about too little memory in the block into a `MolaError` with advice; others pass."""
    try:
        yield
    except Exception as error:
        lack = lack_of_memory(error)
        if lack is None:
            raise
        raise MolaError(f"out of memory: {lack}. {advice}") from error
