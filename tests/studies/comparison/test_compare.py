"""`mola compare`: recipes x tasks x seeds, going on after a stop, allocations, statistics, tables, what is refused."""

import contextlib
import csv
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats

from mola import MolaError
from mola.cli import main
from mola.evaluation.differences import (
    Difference,
    Mean,
    Part,
    mean_accuracy,
    mean_squares,
    paired_differences,
    two_way_error,
    verdict_of,
)
from mola.evaluation.evaluate import evaluate
from mola.evaluation.resuming import AnswersFile
from mola.models.devices import cpu_has_native_bfloat16
from mola.reporting.formatting import duration
from mola.studies.comparison import checks
from mola.studies.comparison.compare import CompareOptions, compare
from mola.studies.comparison.notes import effort_line, time_left
from mola.studies.comparison.outputs import Outcome, page
from mola.studies.comparison.record import BASE, read_results
from mola.studies.comparison.summary import ALL_TASKS, Row, budget_groups
from mola.studies.comparison.tables import comma_separated, markdown
from mola.studies.train_and_test import signals_as_interrupt, stop_if_asked
from mola.training.callbacks import MetricsFile
from mola.training.train import TrainOptions, train
from tests.grids import slow
from tests.reporting.pages import Page
from tests.studies.comparison.comparisons import RECIPES, SETTINGS, TASKS, numbers, read
from tests.waiting import PATIENCE, wait_until


