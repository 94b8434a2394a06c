"""What routing is worth: every mixture of a comparison as LoRA; the page says what the record does."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from studies.routing_worth import main
from studies.routing_worth_tables import markdown, note_of, tables

from mola.data.prepare import PrepareOptions, prepare
from mola.evaluation.evaluate import EvaluateOptions, evaluate
from mola.exporting.convert import ConvertOptions, convert
from mola.studies.comparison.compare import CompareOptions, compare
from tests.waiting import PATIENCE
from tests.words import replaced

ROOT = Path(__file__).parents[2]
RECORD, PAGE = ROOT / "studies" / "routing_worth.json", ROOT / "docs" / "routing-worth.md"
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.02, "warmup_steps": 0, "r": "4"}
TRAINING |= {"save_strategy": "no", "eval_strategy": "no", "lora_dropout": 0.0, "dtype": "float32"}


@pytest.fixture(scope="module")
def comparison(tiny_model_dir, tmp_path_factory):
    """A LoRA and a mixture on one of five topics, in other prompts than the task's; two seeds."""
    folder = tmp_path_factory.mktemp("comparison")
    prepare(PrepareOptions("sample", str(folder / "data"), train_size=80, validation_size=10, test_size=40))
    options = {"base_model": str(tiny_model_dir), "task": "sample", "data": str(folder / "data" / "dataset.hf")}
    options |= {"filters": {"topic": "physics"}, "template": "alpaca", "scoring": "likelihood", "test_limit": 6}
    recipes = {"lora": {"num_experts": "1"}, "2468": {"num_experts": "2468"}}
    options |= {"tasks": {"physics": {}}, "recipes": recipes, "seeds": [0, 1], "disable_tqdm": True}
    compare(CompareOptions(**options, **TRAINING, output_dir=str(folder / "out")))
    return folder


