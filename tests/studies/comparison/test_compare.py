"""`mola compare`: recipes x tasks x seeds, going on after a stop, tables, what is refused."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mola import MolaError
from mola.cli import main
from mola.evaluation.evaluate import evaluate
from mola.evaluation.resuming import AnswersFile
from mola.models.devices import cpu_has_native_bfloat16
from mola.studies.comparison import checks
from mola.studies.comparison.compare import CompareOptions, compare
from mola.studies.comparison.record import BASE, read_results
from mola.studies.comparison.tables import ALL_TASKS, comma_separated, markdown, summarize
from mola.studies.train_and_test import evaluation_of
from mola.training.callbacks import MetricsFile
from mola.training.train import TrainOptions, train
from tests.grids import slow
from tests.studies.comparison.comparisons import RECIPES, TASKS, numbers, read
from tests.waiting import PATIENCE, wait_until

ONE = {"tasks": {"physics": TASKS["physics"]}, "evaluate_base": False}


# ---------------------------------------------------------------------- a finished comparison


def test_every_run_is_an_ordinary_training_and_test(whole, values, tmp_path):
    _, result = whole
    assert (result.status, result.open) == ("finished", 0)
    keys = [(each.task, each.recipe, each.seed) for each in result.results if each.recipe != BASE]
    assert keys == [(task, recipe, seed) for seed in (0, 1) for task in TASKS for recipe in RECIPES]
    assert [(each.task, each.recipe) for each in result.results if each.recipe == BASE] == [(t, BASE) for t in TASKS]
    (one,) = (each for each in result.results if each.key == ("biology", "2468", 1))
    assert one.num_experts == [2, 4, 6, 8]
    assert one.total == 8
    names = TrainOptions.__dataclass_fields__
    options = {name: value for name, value in values(**RECIPES["2468"], **TASKS["biology"]).items() if name in names}
    alone = train(TrainOptions(**{**options, "seed": 1, "output_dir": str(tmp_path / "alone")}))
    assert alone.trainable_parameters == one.trainable_parameters
    test = CompareOptions(**values()).runs["biology", "2468", 1]
    evaluation = evaluation_of(test)
    evaluation.adapter = str(tmp_path / "alone")
    marks = [sample["correct"] for sample in evaluate(evaluation).samples]
    assert one.marks == "".join("01"[mark] for mark in marks)


def test_rows_are_the_statistics_of_the_marks(whole):
    _, result = whole
    tasks = [*TASKS, ALL_TASKS]
    assert [(row.task, row.recipe) for row in result.rows] == [(t, r) for t in tasks for r in (*RECIPES, BASE)]
    by_key = {each.key: each for each in result.results}
    for row in result.rows:
        if row.recipe == BASE or row.task == ALL_TASKS:
            continue
        runs = [by_key[row.task, row.recipe, seed] for seed in (0, 1)]
        assert row.accuracy == pytest.approx(np.mean([each.accuracy for each in runs]))
        assert row.seeds == 2
        if row.recipe == "lora":
            assert row.difference is None
        else:
            reference = np.mean([by_key[row.task, "lora", seed].accuracy for seed in (0, 1)])
            assert row.difference.value == pytest.approx(row.accuracy - reference)
    means = {(row.task, row.recipe): row.accuracy for row in result.rows}
    for recipe in (*RECIPES, BASE):
        assert means[ALL_TASKS, recipe] == pytest.approx(np.mean([means[task, recipe] for task in TASKS]))


def test_the_record_alone_is_enough_to_go_on(whole, run, tmp_path):
    folder, result = whole
    record = tmp_path / "record.json"
    shutil.copy(folder / "compare.json", record)
    again = run(record=str(record), verbose=True)  # an option that changes no weights
    assert not (tmp_path / "out" / "physics").exists()
    assert numbers(again.results) == numbers(result.results)
    assert read(record)["status"] == "finished"


def test_record_of_an_earlier_version_gives_the_same_table():
    record = Path(__file__).parents[3] / "studies" / "harder_questions.json"
    content = read(record)
    rows = summarize(read_results(record), [*content["recipes"]], [*content["tasks"]], content["summary"]["reference"])
    before = {row["recipe"]: row for row in content["summary"]["rows"] if row["measure"] == "at the end"}
    assert [row.recipe for row in rows] == [*content["recipes"], BASE]
    for row in rows:
        assert row.accuracy == pytest.approx(before[row.recipe]["mean"]["value"])
        if row.difference:
            assert row.difference.interval == pytest.approx(before[row.recipe]["difference"]["joint_95"])
            assert row.difference.verdict == before[row.recipe]["difference"]["verdict"]


@pytest.mark.slow
def test_more_seeds_join_a_record(whole, run, tmp_path):
    folder, result = whole
    record = Path(shutil.copy(folder / "compare.json", tmp_path / "record.json"))
    more = run(record=str(record), seeds=[0, 1, 2])
    assert len(more.results) == len(result.results) + 4
    assert {row.seeds for row in more.rows if row.recipe in RECIPES} == {3}
    # Results of seeds that are not asked for are kept, with other options too, and are in no table.
    other = run(record=str(record), seeds=[3], learning_rate=0.001, **ONE)
    assert {row.seeds for row in other.rows} == {1}
    assert len(read(record)["runs"]) == len(more.results) + 2


def test_existing_files_are_not_replaced(run, tmp_path):
    """A page of the user, and a file where the folder of the runs is to be."""
    page, place = tmp_path / "page.md", tmp_path / "file"
    page.write_text("mine")
    with pytest.raises(MolaError, match=r"`tables` must be new files: .*page\.md"):
        run(tables=str(page))
    with pytest.raises(MolaError, match="cannot be written"):
        run(output_dir=str(page / "out"), record=str(place))
    assert page.read_text() == "mine"


def test_tables_in_every_form(whole, values, tmp_path, capsys):
    folder, result = whole
    names = [tmp_path / f"table{ending}" for ending in (".csv", ".md")]
    flags = [f"--{name}={json.dumps(v) if isinstance(v, (dict, bool)) else v}" for name, v in values().items()
             if name not in ("seeds", "output_dir")]  # fmt: skip
    tables = ",".join(map(str, names))
    assert main(["compare", *flags, "--seeds", "0", "1", f"--output={folder}", f"--tables={tables}"]) == 0
    printed = capsys.readouterr().out
    assert "physics" in printed
    assert ALL_TASKS in printed
    rows = list(csv.DictReader(io.StringIO(names[0].read_text())))
    assert [float(row["accuracy"]) for row in rows] == [row.accuracy for row in result.rows]
    assert rows[1]["num_experts"] == "2-4-6-8"
    assert names[0].read_text() == comma_separated(result.rows)
    text = names[1].read_text()
    assert text == markdown(result.rows, [], "lora", result.results, 0)
    assert f"{len(result.results) - 2} trainings took " in text
    assert "On physics, the recipes differ in size: lora trains " in text
    assert "Fewer than 5 seeds say little" in text


# ---------------------------------------------------------------------- stopping and going on


@pytest.mark.slow
def test_two_processes_share_the_runs_and_one_is_killed(whole, values, tmp_path):
    _, result = whole
    recipe = tmp_path / "study.yaml"
    recipe.write_text(json.dumps(values()), encoding="utf-8")
    command = [sys.executable, "-m", "mola.cli", "compare", "--config", str(recipe)]
    record = tmp_path / "out" / "compare.json"
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        wait_until(lambda: record.exists() and len(read(record)["runs"]) >= 4, *both)
        os.kill(both[0].pid, signal.SIGKILL)
        assert len(read_results(record)) < len(result.results)
        assert both[1].wait(timeout=PATIENCE) == 0
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert numbers(read_results(record)) == numbers(result.results)
    assert read(record)["status"] == "finished"


@pytest.mark.parametrize(("tasks", "seeds", "number"), [(["physics"], [0], 2), *slow(([*TASKS], [0, 1], 3))])
def test_interrupted_and_resumed_gives_the_same(tasks, seeds, number, whole, run, monkeypatch):
    _, result = whole
    expected = [each for each in result.results if each.task in tasks and (each.recipe == BASE or each.seed in seeds)]
    chosen = {"tasks": {name: TASKS[name] for name in tasks}, "seeds": seeds}
    seen = []

    def stop_at_one(self, *args, **kwargs):
        seen.append(self)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsFile, "on_train_begin", stop_at_one)
    first = run(**chosen)
    num_runs = len(tasks) * len(seeds) * len(RECIPES)
    assert (first.status, first.open) == ("interrupted", num_runs - number + 1)
    monkeypatch.undo()
    again = run(**chosen)
    assert (again.status, again.open) == ("finished", 0)
    assert numbers(again.results) == numbers(expected)


def test_a_test_that_was_cut_short_goes_on_in_another_folder(whole, run, values, tmp_path, monkeypatch):
    original = AnswersFile.append

    def append(self, records):
        original(self, records)
        raise KeyboardInterrupt

    asked = {"tasks": {"physics": TASKS["physics"]}, "recipes": {"lora": RECIPES["lora"]}, "seeds": [0]}
    asked |= {"evaluate_base": False, "test_batch_size": 2}
    monkeypatch.setattr(AnswersFile, "append", append)
    assert run(**asked).status == "interrupted"
    monkeypatch.undo()
    assert list((tmp_path / "out").rglob("*.partial.jsonl"))
    shutil.move(tmp_path / "out", tmp_path / "moved")
    moved = compare(CompareOptions(**{**values(**asked), "output_dir": str(tmp_path / "moved")}))
    assert moved.status == "finished"
    (expected,) = (each for each in whole[1].results if each.key == ("physics", "lora", 0))
    (found,) = moved.results
    assert (found.key, found.marks, found.total) == (expected.key, expected.marks, expected.total)
    assert (len(found.marks), set(found.marks)) == (8, {"0", "1"})


def test_an_adapter_of_other_options_is_not_taken(whole, run, tmp_path):
    only = {"tasks": {"physics": TASKS["physics"]}, "recipes": {"lora": RECIPES["lora"]}, "seeds": [0]}
    shutil.copytree(whole[0], tmp_path / "out")
    record = tmp_path / "out" / "compare.json"
    with pytest.raises(MolaError, match="made with a different setting `learning_rate`"):
        run(**only, learning_rate=0.01)
    record.unlink()
    with pytest.raises(MolaError, match="was begun with a different setting `learning_rate`"):
        run(**only, learning_rate=0.01)
    weights = tmp_path / "out" / "physics" / "lora" / "seed-0" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert len(run(**only).results) == 2  # from the folder, nothing is trained again
    assert weights.stat().st_mtime_ns == before


def test_without_adapters_the_results_stay(run, tmp_path):
    asked = {**ONE, "seeds": [0], "save_strategy": "steps", "save_steps": 2, "recipes": {"lora": RECIPES["lora"]}}
    result = run(**asked, keep_adapters=False)
    folder = tmp_path / "out" / "physics" / "lora" / "seed-0"
    assert (folder / "test.json").is_file()
    assert not (folder / "adapter_model.safetensors").exists()
    assert not list(folder.glob("checkpoint-*"))
    assert numbers(run(**asked).results) == numbers(result.results)


def test_experts_from_a_file_of_mola_allocate(run, tiny_model_dir, tmp_path):
    """The numbers belong to the identity of a run, not the name of the file."""
    file = tmp_path / "allocation.json"
    words = ["--base_model", str(tiny_model_dir), "--method", "triangle", "--budget", "12", "--output", str(file)]
    assert main(["allocate", *words]) == 0
    asked = {**ONE, "seeds": [0], "recipes": {"found": {"num_experts": str(file), "r": "4"}}}
    (result,) = run(**asked).results
    assert result.num_experts == read(file)["num_experts"]
    file.write_text(json.dumps({**read(file), "num_experts": [3, 3, 3, 3]}))
    with pytest.raises(MolaError, match="physics/found/seed-0 was made with a different setting `num_experts`"):
        run(**asked)


def test_another_base_model_is_refused(whole, run, tiny_model_dir, tmp_path):
    record = str(shutil.copy(whole[0] / "compare.json", tmp_path / "record.json"))
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    assert run(seeds=[0], record=record, tasks=ONE["tasks"], base_model=str(other)).open == 0  # another place
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(MolaError, match="was made with a different model `base_model`: .* Use the same"):
        run(seeds=[0, 2], record=record, tasks=ONE["tasks"], base_model=str(other))
    content = read(record)
    content["runs"] = [each for each in content["runs"] if each["recipe"] == "base model"]
    Path(record).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MolaError, match="physics/base model/seed-0 was made with a different model"):
        run(seeds=[0], record=record, tasks=ONE["tasks"], base_model=str(other), output_dir=str(tmp_path / "second"))


@pytest.mark.slow
def test_a_record_goes_to_a_machine_whose_dtype_is_another(run, monkeypatch, tmp_path):
    """`auto` is bfloat16 on some processors and float32 on others; a dtype that is named is the same on all."""
    shared = {"tasks": ONE["tasks"], "seeds": [0], "recipes": {"lora": RECIPES["lora"]}}
    for dtype in ("auto", "float32"):
        run(**shared, dtype=dtype, record=str(tmp_path / dtype), output_dir=str(tmp_path / "first" / dtype))
    before = read(tmp_path / "auto")["runs"][0]["dtype"]
    here = cpu_has_native_bfloat16()
    monkeypatch.setattr("mola.models.devices.cpu_has_native_bfloat16", lambda: not here)
    checks._defaults.cache_clear()
    elsewhere = str(tmp_path / "elsewhere")
    assert run(**shared, dtype="float32", record=str(tmp_path / "float32"), output_dir=elsewhere).open == 0
    again = {**shared, "record": str(tmp_path / "auto"), "output_dir": elsewhere}
    with pytest.raises(MolaError, match=f"was made with a different model `dtype`: '{before}', now"):
        run(**again, dtype="auto")
    assert run(**again, dtype=before).open == 0


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "`tasks` must not be empty"),
        ({"recipes": {"a": {"num_expert": "2"}}}, "no option of this command"),
        ({"recipes": {"a": {"seed": 3}}}, "`seed` cannot be set in `recipes.a`"),
        ({"recipes": {"a": {"filters": {"topic": "physics"}}}}, "`filters` is set twice for physics/a/seed-0"),
        (
            {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_split": "test"},
            "`load_best_model_at_end` would choose a checkpoint by the test questions",
        ),
        (
            {"recipes": {"a": {}, "b": {"test_limit": 4}}},
            "task `physics`: the recipes 'a' and 'b' must have the same test questions, got 8 and 4",
        ),
        ({"task": None}, "`scoring` .'likelihood'. is for questions with answers"),
        ({"reference": "none"}, "`reference` must be one of the recipes lora, 2468"),
        ({"seeds": [1, 1]}, "`seeds` must be a non-empty list of distinct numbers"),
        ({"seed": 5}, "`seed` has no effect"),
        ({"resume_from_checkpoint": "last"}, "`resume_from_checkpoint` .* has no effect"),
        ({"tables": "table.xls"}, "`tables` must be files that end in"),
        ({"recipes": {"a": {"num_experts": "2,2"}}}, "recipe `a`: `num_experts` needs one entry per decoder layer"),
        ({"tasks": {"a": {"test_split": "tset"}}}, "task `a`.*split.*'tset'"),
    ],
)
def test_wrong_comparisons_are_refused_before_anything_is_trained(run, tmp_path, changes, message):
    with pytest.raises(MolaError, match=message):
        run(**changes)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not (tmp_path / "out" / "compare.json").exists()


@pytest.mark.parametrize("text", ["nonsense", '{"format": 9, "runs": []}', '{"format": 1, "runs": [{}]}'])
def test_a_file_that_is_not_a_record_is_kept(run, tmp_path, text):
    record = tmp_path / "record.json"
    record.write_text(text, encoding="utf-8")
    with pytest.raises(MolaError, match="`record` must be a new file or the record of a comparison"):
        run(record=str(record))
    assert record.read_text(encoding="utf-8") == text