@pytest.fixture(scope="module")
def whole(tiny_model_dir, data, tmp_path_factory):
    """The comparison that nobody stopped, made once: folder and result."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    options = {"base_model": str(tiny_model_dir), "data": str(data), "output_dir": str(folder), **SETTINGS}
    return folder, compare(CompareOptions(**options, tasks=TASKS, recipes=RECIPES))


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
    from mola.studies.train_and_test import evaluation_of

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
        assert row.mean.value == pytest.approx(np.mean([each.accuracy for each in runs]))
        assert row.mean.seeds == 2
        if row.recipe == "lora":
            assert row.difference is None
        else:
            reference = np.mean([by_key[row.task, "lora", seed].accuracy for seed in (0, 1)])
            assert row.difference.value == pytest.approx(row.mean.value - reference)
    means = {(row.task, row.recipe): row.mean.value for row in result.rows}
    for recipe in (*RECIPES, BASE):
        assert means[ALL_TASKS, recipe] == pytest.approx(np.mean([means[task, recipe] for task in TASKS]))


def test_the_record_alone_is_enough_to_go_on(whole, run, tmp_path):
    folder, result = whole
    record = tmp_path / "record.json"
    shutil.copy(folder / "compare.json", record)
    again = run(record=str(record))
    assert not (tmp_path / "out" / "physics").exists()
    assert numbers(again.results) == numbers(result.results)
    assert read(record)["status"] == "finished"


@pytest.mark.slow
def test_more_seeds_join_a_record(whole, run, tmp_path):
    folder, result = whole
    record = Path(shutil.copy(folder / "compare.json", tmp_path / "record.json"))
    more = run(record=str(record), seeds=[0, 1, 2])
    assert len(more.results) == len(result.results) + 4
    assert {row.mean.seeds for row in more.rows if row.recipe in RECIPES} == {3}


def test_files_that_are_not_its_own_are_not_replaced(run, tmp_path):
    """A page of the user, and a file where the folder of the runs is to be."""
    page, place = tmp_path / "page.md", tmp_path / "file"
    page.write_text("mine")
    with pytest.raises(MolaError, match=r"`tables` must name files that are not there yet.*page\.md"):
        run(tables=str(page))
    with pytest.raises(MolaError, match="cannot be written"):
        run(output_dir=str(page / "out"), record=str(place))
    assert page.read_text() == "mine"


def test_tables_in_every_form(whole, values, tmp_path, capsys):
    folder, result = whole
    names = [tmp_path / f"table{ending}" for ending in (".csv", ".md", ".html")]
    flags = [f"--{name}={json.dumps(v) if isinstance(v, (dict, bool)) else v}" for name, v in values().items()
             if name not in ("seeds", "output_dir")]  # fmt: skip
    tables = ",".join(map(str, names))
    assert main(["compare", *flags, "--seeds", "0", "1", f"--output_dir={folder}", f"--tables={tables}"]) == 0
    printed = capsys.readouterr().out
    assert "physics" in printed
    assert ALL_TASKS in printed
    rows = list(csv.DictReader(io.StringIO(names[0].read_text())))
    assert [float(row["accuracy"]) for row in rows] == [row.mean.value for row in result.rows]
    assert rows[1]["num_experts"] == "2-4-6-8"
    assert names[0].read_text() == comma_separated(result.rows)
    effort = effort_line(result.results)
    assert effort.startswith(f"{len(result.results) - 2} trainings took ")
    assert names[1].read_text() == f"{markdown(result.rows, 'lora')}\n{effort}\n"
    text = names[2].read_text()
    assert text.count("<table") == 3
    assert "http:" not in text
    assert "https:" not in text


def test_time_left_is_that_of_runs_like_those_so_far(whole):
    results = [replace(each, seconds_training=600.0, seconds_testing=0.0) for each in whole[1].results]
    assert time_left(results, 12) == f" (about {duration(7200)} of computing left)"
    assert time_left([each for each in results if each.recipe == BASE], 12) == ""


def test_names_are_text_on_the_page():
    def tree(task, reference, other):
        difference = Difference(0.1, (0.05, 0.15), (0.02, 0.2), (0.01, 0.3), (0.01, 0.3), 0.02, "better", 2)
        means = Mean(0.5, (0.4, 0.6), 2), Mean(0.6, (0.5, 0.7), 2)
        rows = [Row(task, reference, 5, 0, [[1]], means[0], None), Row(task, other, 5, 0, [[2]], means[1], difference)]
        rows += [replace(rows[1], recipe="c", difference=replace(difference, joint_95=None, verdict="one seed"))]
        return Page(page(Outcome(rows, reference)))

    def looks(tree):
        return {(node.tag, *sorted(node.attributes)) for node in tree.root}

    hostile = '</script><script>alert(1)</script><img src=x onerror="alert(1)">&amp;\'{{ 1 }}'
    found = tree(hostile, f"a{hostile}", f"b{hostile}")
    assert looks(found) == looks(tree("task", "a", "b"))
    assert found.root.one("h2").text == hostile
    assert [row[0] for row in found.root.one("table").rows[1:]] == [f"a{hostile}", f"b{hostile}", "c"]
    assert f"1 of 1 differences to a{hostile} are significant." in found.root.one("header").text


def test_differences_without_a_verdict_are_not_counted_on_the_page():
    told = Difference(0.1, (0.05, 0.15), (0.02, 0.2), (0.01, 0.3), (0.01, 0.3), 0.02, "better", 2)
    untold = replace(told, joint_95=None, verdict="one seed: no verdict")
    mean = Mean(0.5, (0.4, 0.6), 2)

    def lead(*tables):
        rows = [
            Row(str(number), name, 5, 0, [[1]], mean, difference)
            for number, differences in enumerate(tables)
            for name, difference in (("lora", None), *zip("ab", differences, strict=False))
        ]
        return Page(page(Outcome(rows, "lora"))).root.one("header").text

    assert "No verdict: it takes two seeds of lora" in lead([untold, untold])
    assert "1 of 1 differences to lora are significant." in lead([told, untold])
    assert "2 of 2 differences to lora are significant, each at the level of its table." in lead([told], [told, untold])


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
def test_interrupted_and_gone_on_gives_the_same(tasks, seeds, number, whole, run, monkeypatch):
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


def test_a_signal_during_garbage_collection_is_not_lost(monkeypatch):
    lost = []

    class Loop:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)  # what is raised in here Python only prints

    with signals_as_interrupt():
        loop = Loop()
        loop.itself = loop
        del loop
        with monkeypatch.context() as patch:
            patch.setattr(sys, "unraisablehook", lost.append)
            gc.collect()
        assert [each.exc_type for each in lost] == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            stop_if_asked()
        with signals_as_interrupt():  # inside of another: the outer one still knows
            pass
        with pytest.raises(KeyboardInterrupt):
            stop_if_asked()
    stop_if_asked()


def test_a_signal_that_is_lost_while_a_training_is_prepared_ends_it_before_its_first_step(run, tmp_path, monkeypatch):
    from mola.training import train as module

    real, built = module.build_model, []

    def build_model(*args):
        with contextlib.suppress(KeyboardInterrupt):  # as by a library that catches all there is
            os.kill(os.getpid(), signal.SIGTERM)
        built.append(1)
        return real(*args)

    monkeypatch.setattr(module, "build_model", build_model)
    result = run(tasks={"physics": TASKS["physics"]}, evaluate_base=False)
    assert (result.status, result.results, built) == ("interrupted", [], [1])
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_adapter_of_other_options_is_not_taken(whole, run, tmp_path):
    only = {"tasks": {"physics": TASKS["physics"]}, "recipes": {"lora": RECIPES["lora"]}, "seeds": [0]}
    shutil.copytree(whole[0], tmp_path / "out")
    record = tmp_path / "out" / "compare.json"
    with pytest.raises(MolaError, match="made with another setting `learning_rate`"):
        run(**only, learning_rate=0.01)
    record.unlink()
    with pytest.raises(MolaError, match="was begun with another setting `learning_rate`"):
        run(**only, learning_rate=0.01)
    weights = tmp_path / "out" / "physics" / "lora" / "seed-0" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert len(run(**only).results) == 2  # from the folder, nothing is trained again
    assert weights.stat().st_mtime_ns == before


@pytest.mark.slow
def test_without_adapters_the_results_stay(run, tmp_path):
    result = run(tasks={"physics": TASKS["physics"]}, seeds=[0], keep_adapters=False)
    folder = tmp_path / "out" / "physics" / "2468" / "seed-0"
    assert (folder / "test.json").is_file()
    assert not (folder / "adapter_model.safetensors").exists()
    assert numbers(run(tasks={"physics": TASKS["physics"]}, seeds=[0]).results) == numbers(result.results)


# ---------------------------------------------------------------------- allocations


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [[1], [0, 1]], ids=str)
def test_experts_from_mola_allocate(seeds, run, tmp_path):
    recipes = {
        "probe": {"num_experts": "3,", "r": "4"},
        "shape": {"allocate": {"method": "triangle", "budget": 12}, "r": "4"},
        "redundancy": {"allocate": {"method": "redundancy", "budget": 12, "probe": "probe"}, "r": "4"},
    }
    result = run(tasks={"physics": TASKS["physics"]}, recipes=recipes, keep_adapters=False, seeds=seeds)
    experts = {(each.recipe, each.seed): each.num_experts for each in result.results}
    assert experts["shape", seeds[0]] == experts["shape", 1]
    assert sorted(experts["shape", 1], reverse=True) == experts["shape", 1]
    assert {sum(experts[name, seed]) for name in ("shape", "redundancy") for seed in seeds} == {12}
    assert (tmp_path / "out" / "physics" / "redundancy-seed-1.json").is_file()
    assert result.rows[0].recipe == "probe"
    assert all(row.budget_group == 0 for row in result.rows if row.recipe in recipes)


def test_experts_per_module_and_shuffled(run, tmp_path):
    asked = {"method": "redundancy", "budget": 12, "beta": 40.0, "probe": "probe", "per_module": True, "shuffle": 4}
    recipes = {
        "probe": {"num_experts": "3,", "r": "4", "target_modules": "q_proj,up_proj"},
        "modules": {"allocate": asked, "r": "4", "target_modules": "q_proj,up_proj"},
    }
    words = {"tasks": {"physics": TASKS["physics"]}, "seeds": [1], "evaluate_base": False}
    result = run(recipes=recipes, **words)
    made = json.loads((tmp_path / "out" / "physics" / "modules-seed-1.json").read_text())
    assert sum(row["num_experts"] for row in made["modules"]) == 2 * 12
    folder = tmp_path / "out" / "physics" / "modules" / "seed-1"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["num_experts_pattern"] or {}) == made["num_experts_pattern"] != {}
    assert config["num_experts"] in (made["num_experts"], 3)
    assert result.results[1].settings["allocate"] == asked
    (tmp_path / "out" / "compare.json").unlink()
    assert run(recipes=recipes, **words).status == "finished"  # takes the allocation and the training that are there
    (tmp_path / "out" / "compare.json").unlink()
    with pytest.raises(MolaError, match="an allocation with another `shuffle`: 4"):
        run(recipes={**recipes, "modules": {**recipes["modules"], "allocate": {**asked, "shuffle": 5}}}, **words)


ONE = {"tasks": {"physics": TASKS["physics"]}, "evaluate_base": False}
PROBED = {
    "probe": {"num_experts": "3,", "r": "4"},
    "found": {"allocate": {"method": "redundancy", "budget": 12, "probe": "probe"}, "r": "4"},
}


@pytest.mark.slow
def test_allocations_are_in_the_record_for_a_machine_without_the_run_folders(run, tmp_path):
    """Stopped between the probe and what is made from it, it goes on where the record alone is."""
    record = tmp_path / "record.json"
    first = run(recipes=PROBED, seeds=[1], record=str(record), **ONE)
    content = read(record)
    known = content["allocations"]["physics/found-seed-1"]
    assert known["num_experts"] == first.results[1].num_experts
    assert str(tmp_path) not in json.dumps(known)
    content["runs"].pop()
    record.write_text(json.dumps(content), encoding="utf-8")
    shutil.rmtree(tmp_path / "out")
    again = run(recipes=PROBED, seeds=[1], record=str(record), **ONE)
    assert numbers(again.results) == numbers(first.results)
    content["allocations"]["physics/found-seed-1"]["made_from"]["base_model"] = "another"
    record.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MolaError, match="recipe `found`: .* an allocation that was made from another `base_model`"):
        run(recipes=PROBED, seeds=[1], record=str(record), **ONE)
    content["allocations"]["physics/found-seed-1"]["settings"]["budget"] = 13
    record.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MolaError, match="recipe `found`: `allocations` of the `record` has, .* another `budget`: 13"):
        run(recipes=PROBED, seeds=[1], record=str(record), **ONE)


def test_another_exponent_of_an_allocation_is_refused(run, tmp_path):
    """Also the method's own, which no option names."""

    def recipes(**asked):
        found = {"method": "alphalora", "budget": 16, "min_experts": 3, **asked}
        return {"found": {"allocate": found, "r": "2", "top_k": "3"}}

    words = {"seeds": [0], "max_steps": 1, **ONE}
    assert run(recipes=recipes(), **words).status == "finished"
    (tmp_path / "out" / "compare.json").unlink()
    assert run(recipes=recipes(), **words).status == "finished"
    (tmp_path / "out" / "compare.json").unlink()
    with pytest.raises(MolaError, match="an allocation with another `beta`"):
        run(recipes=recipes(beta=0.5), **words)


