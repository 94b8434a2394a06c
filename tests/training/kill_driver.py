"""Runs `mola` commands in forks of one process and kills them with SIGKILL at a chosen file operation.

Reads one JSON job per line from standard input and answers each with one line. Python reports its file operations
to an audit hook; what is written without Python's knowledge (torch.save, safetensors) is wrapped. A job has

    arguments   the command line
    folder      only operations inside it count
    kill        null, or {"operation", "path" (regular expressions), "number" (1 = first match), "half"}, or
                {"index": n, "half"}: at the n-th operation; or {"seconds"}: at any moment.
                Before the operation; with "half" after it, when only half of what it wrote is in the file.
                With "signal" another signal is sent instead, before the operation or at that moment.
    log         file for standard output and error
    operations  file for the list of operations, or null
"""

import gc
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

_TIMEOUT = 600
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class Operations:
    """Counts the operations in `folder`, kills at the one asked for."""

    def __init__(self, folder: str, kill: dict | None) -> None:
        self.folder = os.path.realpath(folder)
        self.kill = kill or {}
        self.seen: list[tuple[str, str]] = []
        self.matches = 0
        self.half_of: tuple[str, int] | None = None

    def hook(self, event: str, arguments: tuple) -> None:
        if event == "open" and os.path.isdir(arguments[0]):
            return  # tempfile tries a folder and names the folder; the file that it makes is an event of its own
        if event == "open" and arguments[2] & _WRITING:
            self.note("open", arguments[0])
        elif event == "os.rename":
            self.note("rename", arguments[1])
        elif event in ("os.remove", "os.rmdir"):
            # shutil.rmtree names files relative to an open folder.
            folder = os.readlink(f"/proc/self/fd/{arguments[1]}") if arguments[1] != -1 else ""
            self.note("remove", os.path.join(folder, os.fsdecode(arguments[0])))
        elif event == "os.mkdir":
            self.note("mkdir", arguments[0])

    def note(self, operation: str, path) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(self.folder + os.sep):
            return
        if self.half_of is not None:
            name, before = self.half_of
            os.truncate(name, (before + os.path.getsize(name)) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append((operation, os.path.relpath(path, self.folder)))
        if self.is_asked_for():
            if not self.kill.get("half"):
                os.kill(os.getpid(), self.kill.get("signal", signal.SIGKILL))
                return
            self.half_of = path, os.path.getsize(path) if operation == "open" and os.path.exists(path) else 0

    def is_asked_for(self) -> bool:
        if "index" in self.kill:
            return len(self.seen) == self.kill["index"]
        if "path" not in self.kill:
            return False
        operation, path = self.seen[-1]
        is_match = re.fullmatch(self.kill["path"], path) and re.fullmatch(self.kill.get("operation", ".*"), operation)
        self.matches += bool(is_match)
        return bool(is_match) and self.matches == self.kill.get("number", 1)


def run(job: dict) -> int:
    import safetensors.torch
    import torch

    from mola.cli import main

    torch.set_num_threads(1)
    operations = Operations(job["folder"], job["kill"])
    save, serialize = torch.save, safetensors.torch.serialize_file

    def noted_save(content, file, *rest, **options):
        operations.note("write", file)
        save(content, file, *rest, **options)

    def noted_serialize(tensors, file, *rest, **options):
        operations.note("write", file)
        serialize(tensors, file, *rest, **options)

    torch.save, safetensors.torch.serialize_file = noted_save, noted_serialize
    sys.addaudithook(operations.hook)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    code = main(job["arguments"])
    if job.get("operations"):
        Path(job["operations"]).write_text(json.dumps(operations.seen), encoding="utf-8")
    return code


def child(job: dict) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = run(job)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, kill: dict) -> dict:
    """What the process ended with; sent a signal after `seconds`, killed after a time that means it hangs."""
    status = ended_within(process, kill.get("seconds", _TIMEOUT))
    if status is None and "seconds" in kill:
        os.kill(process, kill.get("signal", signal.SIGKILL))
        status = ended_within(process, _TIMEOUT)
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return {"signal": None, "code": None}
    killed = os.WIFSIGNALED(status)
    return {"signal": os.WTERMSIG(status) if killed else 0, "code": None if killed else os.WEXITSTATUS(status)}


def ended_within(process: int, seconds: float) -> int | None:
    """The status a process ended with, or None if it has not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.002)
    return None


def main() -> None:
    import mola.training.train  # the slow part, once

    del mola
    gc.freeze()  # what was imported is no garbage: looking through it would take half of a tiny run's time
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        # Until the command begins: before, an interruption would be this script's.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process = os.fork()
        if process == 0:
            child(job)
        print(json.dumps(wait(process, job["kill"] or {})), flush=True)


if __name__ == "__main__":
    main()
