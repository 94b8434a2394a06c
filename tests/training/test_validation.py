"""Evaluation during training: on which rows, when, and which weights are kept."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Trainer

from mola.cli import main
from mola.data.prepare import PrepareOptions, prepare
from tests.grids import slow
from tests.training.runs import NO_EVALUATION, assert_same_weights, evaluation_loss, read_metrics, read_record


@pytest.fixture
def older_trainer(monkeypatch):
    """As that of Transformers 5.2, which keeps no note of what `save_strategy` best has saved."""
    determine = Trainer._determine_best_metric

    def of_best(self, *args, **kwargs):
        before = self.state.best_global_step
        found = determine(self, *args, **kwargs)
        if self.args.save_strategy == "best":
            self.state.best_global_step = before
        return found

    monkeypatch.setattr(Trainer, "_determine_best_metric", of_best)


@pytest.mark.parametrize("strategy", ["epoch", *slow("best")])
def test_saved_weights_are_those_of_the_lowest_evaluation_loss(
    strategy, flags, tmp_path, tiny_model_dir, rows_file, older_trainer
):
    data = tmp_path / "validation.json"
    rows = json.loads(rows_file.read_text(encoding="utf-8"))
    data.write_text(json.dumps(rows[:3]), encoding="utf-8")
    # The rate rises to a hundred times its start: the loss gets better first and much worse afterwards.
    options = {"num_train_epochs": 6, "warmup_steps": 0, "lr_scheduler_type": "cosine_with_min_lr"}
    options |= {"lr_scheduler_kwargs": '{"min_lr_rate": 100}', "save_strategy": strategy}
    assert main(flags(eval_data=data, lora_dropout=0, save_total_limit=1, **options)) == 0
    folder = tmp_path / "run"
    curve = [entry["eval_loss"] for entry in read_metrics(folder) if "eval_loss" in entry]
    assert len(curve) == 6, "each epoch is evaluated once, and the weights that were kept not again"
    assert curve[-1] > min(curve), "the last epoch has to be a worse one for this test"
    record = read_record(folder)
    final = record["metrics"]["eval_loss"]
    assert final == min(curve)
    assert Path(record["best_checkpoint"]).name == f"checkpoint-{3 * (1 + curve.index(min(curve)))}"
    assert_same_weights(folder, Path(record["best_checkpoint"]))
    assert evaluation_loss(folder, tiny_model_dir, data, slice(None)) == pytest.approx(final, rel=1e-5)
    # The recorded loss is, to the last bit, what the Trainer measures with the saved weights.
    more = {"adapter": folder, "max_steps": 1, "warmup_steps": 0, "eval_on_start": "true", "save_strategy": "no"}
    assert main(flags(tmp_path / "more", eval_data=data, load_best_model_at_end="false", **more)) == 0
    entries = [entry for entry in read_metrics(tmp_path / "more") if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [0, 1]
    assert entries[0]["eval_loss"] == final


def test_evaluation_can_be_switched_off_although_there_is_a_validation_split(flags, rows_file, tmp_path, caplog):
    prepare(PrepareOptions("sample", str(tmp_path / "data"), train_size=8, validation_size=4, test_size=4))
    unused = {"eval_data": rows_file, "eval_split": "dev", "eval_limit": 2, "eval_steps": 2}
    assert main(flags(data=tmp_path / "data" / "dataset.hf", num_train_epochs=1, **unused, **NO_EVALUATION)) == 0
    record = read_record(tmp_path / "run")
    assert record["data"].keys() == {"train"}
    assert "eval_loss" not in record["metrics"]
    for name in unused:
        assert f"`{name}` is not used, since `eval_strategy` is no" in caplog.text


def test_evaluation_samples_that_are_trained_on_are_counted(flags, rows_file, tmp_path, caplog):
    rows = json.loads(rows_file.read_text(encoding="utf-8"))
    other = [{**row, "id": f"other-{row['id']}"} for row in rows[:2]] + [{**rows[2], "id": "new", "output": "Other."}]
    (tmp_path / "eval.json").write_text(json.dumps(other), encoding="utf-8")
    assert main(flags(eval_data=tmp_path / "eval.json", num_train_epochs=1)) == 0
    assert "2 of 3 evaluation samples are trained on, too" in caplog.text


def test_splits_and_limits_are_those_asked_for(flags, tmp_path, caplog):
    prepare(PrepareOptions("sample", str(tmp_path / "data"), train_size=8, validation_size=4, test_size=6))
    named = {"data": "dataset.hf", "train_split": "test", "eval_split": "train", "eval_limit": 3}
    taken = {"data": "train.json", "validation_size": 0.5, "eval_limit": 2}
    for name, options, totals in (("named", named, [6, 3]), ("taken", taken, [4, 2])):
        options["data"] = tmp_path / "data" / options["data"]
        assert main(flags(tmp_path / name, num_train_epochs=1, warmup_steps=0, **options)) == 0
        record = read_record(tmp_path / name)
        assert [record["data"][part]["total"] for part in ("train", "evaluation")] == totals
        assert record["data_fingerprints"]["train"] != record["data_fingerprints"]["evaluation"]
    assert "`eval_limit` 2 leaves 2 samples that `validation_size` takes out" in caplog.text


def test_run_without_a_best_checkpoint_warns_and_is_evaluated_at_its_end(flags, tmp_path, caplog):
    assert main(flags(validation_size=2, num_train_epochs=1, eval_delay=100)) == 0
    assert "No evaluation ran that could choose a best checkpoint" in caplog.text
    losses = [entry["eval_loss"] for entry in read_metrics(tmp_path / "run") if "eval_loss" in entry]
    assert losses == [read_record(tmp_path / "run")["metrics"]["eval_loss"]]


def test_weights_that_no_evaluation_measured_are_evaluated(flags, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3, "load_best_model_at_end": "false"}
    assert main(flags(validation_size=2, save_strategy="no", **steps)) == 0
    entries = [entry for entry in read_metrics(tmp_path / "run") if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 3]
    assert read_record(tmp_path / "run")["metrics"]["eval_loss"] == entries[-1]["eval_loss"]


def test_missing_split_is_named_by_its_option(flags, tmp_path, capsys):
    prepare(PrepareOptions("sample", str(tmp_path / "data"), train_size=8, validation_size=0, test_size=4))
    data = tmp_path / "data" / "dataset.hf"
    for options, name in (
        ({"data": data, "train_split": "fit"}, "`train_split` must be one of train"),
        ({"data": data, "eval_data": data, "eval_split": "fit"}, "`eval_split` must be one of train"),
        ({"data": data, "eval_data": tmp_path / "nowhere.json"}, "`eval_data` must be an existing"),
    ):
        assert main(flags(**options)) == 2
        assert name in capsys.readouterr().err


def test_empty_validation_split_counts_as_none(flags, tmp_path, caplog):
    prepare(PrepareOptions("sample", str(tmp_path / "data"), train_size=8, validation_size=0, test_size=0))
    assert main(flags(data=tmp_path / "data" / "dataset.hf", num_train_epochs=1)) == 0
    assert "no evaluation data (the split `validation` is empty)" in caplog.text
    assert read_record(tmp_path / "run")["data"].keys() == {"train"}


def test_validation_split_is_evaluated_at_the_interval_asked_for(flags, tmp_path):
    options = {"train_size": 8, "validation_size": 4, "test_size": 4}
    prepare(PrepareOptions("sample", str(tmp_path / "data"), **options))
    # Saved as often as evaluated, or the best weights could not be kept.
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "max_steps": 4}
    assert main(flags(data=tmp_path / "data" / "dataset.hf", **steps)) == 0
    record = read_record(tmp_path / "run")
    assert [record["data"][name]["kept"] for name in ("train", "evaluation")] == [8, 4]
    evaluated = [entry["step"] for entry in read_metrics(tmp_path / "run") if "eval_loss" in entry]
    assert evaluated == [2, 4]


def test_base_model_too_large_for_memory_names_remedies(flags, monkeypatch, error_line):
    def build(*given):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes.")

    monkeypatch.setattr("mola.training.train.build_model", build)
    line = error_line(flags(dtype="float32"))
    assert (
        "The base model does not fit: pass --dtype bfloat16; or --load_in_4bit or --load_in_8bit; or a smaller" in line
    )
    assert "batch" not in line


def test_tokens_beyond_the_vocabulary_are_refused(tiny_model_dir, flags, tmp_path, error_line):
    """As a tokenizer has them that was given tokens after the model."""
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["Say"])
    tokenizer.save_pretrained(base)
    rows = [{"instruction": f"Say {i}", "output": "x"} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    line = error_line(flags(base_model=base, data=tmp_path / "rows.json", **NO_EVALUATION))
    assert f"id {len(tokenizer) - 1}, its vocabulary has {len(tokenizer) - 1}" in line
