"""`mola train` stopped by a signal and resumed ends with the very same weights, wherever the signal hits.

The runs are real processes, forked from one that has imported everything (`kill_driver.py`).
"""

import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mola.cli import main
from mola.errors import MolaError
from mola.training.checkpoints import find_checkpoint
from tests.grids import slow
from tests.versions import needs
from tests.waiting import PATIENCE

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="file operations are followed through /proc, which Linux has"
)

WEIGHTS = "adapter_model.safetensors"
KILLS = int(os.environ.get("MOLA_KILLS", "54"))  # random moments; `MOLA_KILLS=300` for a long run
RUNS = {
    # A checkpoint every second step, the older one removed; the last step is no multiple of two.
    "steps": {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "save_total_limit": 1, "max_steps": 5},
    # The best weights are not the last ones: the last checkpoint is removed before the result is saved.
    "best": {
        "validation_size": 3,
        "num_train_epochs": 3,
        "save_total_limit": 1,
        "learning_rate": 0.05,
        "seed": 2,  # with these the second epoch is the best one by far
        "lora_dropout": 0.0,  # whose masks are others without numba
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
    },
    # A checkpoint and an evaluation at the same step, the evaluation by epoch.
    "mixed": {
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "epoch",
        "load_best_model_at_end": "false",
        "validation_size": 1,
        "per_device_train_batch_size": 3,
    },
}


class Driver:
    """The process that forks the commands."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        script = Path(__file__).with_name("kill_driver.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        assert line, "the driver has ended"
        return json.loads(line)

    def run(self, arguments: list[str], kill: dict | None = None, operations: Path | None = None) -> int | None:
        """Exit code, or None if the process was killed."""
        folder = next(item.partition("=")[2] for item in arguments if item.startswith("--output_dir="))
        self.log.write_text("", encoding="utf-8")
        job = {"arguments": arguments, "folder": folder, "kill": kill, "log": str(self.log)}
        self.process.stdin.write(json.dumps({**job, "operations": operations and str(operations)}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        assert answer["signal"] in (0, (kill or {}).get("signal", signal.SIGKILL)), answer
        return answer["code"]

    def succeed(self, arguments: list[str], **more) -> None:
        assert self.run(arguments, **more) == 0, self.log.read_text(encoding="utf-8")

    def kill(self, arguments: list[str], **kill) -> None:
        assert self.run(arguments, kill) is None, f"not killed by {kill}: {self.log.read_text(encoding='utf-8')}"

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=PATIENCE)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    running = Driver(tmp_path_factory.mktemp("driver"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def flags(tiny_model_dir, tmp_path_factory):
    """Command line of a short run."""
    data = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [
        {"id": str(i), "instruction": f"Say {i}", "input": "", "output": f"Answer: {'ABC'[i % 3]}."} for i in range(10)
    ]
    data.write_text(json.dumps(rows), encoding="utf-8")

    def build(output_dir: Path, **options) -> list[str]:
        settings = {
            "base_model": tiny_model_dir,
            "data": data,
            "output_dir": output_dir,
            "dtype": "float32",
            "template": "meta",
            "num_experts": "2222",
            "r": 2,
            "lora_dropout": 0.1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "disable_tqdm": "true",
            "use_cpu": "true",
            **options,
        }
        return ["train", *(f"--{name}={value}" for name, value in settings.items())]

    return build


@pytest.fixture(scope="module")
def whole(driver, flags, tmp_path_factory):
    """Runs that nobody killed, and their file operations, by name; each made once."""
    made = {}

    def get(name: str) -> tuple[Path, list[list[str]]]:
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
            driver.succeed(flags(folder / "run", **RUNS[name]), operations=folder / "operations.json")
            made[name] = folder / "run", json.loads((folder / "operations.json").read_text(encoding="utf-8"))
        return made[name]

    return get


def curve(folder: Path) -> list[dict]:
    """The entries of the loss curve without the speed, which no two runs share."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    speed = re.compile(r".*(_runtime|_per_second|total_flos)|train_loss")
    return [{name: value for name, value in entry.items() if not speed.fullmatch(name)} for entry in entries]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def assert_same_run(folder: Path, expected: Path) -> None:
    one, two = weights_of(folder), weights_of(expected)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert curve(folder) == curve(expected)
    names = [sorted(path.name for path in run.iterdir()) for run in (folder, expected)]
    assert names[0] == names[1], "something is missing or left over"
    records = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in (folder, expected)]
    assert [record["status"] for record in records] == ["finished", "finished"]
    assert records[0]["steps"] == records[1]["steps"]
    assert records[0]["metrics"].get("eval_loss") == records[1]["metrics"].get("eval_loss")


