"""docs/reference/file-formats.md names every key and tensor of the files that mola writes, and no others."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

import mola
from mola.data.prepare import PrepareOptions, prepare

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "file-formats.md"


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """A run of a mixture, and a sequence of two skills."""
    folder = tmp_path_factory.mktemp("files")
    data = folder / "data"
    prepare(PrepareOptions("sample", str(data), train_size=24, validation_size=4, test_size=4))
    common = {"base_model": str(tiny_model_dir), "task": "sample", "data": str(data / "dataset.hf"), "max_steps": 1}
    common |= {"warmup_steps": 0, "logging_steps": 1, "r": "2"}
    mola.train(mola.TrainOptions(**common, num_experts="1,2,2,2", output_dir=str(folder / "run")))
    mola.continual(
        mola.ContinualOptions(
            **common,
            growth="skills",
            stages={"first": {"filters": {"subject": "natural science"}}, "second": {}},
            test_limit=1,
            output_dir=str(folder / "sequence"),
        )
    )
    return folder


def documented(heading):
    """The names in the first column of the tables below a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1]
    rows = re.findall(r"^\| (`.+?`) \|", section, re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def tensors_of(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping


def test_tensors_of_an_adapter(folder):
    found = tensors_of(folder / "run" / "adapter_model.safetensors")
    names = {f"MODULE.{name.rpartition('.')[2]}" for name in found}
    assert names == {name for name in documented("Adapter") if "PARAMETER" not in name}
    shapes = {name.rpartition("mola_")[2]: shape for name, shape in found.items() if ".layers.1.mlp.up_proj." in name}
    assert shapes == {"A": [2, 2, 32], "B": [2, 2, 48], "router": [2, 32]}


@pytest.mark.parametrize(
    ("heading", "file"),
    [
        ("Run folder", "run/run.json"),
        ("Skills folder", "sequence/skills/skills.json"),
        ("Sequence of tasks", "sequence/continual.json"),
    ],
)
def test_keys_of_a_record(folder, heading, file):
    record = json.loads((folder / file).read_text(encoding="utf-8"))
    names = {name for name in documented(heading) if not name.startswith(("general/", "skills/"))}
    assert record.keys() == names


def test_entries_of_the_records(folder):
    text = PAGE.read_text(encoding="utf-8")
    skills = json.loads((folder / "sequence" / "skills" / "skills.json").read_text(encoding="utf-8"))["skills"]
    sequence = json.loads((folder / "sequence" / "continual.json").read_text(encoding="utf-8"))
    lines = (folder / "run" / "routing.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [*skills.values(), *sequence["stages"], *sequence["results"], json.loads(lines[0])["modules"][0]]
    assert {key for entry in entries for key in entry if f"`{key}`" not in text} == set()
    assert json.loads(lines[0]).keys() == {"step", "epoch", "tokens", "modules"}


def test_tensors_of_the_statistics(folder):
    found = tensors_of(folder / "sequence" / "skills" / "statistics.safetensors")
    names = {re.sub(r"skills/\w+/", "skills/NAME/", name) for name in found}
    assert names == {name for name in documented("Skills folder") if name.startswith(("general/", "skills/"))}
