"""What of a sequence that was begun can be changed, and what not."""

import json
import shutil
from pathlib import Path

import pytest

from mola import ContinualOptions, MolaError, continual
from mola.training.run_folder import locked
from tests.studies.continual_learning.sequences import FIRST_TWO, FOLDERS, STAGES, assert_same_end, contents, read
from tests.training.runs import WEIGHTS


@pytest.fixture
def begun(whole, values, tmp_path):
    """A copy of the finished sequence with its third stage not begun; returns its folder and options."""
    folder = Path(shutil.copytree(whole[0], tmp_path / "copy"))
    shutil.rmtree(folder / FOLDERS[2])
    return folder, values(output_dir=str(folder))


def test_a_stage_that_was_not_begun_may_change(begun, whole):
    folder, options = begun
    stages = {**FIRST_TWO, "tense": {"filters": {"topic": "verbs"}, "max_steps": 1, "test_limit": 2}}
    result = continual(ContinualOptions(**{**options, "stages": stages}))
    assert (result.status, len(result.results)) == ("finished", 3)
    assert result.results[:2] == whole[1].results[:2]
    recorded = [entry["folder"] for entry in read(folder / "continual.json")["stages"]]
    assert recorded == ["01-physics", "02-biology", "03-tense"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"learning_rate": 0.5}, ["stage `physics`", "`learning_rate`", "0.02", "0.5"]),
        ({"stages": {**STAGES, "biology": {**STAGES["biology"], "limit": 4}}}, ["stage `biology`", "`limit`"]),
        ({"stages": {"physics": STAGES["physics"]}}, ["02-biology", "stage 2"]),
        ({"stages": {name: STAGES[name] for name in ("biology", "physics")}}, ["01-physics", "stage 1"]),
    ],
)
def test_a_stage_that_was_begun_must_stay_the_same(begun, changes, parts):
    folder, options = begun
    before = contents(folder)
    with pytest.raises(MolaError) as caught:
        continual(ContinualOptions(**{**options, **changes}))
    assert [part for part in parts if part not in str(caught.value)] == []
    assert contents(folder) == before


def edit_record(folder, edit):
    record = read(folder / "continual.json")
    edit(record)
    (folder / "continual.json").write_text(json.dumps(record), encoding="utf-8")


def replace_data(folder, whole):
    edit_record(folder, lambda record: record["stages"][1]["data_fingerprints"].update(train="0" * 64))


def add_a_foreign_stage(folder, whole):
    shutil.copytree(whole / FOLDERS[2], folder / FOLDERS[2])
    edit_record(folder, lambda record: record["stages"].pop())


def exchange_weights(folder, whole):
    shutil.copy(folder / FOLDERS[1] / WEIGHTS, folder / FOLDERS[0] / WEIGHTS)


def delete_the_first_stage(folder, whole):
    shutil.rmtree(folder / FOLDERS[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_data, "stage `biology`.*`train`"),
        (add_a_foreign_stage, f"{FOLDERS[2]}' does not belong to this sequence. Move it away"),
        (exchange_weights, "stage `physics`.*not the adapter that was trained"),
        (delete_the_first_stage, "'02-biology' was trained after '01-physics'"),
    ],
)
def test_a_folder_that_was_changed_is_refused(begun, whole, damage, message):
    folder, options = begun
    damage(folder, whole[0])
    with pytest.raises(MolaError, match=message):
        continual(ContinualOptions(**options))


def spoil(path):
    """Make a result one that no test can have, so that a reader of it is found out."""
    result = read(path)
    path.write_text(json.dumps({**result, "correct": -1}), encoding="utf-8")


@pytest.mark.slow
def test_a_stage_that_starts_again_is_tested_again(begun, whole, caplog):
    folder, options = begun
    stage = folder / FOLDERS[1]
    for checkpoint in stage.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (stage / WEIGHTS).unlink()
    for name in ("01-physics", "02-biology"):
        spoil(stage / "evaluation" / f"{name}.json")
    first = contents(folder / FOLDERS[0])
    continual(ContinualOptions(**{**options, "stages": FIRST_TWO}))
    assert "no complete checkpoint: the training starts from the beginning" in caplog.text
    assert_same_end(folder, whole, 2)
    assert contents(folder / FOLDERS[0]) == first


@pytest.mark.slow
def test_other_weights_at_the_start_are_tested_again_or_refused(whole, run, tmp_path, at_step):
    def crash():
        raise RuntimeError("power cut")

    adapter = tmp_path / "adapter"
    shutil.copytree(whole[0] / FOLDERS[0], adapter)
    stage = tmp_path / "run" / "01-words"
    options = {
        "stages": {"words": {**STAGES["words"], "max_steps": 1}},
        "adapter": str(adapter),
        "num_experts": None,
        "evaluate_base": True,
    }
    at_step(stage.name, 1, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(**options)
    spoil(tmp_path / "run" / "00-start" / "evaluation" / "01-words.json")
    for name in (WEIGHTS, "adapter_config.json"):
        shutil.copy(whole[0] / FOLDERS[1] / name, adapter / name)
    before = contents(tmp_path / "run")
    with pytest.raises(MolaError, match="stage `words` was begun with different weights than those now in `adapter`"):
        run(**options)
    assert contents(tmp_path / "run") == before
    shutil.rmtree(stage)
    result = run(**options)
    assert (result.status, result.base["words"]["correct"] >= 0) == ("finished", True)


def test_other_weights_of_the_base_model_are_refused(begun, base_model):
    folder, options = begun
    before = contents(folder)
    weights = base_model / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        with pytest.raises(
            MolaError, match="stage `physics` was begun with different weights than those now in `base_model`"
        ):
            continual(ContinualOptions(**options))
    finally:
        weights.write_bytes(kept)
    assert contents(folder) == before
    record = read(folder / "continual.json")
    known = record.pop("base_model_weights")
    (folder / "continual.json").write_text(json.dumps(record), encoding="utf-8")
    assert continual(ContinualOptions(**{**options, "stages": FIRST_TWO})).status == "finished"
    assert read(folder / "continual.json")["base_model_weights"] == known


@pytest.mark.slow
def test_a_moved_sequence_goes_on(begun, whole, tmp_path):
    folder, options = begun
    folder.rename(tmp_path / "moved")
    assert continual(ContinualOptions(**{**options, "output_dir": str(tmp_path / "moved")})).status == "finished"
    assert_same_end(tmp_path / "moved", whole)


def test_overwriting_removes_the_folders_of_the_sequence(begun):
    folder, options = begun
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(MolaError, match="`learning_rate`"):
        continual(ContinualOptions(**{**options, "learning_rate": 0.5}))
    stages = {"physics": {**STAGES["physics"], "max_steps": 1}}
    anew = ContinualOptions(**{**options, "stages": stages, "overwrite_output_dir": True})
    before = contents(folder)
    with locked(folder), pytest.raises(MolaError, match="another one is at work"):
        continual(anew)
    assert contents(folder) == before
    result = continual(anew)
    assert (result.status, len(result.results)) == ("finished", 1)
    kept = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert kept == {"notes.txt", FOLDERS[0], "continual.json"}
