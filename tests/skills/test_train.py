"""`mola train --skill NAME --into FOLDER`: a plain LoRA on the upper layers, which is then a skill."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mola.checkpoints.skills_folder import read_skills
from mola.cli import main
from tests.checkpoints.test_skills_folder import content

SETTINGS = ["--max_steps=2", "--save_strategy=steps", "--save_steps=1", "--eval_strategy=no", "--warmup_steps=0"]
SETTINGS += ["--batch_size=4"]


@pytest.fixture
def train(run, data):
    def call(folder, name, *more):
        return run("train", "--skill", name, "--into", folder, "--data", data[name], *SETTINGS, *more)

    return call


def test_a_skill_is_trained_and_added(train, run, tiny_model_dir, data, tmp_path, capsys):
    folder = tmp_path / "skills"
    train(folder, "birds", "--base_model", tiny_model_dir)
    skills = read_skills(folder)
    assert (skills.names, skills.layer, skills.skills["birds"].rows) == (["birds"], 1, 20)
    run_folder = tmp_path / "skills-runs" / "birds"
    assert {int(name.split(".layers.")[1][0]) for name in load_file(run_folder / "adapter_model.safetensors")} == {
        1, 2, 3,
    }  # fmt: skip
    assert [path.name for path in run_folder.glob("checkpoint-*")] == ["checkpoint-2"]
    record = json.loads((run_folder / "run.json").read_text())
    assert record["adapter_settings"]["layer"] == 1
    assert record["status"] == "finished"
    # Added again from the run, the folder is the same: the model of the training decides like a fresh one.
    run("skills", "add", tmp_path / "again", f"birds={run_folder}")
    assert content(tmp_path / "again") == content(folder)
    # The second one needs no base model.
    words = ["train", "--skill", "rivers", "--into", folder, "--data", data["rivers"], *SETTINGS, "--r", 3]
    assert main([*map(str, words), f"--output={tmp_path / 'second'}"]) == 0
    told = capsys.readouterr().err.partition("Next:\n")[2].splitlines()
    assert told[:2] == [f"  mola skills test {folder} --data NAME=TEST_DATA ...", f"  mola serve {folder}"]
    assert read_skills(folder).names == ["birds", "rivers"]
    assert json.loads((folder / "rivers" / "adapter_config.json").read_text())["r"] == 3


@pytest.mark.slow
def test_resumed_and_then_added(train, made_folder, tmp_path):
    folder = shutil.copytree(made_folder, tmp_path / "skills")
    train(folder, "tools", "--save_total_limit=3")
    run_folder = tmp_path / "skills-runs" / "tools"
    weights = load_file(run_folder / "adapter_model.safetensors")
    shutil.rmtree(run_folder / "checkpoint-2")
    shutil.rmtree(folder)  # as if the command had been killed before the skill was added
    shutil.copytree(made_folder, folder)
    train(folder, "tools", "--resume_from_checkpoint", "last")
    again = load_file(run_folder / "adapter_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert "tools" in read_skills(folder).names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--skill", "birds", "--into", "{folder}"], "has a skill 'birds' already"),
        (["--skill", "new", "--into", "{folder}", "--layer", "2"], "reads the input of layer 1, `layer` has 2"),
        (["--skill", "new", "--into", "{folder}", "--num_experts", "2"], "`num_experts` ('2') is not for skills"),
        (["--skill", "new", "--into", "{folder}", "--r", "2,4"], "`r` needs one entry per decoder layer"),
        (["--skill", "new", "--into", "{folder}", "--target_modules", "q_prj"], "'q_prj' (did you mean"),
        (["--skill", "a.b", "--into", "{folder}"], "a skill's name must be of"),
        (["--skill", "new"], "`skill` needs a skills folder"),
        (["--into", "{folder}"], "`into` has no effect without `skill`"),
        (["--skill", "new", "--into", "{folder}/birds", "--base_model", "{base}"], "`into` must be new or empty"),
    ],
)
def test_wrong_options_are_found_before_the_training(words, message, folder, no_weights_dir, data, tmp_path, capsys):
    places = {"folder": folder, "base": no_weights_dir}
    given = [word.format(**places) for word in words]
    assert main(["train", *given, "--data", str(data["tools"]), "--output", str(tmp_path / "run"), *SETTINGS]) == 2
    assert message in capsys.readouterr().err