def test_a_probe_that_is_gone_is_told_before_anything_is_trained(run, tmp_path):
    record = tmp_path / "record.json"
    run(recipes=PROBED, seeds=[1], record=str(record), **ONE)
    content = read(record)
    content["runs"].pop()
    del content["allocations"]  # as of an earlier version
    record.write_text(json.dumps(content), encoding="utf-8")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(
        MolaError, match="recipe `found`: `recipes.found` needs the adapter of 'probe' .* which is gone"
    ):
        run(recipes={"more": {"num_experts": "2"}, **PROBED}, seeds=[1, 2], record=str(record), **ONE)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.slow
def test_results_of_other_seeds_are_kept_and_stand_in_no_table(run, tmp_path):
    """Nobody has compared their options with those of this comparison."""
    first = run(seeds=[0], **ONE)
    second = run(seeds=[1], learning_rate=0.001, test_limit=3, **ONE)
    assert [row.mean.seeds for row in second.rows] == [1, 1]
    assert len(read(tmp_path / "out" / "compare.json")["runs"]) == 4
    assert numbers(second.results[:2]) == numbers(first.results)


def test_another_base_model_is_refused(whole, run, tiny_model_dir, tmp_path):
    record = str(shutil.copy(whole[0] / "compare.json", tmp_path / "record.json"))
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    assert run(seeds=[0], record=record, tasks=ONE["tasks"], base_model=str(other)).open == 0  # another place
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(MolaError, match="was made with another model `base_model`: .* Use the same"):
        run(seeds=[0, 2], record=record, tasks=ONE["tasks"], base_model=str(other))
    content = read(record)
    content["runs"] = [each for each in content["runs"] if each["recipe"] == "base model"]
    Path(record).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(MolaError, match="physics/base model/seed-0 was made with another model"):
        run(seeds=[0], record=record, tasks=ONE["tasks"], base_model=str(other), output_dir=str(tmp_path / "second"))


