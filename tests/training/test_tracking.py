"""`report_to`: trackers write what a run logs, without a network; what is not installed ends in one line."""

import contextlib
import json
import sqlite3
import struct
import sys

import pytest
import torch
from transformers import Trainer, TrainerCallback

from mola.cli import main
from mola.options.parsing import parse
from mola.training import train
from mola.training.train import TrainOptions
from tests.training.runs import NO_EVALUATION

# Their packages warn about each other.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def flags(flags):
    """Command line of three steps without an evaluation, in `tmp_path/run`."""
    settings = {"max_steps": 3, "warmup_steps": 0, "use_cpu": "true", **NO_EVALUATION}
    return lambda **options: flags(**{**settings, **options})


class RouterValue(TrainerCallback):
    """Logs a value of its own, as a model or a callback may."""

    def on_step_begin(self, args, state, control, **kwargs):
        # Not at its end: logging there takes back the trainer's own wish to log this step's loss.
        self.trainer.log({"router/entropy": 0.5 + state.global_step})


@pytest.fixture
def own_value(monkeypatch):
    """Every trainer of the command gets `RouterValue`."""
    make = train.make_trainer

    def with_callback(*arguments):
        trainer = make(*arguments)
        callback = RouterValue()
        callback.trainer = trainer
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(train, "make_trainer", with_callback)


def logged(folder, name):
    """Values of `metrics.jsonl` by step."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {entry["step"]: entry[name] for entry in entries if name in entry}


def test_tensorboard(flags, own_value, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tracking: pip install 'mola-peft[tracking]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(flags(report_to="tensorboard")) == 0
    (events,) = (tmp_path / "run" / "runs").rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent)).Reload()
    for tag, name in (("train/loss", "loss"), ("train/router/entropy", "router/entropy")):
        values = {event.step: event.value for event in found.Scalars(tag)}
        assert values == pytest.approx(logged(tmp_path / "run", name))
        assert len(values) == 3
    (summary,) = found.Scalars("train/train_loss")
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert summary.value == pytest.approx(record["metrics"]["train_loss"])
    assert record["settings"]["add_eos_token"] is True  # its name looks like that of a secret


def test_several_trackers_at_once(flags, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tracking: pip install 'mola-peft[tracking]'")
    pytest.importorskip("wandb", reason="needs the extra wandb: pip install 'mola-peft[wandb]'")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("report_to: [tensorboard, wandb]", encoding="utf-8")
    for words in (["--report_to", "tensorboard,wandb"], ["--config", str(recipe)]):
        options = parse(TrainOptions, [*flags()[1:], *words], prog="mola train")
        assert options.report_to == ["tensorboard", "wandb"]


def test_wandb_offline(flags, own_value, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb: pip install 'mola-peft[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(flags(report_to="wandb", run_name="first")) == 0
    import wandb

    wandb.teardown()  # waits until its service has written everything
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    values = wandb_values(file.read_bytes())
    for key, name in (("train/loss", "loss"), ("train/router/entropy", "router/entropy")):
        assert values[key] == pytest.approx(list(logged(tmp_path / "run", name).values()))


def wandb_values(content):
    """History of an offline file: pieces in blocks of 32 KiB, each with checksum, length and kind in front."""
    from wandb.proto import wandb_internal_pb2

    place, record, values = 7, b"", {}
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if left < 7 or kind == 0:  # the rest of a block is empty
            place += left
            continue
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            entry = wandb_internal_pb2.Record.FromString(record)
            record = b""
            for item in entry.history.item:
                key = item.key or "/".join(item.nested_key)
                values.setdefault(key, []).append(json.loads(item.value_json))
    return values


def test_trackio(flags, own_value, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="needs the extra trackio: pip install 'mola-peft[trackio]'")
    assert main(flags(report_to="trackio", project="test")) == 0
    (file,) = (tmp_path / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(file)) as base:
        entries = [json.loads(row[0]) for row in base.execute("select metrics from metrics order by id")]
    for key, name in (("train/loss", "loss"), ("train/router/entropy", "router/entropy")):
        values = [entry[key] for entry in entries if key in entry]
        assert values == pytest.approx(list(logged(tmp_path / "run", name).values()))


WRONG = [
    ("tensorboard,nosuch", None, ["`report_to`", ": nosuch is not"]),
    ("tensorboard", ["tensorboard", "tensorboardX"], ["`report_to`", "tensorboard is not", "Install its package"]),
]


@pytest.mark.parametrize(("name", "missing", "words"), WRONG)
def test_missing_tracker_is_one_line_before_anything_loads(flags, tmp_path, monkeypatch, capsys, name, missing, words):
    import importlib.util

    find = importlib.util.find_spec
    hidden = missing or []
    monkeypatch.setattr(importlib.util, "find_spec", lambda word, *rest: None if word in hidden else find(word, *rest))
    assert main(flags(report_to=name)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("mola train: error: ")
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "run").exists()


def test_floating_point_operations_are_those_of_transformers(flags, monkeypatch):
    made, make = [], train.make_trainer
    monkeypatch.setattr(train, "make_trainer", lambda *arguments: made.append(make(*arguments)) or made[0])
    assert main(flags(max_steps=1)) == 0
    for shape in ((2, 3), (1, 8)):
        batch = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        expected = Trainer.floating_point_ops(made[0], batch)
        assert made[0].floating_point_ops(batch) == expected > 0
