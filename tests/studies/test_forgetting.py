"""The study of forgetting: the page has the record's tables, statistics are right, a stopped study goes on."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from scipy import stats
from studies.forgetting import Study, main
from studies.forgetting_options import RECIPES, ForgettingOptions, order_of
from studies.forgetting_tables import NO_RESULT, by_question, chosen_rate, comparisons, is_finished, tables

from mola.evaluation.differences import paired_differences
from mola.files.marked_pages import BEGIN, END
from mola.reporting.formatting import points
from mola.studies.continual_learning.metrics import overall_performance, performance_drop
from mola.training.callbacks import MetricsFile
from tests.words import replaced

ROOT = Path(__file__).parents[2]
STUDIES = [("forgetting.json", "forgetting.md"), ("forgetting_rate.json", "forgetting-rate.md")]
RUN = {"learning_rate": 0.001, "trained": 1234, "seconds_training": 60.0, "seconds_testing": 6.0}
RUN |= {"machine": {"cpu": "a processor", "gpu": None, "threads": 1}}
QUESTIONS = 20  # of each kind
TWO = {"lora": {"num_experts": 1, "r": 2}, "mixture": {"num_experts": "1,2,2,2", "r": 2}}


def sequence(right, generator):
    """What a run is known by, its last answers right with the chance `right`, and 0.1 above that at its own stage."""
    chances = [[right + 0.1 * (kind == stage < 4) for kind in range(stage + 1)] for stage in range(5)]
    drawn = [[generator.random(QUESTIONS) < chance for chance in row] for row in chances]
    marks = [["".join("01"[int(mark)] for mark in each) for each in row] for row in drawn]
    matrix = [[each.count("1") / QUESTIONS for each in row] for row in marks]
    return {"marks": marks, "matrix": matrix, "op": overall_performance(matrix), "pd": performance_drop(matrix)}


def made_up(right, **settings):
    """A record of sequences: recipe -> chance of a right answer for each seed."""
    generator = np.random.default_rng(0)
    runs = [
        {**RUN, "recipe": recipe, "seed": seed, "order": order_of(seed), "is_search": False}
        | sequence(value, generator)
        for recipe, values in right.items()
        for seed, value in enumerate(values)
    ]
    chosen = {"recipes": {name: RECIPES[name] for name in right}, "seeds": [0, 1, 2, 3], "rates": []}
    chosen["contrasts"] = [[name, name.removesuffix("-balance")] for name in right if name.endswith("-balance")]
    return {"settings": {**chosen, "reference": "lora", "tuning_seeds": [100], **settings}, "runs": runs}


def rows(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(("record", "page"), STUDIES)
def test_the_page_has_the_tables_of_the_record(record, page):
    path = ROOT / "studies" / record
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    found = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert found == f"\n{tables(record) if is_finished(record) else NO_RESULT}\n\n"
    for run in record["runs"]:
        assert run["matrix"] == [[marks.count("1") / len(marks) for marks in row] for row in run["marks"]]
        ends = [run["op"], run["pd"]]
        assert ends == pytest.approx([overall_performance(run["matrix"]), performance_drop(run["matrix"])])


def test_differences_are_paired_adjusted_and_put_into_words():
    lora, better, same = [0.50, 0.60, 0.40, 0.55], [0.80, 0.85, 0.70, 0.84], [0.52, 0.59, 0.41, 0.53]
    record = made_up({"lora": lora, "2468": better, "2468-balance": same})
    found = {(each.measure, each.recipe, each.other): each.difference for each in comparisons(record)}
    pairs = [("2468", "lora"), ("2468-balance", "lora"), ("2468-balance", "2468")]
    assert list(found) == [(measure, *pair) for measure in ("op", "pd") for pair in pairs]
    ops = {
        name: [run["op"] for run in record["runs"] if run["recipe"] == name] for name in record["settings"]["recipes"]
    }
    ahead, level = found["op", "2468", "lora"], found["op", "2468-balance", "lora"]
    assert ahead.value == pytest.approx(np.mean(ops["2468"]) - np.mean(ops["lora"]))
    assert ahead.seeds_95 == pytest.approx(tuple(stats.ttest_rel(ops["2468"], ops["lora"]).confidence_interval(0.95)))
    alone = paired_differences({"": marks_in_the_end(record, "2468")}, marks_in_the_end(record, "lora"))[""]
    assert ahead.both_95 == pytest.approx(alone.both_95)
    assert ahead.p_adjusted == pytest.approx(6 * alone.p_adjusted)
    assert ahead.joint_95[0] < alone.joint_95[0]
    assert (ahead.verdict, found["op", "2468-balance", "2468"].verdict) == ("better", "worse")
    assert level.verdict == f"no difference above {100 * max(map(abs, level.joint_95)):.1f} points"
    lines = rows(tables(record))
    first = next(line for line in lines if line[:3] == ["OP", "2468", "lora"])
    assert (first[3:5], first[-1]) == (["4", points(ahead.value)], "better")
    every = [line for line in lines if line[0] in ("0", "1", "2", "3")]
    assert [line[1] for line in every] == [", ".join(order_of(seed)) for seed in range(4)]
    assert [line[2].partition(",")[0] for line in every] == [f"{100 * op:.1f}" for op in ops["lora"]]
    means = next(line for line in lines if line[0] == "lora")
    assert means[:4] == ["lora", "1,234", "0.001", "4"]
    assert means[5] == f"{100 * np.mean(ops['lora']):.1f}"


def marks_in_the_end(record, recipe):
    """`(sequences, questions)`, the kinds in one order."""
    found = []
    for run in record["runs"]:
        if run["recipe"] == recipe:
            by_kind = dict(zip(run["order"], run["marks"][-1], strict=True))
            found.append([float(mark) for kind in sorted(by_kind) for mark in by_kind[kind]])
    return np.array(found)


def test_questions_add_up_to_both_measures():
    for run in made_up({"lora": [0.2, 0.5, 0.7, 0.9]})["runs"]:
        assert by_question(run, "op").mean() == pytest.approx(run["op"])
        assert by_question(run, "pd").mean() == pytest.approx(run["pd"])


def test_a_question_has_one_place_in_all_orders():
    """The third question of "senses" alone is right: it is the same column, wherever that kind comes."""
    columns = set()
    for order in map(order_of, (None, 0, 1, 2, 3)):
        row = ["0010" if kind == "senses" else "0000" for kind in order]
        run = {"marks": [row[: stage + 1] for stage in range(5)], "order": order}
        columns.add(tuple(by_question(run, "op")))
    assert len(columns) == 1


def test_sequences_without_partner_are_left_out_and_one_pair_gives_no_verdict():
    record = made_up({"lora": [0.5, 0.9, 0.1], "5555": [0.6]})
    text, first = tables(record), [run["op"] for run in record["runs"] if run["seed"] == 0]
    shown = points(first[1] - first[0])
    assert ["OP", "5555", "lora", "1", shown, "", "", "", "too few pairs"] in rows(text)
    assert "4 of 8 sequences are finished: the tables will change." in text


def test_of_rates_with_as_many_right_answers_the_lowest_is_chosen():
    """Sums of shares differ in their last digits."""
    ops = {0.001: 139 / 150, 0.002: math.nextafter(139 / 150, 1)}
    record = made_up({"lora": []}, rates=[0.001, 0.002])
    record["runs"] = [
        {**RUN, "recipe": "lora", "seed": 100, "is_search": True, "learning_rate": rate, "op": op}
        for rate, op in ops.items()
    ]
    assert chosen_rate(record, "lora") == 0.001


def test_verdicts_of_few_sequences_are_warned_of():
    few = made_up({"lora": [0.5, 0.6], "2468": [0.5, 0.6]})
    assert "Fewer than 5 seeds hardly tell" in tables(few)
    assert "hardly tell" not in tables(made_up({"lora": [0.5] * 5, "2468": [0.6] * 5}, seeds=[0, 1, 2, 3, 4]))


def test_every_seed_and_the_search_have_orders_of_their_own():
    assert len({tuple(order_of(seed)) for seed in (None, *range(119))}) == 120


@pytest.fixture
def words(tiny_model_dir, tmp_path):
    found = ["--base_model", tiny_model_dir, "--output_dir", tmp_path / "runs", "--record", tmp_path / "record.json"]
    found += ["--recipes", json.dumps(TWO), "--seeds", 0, "--train_size", 16, "--validation_size", 4]
    return [str(word) for word in [*found, "--test_size", 5, "--num_train_epochs", 1, "--learning_rate", 0.02]]


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_runs_nothing_twice(words, tmp_path, monkeypatch, capsys):
    record, page = tmp_path / "record.json", tmp_path / "page.md"
    page.write_text(f"# Page\n\n{BEGIN}old\n{END}\n\nend\n", encoding="utf-8")
    original, waiting = MetricsFile.on_train_begin, [3]

    def on_train_begin(self, *args, **kwargs):
        waiting[0] -= 1
        if waiting[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MetricsFile, "on_train_begin", on_train_begin)
    assert main(words) == 130, "in the third stage"
    assert not record.exists()
    assert main([*words, "--at_most", "1"]) == 0
    assert waiting[0] == 3 - 3 - 3, "two finished stages are not trained again"
    first = json.loads(record.read_text())["runs"]
    assert [run["recipe"] for run in first] == ["lora"]
    assert main([*words, "--page", str(page)]) == 0
    content = json.loads(record.read_text())
    assert content["runs"][:1] == first
    assert [run["recipe"] for run in content["runs"]] == list(TWO)
    for run in content["runs"]:
        assert [[len(marks) for marks in row] for row in run["marks"]] == [[5] * stage for stage in range(1, 6)]
        assert run["matrix"] == [[marks.count("1") / 5 for marks in row] for row in run["marks"]]
        assert (run["op"], run["pd"]) == (overall_performance(run["matrix"]), performance_drop(run["matrix"]))
        assert run["steps"] == [4] * 5
    assert str(tmp_path) not in record.read_text()
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] in (
        [".locks", "data-16-4-5"],
        ["data-16-4-5", ".locks"],
    )
    assert page.read_text() == f"# Page\n\n{BEGIN}\n{tables(content)}\n\n{END}\n\nend\n"
    before = record.read_bytes()
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out == f"0 sequences left\n\n{tables(content)}\n"
    assert record.read_bytes() == before
    for change, message in (
        (["--test_size", "6"], "`test_size` must be as in"),
        (["--recipes", json.dumps({**TWO, "lora": {"num_experts": 2}})], "`recipes` must be as in"),
        (["--seeds", "1"], "`seeds` must be as in"),
    ):
        assert main(replaced(words, change)) == 2
        assert message in capsys.readouterr().err
    more = Study(ForgettingOptions(**{**options_of(words), "seeds": [0, 1]}))
    assert [key[:2] for key in more.left()] == [("lora", 1), ("mixture", 1)]


def options_of(words):
    found = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    sizes = {name: int(found[name]) for name in ("train_size", "validation_size", "test_size")}
    rates = {name: float(found[name]) for name in ("num_train_epochs", "learning_rate")}
    return {**found, **sizes, **rates, "seeds": [int(found["seeds"])]}


@pytest.mark.slow
def test_the_rate_is_chosen_on_other_seeds_and_sequences_of_others_are_left_alone(words, tmp_path):
    only = json.dumps({"lora": TWO["lora"], "fixed": {**TWO["lora"], "learning_rate": 0.05}})
    words = [*words, "--recipes", only, "--rates", "0.001", "0.02"]
    locks = tmp_path / "runs" / ".locks"
    locks.mkdir(parents=True)
    with FileLock(locks / "lora-100-0.02"):  # as another process would
        assert main([*words, "--at_most", "2"]) == 0
    runs = json.loads((tmp_path / "record.json").read_text())["runs"]
    assert [(run["recipe"], run["is_search"], run["learning_rate"]) for run in runs] == [
        ("lora", True, 0.001),
        ("fixed", False, 0.05),
    ]
    assert [run["order"] for run in runs] == [order_of(None), order_of(0)]
    assert {len(marks) for row in runs[0]["marks"] for marks in row} == {4}, "validation questions"
    assert main(words) == 0
    found = json.loads((tmp_path / "record.json").read_text())
    op = {run["learning_rate"]: run["op"] for run in found["runs"] if run["is_search"]}
    assert sorted(op) == [0.001, 0.02]
    assert found["runs"][-1]["learning_rate"] == max(sorted(op), key=op.get)
    assert {len(marks) for row in found["runs"][-1]["marks"] for marks in row} == {5}
    chosen = f"{max(sorted(op), key=op.get):g} (at the edge)"
    assert ["lora", *(f"{100 * op[rate]:.1f}" for rate in (0.001, 0.02)), chosen] in rows(tables(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--reference", "other"], "`reference`"),
        (["--rates", "0.1", "--tuning_seeds", "0"], "`tuning_seeds` must be others than `seeds`: both have [0]"),
        (["--recipes", '{"lora": {"seed": 3}}'], "`seed` cannot be set in `recipes.lora`"),
        (["--recipes", '{"lora": {"num_expert": 3}}'], "`num_experts`"),
        (["--seeds", "119"], "`seeds` must be 0 to 118"),
        (["--seeds", "-1", "0"], "`seeds` must be 0 to 118"),
        (["--seeds", "1", "1"], "`seeds` must be different"),
        (["--page", "README.md"], "`page`"),
        (["--base_model", "nosuch"], "`base_model` must be a folder"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_trained(words, change, message, tmp_path, capsys):
    assert main(replaced(words, change)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "record.json").exists()