@pytest.mark.slow
@pytest.mark.parametrize("is_another", [True, False])
def test_a_record_may_go_to_a_machine_whose_dtype_is_another(is_another, run, monkeypatch, tmp_path):
    """`auto` is bfloat16 on some processors and float32 on others; a dtype that is named is the same on all."""
    shared = {"tasks": ONE["tasks"], "seeds": [0], "recipes": {"lora": RECIPES["lora"]}}
    for dtype in ("auto", "float32"):
        run(**shared, dtype=dtype, record=str(tmp_path / dtype), output_dir=str(tmp_path / "first" / dtype))
    before = read(tmp_path / "auto")["runs"][0]["dtype"]
    here = cpu_has_native_bfloat16()
    monkeypatch.setattr("mola.models.devices.cpu_has_native_bfloat16", lambda: here is not is_another)
    checks._defaults.cache_clear()
    elsewhere = str(tmp_path / "elsewhere")
    assert run(**shared, dtype="float32", record=str(tmp_path / "float32"), output_dir=elsewhere).open == 0
    again = {**shared, "record": str(tmp_path / "auto"), "output_dir": elsewhere}
    if not is_another:
        assert run(**again, dtype="auto").open == 0
    else:
        with pytest.raises(MolaError, match=f"was made with another model `dtype`: '{before}', now"):
            run(**again, dtype="auto")
    assert run(**again, dtype=before).open == 0


