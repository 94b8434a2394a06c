"""Runs `mola train --nproc N` in N processes on this machine, which torchrun starts and watches."""

import os
from collections.abc import Sequence

from mola.errors import MolaError

_STARTED = "MOLA_NPROC"  # environment variable of the processes that `launch` starts: their number


def is_launcher(nproc: int) -> bool:
    """Whether this process is to start the training in `nproc` processes, and is none of them."""
    return nproc > 1 and "LOCAL_RANK" not in os.environ  # a launcher gives each process its rank


def check_nproc(nproc: int) -> None:
    """Check the option `nproc` in a process that trains.

    Raises:
        MolaError: the number is below 1, or `launch` did not start this process.
    """
    if nproc < 1:
        raise MolaError(f"`nproc` must be at least 1: got {nproc}.")
    if nproc > 1 and os.environ.get(_STARTED) != str(nproc):
        raise MolaError(
            f"`nproc` starts processes for the command `mola train` alone: got {nproc} in Python, in a different "
            "command, or in a process of torchrun or accelerate. Leave it out there."
        )


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run `mola train` with these arguments in `nproc` processes until all have ended.

    SIGINT and SIGTERM are handed on: the processes save a checkpoint. If one process fails, the others are stopped.

    Returns:
        The exit code of the process that failed first, 130 after a signal, or 0.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))  # torchrun would set 1
    # Time for the last step and the checkpoint. torchrun's 30 seconds are too short for a large model.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    os.environ[_STARTED] = str(nproc)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # `--`: torchrun would use the flag `--r` as one of its own.
    words = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={nproc}", "--module", "--", "mola", "train"]
    try:
        run.run(run.parse_args([*words, *arguments]))
    except SignalException:
        return 130
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code  # as a shell reports a process that a signal has ended
    return 0