# One folder, killed and gone on with again and again: where, and the checkpoint that is the last complete one then.
CHAINS = {
    "short": [
        ({"path": r"checkpoint-4", "operation": "rename"}, 2),
        ({"path": r"checkpoint-2/.*", "operation": "remove", "number": 3}, 4),
        ({"path": r"adapter_model\.safetensors", "operation": "rename"}, 5),
    ],
    "steps": [
        ({"path": r".*checkpoint-2/optimizer\.pt", "half": True}, None),
        ({"path": r".*checkpoint-4/rng_state\.pth", "half": True}, 2),
        ({"path": r".*checkpoint-4/trainer_state\.json", "half": True}, 2),
        ({"path": r"checkpoint-4", "operation": "rename"}, 2),
        ({"path": r"checkpoint-2/.*", "operation": "remove", "number": 3}, 4),
        ({"path": r"metrics\.jsonl", "operation": "open", "half": True}, 4),
        ({"path": r"\.saving-checkpoint", "operation": "remove"}, 5),
        ({"path": r"adapter_model\.safetensors", "operation": "rename"}, 5),
    ],
    "best": [
        ({"path": r".*checkpoint-4/trainer_state\.json"}, 2),
        ({"path": r"checkpoint-6/.*", "operation": "remove", "number": 4}, 4),
        ({"path": r"run\.json", "operation": "rename", "number": 2}, 4),
    ],
    "mixed": [
        ({"path": r"metrics\.jsonl", "operation": "open", "number": 4}, None),  # the evaluation after step 3
        ({"path": r"metrics\.jsonl", "operation": "open", "number": 5}, 3),  # step 4
        ({"path": r"\.saving-(?!checkpoint).*", "operation": "mkdir"}, 6),  # after the final evaluation
    ],
}


def last_step(folder: Path) -> int | None:
    """Step of the last complete checkpoint."""
    try:
        return int(find_checkpoint(folder, "last").name.rpartition("-")[2])
    except MolaError:
        return None


def go_on(folder: Path) -> list[str]:
    """What the documentation says to add to the command."""
    if not any(folder.iterdir()):
        return []
    return ["--overwrite"] if last_step(folder) is None else ["--resume_from_checkpoint=last"]


@pytest.mark.parametrize(
    ("chain", "name"), [("short", "steps"), *slow(("steps", "steps"), ("best", "best"), ("mixed", "mixed"))]
)
def test_run_killed_again_and_again_ends_as_one_that_was_not(driver, flags, whole, tmp_path, chain, name):
    expected, _ = whole(name)
    folder = tmp_path / "run"
    arguments = flags(folder, **RUNS[name])
    more = []
    for kill, step in CHAINS[chain]:
        driver.kill([*arguments, *more], **kill)
        assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "running"
        assert last_step(folder) == step, kill
        more = go_on(folder)
    driver.succeed([*arguments, *more])
    assert_same_run(folder, expected)


