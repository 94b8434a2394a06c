"""The suite `contention`: neighbours that are busy and never stay, a time limit that holds, rows and their table."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.command import main
from benchmarks.contended import FreshProcess
from benchmarks.contention import Setting, measure, settings
from benchmarks.neighbours import busy_neighbours, busy_seconds, usable_cores
from benchmarks.options import BenchmarkOptions
from benchmarks.tables import tables
from rich.console import Console

from tests.grids import slow
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]


def running(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


# ------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_neighbours_work_and_are_gone_afterwards(error):
    pids = []

    def work():
        before = busy_seconds()
        with busy_neighbours(2) as started:
            pids.extend(started)
            for pid in pids:
                wait_until(lambda pid=pid: cpu_ticks(pid) >= 5)
            assert busy_seconds() - before >= 2 * 5 / os.sysconf("SC_CLK_TCK") * 0.8
            if error:
                raise error

    with pytest.raises(error) if error else nullcontext():
        work()
    assert len(set(pids)) == 2
    assert not any(map(running, pids))


def test_a_neighbour_that_ended_is_no_silent_quiet_machine():
    pids = []

    def work():
        with busy_neighbours(2) as started:
            pids.extend(started)
            os.kill(pids[0], signal.SIGKILL)
            wait_until(lambda: not running(pids[0]))

    with pytest.raises(RuntimeError, match="ended while something was measured"):
        work()
    assert not any(map(running, pids))


# In the background of a shell without job control, tests inherit that Ctrl-C is ignored.
PARENT = """
import signal, sys, time
from benchmarks.neighbours import busy_neighbours
signal.signal(signal.SIGINT, signal.default_int_handler)
with busy_neighbours(2) as pids:
    print(*pids, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, *slow(signal.SIGTERM, signal.SIGINT)])
def test_neighbours_do_not_outlive_a_killed_parent(number):
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(running, pids))
        parent.send_signal(number)
        parent.wait(PATIENCE)
        wait_until(lambda: not any(map(running, pids)))


# ------------------------------------------------------------------ processes of their own


