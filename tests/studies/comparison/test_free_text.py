"""`mola compare` with a base model and data alone: LoRA and mixtures of its size, on test rows that it draws."""

import json
import math
from pathlib import Path

import pytest

from mola import MolaError
from mola.cli import main
from mola.studies.comparison.checks import check_runs, check_search
from mola.studies.comparison.compare import compare
from mola.studies.comparison.default_recipes import default_recipes
from mola.studies.comparison.drawn_rows import draw_test_rows
from mola.studies.comparison.options import CompareOptions
from mola.studies.comparison.record import BASE, read_results
from mola.training.model import base_config, check_model_options
from tests.studies.comparison.comparisons import read

FEW_STEPS = {"max_steps": 2, "warmup_steps": 0, "dtype": "float32", "lora_dropout": 0.0, "disable_tqdm": True}
ROWS = [{"instruction": f"Say {i} twice.", "output": f"{i} {i}" + "!" * (i % 4)} for i in range(60)]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """60 rows of free text, two of them twice, and one question with two answers."""
    more = [*ROWS[:2], {"instruction": "Say 5 twice.", "output": "5, 5"}]
    path = tmp_path_factory.mktemp("rows") / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *more]))
    return path


@pytest.fixture
def options(tiny_model_dir, mine, tmp_path):
    def build(**changes):
        given = {"base_model": str(tiny_model_dir), "data": str(mine), "output_dir": str(tmp_path / "out"), **FEW_STEPS}
        made = CompareOptions(**given | changes)
        if made.is_short:
            made.use_recipes(default_recipes(made))
        return made

    return build


