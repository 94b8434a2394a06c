"""SIGKILL to one of two processes: the other one ends and says so, and the run goes on to the same result."""

import importlib.util
import os
import time
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import PartialState

from mola.cli import main
from mola.files.failures import lost_process_reason
from tests.versions import has

from .conftest import write_rows
from .kill_trials import WAYS, Trials, summary


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


def lose_one(index: int) -> None:
    PartialState(cpu=True, backend="gloo").wait_for_everyone()
    if index == 0:
        os._exit(0)
    with pytest.raises(RuntimeError) as caught:
        torch.distributed.all_reduce(torch.zeros(1))
    assert lost_process_reason(caught.value) is not None, caught.value
    os._exit(0)  # its group cannot be left in order any more


def test_lost_process_is_known_by_the_error(processes):
    processes.call(lose_one)
    assert lost_process_reason(RuntimeError("shape mismatch")) is None


def train_slowly(index: int, arguments: list[str]) -> None:
    """The second process writes its random state late: the checkpoint is not in its place before."""
    save = transformers.Trainer._save_rng_state

    def save_late(self, output_dir):
        if index == 1:
            time.sleep(0.5)
            assert not Path(output_dir).parent.parent.joinpath(Path(output_dir).name).exists()
        save(self, output_dir)

    transformers.Trainer._save_rng_state = save_late
    assert main(arguments) == 0


def test_checkpoint_appears_when_all_processes_have_written(processes, flags, tmp_path):
    processes.call(train_slowly, arguments=flags(tmp_path))
    written = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trainer_state.json"} <= written
