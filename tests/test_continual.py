"""`mola continual`: a chain of trainings and tests, its metrics, going on after a stop, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mola import ContinualOptions, MolaError, TrainOptions, continual, train
from mola.cli import main
from mola.continual_learning.metrics import overall_performance, performance_drop
from mola.data.prepare import PrepareOptions, prepare
from mola.evaluate import EvaluateOptions, evaluate
from mola.evaluation.partial import PartialResults
from mola.training.callbacks import MetricsFile

WEIGHTS = "adapter_model.safetensors"
STAGES = {
    "physics": {"filters": {"topic": "physics"}},
    "biology": {"filters": {"topic": "biology"}, "learning_rate": 0.01},
    "words": {"filters": {"topic": ["verbs", "grammar"]}, "max_steps": 5},
}
FIRST_TWO = {name: STAGES[name] for name in ("physics", "biology")}
FOLDERS = ["01-physics", "02-biology", "03-words"]
SETTINGS = {
    "task": "sample",
    "num_experts": "1,2,2,2",
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "lora_dropout": 0.1,
    "dtype": "float32",
    "scoring": "likelihood",
    "test_batch_size": 4,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Generated questions on five topics, 8 of each to train on and 8 to test with."""
    folder = tmp_path_factory.mktemp("questions") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=40, validation_size=10, test_size=40))
    return folder / "dataset.hf"


@pytest.fixture(scope="module")
def base_model(tiny_model_dir, tmp_path_factory):
    """A copy of the tiny model that a test may take the weights away from."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture
def values(base_model, data, tmp_path):
    """Builds the options of a short sequence, as a mapping; options given replace or extend them."""

    def build(**changes):
        chosen = {
            "base_model": str(base_model),
            "data": str(data),
            "output_dir": str(tmp_path / "run"),
            "stages": STAGES,
            **SETTINGS,
            **changes,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    return build


@pytest.fixture
def run(values):
    """Runs a sequence in Python."""
    return lambda **changes: continual(ContinualOptions(**values(**changes)))


@pytest.fixture(scope="module")
def whole(base_model, data, tmp_path_factory):
    """The sequence that nobody stopped, made once: folder and result."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = {"base_model": str(base_model), "data": str(data), "output_dir": str(folder), **SETTINGS}
    return folder, continual(ContinualOptions(**options, stages=STAGES, evaluate_base=True))


def flags(values):
    def text(value):
        return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)

    return ["continual", *(f"--{name}={text(value)}" for name, value in values.items())]


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(one, two):
    first, second = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_same_end(folder, whole, stages=3):
    """Adapters and numbers of the first stages are those of the uninterrupted sequence, to the last bit."""
    assert [name for name in FOLDERS[:stages] if not same_weights(folder / name, whole[0] / name)] == []
    assert read(folder / "continual.json")["results"] == whole[1].results[:stages]


# ---------------------------------------------------------------------- metrics


def test_metrics_of_a_matrix_worked_out_by_hand():
    matrix = [[0.8], [0.6, 0.9], [0.5, 1.0, 0.3]]
    assert overall_performance(matrix[:1]) == pytest.approx(0.8)
    assert overall_performance(matrix[:2]) == pytest.approx(0.75)
    assert overall_performance(matrix) == pytest.approx(0.6)
    assert performance_drop(matrix[:1]) is None
    assert performance_drop(matrix[:2]) == pytest.approx(-0.2)
    assert performance_drop(matrix) == pytest.approx((-0.3 + 0.1) / 2)


accuracies = st.floats(0, 1)
matrices = st.integers(1, 6).flatmap(
    lambda size: st.tuples(*(st.lists(accuracies, min_size=t, max_size=t) for t in range(1, size + 1)))
)


@given(matrices)
def test_metrics_stay_in_their_ranges(matrix):
    assert min(matrix[-1]) - 1e-12 <= overall_performance(matrix) <= max(matrix[-1]) + 1e-12
    drop = performance_drop(matrix)
    assert (drop is None) == (len(matrix) == 1)
    assert drop is None or -1 <= drop <= 1


@given(st.lists(accuracies, min_size=2, max_size=6))
def test_nothing_is_dropped_where_accuracies_stay(row):
    assert performance_drop([row[: t + 1] for t in range(len(row))]) == 0