@pytest.mark.slow
def test_a_fresh_process_has_its_setting_and_is_killed_at_the_limit(case, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as the benchmarks have it themselves
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with FreshProcess("generate", case, 2, "ACTIVE") as process:
        assert process.found == {"threads": 2, "wait_policy": "ACTIVE"}
        seconds = process.run(PATIENCE)
        assert seconds["wall_seconds"] > 0
        assert seconds["cpu_seconds"] > 0
        # The system counts in ticks, of which each core may be one ahead.
        most = os.cpu_count() * (1 + 2 / os.sysconf("SC_CLK_TCK") / seconds["wall_seconds"])
        assert 0 <= seconds["cores_of_others"] <= most
        assert process.alive
        assert process.run(0.0001) is None
        assert not process.alive


@pytest.mark.slow
def test_a_process_that_fails_says_why(case, tmp_path):
    with pytest.raises(RuntimeError, match=r"Measuring 'step' in a fresh process failed:\n[\s\S]*no-such-model"):
        FreshProcess("step", replace(case, folder=str(tmp_path / "no-such-model")), 1, None)


# ------------------------------------------------------------------ the suite


def test_settings_are_one_thread_and_all_cores_with_every_way_to_wait():
    assert settings(4) == [(1, None), (4, "ACTIVE"), (4, "PASSIVE"), (4, None)]
    assert usable_cores() >= 1


class Answers:
    """In place of a fresh process: answers with given seconds, None is one that reached the limit."""

    def __init__(self, seconds, busy_machine=False):
        self.busy_machine = busy_machine
        self.found, self.alive, self.limits = {"threads": 2, "wait_policy": None}, True, []
        self.seconds = iter(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, limit):
        self.limits.append(limit)
        seconds = next(self.seconds)
        self.alive = seconds is not None
        others = 1.5 if self.busy_machine else 0.0
        return seconds and {"wall_seconds": seconds, "cpu_seconds": seconds / 2, "cores_of_others": others}


@pytest.mark.parametrize(
    ("seconds", "expected", "cells"),
    [
        # One run to warm up each, then the median of three.
        ([9, 1, 2, 3, 9, 8, 4, 6], {"busy_over_quiet": 3.0}, ["2.00 (1.40 to 2.60)", "6.00", "3.00"]),
        # 25 and 26 seconds exceed 50 together: the third is left out.
        ([9, 1, 1, 1, 9, 25, 26], {"busy_over_quiet": 25.5}, ["1.00 (1.00 to 1.00)", "25.50", "25.50"]),
        (
            [9, 2, 2, 2, 9, 40, None],
            {"busy_over_quiet_at_least": 25.0, "busy_seconds_at_least": 50},
            ["> 50", "> 25.0"],
        ),
        ([9, 2, 2, 2, None], {"busy_over_quiet_at_least": 25.0, "busy_seconds_at_least": 50}, ["> 50", "> 25.0"]),
        ([None], {"quiet_seconds_at_least": 50}, ["> 50"]),
    ],
)
def test_rows_hold_medians_or_the_limit(case, monkeypatch, seconds, expected, cells):
    process = Answers(seconds)
    monkeypatch.setattr("benchmarks.contention.FreshProcess", lambda *_: process)
    options = BenchmarkOptions(repeats=3, warmup=1, contention_limit=50)
    row = measure(options, case, "step", Setting(2, None), neighbours=1)
    assert next(process.seconds, "none left") == "none left"
    assert set(process.limits) == {50}
    names = {"busy_over_quiet", "busy_over_quiet_at_least", "busy_seconds_at_least", "quiet_seconds_at_least"}
    assert {name: row[name] for name in names & set(row)} == expected
    assert ("busy_wall_seconds" in row) is ("busy_over_quiet" in row)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(*tables("contention", [row]))
    assert all(cell in captured.get() for cell in cells), captured.get()


@pytest.mark.parametrize("busy_machine", [True, False])
def test_a_quiet_machine_that_is_none_is_said(case, monkeypatch, caplog, busy_machine):
    monkeypatch.setattr("benchmarks.contention.FreshProcess", lambda *_: Answers([1, 1], busy_machine))
    measure(BenchmarkOptions(repeats=1, warmup=0), case, "step", Setting(2, None), neighbours=1)
    assert ("The machine was not quiet: other processes kept 1.5 cores busy" in caplog.text) is busy_machine


def test_a_limit_below_one_second_is_refused(tiny_model_dir, tmp_path, capsys):
    words = ["--suite", "contention", "--model", str(tiny_model_dir), "--output", str(tmp_path / "results.json")]
    assert main([*words, "--contention_limit", "0"]) == 2
    assert "`contention_limit` must be at least 1: got 0" in capsys.readouterr().err
    assert main([*words, "--providers", "lora_8"]) == 2
    assert "`providers` must hold one of mola for the suite contention" in capsys.readouterr().err


@pytest.mark.slow
def test_from_end_to_end(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    words = ["--suite", "contention", "--model", str(tiny_model_dir), "--output", str(output), "--r", "4"]
    code = main([*words, "--batch_size", "2", "--seq_len", "12", "--repeats", "1", "--warmup", "0"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    rows = json.loads(output.read_text())["results"]["contention"]
    cores = usable_cores()
    every = [(1, "not set"), (cores, "ACTIVE"), (cores, "PASSIVE"), (cores, "not set")]
    assert [(row["threads"], row["waiting"]) for row in rows] == [*every, *every]
    assert [(row["action"], row["batch_size"], row["seq_len"]) for row in rows[::4]] == [
        ("step", 2, 12),
        ("generate", 1, 24),
    ]
    for row in rows:
        assert row["neighbours"] == cores
        assert row["dtype"] == "float32"
        for when in ("quiet", "busy"):
            assert row.get(f"{when}_seconds_at_least") or row[f"{when}_wall_seconds"]["median"] > 0
    assert "contention: model" in printed.out