@pytest.mark.slow
def test_recipes_may_have_a_dtype_of_their_own(run):
    recipes = {name: {**RECIPES["lora"], "dtype": name} for name in ("float32", "bfloat16")}
    for _ in range(2):
        result = run(tasks=ONE["tasks"], seeds=[0], recipes=recipes, reference="float32", dtype="auto")
        assert [each.dtype for each in result.results if each.recipe != BASE] == ["float32", "bfloat16"]


def test_one_seed_without_curves_has_no_picture(whole, run, tmp_path, caplog):
    pytest.importorskip("matplotlib")
    record = str(shutil.copy(whole[0] / "compare.json", tmp_path / "record.json"))
    assert run(seeds=[0], record=record, plots=str(tmp_path / "plot.svg"), **ONE).status == "finished"
    assert not (tmp_path / "plot.svg").exists()
    assert "plot.svg is not written" in caplog.text


# ---------------------------------------------------------------------- what is refused

SHAPE = {"method": "triangle", "budget": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "`tasks` must name at least one"),
        ({"test_every": 4}, "`test_every` .4. must be less than the 4 steps"),
        ({"recipes": {}}, "`recipes` must name at least one"),
        ({"recipes": {"a b": {}}}, "`recipes` must have names made of"),
        ({"recipes": {"a": 5}}, "`recipes.a` must be a mapping"),
        ({"recipes": {"a": {"num_expert": "2"}}}, "no option of this command"),
        ({"recipes": {"a": {"seed": 3}}}, "`seed` cannot be set in `recipes.a`"),
        ({"recipes": {"a": {"push-to-hub": True}}}, "`push_to_hub` cannot be set in `recipes.a`"),
        ({"recipes": {"a": {"lora-alpha": 8, "lora_alpha": 4}}}, "`recipes.a` has an option twice"),
        ({"recipes": {"a": {"filters": {"topic": "physics"}}}}, "`filters` is set by the task"),
        (
            {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_split": "test"},
            "`load_best_model_at_end` would choose a checkpoint by the questions of the test",
        ),
        (
            {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_split": "test", "eval_limit": 2},
            "`load_best_model_at_end` would choose a checkpoint by the questions of the test",
        ),
        (
            {"recipes": {"a": {"top_k": "3", "allocate": {"method": "triangle", "budget": 8}}}},
            "recipe `a`: .*`top_k`",
        ),
        (
            {"recipes": {"a": {}, "b": {"test_limit": 4}}},
            "task `physics`: the recipes 'a' and 'b' must have the same test questions, got 8 and 4",
        ),
        ({"recipes": {"a": {"learning_rate": -1}}}, "recipe `a`: `learning_rate`"),
        ({"recipes": {"a": {"allocate": {"method": "triangle"}}}}, "must have `method` and `budget`"),
        ({"recipes": {"a": {"num_experts": "2", "allocate": {"method": "uniform", "budget": 8}}}}, "`recipes.a` has"),
        (
            {"recipes": {"a": {"allocate": {"method": "redundancy", "budget": 8, "probe": "b"}}, "b": {}}},
            "must be a recipe that stands before 'a'",
        ),
        ({"task": None}, "`task` must name the task"),
        ({"data": None}, "`data` must name the training data"),
        ({"reference": "none"}, "`reference` must be one of the recipes lora, 2468"),
        ({"seeds": [1, 1]}, "`seeds` must be different numbers"),
        ({"seed": 5}, "`seed` has no use here"),
        ({"push_to_hub": True}, "`push_to_hub` has no use here"),
        ({"overwrite_output_dir": True}, "`overwrite_output_dir` has no use here"),
        ({"resume_from_checkpoint": "last"}, "`resume_from_checkpoint` .* has no use here"),
        ({"tables": "table.xls"}, "`tables` must be files that end in"),
        ({"recipes": {"a": {"num_experts": "2,2"}}}, "recipe `a`: `num_experts` needs one entry per decoder layer"),
        ({"recipes": {"a": {"allocate": {"method": "trangle", "budget": 8}}}}, "recipe `a`: `method` .*'trangle'"),
        (
            {"recipes": {"a": {"allocate": {"method": "uniform", "budget": 8, "per_module": True}}}},
            "recipe `a`: `per_module` needs a method that measures",
        ),
        (
            {
                "num_experts_pattern": {"q_proj": 2},
                "recipes": {"a": {"allocate": {"method": "alphalora", "budget": 8, "per_module": True}}},
            },
            "recipe `a`: `num_experts_pattern` .* must not be given beside `allocate`",
        ),
        (
            {
                "recipes": {
                    "b": {"target_modules": "q_proj"},
                    "a": {"allocate": {"method": "usage", "budget": 8, "per_module": True, "probe": "b"}},
                }
            },
            "recipe `a`: `target_modules` must be those of the `probe` with `per_module`: None, the probe has 'q_proj'",
        ),
        (
            {
                "recipes": {
                    "b": {},
                    "a": {"allocate": {"method": "usage", "budget": 8, "shuffle": -2, "probe": "b"}},
                }
            },
            "recipe `a`: `shuffle` must be at least 0: got -2",
        ),
        ({"recipes": {"a": {"allocate": {"method": "triangle", "budget": 3}}}}, "recipe `a`: `budget` .*3"),
        ({"recipes": {"base": {"allocate": SHAPE}}}, "`recipes.base` has `allocate`, whose file"),
        ({"recipes": {"a": {"allocate": SHAPE}}, "adapter": "x"}, "`adapter` .'x'. brings its own experts"),
        (
            {"recipes": {"a": {"allocate": SHAPE}}, "tasks": {"a": TASKS["physics"] | {"num_experts": "2,"}}},
            "`num_experts` is set by the task 'a', and the recipe 'a' has `allocate`",
        ),
        (
            {
                "recipes": {"a": {"allocate": {"method": "alphalora", "budget": 8}}},
                "tune": {"target_modules": ["q_proj", "k_proj"]},
                "tuning_seeds": [7],
                "tuning_split": "tuning",
            },
            "`target_modules` cannot be in `tune`: `recipes.a.allocate` is made once",
        ),
        (
            {
                "recipes": {
                    "b": {"num_experts": "1222"},
                    "a": {"allocate": {"method": "redundancy", "budget": 8, "probe": "b"}},
                }
            },
            "recipe `a`: `num_experts` of the `probe` must be at least 2 .*: got '1222'",
        ),
        (
            {
                "recipes": {
                    "b": {"expert_telemetry": False},
                    "a": {"allocate": {"method": "usage", "budget": 8, "probe": "b"}},
                }
            },
            "recipe `a`: `expert_telemetry` of the `probe` must be on",
        ),
        ({"tasks": {"a": {"data": "nowhere.json"}}}, "task `a`.*nowhere.json"),
        ({"tasks": {"a": {"test_split": "tset"}}}, "task `a`.*split.*'tset'"),
    ],
)
def test_wrong_comparisons_are_refused_before_anything_is_trained(run, tmp_path, changes, message):
    with pytest.raises(MolaError, match=message):
        run(**changes)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not (tmp_path / "out" / "compare.json").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"format": 9, "runs": []}', '{"format": 1, "runs": [{}]}'])
