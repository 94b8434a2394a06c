"""Disks that are full or read-only, and folders with unusual names: one clear error, and nothing old is lost."""

import json
import shutil
import subprocess
import threading
import time

import pytest

from mola import MolaConfig
from mola.cli import main
from mola.errors import MolaError
from mola.files.atomic import append_lines, atomic_write_text
from mola.training.checkpoints import newest_complete
from tests.conftest import save_adapter
from tests.disks import disk
from tests.training.runs import same_weights

WEIGHTS = "adapter_model.safetensors"
CONFIG = MolaConfig(r=2, num_experts=2, top_k=1, task_type="CAUSAL_LM")


@pytest.fixture
def small(tmp_path):
    with disk(tmp_path / "disk") as mounted:
        yield mounted


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "reserve"}


@pytest.mark.parametrize("write", [atomic_write_text, lambda path, text: append_lines(path, [text])])
@pytest.mark.parametrize("fault", ["fill", "make_read_only"])
def test_files_on_a_bad_disk(small, fault, write):
    path = small.path / "result.json"
    path.write_text("old\n")
    getattr(small, fault)()
    before = contents(small.path)
    with pytest.raises(MolaError, match=r"result\.json' cannot be written: (No space left|Read-only)"):
        write(path, "new" * 10_000)
    if write is atomic_write_text:
        assert contents(small.path) == before
    small.make_writable()
    write(path, "new")
    assert path.read_text().endswith("new\n" if write is not atomic_write_text else "new")


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    return save_adapter(tiny_model_dir, tmp_path_factory.mktemp("adapter"), CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sample"
    sizes = ["--train_size=8", "--validation_size=2", "--test_size=4"]
    assert main(["prepare", "sample", f"--output={folder}", *sizes]) == 0
    return folder


def commands(base, adapter, data, folder):
    """Commands that write, and what they write."""
    given = [f"--base_model={base}", f"--adapter={adapter}", f"--data={data / 'test.json'}", "--task=sample"]
    return {
        "evaluate": (["evaluate", *given, "--max_new_tokens=2", f"--output={folder / 'result.json'}"], "result.json"),
        "inspect": (["inspect", *given, f"--json={folder / 'seen.json'}", f"--html={folder / 's.html'}"], "seen.json"),
        "convert": (["convert", str(adapter), "--to=published", f"--output={folder / 'published'}"], "published"),
        "reallocate": (
            ["reallocate", f"--adapter={adapter}", "--num_experts=3", f"--output={folder / 'other'}"],
            "other",
        ),
        "allocate": (
            ["allocate", f"--base_model={base}", "--method=triangle", "--budget=8", f"--output={folder / 'list.json'}"],
            "list.json",
        ),
    }


@pytest.mark.parametrize("name", ["evaluate", "inspect", "convert", "reallocate", "allocate"])
def test_commands_on_a_bad_disk(name, small, tiny_model_dir, adapter, data, capsys):
    arguments, written = commands(tiny_model_dir, adapter, data, small.path)[name]
    (small.path / "old.json").write_text("old")
    for fault in ("fill", "make_read_only"):
        getattr(small, fault)()
        before = contents(small.path)
        assert main(arguments) == 2, fault
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith(f"mola {name}: error: ")
        assert "No space left on device" in message or "Read-only file system" in message
        assert contents(small.path).items() >= before.items()
        assert not (small.path / written).exists()
        small.make_writable()
    assert main(arguments) == 0
    assert (small.path / written).exists()


@pytest.fixture
def training(tiny_model_dir, data):
    """Flags of a run with a checkpoint at every step."""

    def build(folder, **more):
        settings = {
            **{"base_model": tiny_model_dir, "data": data / "dataset.hf", "task": "sample", "output_dir": folder},
            **{"dtype": "float32", "num_experts": 2, "r": 2, "per_device_train_batch_size": 2, "max_steps": 8},
            **{"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "save_total_limit": 99},
            **{"use_cpu": "true", "logging_steps": 1, "disable_tqdm": "true", **more},
        }
        return ["train", *(f"--{name}={value}" for name, value in settings.items())]

    return build


@pytest.mark.parametrize(
    "room", [700_000, *(pytest.param(room, marks=pytest.mark.slow) for room in range(150_000, 1_400_000, 23_000))]
)
def test_training_until_the_disk_is_full_goes_on_when_there_is_room(room, training, small, tmp_path, capsys):
    """The room ends while any library writes any of a run's files."""
    small.resize(room)
    folder = small.path / "run"
    assert main(training(folder)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be written" in message
    assert message.startswith("mola train: error: ")
    last = newest_complete(folder)
    small.resize(1 << 24)
    more = ["--resume_from_checkpoint=last"] if last else ["--overwrite"]
    assert main([*training(folder), *more]) == 0
    assert main(training(tmp_path / "whole")) == 0
    assert same_weights(folder, tmp_path / "whole")
    print(f"{room} bytes: full after {last.name if last else 'no checkpoint'}; {message}")


def test_training_on_a_disk_that_becomes_read_only(training, small, tmp_path, capsys):
    folder = small.path / "run"

    def take_away():
        while newest_complete(folder) is None and not has_ended.wait(0.01):
            pass
        for _ in range(1000):  # busy as long as a file is open to be written
            try:
                return small.make_read_only()
            except subprocess.CalledProcessError:
                time.sleep(0.002)

    has_ended = threading.Event()
    thread = threading.Thread(target=take_away, daemon=True)
    thread.start()
    try:
        code = main(training(folder, max_steps=400, save_total_limit=2))
    finally:
        has_ended.set()
        thread.join()
    assert code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Read-only file system" in message
    assert newest_complete(folder) is not None


UNUSUAL = "a b 'c' \"d\" $e ü 模型 🙂 [x] {y} %z #"


@pytest.mark.slow
def test_everything_works_in_folders_with_unusual_names(tiny_model_dir, data, training, tmp_path):
    here = tmp_path / UNUSUAL
    base, own = shutil.copytree(tiny_model_dir, here / "base"), shutil.copytree(data, here / "data")
    run = here / "run"
    more = {"max_steps": 2, "base_model": base, "data": own / "dataset.hf"}
    assert main(training(run, **more)) == 0
    assert main([*training(run, **more | {"max_steps": 3}), "--resume_from_checkpoint=last"]) == 0
    assert main(["generate", f"--base_model={base}", f"--adapter={run}", "--prompt=a", "--max_new_tokens=2"]) == 0
    for arguments, written in commands(base, run, own, here).values():
        assert main(arguments) == 0
        assert (here / written).exists()
    assert main(["report", str(run)]) == 0
    back = ["--from=published", f"--base_model={base}", "--top_k=2", f"--output={here / 'back'}"]
    assert main(["convert", str(here / "published"), *back]) == 0
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["output_dir"] == str(run)
