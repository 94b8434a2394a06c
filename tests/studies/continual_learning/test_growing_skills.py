"""`--growth skills`: every stage trains a LoRA alone and adds it to a skills folder, which answers all tests so far."""

import shutil
from pathlib import Path

import pytest

from mola import ContinualOptions, continual, load_model, load_tokenizer
from mola.cli import main
from mola.studies.continual_learning.skills import changed
from mola.training import train as training
from tests.checkpoints.test_skills_folder import content
from tests.studies.continual_learning.sequences import SETTINGS, STAGES, flags, read
from tests.studies.continual_learning.test_stopping import send
from tests.training.runs import WEIGHTS, same_weights

GROWTH = {"growth": "skills", "num_experts": None, "layer": 1, "r": "4", "max_steps": 2, "save_steps": 1}
GROWN = {"physics": STAGES["physics"], "words": {"filters": STAGES["words"]["filters"], "r": "2"}}
FOLDERS = ["01-physics", "02-words"]


@pytest.fixture(scope="module")
def grown(base_model, data, tmp_path_factory):
    """A sequence that nobody stopped: folder and result."""
    folder = tmp_path_factory.mktemp("grown") / "run"
    options = {"base_model": str(base_model), "data": str(data), "output_dir": str(folder), "stages": GROWN}
    options |= {**SETTINGS, **GROWTH}
    return folder, continual(ContinualOptions(**options))


@pytest.fixture
def arguments(values):
    """The command line of the same sequence."""
    return flags(values(**GROWTH, stages=GROWN))


def answers(folder, stage, task):
    return read(folder / stage / "evaluation" / f"{task}.json")["samples"]


def assert_same_end(folder, whole):
    assert read(folder / "continual.json")["results"] == whole[1].results
    ends = [content(each / "skills") for each in (folder, whole[0])]
    for end in ends:
        for name in [name for name in end if name.endswith("run.json")]:  # it has times
            del end[name]
    assert ends[0] == ends[1]


def test_the_record_says_who_was_asked_and_which_old_answers_changed(grown):
    folder, result = grown
    first, last = read(folder / "continual.json")["results"]
    assert result.status == "finished"
    r = [[task["accuracy"] for task in row["tasks"].values()] for row in (first, last)]
    assert last["overall_performance"] == pytest.approx((r[1][0] + r[1][1]) / 2)
    assert last["performance_drop"] == pytest.approx(r[1][0] - r[0][0])
    assert (first["performance_drop"], first["changed"]) == (None, [])

    model = load_model(folder / "skills")
    tokenizer = load_tokenizer(model.name_or_path)
    for task, name in zip(FOLDERS, GROWN, strict=True):
        samples = answers(folder, FOLDERS[1], task)
        for sample in samples:
            model(**tokenizer(sample["prompt"], return_tensors="pt"))
            assert [sample["asked"]] == [asked or "base" for asked in model.skills.last_names]
        counts = last["asked"][name]
        assert counts == {each: sum(s["asked"] == each for s in samples) for each in counts}
        assert sum(counts.values()) == len(samples)

    before, now = (answers(folder, stage, FOLDERS[0]) for stage in FOLDERS)
    different = [place for place in range(8) if before[place] != now[place]]
    assert [each["place"] for each in last["changed"]] == different


def test_every_skill_is_a_plain_lora_of_its_own(grown):
    folder, _ = grown
    assert read(folder / "skills" / "skills.json")["layer"] == 1
    for stage, (name, rank) in zip(FOLDERS, {"physics": 4, "words": 2}.items(), strict=True):
        assert read(folder / stage / "adapter_config.json")["r"] == rank
        assert same_weights(folder / stage, folder / "skills" / name)


def test_an_answer_changes_if_another_one_is_asked_or_it_says_something_else():
    def sample(number, asked, predicted):
        return {"id": number, "asked": asked, "predicted": predicted, "correct": predicted == "A", "seconds": 1}

    before = {"a": [sample(0, "a", "A"), sample(1, "a", "B"), sample(2, "a", "A"), sample(3, "a", "A")]}
    now = {"a": [sample(0, "a", "A"), sample(1, "a", "C"), sample(2, "base", "A"), sample(3, "b", "B")], "b": []}
    found = changed(before, now)
    assert [(each["task"], each["place"], each["id"]) for each in found] == [("a", 1, 1), ("a", 2, 2), ("a", 3, 3)]
    assert found[1]["before"] == {"asked": "a", "predicted": "A", "correct": True}
    assert found[1]["now"] == {"asked": "base", "predicted": "A", "correct": True}


def test_stopped_and_the_same_command_again(grown, arguments, tmp_path, at_step, capsys):
    folder = tmp_path / "run"
    at_step(FOLDERS[1], 1, send("SIGINT"))
    assert main(arguments) == 130
    assert len(read(folder / "continual.json")["results"]) == 1
    assert main(arguments) == 0
    assert_same_end(folder, grown)
    assert "asked right" in capsys.readouterr().out


def test_a_skill_that_was_trained_and_not_added_is_added(grown, arguments, tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("power cut")

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(training, "add_trained_skill", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            main(arguments)
    assert (folder / FOLDERS[0] / WEIGHTS).is_file()
    assert not (folder / "skills").exists()
    assert main(arguments) == 0
    assert_same_end(folder, grown)


def test_a_stage_that_is_trained_again_replaces_its_skill(grown, values, tmp_path):
    folder = Path(shutil.copytree(grown[0], tmp_path / "run"))
    shutil.rmtree(folder / FOLDERS[1])
    stages = {"physics": GROWN["physics"], "grammar": {"filters": {"topic": "grammar"}, "r": "2"}}
    assert main(flags(values(**GROWTH, stages=stages))) == 0
    assert sorted(read(folder / "skills" / "skills.json")["skills"]) == ["grammar", "physics"]
    shutil.rmtree(folder / "02-grammar")
    assert main(flags(values(**GROWTH, stages=GROWN))) == 0
    assert_same_end(folder, grown)


WRONG = [
    ({"growth": "forest"}, ["`growth`", "adapter, skills", "'forest'"]),
    ({"num_experts": "2468"}, ["`num_experts`", "'2468'", "not for skills"]),
    ({"top_k": "1"}, ["`top_k`", "not for skills"]),
    ({"adapter": ".", "r": None}, ["`adapter`", "not for skills"]),
    ({"skill": "physics", "into": "skills"}, ["`skill`", "follows from the stages"]),
    ({"growth": "adapter"}, ["`layer`", "no effect without --growth skills"]),
    ({"layer": 4}, ["stage `physics`", "`layer`", "between 0 and 3", "4"]),
    ({"r": "2,4"}, ["stage `physics`", "`r`", "one entry per decoder layer"]),
    ({"stages": {"a": {"layer": 2}}}, ["stage `a`", "`layer`", "same in all stages"]),
    ({"stages": {"a": {"into": "x"}}}, ["stage `a`", "`into`", "cannot be set for one stage"]),
    ({"stages": {"base": {}}}, ["stage `base`", "a skill's name", "'base'"]),
]


@pytest.mark.parametrize(("changes", "parts"), WRONG, ids=lambda value: str(value)[:70] if type(value) is dict else "")
def test_options_that_would_be_ignored_are_refused(values, changes, parts, tmp_path, capsys):
    assert main(flags(values(**{**GROWTH, "stages": GROWN, **changes}))) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("mola continual: error: ")
    assert [part for part in parts if part not in line] == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
