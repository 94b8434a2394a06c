"""Several processes on one machine, and runs to compare."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ports import free_port
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


class Processes:
    """Starts jobs of `forks.py`."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        assert line, "the process that starts the others has ended"
        return json.loads(line)

    def run(self, processes: int = 2, **job) -> list[int]:
        """Exit codes of the processes."""
        job = {"processes": processes, "port": free_port(), "log": str(self.log), **job}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        codes, self.seconds, self.lasted = answer["codes"], answer["seconds"], answer["lasted"]
        self.output = [Path(f"{self.log}.{index}").read_text(encoding="utf-8") for index in range(processes)]
        return codes

    def mola(self, arguments: list[str], processes: int = 2, **job) -> None:
        """Run a command that must succeed in every process."""
        codes = self.run(processes, arguments=arguments, **job)
        assert codes == [0] * processes, "\n\n".join(self.output)

    def call(self, function, processes: int = 2, shard: bool = False, **given) -> None:
        """Call a function of a test module in every process."""
        name = f"{function.__module__}:{function.__qualname__}"
        codes = self.run(processes, function=name, given=given, shard=shard)
        assert codes == [0] * processes, "\n\n".join(self.output)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=PATIENCE)


def write_rows(path: Path) -> Path:
    """18 samples of different length."""
    rows = [
        {"id": str(i), "instruction": "Count " * (1 + i % 3) + str(i), "input": "", "output": f"It is {'ABC'[i % 3]}."}
        for i in range(18)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    if not hasattr(os, "fork") or not torch.distributed.is_gloo_available():
        pytest.skip("needs fork and torch's gloo, to start processes that talk to each other")
    running = Processes(tmp_path_factory.mktemp("processes"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def flags(tiny_model_dir, tmp_path_factory):
    """Command line of a short run: 16 training samples of different length, batches of 2 per process."""
    data = write_rows(tmp_path_factory.mktemp("data") / "rows.json")

    def build(output_dir: Path, **options) -> list[str]:
        settings = {
            "base_model": tiny_model_dir,
            "data": data,
            "output_dir": output_dir,
            "dtype": "float32",
            "template": "meta",
            "num_experts": "2468",
            "r": 4,
            "lora_dropout": 0,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1,
            "validation_size": 2,
            "disable_tqdm": "true",
            "use_cpu": "true",
            **options,
        }
        return ["train", *(f"--{name}={value}" for name, value in settings.items() if value is not None)]

    return build


@contextmanager
def goes_on_from(folder: Path, checkpoint: str, *, removed: str) -> Iterator[None]:
    """A finished run without its weights and a checkpoint, which the block makes anew from an earlier one."""
    (folder / "adapter_model.safetensors").unlink()
    shutil.rmtree(folder / removed)
    kept = folder / checkpoint / "trainer_state.json"
    before = kept.stat().st_mtime_ns
    yield
    assert (folder / removed / "trainer_state.json").is_file()
    assert kept.stat().st_mtime_ns == before, "it was written anew: the run did not go on from it"


def weights_of(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def curve(folder: Path, name: str = "loss") -> list[float]:
    """A loss by step; every step once."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    found = [(entry["step"], entry[name]) for entry in entries if name in entry and "train_runtime" not in entry]
    if name == "loss":
        assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [value for _, value in found]


def assert_same_run(first: Path, second: Path, tolerance: float) -> None:
    """Weights and losses differ by at most `tolerance`, relative to the largest of each."""
    one, two = weights_of(first), weights_of(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        difference, scale = (tensor - two[name]).abs().max(), two[name].abs().max()
        assert difference <= tolerance * scale, f"{name}: {difference} of {scale}"
    for name in ("loss", "eval_loss"):
        ours, theirs = curve(first, name), curve(second, name)
        assert ours
        assert ours == pytest.approx(theirs, rel=max(tolerance, 1e-6))


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))
