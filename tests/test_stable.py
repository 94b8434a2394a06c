"""What docs/reference/stability.md calls stable is still there.

`python -m tests.test_stable` adds what is new to the record. Run it for a release. It removes nothing.
"""

import dataclasses
import inspect
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

import mola
from mola.cli import COMMANDS, main

GOLDEN = Path(__file__).parent / "golden"
RECORD = GOLDEN / "stable.json"
# Made with version 1.0.0: a tiny base model, a run of `mola train`, a folder of `mola skills add`, and the logits after
# the tokens 3 to 18 in float32.
WRITTEN = GOLDEN / "version_1_0_0"


def arguments(name, function):
    """Each argument of a function -> its default."""
    parameters = inspect.signature(function).parameters.values()
    defaults = {each.name: "" if each.default is each.empty else repr(each.default) for each in parameters}
    return {f"{name}({argument})": default for argument, default in defaults.items() if argument != "self"}


def names():
    """Everything stable that has a name -> its default, or an empty text."""
    found = {f"mola {command}": "" for command in COMMANDS}
    own = {field.name for field in dataclasses.fields(mola.MolaConfig)}
    for name in own - {field.name for field in dataclasses.fields(PeftConfig)}:
        found[f"MolaConfig.{name}"] = json.dumps(getattr(mola.MolaConfig(), name))
    found |= arguments("mola.load_model", mola.load_model) | arguments("mola.Skills", mola.Skills)
    for name in (name for name in dir(mola.Skills) if not name.startswith("_")):
        member = getattr(mola.Skills, name)
        found |= arguments(f"mola.Skills.{name}", member) if callable(member) else {}
        found[f"mola.Skills.{name}"] = ""
    return dict(sorted(found.items()))


def test_nothing_stable_is_removed_or_has_another_default():
    stable = json.loads(RECORD.read_text(encoding="utf-8"))
    found = names()
    assert {"MolaConfig.num_experts", "mola train", "mola.load_model(adapter)", "mola.Skills.add"} <= stable.keys()
    assert {name: default for name, default in stable.items() if found.get(name) != default} == {}


def last_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19)[None]).logits[0, -1]


def test_files_of_version_1_0_0_compute_what_they_did(caplog):
    expected = load_file(WRITTEN / "logits.safetensors")
    found = {"run": last_logits(mola.load_model(WRITTEN / "base", WRITTEN / "run", dtype="float32"))}
    model = mola.load_model(WRITTEN / "base", WRITTEN / "skills", dtype="float32")
    for name in ("birds", "rivers"):
        with model.skills.use(name):
            found[name] = last_logits(model)
    assert found.keys() == expected.keys()
    for name, logits in found.items():
        torch.testing.assert_close(logits, expected[name], atol=2e-5, rtol=1e-4, msg=name)
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_two_skills_that_answered_together_in_1_0_0_do_not_any_more(tmp_path, caplog):
    folder = shutil.copytree(WRITTEN / "skills", tmp_path / "skills")
    record = json.loads((folder / "skills.json").read_text(encoding="utf-8"))
    (folder / "skills.json").write_text(json.dumps({**record, "top_k": 2, "threshold": -1e6}), encoding="utf-8")
    model = mola.load_model(WRITTEN / "base", folder, dtype="float32")
    last_logits(model)
    assert model.skills.last_names[0] in ("birds", "rivers")
    assert mola.Skills(folder).names == ["birds", "rivers"]
    (warning,) = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert "has `top_k` 2: one skill answers a prompt now" in warning
    mola.Skills(folder).remove("birds")
    assert "top_k" not in json.loads((folder / "skills.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("command", "expected"), [(("report", "run"), "report.html"), (("skills", "list", "skills"), "rivers")]
)
def test_commands_read_files_of_version_1_0_0(command, expected, tmp_path, monkeypatch, capsys):
    shutil.copytree(WRITTEN, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    assert main([*command]) == 0
    captured = capsys.readouterr()
    assert expected in captured.out
    assert "error" not in captured.err


if __name__ == "__main__":
    kept = json.loads(RECORD.read_text(encoding="utf-8"))
    RECORD.write_text(json.dumps({**names(), **kept}, indent=1) + "\n", encoding="utf-8")