@pytest.fixture
def words(comparison, tmp_path):
    """Flags, and where the record is."""
    folder, output = shutil.copytree(comparison / "out", tmp_path / "out"), tmp_path / "worth.json"
    words = ["--record", folder / "compare.json", "--runs", folder, "--output", output, "--rank", 4, "--fit_rows", 10]
    return [str(word) for word in words], output


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change(path, changed):
    content = read(path)
    changed(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def run_of(content, seed):
    return next(each for each in content["runs"] if (each["recipe"], each["seed"]) == ("2468", seed))


def test_every_mixture_is_exported_and_tested_once(words, comparison, tmp_path, capsys):
    flags, output = words
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- /tables -->\nafter\n", encoding="utf-8")
    assert main([*flags, "--seeds", "1"]) == 0
    first = read(output)["runs"]
    assert [entry["seed"] for entry in first] == [1]
    assert main([*flags, "--page", str(page)]) == 0
    runs = read(output)["runs"]
    assert runs[:1] == first
    assert [(run["task"], run["recipe"], run["seed"]) for run in runs] == [("physics", "2468", s) for s in (1, 0)]
    for entry in runs:
        assert entry["mixture"] == run_of(read(comparison / "out" / "compare.json"), entry["seed"])["marks"]
        assert len(entry["marks"]) == 6
        assert entry["rows"] == {"fitted": 9, "held_out": 1}
        assert entry["kl"] >= 0
        assert min(entry["explained"].values()) > 0
    assert not list(tmp_path.glob("out/.worth/*/*"))
    said = page.read_text(encoding="utf-8")
    assert said == f"before\n<!-- tables -->\n\n{markdown(runs)}\n\n<!-- /tables -->\nafter\n"
    content = output.read_bytes()
    shutil.rmtree(tmp_path / "out" / "physics")  # with a result nothing else is needed
    capsys.readouterr()
    assert main(flags) == 0
    assert "mixtures left" not in capsys.readouterr().out
    assert output.read_bytes() == content


def test_an_entry_is_what_the_commands_give(words, comparison, tiny_model_dir, tmp_path):
    """With rows and prompts of the training, and the test of the run."""
    flags, output = words
    assert main([*flags, "--seeds", "0", "--fit_rows", "1000"]) == 0
    (entry,) = read(output)["runs"]
    rows = [row for row in read(comparison / "data" / "train.json") if row["topic"] == "physics"]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    sample = (ROOT / "src/mola/data/tasks/sample.yaml").read_text(encoding="utf-8")
    (tmp_path / "task.yaml").write_text(sample.replace("template: alpaca_short", "template: alpaca"), encoding="utf-8")
    adapter, lora = tmp_path / "out" / "physics" / "2468" / "seed-0", tmp_path / "lora"
    data = {"data": [str(tmp_path / "train.json")], "task": str(tmp_path / "task.yaml"), "dtype": "float32"}
    report = convert(ConvertOptions([str(adapter)], str(lora), None, "lora", str(tiny_model_dir), rank=4, **data))
    assert entry["rows"] == report.rows["answer"]
    assert entry["kl"] == pytest.approx(report.divergence["answer"], rel=1e-4)
    assert entry["explained"] == pytest.approx(report.by_kind(), rel=1e-4)
    test = read(adapter / "test.json")
    samples = evaluate(EvaluateOptions(**{**test["settings"], "adapter": str(lora), "output": None})).samples
    assert [each["prompt"] for each in samples] == [each["prompt"] for each in test["samples"]]
    assert entry["marks"] == "".join("01"[each["correct"]] for each in samples)


def test_the_tables_are_means_and_quantiles_of_the_marks():
    marks = {("b", 0): ("1100", "1000"), ("b", 1): ("1111", "1011"), ("a", 0): ("0001", "0011")}
    entries = [
        {"task": "t", "recipe": recipe, "seed": seed, "marks": lora, "mixture": mixture, "kl": 0.5}
        for (recipe, seed), (lora, mixture) in marks.items()
    ]
    (_, rows), (heads, (overall,)) = tables(entries)
    assert [row[:6] for row in rows] == [
        ["t", "a", "1", "50.0", "25.0", "-25.0"],
        ["t", "b", "2", "50.0", "75.0", "+25.0"],
    ]
    assert [row[6] for row in rows] == ["-100.0 to +63.8", "-63.8 to +100.0"]  # over four questions; both seeds agree
    assert [row[7] for row in rows] == ["one seed: no verdict", "no difference above 100.0 points"]
    assert [row[8:] for row in rows] == [["-25.0", "-25.0", "0.5000"], ["+25.0", "+25.0", "0.5000"]]
    said = dict(zip(heads, overall, strict=True))
    assert [said[name] for name in ("task", "LoRAs", "behind", "equal", "ahead")] == ["t", "3", "1", "0", "2"]
    assert [said[name] for name in ("mean", "least", "25 %", "median", "most")] == [
        "+8.3",
        "-25.0",
        "+0.0",
        "+25.0",
        "+25.0",
    ]


def test_verdicts_allow_for_the_rows_of_a_task():
    marks = {"marks": "1100", "mixture": "1000", "kl": 0.5, "seconds": {"testing": 1.0}, "machine": {}}
    entries = [{"task": "t", "recipe": each, "seed": seed, **marks} for each in "ab" for seed in range(2)]
    alone = tables(entries)[0][1]
    others = [{**entry, "task": "u"} for entry in entries] + [{**entries[0], "task": "u", "recipe": "c"}]
    assert tables([*entries, *others])[0][1][:2] == alone
    assert [row[:2] for row in tables([*entries, *others])[1][1]] == [["t", "4"], ["u", "5"]]
    assert "Fewer than 5 seeds" in note_of(entries)
    assert "Fewer" not in note_of([{**entry, "seed": seed} for entry in entries for seed in range(5)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda run: run.update(marks="111111", correct=6), "was made with another `mixture`"),
        (lambda run: run["settings"].update(learning_rate=0.1), "was made with another `settings`"),
        (lambda run: run["fingerprints"].update(train="0"), "was made with another `fingerprints`"),
        (lambda run: run.update(num_experts=[1] * 4), "is no mixture of"),
    ],
)
def test_entries_of_another_comparison_are_refused(changed, message, words, comparison, tmp_path, capsys):
    flags, output = words
    run = run_of(read(comparison / "out" / "compare.json"), 1)
    entry = {name: run[name] for name in ("task", "recipe", "seed", "marks", "settings", "fingerprints")}
    entry |= {"mixture": run["marks"], "kl": 0.0, "rank": 4, "fit_rows": 10}
    output.write_text(json.dumps({"runs": [entry]}), encoding="utf-8")
    assert main([*flags, "--seeds", "1"]) == 0  # as it is, it counts
    assert main([*flags, "--rank", "5"]) == 2
    assert "another `rank`: 4, now 5" in capsys.readouterr().err
    change(tmp_path / "out" / "compare.json", lambda content: changed(run_of(content, 1)))
    assert main(flags) == 2
    assert f"physics/2468/seed-1 of {str(output)!r} {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "cola"], "`tasks` must be of mixtures in .* got 'cola': there is physics."),
        (["--recipes", "lora"], "`recipes` must be of mixtures in .* got 'lora': there is 2468."),
        (["--seeds", "7"], "`seeds` must be of mixtures in .* got 7: there is 0, 1."),
        (["--fit_rows", "1"], "`fit_rows` must be at least 2, .* got 1."),
        (["--rank", "0"], "`rank` must be from 1 to .* got 0."),
        (["--record", "none.json"], "`record` must hold a mixture .* 'none.json' has none."),
        (["--runs", "one", "two"], "`runs` must be as many as `record`, 1: got 2."),
        (["--page", "none.md"], "`page` cannot be read: 'none.md'"),
        (["--page", str(ROOT / "README.md")], "`page` must hold the lines <!-- tables -->"),
    ],
)
def test_wrong_options_are_refused(more, message, words, capsys):
    flags, output = words
    assert main(replaced(flags, more)) == 2
    error = capsys.readouterr().err
    assert re.search(f"^error: {message}", error, re.M), error
    assert not output.exists()


