"""Runs jobs in several processes at once: forks of one that has imported everything, so that they start quickly.

Reads one JSON job per line from standard input and answers each with one line, the exit codes. A job has

    processes   how many; they find each other through `port` of this machine
    log         standard output and error of process i go to the file `{log}.{i}`
    arguments   a command line of `mola`; or
    function    "module:name", called as name(process, **given)
    given       its arguments
    environment variables that are set in them
    shard       let accelerate shard on the CPU, see `shard_on_cpu`
    terminate   null, or {"file", "lines"}: once the file has so many lines, SIGTERM to the last process
    kill        null, or {"process", "seconds"}: SIGKILL to a process so long after the start
    patience    seconds that the others have when one has failed, before SIGTERM, and again before SIGKILL; 60
                with `kill`, one that still runs so long after its start says where it is
"""

import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

_TIMEOUT = 600


def shard_on_cpu() -> None:
    """FSDP with accelerate, which has it for GPUs only: torch's part of it works between CPU processes just as well."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from mola.training import distributed

    make_state = AcceleratorState.__init__

    def make_sharded_state(self, *arguments, fsdp_plugin=None, **options):
        make_state(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = make_sharded_state
    distributed.can_shard = lambda device: True


def work(job: dict, index: int) -> int:
    import torch

    torch.set_num_threads(1)
    if job["processes"] > 1:
        names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": job["processes"], "MASTER_PORT": job["port"]}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.update(job.get("environment", {}))
    if job.get("shard"):
        shard_on_cpu()
    if "arguments" in job:
        from mola.cli import main

        return main(job["arguments"])
    module, _, name = job["function"].partition(":")
    getattr(importlib.import_module(module), name)(index, **job.get("given", {}))
    return 0


def child(job: dict, index: int, log: int) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job.get("kill"):
        faulthandler.dump_traceback_later(job.get("patience", 60))
    code = 1
    try:
        code = work(job, index)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def number_of_lines(path: str) -> int:
    return len(Path(path).read_text(encoding="utf-8").splitlines()) if Path(path).exists() else 0


def wait(processes: list[int], job: dict) -> dict:
    """Exit codes, seconds from the end of the first to that of the last, and seconds in all.

    When one has failed, the others, which would wait for it, are ended.
    """
    terminate, kill, patience = job.get("terminate"), job.get("kill"), job.get("patience", 60)
    codes: dict[int, int] = {}
    ends = []
    start = time.monotonic()
    end, number = start + _TIMEOUT, signal.SIGKILL
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes and (status := os.waitpid(process, os.WNOHANG))[0]:
                codes[process] = os.waitstatus_to_exitcode(status[1])
                ends.append(time.monotonic())
                # Those that fail of themselves, with the same error, have a moment for it.
                if codes[process] not in (0, 130):
                    end, number = min(end, time.monotonic() + patience), signal.SIGTERM
        if terminate and number_of_lines(terminate["file"]) >= terminate["lines"]:
            os.kill(processes[-1], signal.SIGTERM)
            terminate = None
        if kill and time.monotonic() - start >= kill["seconds"]:
            if (victim := processes[kill["process"]]) not in codes:
                os.kill(victim, signal.SIGKILL)
            kill = None
        if time.monotonic() > end:
            for process in set(processes) - codes.keys():
                os.kill(process, number)
            end, number = time.monotonic() + patience, signal.SIGKILL
        time.sleep(0.005)
    seconds = {"seconds": max(ends) - min(ends), "lasted": max(ends) - start}
    return {"codes": [codes[process] for process in processes], **seconds}


def main() -> None:
    import mola.training.train  # the slow part, once

    del mola
    gc.freeze()  # what was imported is no garbage: looking through it would take half of a tiny run's time
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        processes = []
        for index in range(job["processes"]):
            # Before the fork: the process may be killed at once.
            log = os.open(f"{job['log']}.{index}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            process = os.fork()
            if process == 0:
                child(job, index, log)
            os.close(log)
            processes.append(process)
        print(json.dumps(wait(processes, job)), flush=True)


if __name__ == "__main__":
    main()
