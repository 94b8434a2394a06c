"""SIGKILL to one of two processes: the other one ends and says so, and the run goes on to the same result."""

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState

from mola.cli import main
from mola.files.failures import lost_process
from tests.grids import slow
from tests.versions import has

from .conftest import write_rows
from .kill_trials import WAYS, Trials, summary
from .test_launchers import environment_of


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_random_moments(processes, tiny_model_dir, tmp_path, way):
    """A few of the trials of `kill_trials.py`."""
    if way.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed, which the extra `deepspeed` installs")
    if way == "fsdp2" and not has("accelerate", "1.15"):
        pytest.skip("needs accelerate 1.15: its checkpoints of sharded adapters are not whole, and mola refuses it")
    trials = Trials(processes, way, tiny_model_dir, write_rows(tmp_path / "rows.json"), tmp_path)
    results = [trials.trial(number, seed=1) for number in range(3)]
    assert all(result["same"] and "WRONG" not in result["other"] for result in results), results
    print(summary(results))


@pytest.mark.parametrize("left", [0, *slow(1)], ids=["the first is left", "the last is left"])
@pytest.mark.parametrize("way", ["ddp", "zero3"])
def test_one_that_never_comes(processes, flags, tmp_path, way, left):
    """The other one says that it waits, and ends by itself."""
    if way == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed, which the extra `deepspeed` installs")
    codes = processes.run(
        arguments=flags(tmp_path, ddp_timeout=2),
        environment=environment_of("zero3.yaml")[1] | {"DS_ACCELERATOR": "cpu"} if way == "zero3" else {},
        kill={"process": 1 - left, "seconds": 0},
    )
    output = processes.output[left]
    assert codes[left] == 2, output
    assert f"Process {left} waits for the others, 2 in all: for about 2 s" in output
    assert "another process of this run has ended, or does not answer: " in output
    assert "Traceback" not in output
    assert not any(tmp_path.iterdir())


def lose_one(index: int) -> None:
    PartialState(cpu=True, backend="gloo").wait_for_everyone()
    if index == 0:
        os._exit(0)
    with pytest.raises(RuntimeError) as caught:
        torch.distributed.all_reduce(torch.zeros(1))
    assert lost_process(caught.value) is not None, caught.value
    os._exit(0)  # its group cannot be left in order any more


def test_lost_process_is_known_by_the_error(processes):
    processes.call(lose_one)
    assert lost_process(RuntimeError("shape mismatch")) is None


def train_slowly(index: int, arguments: list[str]) -> None:
    """The second process writes its random state late: the file that completes a checkpoint is not there before."""
    save = transformers.Trainer._save_rng_state

    def save_late(self, output_dir):
        if index == 1:
            time.sleep(0.5)
            assert not (Path(output_dir) / "trainer_state.json").exists()
        save(self, output_dir)

    transformers.Trainer._save_rng_state = save_late
    assert main(arguments) == 0


def test_checkpoint_is_complete_when_all_have_written(processes, flags, tmp_path):
    processes.call(train_slowly, arguments=flags(tmp_path))
    digests = json.loads((tmp_path / "checkpoint-4" / "sha256.json").read_text(encoding="utf-8"))
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trainer_state.json"} <= digests.keys()