@pytest.mark.slow
def test_mixtures_of_several_comparisons_stand_in_one_record(words, tmp_path, capsys):
    flags, output = words
    first, second = tmp_path / "out", tmp_path / "second"
    shutil.copytree(first, second)
    more = ["--record", str(first / "compare.json"), str(second / "compare.json"), "--runs", str(first), str(second)]
    flags = replaced(flags, more)
    assert main(flags) == 2
    assert "physics/2468/seed-0 is in" in capsys.readouterr().err
    (second / "physics").rename(second / "mechanics")
    change(second / "compare.json", lambda content: [run.update(task="mechanics") for run in content["runs"]])
    assert main([*flags, "--seeds", "1", "--tasks", "physics"]) == 0
    shutil.rmtree(first / "physics")  # no folder but of those that are asked for is needed
    assert main([*flags, "--seeds", "1", "--tasks", "mechanics"]) == 0
    entries = read(output)["runs"]
    assert [(each["task"], each["seed"]) for each in entries] == [("physics", 1), ("mechanics", 1)]
    assert entries[0]["marks"] == entries[1]["marks"]
    assert [row[:3] for row in tables(entries)[0][1]] == [["mechanics", "2468", "1"], ["physics", "2468", "1"]]


def test_folders_that_are_not_those_of_the_record_are_refused(words, tmp_path, capsys):
    flags, output = words
    folder = tmp_path / "out" / "physics" / "2468" / "seed-0"
    change(folder / "test.json", lambda test: test["settings"].update(load_in_4bit=True))
    assert main(flags) == 2
    assert "`load_in_4bit` (True) of physics/2468/seed-0 is unknown to `mola convert`" in capsys.readouterr().err
    change(folder / "test.json", lambda test: test.update(data_fingerprint="0"))
    assert main(flags) == 2
    assert "is not the test in" in capsys.readouterr().err
    (folder / "test.json").unlink()
    assert main(flags) == 2
    assert "must hold run.json and test.json" in capsys.readouterr().err
    (folder / "adapter_model.safetensors").unlink()
    assert main(flags) == 2
    assert "physics/2468/seed-0 has no adapter, see `keep_adapters`" in capsys.readouterr().err
    assert not output.exists()


def test_data_that_have_changed_are_refused(words, comparison, tmp_path, capsys):
    flags, output = words
    folder, other = tmp_path / "out" / "physics" / "2468" / "seed-0", str(tmp_path / "other.json")
    rows = [{**row, "topic": "physics"} for row in read(comparison / "data" / "train.json")]
    Path(other).write_text(json.dumps(rows), encoding="utf-8")
    for file, message in (("run", "has changed since physics/2468/seed-0"), ("test", "the test data of physics/2468")):
        change(folder / f"{file}.json", lambda content: content["settings"].update(data=other))
        assert main([*flags, "--seeds", "0"]) == 2
        assert message in capsys.readouterr().err
    assert not output.exists()
    assert not list(tmp_path.glob("out/.worth/*/*"))


@pytest.mark.parametrize("name", ["base_model", "rule"])
def test_another_base_model_or_rule_than_the_comparisons_is_refused(name, words, tmp_path, capsys):
    flags, output = words
    change(tmp_path / "out" / "compare.json", lambda content: [each.update({name: "abc"}) for each in content["runs"]])
    assert main([*flags, "--seeds", "0"]) == 2
    assert f"`{name}` of physics/2468/seed-0 is not that with which the mixture was tested: 'abc' then" in (
        capsys.readouterr().err
    )
    assert not output.exists()


@pytest.mark.slow
def test_two_processes_share_the_work(words):
    flags, output = words
    command = [sys.executable, "-m", "studies.routing_worth", *flags]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(entry["seed"] for entry in read(output)["runs"]) == [0, 1]
    assert sum(each.count("Next: ") for each in said) == 2


def test_the_page_has_the_tables_of_the_record():
    """Of all tasks, or of those before one that is still being done."""
    between = PAGE.read_text(encoding="utf-8").partition("<!-- tables -->\n")[2].partition("<!-- /tables -->")[0]
    entries = read(RECORD)["runs"]
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    finished = [tasks[: number + 1] for number in range(len(tasks))]
    assert between.strip() in [markdown([each for each in entries if each["task"] in some]) for some in finished]