@pytest.mark.parametrize("matrix", [[], [[]], [[0.5], [0.5]], [[0.5, 0.5]]])
def test_metrics_refuse_another_shape(matrix):
    for metric in (overall_performance, performance_drop):
        with pytest.raises(MolaError, match="`matrix`"):
            metric(matrix)


# ---------------------------------------------------------------------- a finished sequence


def test_result_has_the_matrix_with_counts_and_both_metrics(whole):
    folder, result = whole
    record = read(folder / "continual.json")
    assert (result.status, result.stages) == ("finished", list(STAGES))
    assert record["status"] == "finished"
    assert [(row["stage"], row["name"], list(row["tasks"])) for row in record["results"]] == [
        (1, "physics", ["physics"]),
        (2, "biology", ["physics", "biology"]),
        (3, "words", ["physics", "biology", "words"]),
    ]
    for row in record["results"]:
        for task in row["tasks"].values():
            assert task["accuracy"] == task["correct"] / task["total"]
            assert task["interval_95"][0] <= task["accuracy"] <= task["interval_95"][1]
    assert [row["tasks"]["physics"]["total"] for row in record["results"]] == [8, 8, 8]
    assert record["results"][2]["tasks"]["words"]["total"] == 16
    r = [[task["accuracy"] for task in row["tasks"].values()] for row in record["results"]]
    last = record["results"][-1]
    assert last["overall_performance"] == pytest.approx((r[2][0] + r[2][1] + r[2][2]) / 3)
    assert last["performance_drop"] == pytest.approx((r[2][0] - r[0][0] + r[2][1] - r[1][1]) / 2)
    assert record["results"][0]["performance_drop"] is None
    assert {"settings", "versions", "machine", "command"} <= record.keys()
    assert [entry["folder"] for entry in record["stages"]] == FOLDERS


def test_a_stage_is_an_ordinary_training_that_starts_from_the_one_before(whole, base_model, data, tmp_path):
    folder, _ = whole
    names = TrainOptions.__dataclass_fields__
    settings = {name: value for name, value in SETTINGS.items() if name in names and name != "num_experts"}
    options = {**settings, "base_model": str(base_model), "data": str(data), **STAGES["biology"]}
    train(TrainOptions(**options, adapter=str(folder / FOLDERS[0]), output_dir=str(tmp_path / "alone")))
    assert same_weights(tmp_path / "alone", folder / FOLDERS[1])
    assert not same_weights(folder / FOLDERS[0], folder / FOLDERS[1])
    records = [read(folder / name / "run.json") for name in FOLDERS]
    assert [record["status"] for record in records] == ["finished"] * 3
    assert [record["steps"] for record in records] == [4, 4, 5]
    assert [record["settings"]["learning_rate"] for record in records] == [0.02, 0.01, 0.02]
    assert [record["data"]["train"]["total"] for record in records] == [8, 8, 16]


def test_numbers_are_those_of_mola_evaluate(whole, base_model, data):
    folder, result = whole
    options = EvaluateOptions(
        base_model=str(base_model),
        task="sample",
        data=str(data),
        adapter=str(folder / FOLDERS[2]),
        filters={"topic": "biology"},
        scoring="likelihood",
        batch_size=4,
        dtype="float32",
    )
    expected = evaluate(options)
    task = result.results[2]["tasks"]["biology"]
    assert (task["correct"], task["total"], task["interval_95"]) == (
        expected.correct,
        expected.total,
        expected.interval_95,
    )
    assert read(folder / FOLDERS[2] / "evaluation" / "02-biology.json")["samples"] == expected.samples


def test_base_is_measured_on_all_tasks_and_counts_in_no_metric(whole, base_model, data):
    _, result = whole
    assert list(result.base) == list(STAGES)
    options = {"base_model": str(base_model), "task": "sample", "data": str(data), "scoring": "likelihood"}
    expected = evaluate(EvaluateOptions(**options, batch_size=4, dtype="float32", filters=STAGES["words"]["filters"]))
    assert result.base["words"]["correct"] == expected.correct
    assert len(result.results) == 3


