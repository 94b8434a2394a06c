"""Files of earlier runs: run records, telemetry, results, journals, records of comparisons and sequences."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mola.allocation.probe import routing_records
from mola.data.tasks import load_task
from mola.evaluation.evaluate import EvaluateOptions
from mola.evaluation.resuming import AnswersFile
from mola.reporting.doctor import DoctorOptions, doctor
from mola.reporting.load_run import gather
from mola.reporting.report import ReportOptions, report
from mola.studies.comparison.record import FORMAT, read_results
from mola.studies.continual_learning.record import RECORD_FILE, read_record
from mola.studies.train_and_test import evaluate_once
from mola.training.checkpoints import check_best_checkpoint, checkpoint_step, find_checkpoint
from mola.training.same_run import check_same_run
from tests.fuzz.checking import fuzz, survives
from tests.fuzz.documents import broken, files, line_files
from tests.fuzz.test_adapters import OWN, OWN_SETTINGS

ROW = {"module": "model.layers.0.self_attn.q_proj", "layer_index": 0, "num_tokens": 5, "shares": [0.5, 0.5]}
ROW |= {"mean_gates": [0.5, 0.5], "balance": 1.0, "entropy": 0.5, "margin": 0.1, "dead_experts": [], "drift": None}
INTERVALS = [{"step": step, "epoch": 0.1, "tokens": 9, "modules": [ROW, ROW | {"layer_index": 1}]} for step in (1, 2)]
INSPECTION = {"usage": {"all": [ROW], "token=word": [ROW]}, "redundancy": [], "samples": 3, "settings": {}}
INSPECTION |= {"examples": [{"id": "1", "prompt": "p", "answer": "A", "groups": {}, "experts": [ROW]}]}
INSPECTION |= {"agreement": {"modules": ["a", "b"], "cramers_v": [[1.0, 0.5], [0.5, 1.0]]}}
INSPECTION |= {"leave_one_out": [{"layer_index": 0, "module": None, "expert": 1, "loss_change": 0.1}]}
INSPECTION |= {"leave_one_out_baseline": {"loss": 1.0}}
SAMPLE = {
    "id": "1",
    "prompt": "p",
    "answer": "A",
    "predicted": "B",
    "output": "it is B",
    "correct": False,
    "groups": {"a": "b"},
}
EVALUATION = {"accuracy": 0.5, "correct": 1, "total": 2, "interval_95": [0.1, 0.9], "samples": [SAMPLE]}
EVALUATION |= {"groups": {"a": {"b": {"accuracy": 0.5, "correct": 1, "total": 2, "interval_95": [0.1, 0.9]}}}}
EVALUATION |= {"settings": {"data": "d", "task": "t"}, "data_fingerprint": "ab"}
TEST_OPTIONS = EvaluateOptions(base_model="m", data="d", task="sample")
TESTED = EVALUATION | {"settings": asdict(TEST_OPTIONS), "unanswered": 0, "seconds": 1.5}
TESTED |= {"task_fingerprint": load_task("sample").fingerprint()}
RUN = {"status": "finished", "settings": {"base_model": "m", "data": "d"}, "data_fingerprints": {"train": "ab"}}
RUN |= {"adapter_settings": {"r": 2}, "quantization": None, "metrics": {"eval_loss": 1.0}, "seconds": 2.5}
RUN |= {
    "allocation": {"num_experts": 3, "num_layers": 2, "base_parameters": 100},
    "command": ["mola", "train"],
    "machine": {"cpu": "x"},
}
RUN |= {
    "data": {"train": {"kept": 3, "tokens": 9, "trained_tokens": 5}},
    "trainable_parameters": 5,
    "versions": {"torch": "2"},
}
LOSSES = [{"step": 1, "loss": 2.5, "epoch": 0.1}, {"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": None}]
STATE = {"global_step": 2, "best_model_checkpoint": "run/checkpoint-2", "log_history": []}
RESULT = {"task": "rte", "recipe": "a", "seed": 0, "accuracy": 0.5, "correct": 1, "total": 2, "unanswered": 0}
RESULT |= {"marks": "10", "trainable_parameters": 5, "num_experts": [1], "eval_loss": None, "seconds_training": 1.0}
RESULT |= {"seconds_testing": 1.0, "settings": {"r": 2}, "fingerprints": {"train": "a"}, "versions": {}, "machine": {}}
STAGES = {"stages": [{"name": "a", "folder": "0-a", "settings": {}, "data_fingerprints": {}, "results": {"a": 0.5}}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@fuzz
@given(line_files([{"data": "x", "samples": 2}, SAMPLE, SAMPLE]), st.booleans())
def test_journal_of_an_evaluation(folder, content, discard):
    journal = AnswersFile(folder / "out.json", {"data": "x", "samples": 2})
    journal.path.write_bytes(content)
    records = survives(journal.read, discard)
    assert not isinstance(records, list) or all(isinstance(record, dict) for record in records)


@fuzz
@given(files({"format": FORMAT, "status": "running", "summary": {}, "runs": [RESULT, RESULT | {"seed": 1}]}))
def test_record_of_a_comparison(folder, content):
    (folder / "compare.json").write_bytes(content)
    results = survives(read_results, folder / "compare.json")
    for result in results if isinstance(results, list) else []:
        assert str(result.key)
        assert isinstance(result.settings, dict)
        assert isinstance(result.fingerprints, dict)


@fuzz
@given(files(STAGES))
def test_record_of_a_sequence(folder, content):
    (folder / "sequence").mkdir(exist_ok=True)
    (folder / "sequence" / RECORD_FILE).write_bytes(content)
    survives(read_record, folder / "sequence", False)


@fuzz
@given(files(TESTED))
def test_result_of_a_test(folder, content):
    (folder / "test.json").write_bytes(content)
    survives(evaluate_once, replace(TEST_OPTIONS, output=str(folder / "test.json")), "ab")


def test_result_of_a_test_as_it_was(folder):
    (folder / "test.json").write_text(json.dumps(TESTED), encoding="utf-8")
    assert evaluate_once(replace(TEST_OPTIONS, output=str(folder / "test.json")), "ab") == TESTED


@fuzz
@given(files(INSPECTION), line_files(INTERVALS))
def test_use_of_experts(folder, inspection, lines):
    (folder / "inspect.json").write_bytes(inspection)
    (folder / "routing.jsonl").write_bytes(lines)
    survives(routing_records, None, str(folder / "inspect.json"))
    survives(routing_records, str(folder), None)


RUN_FILES = {
    "run.json": files(RUN),
    "before.json": files(EVALUATION),
    "after.json": files(EVALUATION),
    "inspect.json": files(INSPECTION),
    "metrics.jsonl": line_files(LOSSES),
    "routing.jsonl": line_files(INTERVALS),
    "adapter_config.json": files(OWN_SETTINGS),
    "adapter_model.safetensors": broken(save(OWN)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for name, content in (("run", RUN), ("before", EVALUATION), ("after", EVALUATION), ("inspect", INSPECTION)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    for name, lines in (("metrics", LOSSES), ("routing", INTERVALS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "adapter_config.json").write_text(json.dumps(OWN_SETTINGS))
    (folder / "adapter_model.safetensors").write_bytes(save(OWN))
    return folder


@fuzz
@given(st.sampled_from(sorted(RUN_FILES)).flatmap(lambda name: st.tuples(st.just(name), RUN_FILES[name])))
def test_run_folder_to_report_on(run, victim):
    name, content = victim
    before = (run / name).read_bytes()
    (run / name).write_bytes(content)
    try:
        survives(gather, str(run))
        survives(doctor, DoctorOptions(str(run)))
        survives(report, ReportOptions(str(run), output=str(run.parent / "report.html"), overwrite=True))
    finally:
        (run / name).write_bytes(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "run.json").write_text(json.dumps(RUN))
    place = folder / "checkpoint-2"
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(OWN_SETTINGS))
    (place / "adapter_model.safetensors").write_bytes(save(OWN))
    (place / "trainer_state.json").write_text(json.dumps(STATE))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"a": 1}, place / name)
    return place


CHECKPOINT_FILES = {
    "../run.json": files(RUN),
    "trainer_state.json": files(STATE),
    "adapter_model.safetensors": broken(save(OWN)),
    "optimizer.pt": st.binary(max_size=50),
}


@fuzz
@given(
    st.sampled_from(sorted(CHECKPOINT_FILES)).flatmap(lambda name: st.tuples(st.just(name), CHECKPOINT_FILES[name])),
    st.sampled_from(["", "checkpoint-²", "checkpoint-1" + "0" * 200, "checkpoint-" + "9" * 240]),
)
def test_checkpoint(checkpoint, victim, beside):
    name, content = victim
    before = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content)
    if beside:
        (checkpoint.parent / beside).mkdir()

    def resume():
        found = find_checkpoint(checkpoint.parent, "last")
        check_same_run(found, RUN)
        check_best_checkpoint(found)
        checkpoint_step(found)

    try:
        survives(resume)
    finally:
        (checkpoint / name).write_bytes(before)
        if beside:
            shutil.rmtree(checkpoint.parent / beside)
