"""One action, repeated on demand in a process of its own: `python -m benchmarks.contended`.

The first line of standard input is the job as JSON. Every further line asks for one run, which is answered with what
it took.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.cases import PROMPT_TOKENS, prepare_torch
from benchmarks.measure import time_interleaved
from benchmarks.models import PROJECT, Case, load_base, training_batch
from benchmarks.neighbours import busy_seconds
from benchmarks.providers import build, make_step

ACTIONS = ("step", "generate")
NEW_TOKENS = 8  # few, so that even a crawling one ends
# What OpenMP libraries read when they are loaded; the one that a setting names is set again.
_OPENMP = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class FreshProcess:
    """Runs an action in a process that was started for it, because OpenMP reads its settings only once.

    Attributes:
        found: `threads` and `wait_policy` as the process sees them.
    """

    def __init__(self, action: str, case: Case, threads: int, wait_policy: str | None) -> None:
        """Start the process and wait until it is ready.

        Args:
            action: one of `ACTIONS`.
            case: what to build; computes on the CPU.
            threads: of torch.
            wait_policy: ACTIVE or PASSIVE; None leaves it to the library.

        Raises:
            RuntimeError: the process failed; its error output is in the message.
        """
        environment = {name: value for name, value in os.environ.items() if name not in _OPENMP}
        environment["OMP_NUM_THREADS"] = str(threads)
        if wait_policy is not None:
            environment["OMP_WAIT_POLICY"] = wait_policy
        self._action = action
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process: Any = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contended"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=PROJECT,
            env=environment,
        )
        try:
            self.found: dict[str, Any] = self._ask({"action": action, "case": asdict(case), "threads": threads}, None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it can be asked for another run."""
        return self._process.poll() is None

    def run(self, limit: float) -> dict[str, float] | None:
        """Run the action once.

        Args:
            limit: seconds on the clock after which the process is killed.

        Returns:
            `wall_seconds`, `cpu_seconds` of all threads and, where the system tells, `cores_of_others`, how many
            cores all other processes kept busy meanwhile; None after the limit.

        Raises:
            RuntimeError: the process failed; its error output is in the message.
        """
        answer = self._ask({}, limit)
        if answer is None:
            self.close()
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):  # what was not read by it any more
                file.close()

    def _ask(self, question: dict[str, Any], limit: float | None) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it has failed, which is noticed below
            print(json.dumps(question), file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], limit)[0]:
            return None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"Measuring {self._action!r} in a fresh process failed:\n{self._errors.read()}")
        return json.loads(line)


def make_action(name: str, case: Case) -> Callable[[], Any]:
    """The action of one name: a training step of mola, or a greedy `generate` for one prompt."""
    base = load_base(case)
    if name == "step":
        return make_step(build("mola", base, case).model, training_batch(case, base.config.vocab_size), case)
    model = build("mola", base, case, inference=True).model
    prompt = training_batch(replace(case, batch_size=1, seq_len=PROMPT_TOKENS), base.config.vocab_size)
    inputs = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    lengths = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return lambda: model.generate(**inputs, **lengths, do_sample=False, disable_compile=True)


def main() -> int:
    """Answer the questions on standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    job = json.loads(sys.stdin.readline())
    case = Case(**job["case"])
    prepare_torch(case.device, job["threads"])
    action = make_action(job["action"], case)
    found = {"threads": torch.get_num_threads(), "wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    print(json.dumps(found), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(_run(action, case.device)), file=answers, flush=True)
    return 0


def _run(action: Callable[[], Any], device: str) -> dict[str, float]:
    machine: list[Any] = []

    def watched() -> None:
        machine.append(busy_seconds())
        action()
        machine.append(busy_seconds())

    times = time_interleaved({"it": watched}, repeats=1, warmup=0, device=device)["it"]
    wall, cpu = times.wall_seconds[0], times.cpu_seconds[0]
    before, after = machine
    others = {} if before is None else {"cores_of_others": max(0.0, (after - before - cpu) / wall)}
    return {"wall_seconds": wall, "cpu_seconds": cpu} | others


if __name__ == "__main__":
    sys.exit(main())