@pytest.fixture(scope="module")
def finished(tiny_model_dir, mine, tmp_path_factory):
    """The command, with one mixture beside the LoRA: arguments, folder."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    given = {"base_model": tiny_model_dir, "data": mine, "output_dir": folder, "num_experts": "2468", **FEW_STEPS}
    words = ["compare", *(f"--{name}={value}" for name, value in given.items())]
    assert main(words) == 0
    return words, folder


# ---------------------------------------------------------------------- the command


def test_the_command_says_what_it_found_and_goes_on_with_nothing_left(finished, capsys):
    words, folder = finished
    weights = folder / "mine" / "lora" / "seed-0" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(words) == 0
    assert weights.stat().st_mtime_ns == before
    assert not list(folder.rglob("checkpoint-*"))  # a finished run needs none
    printed, errors = capsys.readouterr()
    record = read(folder / "compare.json")
    row = next(each for each in record["summary"]["rows"] if each["recipe"] == "2468")
    found = row["difference"]
    side = "lower" if found["value"] < 0 else "higher"
    assert (
        f"On 24 test rows and 2 seeds, the loss of 2468 is {abs(found['value']):.3f} nats per token {side} than"
        in printed
    )
    assert f"{found['value']:+.3f}".replace("-", "−") in printed
    assert "joint 95 % interval: " in printed
    assert " with 5 seeds and " in printed
    assert " with 96 test rows." in printed
    assert "Fewer than 5 seeds say little" in printed
    assert "No recipe is named as the one to keep:\n- One learning rate was tried" in printed
    assert f"Next: mola compare --base_model {words[1].partition('=')[2]} " in printed
    assert "Keep" not in printed
    assert "finished, 0 runs left" in errors


def test_losses_of_the_record_are_those_of_the_evaluations(finished):
    _, folder = finished
    results = read_results(folder / "compare.json")
    assert [(each.recipe, each.seed) for each in results] == [
        (BASE, 0),
        *((recipe, seed) for seed in (0, 1) for recipe in ("lora", "2468")),
    ]
    rows = {row["recipe"]: row for row in read(folder / "compare.json")["summary"]["rows"]}
    for result in results[1:]:
        test = read(folder / "mine" / result.recipe / f"seed-{result.seed}" / "test.json")
        assert result.losses == [sample["loss"] for sample in test["samples"]]
        assert result.tokens == [sample["tokens"] for sample in test["samples"]]
        assert result.loss == pytest.approx(sum(result.losses) / sum(result.tokens)) == test["loss"]
        assert (result.total, result.marks, result.accuracy) == (24, None, None)
    for recipe in ("lora", "2468"):
        mean = sum(each.loss for each in results if each.recipe == recipe) / 2
        assert rows[recipe]["loss"] == pytest.approx(mean)
        assert rows[recipe]["has_reference_budget"]
    assert rows["2468"]["difference"]["value"] == pytest.approx(rows["2468"]["loss"] - rows["lora"]["loss"])


def test_a_run_that_is_missing_in_the_record_is_done_again(finished, options, tmp_path, caplog):
    caplog.set_level("INFO", "mola.studies")
    content = read(finished[1] / "compare.json")
    record = tmp_path / "record.json"
    record.write_text(json.dumps({**content, "runs": content["runs"][:-1]}))
    result = compare(options(num_experts="2468", record=str(record)))
    assert (result.status, result.open) == ("finished", 0)
    assert result.results[-1].losses == content["runs"][-1]["losses"]
    assert [path.parent.name for path in (tmp_path / "out").rglob("seed-*") if path.is_dir()] == ["2468"]
    assert "4 runs: lora, 2468 x seeds 0, 1. Test: 24 rows of mine." in caplog.text


# ---------------------------------------------------------------------- recipes and data by default


def test_the_lora_has_the_size_of_the_mixtures(options, tiny_model_dir):
    short = options()
    assert list(short.recipes) == ["lora", "2468", "5555"]
    assert (short.seeds, short.reference, list(short.tasks)) == ([0, 1], "lora", ["mine"])
    sizes = {}
    for key, run in short.runs.items():
        _, totals = check_model_options(run, base_config(run))
        sizes[key.recipe] = totals["trainable_parameters"]
    lora = short.runs["mine", "lora", 0]
    per_rank = sizes["lora"] / int(lora.r)
    assert abs(sizes["lora"] - (sizes["2468"] + sizes["5555"]) / 2) <= per_rank / 2
    assert lora.lora_alpha / int(lora.r) == 16 / 8  # the scale of the experts' updates


def test_options_that_have_no_lora_of_equal_size_need_recipes(options):
    with pytest.raises(MolaError, match="`recipes` must be set if `rank_pattern` is"):
        options(rank_pattern={"q_proj": 4})
    with pytest.raises(MolaError, match="`recipes` must be set if `r` differs by layer: got '4,4,8,8'"):
        options(r="4,4,8,8")


def test_one_task_needs_no_tasks(options, data):
    recipes = {"a": {"num_experts": "2"}}
    assert list(options(task="sample", data=str(data), recipes=recipes).tasks) == ["sample"]
    assert options(recipes=recipes).seeds == [0, 1, 2]


def test_drawn_test_rows_share_no_question_with_the_training(options):
    asked = options()
    draw_test_rows(asked)
    run = asked.runs["mine", "lora", 0]
    before = [Path(path).read_text() for path in (run.data, run.test_data)]
    train, test = ([json.loads(line)["instruction"] for line in text.splitlines()] for text in before)
    assert len(test) == len(set(test)) == 24
    assert not set(train) & set(test)
    assert {*train, *test} == {row["instruction"] for row in ROWS}
    repeated = {f"Say {number} twice." for number in (0, 1, 5)}
    assert len(train) == len({*train}) + len(repeated & {*train})
    draw_test_rows(options())  # the same again
    assert [Path(path).read_text() for path in (run.data, run.test_data)] == before
    with pytest.raises(
        MolaError, match="was drawn from different data, or with a different `test_size` or `split_seed`"
    ):
        draw_test_rows(options(split_seed=1))


def test_a_search_is_tested_on_rows_of_its_own(options, tmp_path):
    asked = options(tune={"learning_rate": [0.001, 0.01]}, tuning_seeds=[7], test_size=0.4, num_experts="2468")
    with pytest.raises(MolaError, match=r"at least 72 rows .* Got 60 with `test_size` 0.4, of which 24 would be drawn"):
        draw_test_rows(asked)
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"instruction": f"Say {i}.", "output": f"{i}"}) + "\n" for i in range(80)))
    asked = options(tune={"learning_rate": [0.001, 0.01]}, tuning_seeds=[7], data=str(more), num_experts="2468")
    draw_test_rows(asked)
    searched, runs = check_runs(asked.tuning_runs), check_runs(asked.runs)
    check_search(searched, runs)  # raises if they share all questions
    questions = [{*each[0].questions} for each in (searched, runs)]
    assert [len(each) for each in questions] == [24, 24]
    assert not questions[0] & questions[1]


def test_wrong_data_are_refused_before_anything_is_trained(options, data, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:47]))
    with pytest.raises(MolaError, match=r"at least 48 rows with different questions: .* Got 47, of which 24"):
        compare(options(data=str(few)))
    with pytest.raises(MolaError, match=r"`test_size` \(30\) has no effect: the data have test rows of their own"):
        compare(options(task="sample", data=str(data), test_size=30))
    with pytest.raises(MolaError, match="must have the same `template` and `add_eos_token`"):
        compare(options(recipes={"a": {}, "b": {"add_eos_token": "false"}}))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_no_sample_is_cut(options, tmp_path):
    """`cutoff_len` follows the data, up to what the model can read; a given one is kept."""
    path = tmp_path / "long.jsonl"

    def checked(length, **changes):
        long = [{"instruction": f"Say it {i} times.", "output": "a" * length} for i in range(60)]
        path.write_text("".join(json.dumps(row) + "\n" for row in long))
        asked = options(data=str(path), output_dir=str(tmp_path / f"{length}"), num_experts="2468", **changes)
        draw_test_rows(asked)
        return check_runs(asked.runs, asked.is_short)

    runs = checked(600)
    assert {run.options.cutoff_len for run in runs} == {max(runs[0].settings["cutoff_len"], 600)}
    assert runs[0].settings["cutoff_len"] > 700  # with the prompt
    with pytest.raises(MolaError, match="`data` must have samples of at most 1024 tokens"):
        checked(1000)
    with pytest.raises(MolaError, match="`cutoff_len` is too small"):
        checked(400, cutoff_len=256)


def chat(i, role, content, names):
    turns = ((names[0], f"Say {i}."), (names[1], f"{i}"), (names[0], "Again."), (names[1], f"{i}, {i}"))
    return [{role: name, content: text} for name, text in turns]


@pytest.mark.parametrize(
    ("make_row", "is_scored"),
    [
        (lambda i: {"messages": chat(i, "role", "content", ("user", "assistant"))}, False),
        (lambda i: {"conversations": chat(i, "from", "value", ("human", "gpt"))}, False),
        (lambda i: {"prompt": f"Say {i}: ", "completion": f"{i}"}, False),
        (lambda i: {"text": f"{i} is a number."}, False),
        (lambda i: {"question": f"What is {i}?", "answer": f"A number: {i}."}, False),
        (lambda i: {"question": f"What is {i}?", "choices": ["a number", "a dog"], "answer": "A"}, True),
    ],
    ids=["messages", "conversations", "prompt", "text", "question", "choices"],
)
def test_data_are_compared_as_they_are_without_a_task(make_row, is_scored, options, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(make_row(i)) + "\n" for i in range(60)))
    asked = options(data=str(path), num_experts="2468")
    draw_test_rows(asked)
    (run, *_) = check_runs(asked.runs, asked.is_short)
    assert (run.is_scored, run.num_questions, len(run.questions)) == (is_scored, 24, 24)
    train, test = (Path(each).read_text() for each in (run.options.data, run.test.data))
    assert sorted([*train.splitlines(), *test.splitlines()]) == sorted(path.read_text().splitlines())


def test_questions_with_answers_are_compared_by_their_accuracy(options, data, tmp_path):
    """Also with test rows that are drawn."""
    rows = json.loads((data.parent / "train.json").read_text()) + json.loads((data.parent / "test.json").read_text())
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = options(task="sample", data=str(path), num_experts="2468")
    draw_test_rows(asked)
    (run, *_) = check_runs(asked.runs, asked.is_short)
    assert (run.is_scored, run.num_questions) == (True, 24)
    assert math.isclose(asked.runs["sample", "lora", 0].learning_rate, 3e-4)
