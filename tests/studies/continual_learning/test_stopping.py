"""A sequence that is stopped, crashes or is killed, and goes on with the same command."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mola.cli import main
from mola.evaluation.resuming import AnswersFile
from tests.studies.continual_learning.sequences import (
    FIRST_TWO,
    FOLDERS,
    STAGES,
    assert_same_end,
    contents,
    flags,
    read,
)
from tests.waiting import wait_until


def send(name):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_signal_during_training_and_the_same_command_again(values, whole, tmp_path, at_step, name, capsys):
    folder = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    at_step(FOLDERS[1], 2, send(name))
    arguments = flags(values(stages=FIRST_TWO))
    assert main(arguments) == 130
    assert "Resume with the same command." in capsys.readouterr().err
    record = read(folder / "continual.json")
    assert (record["status"], len(record["results"])) == ("interrupted", 1)
    assert read(folder / FOLDERS[1] / "run.json")["status"] == "interrupted"
    assert (folder / FOLDERS[1] / "checkpoint-2").is_dir(), "the step is finished and kept"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    first = contents(folder / FOLDERS[0])
    state = folder / FOLDERS[1] / "checkpoint-2" / "trainer_state.json"
    written = state.stat().st_mtime_ns
    assert main(arguments) == 0
    assert contents(folder / FOLDERS[0]) == first, "a finished stage and its test are not repeated"
    assert state.stat().st_mtime_ns == written, "the stage goes on from there"
    assert_same_end(folder, whole, 2)


@pytest.mark.slow
def test_signal_during_a_test_and_the_same_command_again(values, whole, tmp_path, monkeypatch, caplog):
    original, waiting = AnswersFile.append, [send("SIGTERM")]

    def append(self, records):
        original(self, records)
        if self.path.parent.parent.name == FOLDERS[1] and "01-physics" in self.path.name and waiting:
            waiting.pop()()

    monkeypatch.setattr(AnswersFile, "append", append)
    arguments = flags(values(stages=FIRST_TWO))
    assert main(arguments) == 130
    assert read(tmp_path / "run" / "continual.json")["status"] == "interrupted"
    assert main(arguments) == 0
    assert "Resuming with 4 finished samples" in caplog.text
    assert_same_end(tmp_path / "run", whole, 2)


def test_crash_before_the_first_checkpoint_starts_the_stage_again(run, whole, tmp_path, at_step, caplog):
    def crash():
        raise RuntimeError("power cut")

    stages = {"physics": STAGES["physics"]}
    at_step(FOLDERS[0], 1, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(stages=stages)
    record = read(tmp_path / "run" / "continual.json")
    assert (record["status"], record["error"]) == ("failed", "power cut")
    assert run(stages=stages).status == "finished"
    assert "no complete checkpoint: the training starts from the beginning" in caplog.text
    assert_same_end(tmp_path / "run", whole, 1)


def start_and_kill(arguments, record, seconds):
    """Run the command in a process of its own and kill it so long after it began to work."""
    before = record.stat().st_mtime_ns if record.exists() else None
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "mola.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        wait_until(lambda: record.exists() and record.stat().st_mtime_ns != before, process)
        time.sleep(seconds)
    finally:
        process.kill()
        process.wait()
    return process.returncode


@pytest.mark.slow
def test_killed_at_any_time_it_still_ends_the_same(values, whole, tmp_path):
    folder = tmp_path / "run"
    arguments = flags(values(stages=FIRST_TWO))
    ends = [start_and_kill(arguments, folder / "continual.json", seconds) for seconds in (0.2, 0.5, 0.9, 1.4)]
    assert ends.count(-signal.SIGKILL) >= 2
    assert main(arguments) == 0
    assert_same_end(folder, whole, 2)