def test_finished_sequence_is_read_back_without_loading_a_model(whole, base_model, values, capsys):
    folder, result = whole
    before = {path: text for path, text in contents(folder).items() if path.name != "continual.json"}
    weights = base_model / "model.safetensors"
    weights.rename(base_model / "elsewhere")
    try:
        assert main(flags(values(output_dir=folder, evaluate_base=True))) == 0
    finally:
        (base_model / "elsewhere").rename(weights)
    captured = capsys.readouterr()
    assert {path: text for path, text in contents(folder).items() if path.name != "continual.json"} == before
    record = read(folder / "continual.json")
    assert (record["results"], record["base"], record["status"]) == (result.results, result.base, "finished")
    for word in ("after stage", "physics", "OP", "PD", "start", "3 words"):
        assert word in captured.out
    assert "finished after 3 of 3 stages" in captured.err


def test_recipe_and_command_line_mean_the_same(values, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
        stages:
          words: {filters: {topic: [verbs, grammar]}, max_steps: 5}
          physics:
            learning_rate: 1e-2
            save_total_limit: null
        """,
        encoding="utf-8",
    )
    from mola.parsing import parse

    others = flags({name: value for name, value in values(output_dir="run").items() if name != "stages"})[1:]
    options = parse(ContinualOptions, ["--config", str(recipe), *others], prog="mola continual")
    assert list(options.stage_options) == ["words", "physics"], "the order of the file is that of training"
    words, physics = options.stage_options.values()
    assert (words.filters, words.max_steps, words.adapter) == ({"topic": ["verbs", "grammar"]}, 5, None)
    assert (physics.learning_rate, physics.save_total_limit, physics.max_steps) == (0.01, None, 4)
    assert (Path(words.output_dir).name, Path(physics.output_dir).name) == ("01-words", "02-physics")
    assert (physics.adapter, physics.num_experts, physics.lora_dropout) == (words.output_dir, None, 0.1)


def test_options_of_one_stage_do_not_reach_the_next(values):
    stages = {"a": STAGES["physics"], "b": {"lora_dropout": 0.5}, "c": {}}
    for dropout, expected in ((0.1, [0.1, 0.5, 0.1]), (None, [None, 0.5, 0.05])):
        options = ContinualOptions(**values(stages=stages, lora_dropout=dropout))
        assert [stage.lora_dropout for stage in options.stage_options.values()] == expected
        assert [stage.filters for stage in options.stage_options.values()] == [{"topic": "physics"}, None, None]


def test_a_finished_adapter_can_be_the_start(whole, run, tmp_path):
    stages = {"words": {**STAGES["words"], "max_steps": 1}}
    adapter = str(whole[0] / FOLDERS[0])
    result = run(stages=stages, adapter=adapter, num_experts=None, evaluate_base=True)
    assert result.status == "finished"
    assert read(tmp_path / "run" / "01-words" / "run.json")["settings"]["adapter"] == adapter
    test = read(tmp_path / "run" / "00-start" / "evaluation" / "01-words.json")
    assert test["settings"]["adapter"] == adapter, "the start is the adapter, not the bare base model"


# ---------------------------------------------------------------------- stopping and going on


@pytest.fixture
def at_step(monkeypatch):
    """Do something once, right after a step of a stage was logged."""

    def arrange(folder, step, action):
        original = MetricsFile.on_log
        waiting = [action]

        def on_log(self, args, state, control, logs=None, **kwargs):
            original(self, args, state, control, logs=logs, **kwargs)
            if self.path.parent.name == folder and state.global_step == step and waiting:
                waiting.pop()()

        monkeypatch.setattr(MetricsFile, "on_log", on_log)

    return arrange


def send(name):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_signal_during_training_and_the_same_command_again(values, whole, tmp_path, at_step, name, capsys):
    folder = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    at_step(FOLDERS[1], 2, send(name))
    arguments = flags(values(stages=FIRST_TWO))
    assert main(arguments) == 130
    assert "Go on with the same command." in capsys.readouterr().err
    record = read(folder / "continual.json")
    assert (record["status"], len(record["results"])) == ("interrupted", 1)
    assert read(folder / FOLDERS[1] / "run.json")["status"] == "interrupted"
    assert (folder / FOLDERS[1] / "checkpoint-3").is_dir(), "the step is finished and kept"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    first = contents(folder / FOLDERS[0])
    assert main(arguments) == 0
    assert contents(folder / FOLDERS[0]) == first, "a finished stage and its test are not repeated"
    assert_same_end(folder, whole, 2)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_signal_during_a_test_and_the_same_command_again(values, whole, tmp_path, monkeypatch, name, caplog):
    original, waiting = PartialResults.append, [send(name)]

    def append(self, records):
        original(self, records)
        if self.path.parent.parent.name == FOLDERS[1] and "01-physics" in self.path.name and waiting:
            waiting.pop()()

    monkeypatch.setattr(PartialResults, "append", append)
    arguments = flags(values(stages=FIRST_TWO))
    assert main(arguments) == 130
    assert read(tmp_path / "run" / "continual.json")["status"] == "interrupted"
    assert main(arguments) == 0
    assert "Going on with 4 finished samples" in caplog.text
    assert_same_end(tmp_path / "run", whole, 2)


def test_crash_before_the_first_checkpoint_starts_the_stage_again(run, whole, tmp_path, at_step, caplog):
    def crash():
        raise RuntimeError("power cut")

    stages = {"physics": STAGES["physics"]}
    at_step(FOLDERS[0], 1, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        run(stages=stages)
    record = read(tmp_path / "run" / "continual.json")
    assert (record["status"], record["error"]) == ("failed", "power cut")
    assert run(stages=stages).status == "finished"
    assert "no complete checkpoint: the training starts again" in caplog.text
    assert_same_end(tmp_path / "run", whole, 1)


def start_and_kill(arguments, record, seconds):
    """Run the command in a process of its own and kill it so long after it began to work."""
    before = record.stat().st_mtime_ns if record.exists() else None
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "mola.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 120
        while not record.exists() or record.stat().st_mtime_ns == before:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(seconds)
    finally:
        process.kill()
        process.wait()
    return process.returncode


@pytest.mark.slow
def test_killed_at_any_time_it_still_ends_the_same(values, whole, tmp_path):
    folder = tmp_path / "run"
    arguments = flags(values(stages=FIRST_TWO))
    ends = [start_and_kill(arguments, folder / "continual.json", seconds) for seconds in (0.2, 0.5, 0.9, 1.4)]
    assert ends.count(-signal.SIGKILL) >= 2
    assert main(arguments) == 0
    assert_same_end(folder, whole, 2)


# ---------------------------------------------------------------------- what can be changed, and what not


@pytest.fixture
def begun(whole, values, tmp_path):
    """A copy of the finished sequence with its third stage not begun; returns its folder and options."""
    folder = Path(shutil.copytree(whole[0], tmp_path / "copy"))
    shutil.rmtree(folder / FOLDERS[2])
    return folder, values(output_dir=str(folder))


def test_stages_not_begun_may_change_and_be_added(begun, whole):
    folder, options = begun
    shutil.rmtree(folder / FOLDERS[1])
    tense = {"filters": {"topic": "verbs"}, "max_steps": 1, "test_limit": 2}
    stages = {"physics": STAGES["physics"], "tense": tense, "words": {**STAGES["words"], **tense}}
    result = continual(ContinualOptions(**{**options, "stages": stages}))
    assert (result.status, len(result.results)) == ("finished", 3)
    assert result.results[0] == whole[1].results[0]
    assert [entry["folder"] for entry in read(folder / "continual.json")["stages"]] == [
        "01-physics",
        "02-tense",
        "03-words",
    ]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"learning_rate": 0.5}, ["stage `physics`", "`learning_rate`", "0.02", "0.5"]),
        ({"scoring": "generate"}, ["stage `physics`", "`scoring`"]),
        ({"stages": {**STAGES, "biology": {"filters": {"topic": "biology"}}}}, ["stage `biology`", "`learning_rate`"]),
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


def test_other_data_under_the_same_name_are_refused(begun, tmp_path):
    folder, options = begun
    record = read(folder / "continual.json")
    record["stages"][1]["data_fingerprints"]["train"] = "0" * 64
    (folder / "continual.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(MolaError, match="stage `biology`.*`train`"):
        continual(ContinualOptions(**options))


def test_a_result_of_another_test_is_refused(begun):
    folder, options = begun
    path = folder / FOLDERS[1] / "evaluation" / "01-physics.json"
    path.write_text(path.read_text(encoding="utf-8").replace("likelihood", "generate"), encoding="utf-8")
    with pytest.raises(MolaError, match=r"01-physics.json.*`scoring`.*'generate'.*'likelihood'"):
        continual(ContinualOptions(**options))


def spoil(path):
    """Make a result one that no test can have, so that a reader of it is found out."""
    result = read(path)
    path.write_text(json.dumps({**result, "correct": -1}), encoding="utf-8")


def test_a_stage_that_starts_again_is_tested_again(begun, whole, caplog):
    folder, options = begun
    stage = folder / FOLDERS[1]
    for checkpoint in stage.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (stage / WEIGHTS).unlink()
    for name in ("01-physics", "02-biology"):
        spoil(stage / "evaluation" / f"{name}.json")
    (stage / "evaluation" / "mine.json").write_text("{}", encoding="utf-8")
    first = contents(folder / FOLDERS[0])
    continual(ContinualOptions(**{**options, "stages": FIRST_TWO}))
    assert "no complete checkpoint: the training starts again" in caplog.text
    assert_same_end(folder, whole, 2)
    assert contents(folder / FOLDERS[0]) == first
    assert (stage / "evaluation" / "mine.json").read_text(encoding="utf-8") == "{}"


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
    with pytest.raises(MolaError, match="stage `words` was begun from other weights"):
        run(**options)
    assert contents(tmp_path / "run") == before
    shutil.rmtree(stage)
    result = run(**options)
    assert (result.status, result.base["words"]["correct"] >= 0) == ("finished", True)


@pytest.mark.parametrize("change", [{"folder": 3}, {"settings": []}, {"data_fingerprints": None}])
def test_a_record_of_another_form_is_refused(begun, change):
    folder, options = begun
    record = read(folder / "continual.json")
    record["stages"][0].update(change)
    (folder / "continual.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(MolaError, match="can not be read"):
        continual(ContinualOptions(**options))


def test_weights_of_a_stage_that_were_exchanged_are_refused(begun):
    folder, options = begun
    shutil.copy(folder / FOLDERS[1] / WEIGHTS, folder / FOLDERS[0] / WEIGHTS)
    with pytest.raises(MolaError, match="stage `physics`.*not the one that was trained"):
        continual(ContinualOptions(**options))


def test_a_stage_deleted_below_another_is_refused(begun):
    folder, options = begun
    shutil.rmtree(folder / FOLDERS[0])
    with pytest.raises(MolaError, match="'02-biology' was trained on '01-physics'"):
        continual(ContinualOptions(**options))


@pytest.mark.slow
def test_a_moved_sequence_goes_on(begun, whole, tmp_path):
    folder, options = begun
    folder.rename(tmp_path / "moved")
    assert continual(ContinualOptions(**{**options, "output_dir": str(tmp_path / "moved")})).status == "finished"
    assert_same_end(tmp_path / "moved", whole)


def test_overwriting_removes_the_sequence_and_nothing_else(begun):
    folder, options = begun
    foreign = {"notes.txt": "mine", f"{FOLDERS[0]}/notes.txt": "mine", f"{FOLDERS[1]}/evaluation/mine.json": "{}"}
    for name, text in foreign.items():
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(MolaError, match="`learning_rate`"):
        continual(ContinualOptions(**{**options, "learning_rate": 0.5}))
    stages = {"words": {**STAGES["words"], "max_steps": 1}}
    result = continual(ContinualOptions(**{**options, "stages": stages, "overwrite_output_dir": True}))
    assert (result.status, len(result.results)) == ("finished", 1)
    kept = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert kept == {"notes.txt", FOLDERS[0], FOLDERS[1], "01-words", "continual.json"}
    assert [path.name for path in (folder / FOLDERS[0]).rglob("*")] == ["notes.txt"]
    assert {name: (folder / name).read_text(encoding="utf-8") for name in foreign} == foreign


# ---------------------------------------------------------------------- wrong input


WRONG = [
    ({"stages": None}, ["`stages`", "empty"]),
    ({"stages": {}}, ["`stages`", "empty"]),
    ({"stages": "{"}, ["`stages`", "JSON"]),
    ({"stages": '["a"]'}, ["`stages`", "mapping"]),
    ({"stages": '{"a": {}, "a": {}}'}, ["`stages`", "'a' twice"]),
    ({"stages": {"a/b": {}}}, ["`stages`", "'a/b'"]),
    ({"stages": {"a": 3}}, ["`stages.a`", "3"]),
    ({"stages": {"a": {"limt": 3}}}, ["stage `a`", "`limt`", "`limit`"]),
    ({"stages": {"a": {"test_limit": "few"}}}, ["stage `a`", "test_limit", "'few'"]),
    ({"stages": {"a": {"num_experts": 2}}}, ["stage `a`", "`num_experts`", "same in all stages"]),
    ({"stages": {"a": {"adapter": "x"}}}, ["stage `a`", "`adapter`"]),
    ({"stages": {"a": {"output_dir": "x"}}}, ["stage `a`", "`output_dir`"]),
    ({"stages": {"a": {"learning_rate": -1}}}, ["stage `a`", "`learning_rate`", "-1"]),
    ({"stages": {"a": {"optim": "guess"}}}, ["stage `a`", "'guess'"]),
    ({"stages": {"a": {}, "b": {"task": "nosuch"}}}, ["stage `b`", "`task`", "'nosuch'"]),
    ({"stages": {"a": {}, "b": {"data": "nosuch.json"}}}, ["stage `b`", "nosuch.json"]),
    ({"stages": {"a": {}, "b": {"test_data": "nosuch.json"}}}, ["stage `b`", "nosuch.json"]),
    ({"stages": {"a": {}, "b": {"test_split": "exam"}}}, ["stage `b`", "`test_split`", "'exam'", "validation"]),
    ({"stages": {"a": {}, "b": {"test_split": "train"}}}, ["stage `b`", "`test_split`", "not trained on"]),
    ({"stages": {"a": {}, "b": {"cutoff_len": 20}}}, ["stage `b`", "`cutoff_len`", "20"]),
    ({"stages": {"a": {}, "b": {"max_new_tokens": 2000, "scoring": "generate"}}}, ["stage `b`", "1024"]),
    ({"stages": {"a": {}, "b": {"scoring": "guess"}}}, ["stage `b`", "`scoring`", "'guess'"]),
    ({"stages": {"a": {}, "b": {"test_batch_size": 0}}}, ["stage `b`", "`batch_size`", "0"]),
    ({"stages": {"a": {}, "b": {"warmup_steps": 50}}}, ["stage `b`", "`warmup_steps`", "50"]),
    ({"stages": {"a": {}, "b": {"filters": {"topc": "x"}}}}, ["stage `b`", "`filters`", "`topc`", "topic"]),
    ({"stages": {"a": {}, "b": {"filters": {"topic": "art"}}}}, ["stage `b`", "`filters`", "'art'", "'physics'"]),
    ({"task": None}, ["stage `physics`", "`task`"]),
    ({"data": None}, ["stage `physics`", "`data`"]),
    ({"num_experts": "2,4,6"}, ["`num_experts`", "3 entries", "4 layers"]),
    ({"resume_from_checkpoint": "last"}, ["`resume_from_checkpoint`", "goes on"]),
    ({"adapter": "nosuch", "num_experts": None}, ["`adapter`", "nosuch"]),
    (
        {"adapter": "x", "num_experts": None, "lora_dropout": None, "stages": {"a": {"lora_dropout": 0.5}}},
        ["stage `a`", "`lora_dropout`", "beside `stages`"],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), WRONG, ids=lambda value: str(value)[:70] if type(value) is dict else "")
def test_wrong_input_is_refused_before_any_stage(values, changes, parts, tmp_path, capsys):
    assert main(flags(values(**changes))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("mola continual: error: ")
    assert [part for part in parts if part not in lines[-1]] == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_training_data_without_splits_are_not_tested_on(values, data, tmp_path, capsys):
    stages = {"a": {"data": str(data.parent / "train.json")}}
    assert main(flags(values(stages=stages))) == 2
    assert "`test_data`" in capsys.readouterr().err
    stages["a"]["test_data"] = str(data.parent / "test.json")
    options = ContinualOptions(**values(stages=stages, test_limit=3, max_steps=1))
    assert continual(options).results[0]["tasks"]["a"]["total"] == 3


def test_folder_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(MolaError, match=r"`output_dir`.*continual\.json"):
        run()
    (tmp_path / "run" / "continual.json").write_text("[]", encoding="utf-8")
    with pytest.raises(MolaError, match="can not be read"):
        run()


def test_several_processes_are_refused(values, monkeypatch):
    monkeypatch.setattr(TrainOptions, "world_size", property(lambda self: 2))
    with pytest.raises(MolaError, match="one process: got 2"):
        ContinualOptions(**values())