def test_a_file_that_is_no_record_is_refused_and_kept(run, tmp_path, text):
    record = tmp_path / "record.json"
    record.write_text(text, encoding="utf-8")
    with pytest.raises(MolaError, match="`record` must be a new file or the record of a comparison"):
        run(record=str(record))
    assert record.read_text(encoding="utf-8") == text


# ---------------------------------------------------------------------- statistics


def test_differences_worked_out_by_hand():
    reference = np.array([[1, 0, 1, 0], [1, 0, 0, 0]])
    found = paired_differences({"same": reference, "all": np.ones((2, 4))}, reference)
    assert found["same"].value == 0
    assert found["same"].p_adjusted == 1
    assert found["all"].value == pytest.approx(0.625)
    assert found["all"].seeds_95[0] < 0.625 < found["all"].seeds_95[1]


def test_no_answer_that_differs_is_no_certainty_about_other_questions():
    """Always right, both of them: of 200 questions none differs, so a share of 1.8 % may (exact binomial interval)."""
    right = np.ones((5, 200))
    found = paired_differences({"same": right}, right)["same"]
    bound = stats.binomtest(0, 200).proportion_ci(0.95, method="exact").high
    assert found.both_95 == found.questions_95 == pytest.approx((-bound, bound))
    assert 0.018 < bound < 0.019
    assert found.verdict == "no difference above 1.9 points"  # rounded up
    assert found.p_adjusted == 1
    many = paired_differences({str(index): right for index in range(10)}, right)["0"]
    assert many.joint_95[1] > many.both_95[1] == pytest.approx(bound)


def test_few_answers_that_differ_are_no_more_certain_than_none():
    """One of 2,000 marks made it "no difference above 0.2 points"."""
    right, bounds = np.ones((10, 200)), []
    for wrong in (0, 1, 2, 4, 8):
        marks = right.copy()
        marks[0, :wrong] = 0
        found = paired_differences({"other": marks}, right, 13)["other"]
        bounds.append(max(map(abs, found.joint_95)))
    assert 0.03 < bounds[0] < 0.032
    assert bounds == sorted(bounds)
    assert bounds[-1] < 0.04


