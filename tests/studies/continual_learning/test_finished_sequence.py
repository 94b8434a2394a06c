"""A finished sequence: its results, its stages, where it starts and how it is described."""

import shutil
from pathlib import Path

import pytest

from mola import ContinualOptions, MolaError, TrainOptions, train
from mola.cli import main
from mola.evaluation.evaluate import EvaluateOptions, evaluate
from tests.studies.continual_learning.sequences import FOLDERS, SETTINGS, STAGES, contents, flags, read
from tests.training.runs import same_weights


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
    options = {"base_model": str(base_model), "task": "sample", "data": str(data), "scoring": "likelihood"}
    options |= {"batch_size": 4, "dtype": "float32"}
    expected = evaluate(EvaluateOptions(**options, adapter=str(folder / FOLDERS[2]), filters={"topic": "biology"}))
    task = result.results[2]["tasks"]["biology"]
    assert task["correct"] == expected.correct
    assert (task["total"], task["interval_95"]) == (expected.total, expected.interval_95)
    assert read(folder / FOLDERS[2] / "evaluation" / "02-biology.json")["samples"] == expected.samples
    # The base model is tested on all tasks, and is not part of the metrics.
    assert list(result.base) == list(STAGES)
    assert len(result.results) == 3
    expected = evaluate(EvaluateOptions(**options, filters=STAGES["words"]["filters"]))
    assert result.base["words"]["correct"] == expected.correct


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
            save_total_limit: 2
        """,
        encoding="utf-8",
    )
    from mola.options.parsing import parse

    others = flags({name: value for name, value in values(output_dir="run").items() if name != "stages"})[1:]
    options = parse(ContinualOptions, ["--config", str(recipe), *others], prog="mola continual")
    assert list(options.stage_options) == ["words", "physics"], "the order of the file is that of training"
    words, physics = options.stage_options.values()
    assert (words.filters, words.max_steps, words.adapter) == ({"topic": ["verbs", "grammar"]}, 5, None)
    assert (physics.learning_rate, physics.save_total_limit, physics.max_steps) == (0.01, 2, 4)
    assert (Path(words.output_dir).name, Path(physics.output_dir).name) == ("01-words", "02-physics")
    assert (physics.adapter, physics.num_experts, physics.lora_dropout) == (words.output_dir, None, 0.1)


def test_options_of_one_stage_do_not_reach_the_next(values):
    stages = {"a": STAGES["physics"], "b": {"lora_dropout": 0.5}, "c": {}}
    for dropout, expected in ((0.1, [0.1, 0.5, 0.1]), (None, [None, 0.5, 0.05])):
        options = ContinualOptions(**values(stages=stages, lora_dropout=dropout))
        assert [stage.lora_dropout for stage in options.stage_options.values()] == expected
        assert [stage.filters for stage in options.stage_options.values()] == [{"topic": "physics"}, None, None]


def test_a_start_in_the_folder_to_be_replaced_is_kept(whole, run, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "sequence"))
    last = folder / FOLDERS[-1]
    before = contents(folder)
    with pytest.raises(MolaError, match="`adapter` must be outside `output_dir`"):
        run(output_dir=str(folder), adapter=str(last), overwrite_output_dir=True, num_experts=None)
    assert contents(folder) == before


def test_a_finished_adapter_can_be_the_start(whole, run, tmp_path):
    stages = {"words": {**STAGES["words"], "max_steps": 1}}
    adapter = str(whole[0] / FOLDERS[0])
    result = run(stages=stages, adapter=adapter, num_experts=None, evaluate_base=True)
    assert result.status == "finished"
    assert read(tmp_path / "run" / "01-words" / "run.json")["settings"]["adapter"] == adapter
    test = read(tmp_path / "run" / "00-start" / "evaluation" / "01-words.json")
    assert test["settings"]["adapter"] == adapter, "the start is the adapter, not the bare base model"