def changing(operations: list[list[str]]) -> list[int]:
    """Numbers of the operations that change what a reader finds."""
    return [
        number
        for number, (operation, path) in enumerate(operations, 1)
        if operation != "mkdir" and not path.startswith(".write-test-") and not path.endswith("/README.md")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stride"), [("steps", 1), ("best", 3), ("mixed", 3)])
def test_every_file_operation_is_a_safe_moment_to_be_killed(driver, flags, whole, tmp_path, name, stride):
    """Every one of the first kind of run, every third of the others, which write the same files."""
    expected, operations = whole(name)
    numbers = changing(operations)[::stride]
    assert len(numbers) > 10
    kills = 0
    for number in numbers:
        for half in (False, True) if operations[number - 1][0] in ("open", "write") else (False,):
            folder = tmp_path / f"run-{number}-{half}"
            arguments = flags(folder, **RUNS[name])
            driver.kill(arguments, index=number, half=half)
            driver.succeed([*arguments, *go_on(folder)])
            assert_same_run(folder, expected)
            shutil.rmtree(folder)
            kills += 1
    print(f"{name}: {kills} kills")


def logged_steps(folder: Path) -> tuple[int, bool]:
    """The last step whose loss is in the curve, whose last line may be cut off; whether training had ended."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    steps = re.findall(r'^{"step": (\d+), .*"loss": .*}$', text, re.MULTILINE)
    return max(map(int, steps), default=0), "train_runtime" in text


@pytest.mark.slow
def test_signals_at_random_moments(driver, flags, tmp_path):
    """Nothing but the step after the last checkpoint is lost, and SIGINT and SIGTERM do not lose even that."""
    options = {
        **RUNS["steps"],
        "max_steps": 60,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "validation_size": 2,
    }
    start = time.monotonic()
    driver.succeed(flags(tmp_path / "whole", **options))
    longest = time.monotonic() - start  # on a busy machine runs that end sooner would get nowhere
    moments = random.Random(5)
    outcomes, runs = collections.Counter(), 0
    while outcomes.total() < KILLS or runs == 0:
        folder = tmp_path / f"run-{runs}"
        folder.mkdir()
        arguments = flags(folder, **options)
        while True:
            number = moments.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
            kill = {"seconds": moments.uniform(0.1, longest), "signal": number}
            code = driver.run([*arguments, *go_on(folder)], kill)
            message = driver.log.read_text(encoding="utf-8")
            if code == 0:
                break
            is_caught = "saving a checkpoint after this step" in message
            assert code == (130 if number == signal.SIGINT or is_caught else None), message
            assert "Traceback" not in message
            step, had_ended = logged_steps(folder)
            # At the end the trainer removes all but the best checkpoint, before the result is saved.
            if not had_ended or (is_caught and step < options["max_steps"]):
                assert (last_step(folder) or 0) >= step - (0 if is_caught else 1), kill
            outcomes[number.name, "step finished" if is_caught else "stopped at once"] += 1
        assert_same_run(folder, tmp_path / "whole")
        shutil.rmtree(folder)
        runs += 1
    print(f"{dict(outcomes)} in {runs} runs")


# ---------------------------------------------------------------------- single holes

STATE_FILES = [
    "adapter_config.json",
    WEIGHTS,
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
]


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the finished run "steps"."""
    return shutil.copytree(whole("steps")[0], tmp_path / "finished")


@pytest.mark.parametrize("name", STATE_FILES)
def test_checkpoint_without_one_of_its_files_is_refused(finished, name, caplog):
    """As a killed rotation leaves it: deleted in any order."""
    (finished / "checkpoint-5" / name).unlink()
    with pytest.raises(MolaError, match="checkpoint-5.* has no "):
        find_checkpoint(finished, str(finished / "checkpoint-5"))
    with pytest.raises(MolaError, match="no complete checkpoint"):
        find_checkpoint(finished, "last")
    assert "Skipping" in caplog.text


def test_checkpoint_without_scaler_is_incomplete_if_others_have_one(finished):
    shutil.copytree(finished / "checkpoint-5", finished / "checkpoint-4")
    torch.save({}, finished / "checkpoint-4" / "scaler.pt")
    assert find_checkpoint(finished, "last") == finished / "checkpoint-4"


def test_another_order_of_samples_is_refused(finished, flags, capsys):
    arguments = flags(finished, **RUNS["steps"], train_sampling_strategy="group_by_length")
    assert main([*arguments, "--resume_from_checkpoint=last"]) == 2
    assert "`train_sampling_strategy` (settings) differs" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_while_an_earlier_run_is_removed(driver, flags, whole, tmp_path, capsys):
    folder = shutil.copytree(whole("best")[0], tmp_path / "run")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-2")
    arguments = [*flags(folder, **RUNS["steps"]), "--overwrite"]
    driver.kill(arguments, path=r"checkpoint-4/trainer_state\.json", operation="remove")
    assert (folder / "checkpoint-2" / "trainer_state.json").is_file()
    for resume in ("last", folder / "checkpoint-2"):  # the earlier run's, with the options of the new one
        assert main([*arguments, f"--resume_from_checkpoint={resume}"]) == 2
    assert "was being replaced" in capsys.readouterr().err
    driver.succeed(arguments)
    assert_same_run(folder, whole("steps")[0])


@pytest.mark.slow
def test_earlier_checkpoint_starts_a_branch_that_later_ones_do_not_mix_with(driver, flags, whole, tmp_path):
    folder = tmp_path / "run"
    arguments = flags(folder, **{**RUNS["steps"], "save_total_limit": 9})
    driver.succeed(arguments)
    driver.kill(
        [*arguments, f"--resume_from_checkpoint={folder / 'checkpoint-2'}"],
        path=r".*checkpoint-4/optimizer\.pt",
        operation="write",
        half=True,
    )
    assert last_step(folder) == 2
    driver.succeed([*flags(folder, **RUNS["steps"]), "--resume_from_checkpoint=last"])
    assert_same_run(folder, whole("steps")[0])


def test_checkpoint_of_another_folder_does_not_open_a_folder_that_is_in_use(finished, flags, tmp_path, capsys):
    other = shutil.copytree(finished, tmp_path / "other")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    arguments = [*flags(other, **RUNS["steps"]), f"--resume_from_checkpoint={finished / 'checkpoint-5'}"]
    assert main(arguments) == 2
    assert "`output` must be empty" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    assert main([*arguments, "--overwrite"]) == 0
    assert not (other / "checkpoint-5").exists(), "the earlier run is gone, and no step was left to do"


@pytest.mark.slow
def test_best_checkpoint_is_found_after_the_folder_was_renamed(driver, flags, whole, tmp_path):
    options = {**RUNS["best"], "save_total_limit": 2}
    driver.kill(flags(tmp_path / "before", **options), path=r"\.saving-(?!checkpoint).*", operation="mkdir")
    folder = (tmp_path / "before").rename(tmp_path / "after")
    driver.succeed([*flags(folder, **options), "--resume_from_checkpoint=last"])
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["best_checkpoint"] == str(folder / "checkpoint-4")
    expected = weights_of(whole("best")[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(folder).items())


@pytest.mark.slow
def test_best_checkpoint_that_is_gone_is_an_error(whole, flags, tmp_path, capsys):
    folder = shutil.copytree(whole("best")[0], tmp_path / "run")
    path = folder / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**state, "best_model_checkpoint": str(folder / "checkpoint-2")}), encoding="utf-8")
    arguments = [*flags(folder, **RUNS["best"]), "--resume_from_checkpoint=last"]
    assert main(arguments) == 2
    assert "`load_best_model_at_end`" in capsys.readouterr().err
    assert main([*arguments, "--load_best_model_at_end=false"]) == 0


@needs(
    "transformers",
    "5.24",
    "older ones may evaluate once more after such a signal; nothing between 5.2 and it was tried",
)
@pytest.mark.parametrize("strategy", slow("epoch", "best"))
def test_signal_at_the_end_of_an_epoch_writes_one_checkpoint_and_keeps_it(driver, flags, whole, tmp_path, strategy):
    """The log line of step 5 brings the signal, step 6 is the last of its epoch and not the best one."""
    folder = tmp_path / "run"
    arguments = flags(folder, **{**RUNS["best"], "save_strategy": strategy})
    terminate = {"path": r"metrics\.jsonl", "operation": "open", "number": 7, "signal": 15}
    assert driver.run(arguments, terminate, tmp_path / "operations.json") == 130
    assert last_step(folder) == 6
    operations = json.loads((tmp_path / "operations.json").read_text(encoding="utf-8"))
    assert operations.count(["write", ".saving-checkpoint/checkpoint-6/optimizer.pt"]) == 1
    driver.succeed([*arguments, "--resume_from_checkpoint=last"])
    expected = whole("best")[0]
    assert curve(folder) == curve(expected)
    one, two = weights_of(folder), weights_of(expected)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