def test_questions_that_one_recipe_never_knows_count_as_in_the_exact_test():
    """The same five of 200 questions wrong with all seeds: McNemar's exact test has p = 2 / 2 ** 5."""
    right = np.ones((10, 200))
    for wrong, low, high in ((1, 0.6, 1), (5, 0.05, 0.07), (8, 0.003, 0.02)):
        marks = right.copy()
        marks[:, :wrong] = 0
        found = paired_differences({"other": marks}, right)["other"]
        assert low < found.p_adjusted < high
        assert low < stats.binomtest(0, wrong).pvalue <= high


@pytest.mark.parametrize(("hard", "slip"), [(0.01, 0.0002), (0.01, 0.001), (0.01, 0.005), (0.02, 0.001), (0.04, 0.01)])
def test_intervals_hold_the_true_difference_where_nearly_all_answers_are_right(hard, slip):
    """One recipe never knows a few of the questions there are; both slip now and then."""
    generator, rounds, hits = np.random.default_rng(2), 300, 0
    for _ in range(rounds):
        other = (generator.random(200) >= hard) * (generator.random((10, 200)) >= slip)
        one = np.float64(generator.random((10, 200)) >= slip)
        low, high = paired_differences({"other": np.float64(other)}, one)["other"].both_95
        hits += low <= -hard * (1 - slip) <= high
    assert hits >= 0.94 * rounds


@pytest.mark.parametrize("comparisons", [1, 12])
def test_two_more_questions_make_no_interval_narrower(comparisons):
    """With few seeds they would: they raise the degrees of freedom by more than the error."""
    one, other = np.ones((4, 200)), np.ones((4, 200))
    for seed, (start, end) in enumerate([(0, 4), (4, 8), (8, 12), (12, 24)]):
        other[seed, start:end] = 0
    found = paired_differences({"other": other}, one, comparisons)["other"]
    error, df = two_way_error(other - one)
    for interval, level in ((found.both_95, 0.05), (found.joint_95, 0.05 / comparisons)):
        assert interval[1] - found.value >= stats.t.ppf(1 - level / 2, df) * error * (1 - 1e-9)
    assert found.p_adjusted >= min(1.0, comparisons * 2 * stats.t.sf(abs(found.value) / error, df)) - 1e-12


def test_the_mean_of_tasks_is_no_surer_than_its_tasks():
    """Of 20 and of 1,000 questions none differs: the mean may be off by the mean of what both leave room for."""
    parts = [Part(20, 0.5), Part(1000, 0.5)]
    marks = np.ones((4, 1020))
    bounds = [paired_differences({"": marks[:, :size]}, marks[:, :size])[""].both_95[1] for size in (20, 1000)]
    found = paired_differences({"": marks}, marks, parts=parts)[""]
    assert found.both_95[1] == pytest.approx(sum(bounds) / 2)


def test_marks_that_reach_further_have_intervals_that_do():
    """A difference of two performance drops lies between -2 and 2."""
    values = np.repeat(np.array([[1.2], [1.3], [1.1]]), 40, axis=1)
    found = paired_differences({"": values}, np.zeros((3, 40)), parts=[Part(40, 2.0)])[""]
    assert found.value == pytest.approx(1.2)
    assert found.both_95[0] < 1.2 < found.both_95[1] <= 2
    same = paired_differences({"": values}, values, parts=[Part(40, 2.0)])[""]
    assert same.both_95[1] == pytest.approx(2 * (1 - 0.025 ** (1 / 40)))


@given(st.floats(-1, 1), st.integers(2, 300), st.integers(1, 20))
def test_p_and_interval_agree_where_all_answers_differ_alike(value, questions, comparisons):
    values = np.full((3, questions), value)
    found = paired_differences({"other": values}, np.zeros((3, questions)), comparisons)["other"]
    low, high = found.joint_95
    assert low <= found.value <= high
    if abs(found.p_adjusted - 0.05) > 1e-9:
        assert (found.p_adjusted < 0.05) == (low > 0 or high < 0) == (found.verdict in ("better", "worse"))


def test_mean_squares_worked_out_by_hand():
    # Means of rows 1, 3; of columns 1, 2, 3; of all 2. What is left: -+1, 0, +-1.
    values = np.array([[1.0, 1.0, 1.0], [1.0, 3.0, 5.0]])
    assert mean_squares(values) == pytest.approx((6.0, 2.0, 2.0))
    error, df = two_way_error(values)
    assert error == pytest.approx((6 / 6) ** 0.5)
    assert df == 1  # 36 / (36 / 1 + 4 / 2 + 4 / 2), and at least 1


def test_a_clear_difference_is_told_and_its_direction():
    generator = np.random.default_rng(0)
    weak, strong = generator.random((5, 400)) < 0.4, generator.random((5, 400)) < 0.7
    found = paired_differences({"strong": strong.astype(float)}, weak.astype(float))["strong"]
    assert found.verdict == "better"
    assert paired_differences({"weak": weak.astype(float)}, strong.astype(float))["weak"].verdict == "worse"


def test_the_interval_is_for_other_seeds_and_other_questions():
    """Differences that vary between seeds and between questions: 95 % of intervals hold the true one, about."""
    generator = np.random.default_rng(1)
    rounds, hits, seeds_only = 400, 0, 0
    for _ in range(rounds):
        chance = 0.5 + 0.1 * generator.normal(size=(6, 1)) + 0.2 * generator.normal(size=(1, 40))
        one, other = (np.float64(generator.random((6, 40)) < chance + shift) for shift in (0.0, 0.0))
        other = np.where(generator.random((1, 40)) < 0.3, 1 - other, other)  # some questions are another matter
        found = paired_differences({"other": other}, one)["other"]
        truth = 0.3 * (1 - 2 * 0.5)  # a flipped answer is right as often as it was wrong
        hits += found.both_95[0] <= truth <= found.both_95[1]
        seeds_only += found.seeds_95[0] <= truth <= found.seeds_95[1]
    assert 0.93 * rounds <= hits <= 0.995 * rounds
    assert seeds_only < hits


def test_no_difference_is_rarely_told():
    """All recipes alike: at most 5 % of comparisons may say of any that it is another."""
    generator = np.random.default_rng(1)
    told = 0
    for _ in range(200):
        chance = generator.random(100)  # some questions are easy, some are hard
        one, *others = (np.float64(generator.random((3, 100)) < chance) for _ in range(5))
        found = paired_differences({str(number): other for number, other in enumerate(others)}, one)
        told += any(each.verdict in ("better", "worse") for each in found.values())
    assert told <= 10


def test_the_verdict_names_what_the_interval_leaves_room_for():
    assert verdict_of(0.01, (0.001, 0.02)) == "better"
    assert verdict_of(-0.01, (-0.02, -0.001)) == "worse"
    assert verdict_of(0.01, (-0.031, 0.05)) == "no difference above 5.0 points"
    assert verdict_of(-0.01, (-0.031, 0.02)) == "no difference above 3.1 points"
    assert verdict_of(0.01, (-0.01, 0.04201)) == "no difference above 4.3 points"  # what is ruled out is rounded up


def test_one_seed_or_question_tells_nothing_apart():
    found = paired_differences({"all": np.ones((1, 50))}, np.zeros((1, 50)))["all"]
    assert (found.verdict, found.seeds_95, found.both_95, found.value) == ("one seed: no verdict", None, None, 1.0)
    found = paired_differences({"all": np.ones((3, 1))}, np.zeros((3, 1)))["all"]
    assert (found.verdict, found.both_95, found.questions_95) == ("one question: no verdict", None, (-1.0, 1.0))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@example([0.0, 1e-177])
def test_mean_lies_in_its_interval(accuracies):
    mean = mean_accuracy(accuracies)
    assert (mean.interval_95 is None) == (len(accuracies) == 1)
    if mean.interval_95 is not None:
        assert 0 <= mean.interval_95[0] <= mean.value <= mean.interval_95[1] <= 1


def test_a_group_takes_all_within_five_per_cent():
    assert budget_groups({"a": 100, "b": 1000, "c": 1040, "d": 1060}, "a") == {"a": 0, "b": 1, "c": 1, "d": 2}


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 10**9), min_size=1))
def test_groups_of_equal_budget(parameters):
    reference = min(parameters)
    groups = budget_groups(parameters, reference)
    assert groups.keys() == parameters.keys()
    anchor = parameters[reference]
    for number in set(groups.values()):
        members = [parameters[name] for name in groups if groups[name] == number]
        if number == groups[reference]:
            assert {abs(each - anchor) <= 0.05 * anchor for each in members} == {True}
        else:
            assert max(members) <= 1.05 * min(members)
            assert not any(abs(each - anchor) <= 0.05 * anchor for each in members)
    by_size = sorted(parameters, key=lambda name: parameters[name])
    assert groups[by_size[0]] == 0
    assert sorted(set(groups.values())) == list(range(len(set(groups.values()))))
