"""The result file, and the file of answers that an interrupted evaluation goes on from."""

import json
import logging
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from mola.data.encode import data_fingerprint
from mola.errors import MolaError
from mola.evaluation.core import evaluate_examples
from mola.evaluation.evaluate import EvaluateOptions, evaluate
from mola.evaluation.resuming import AnswersFile


def test_result_file_has_the_documented_fields(options, examples):
    result = evaluate(options)
    written = json.loads(Path(options.output).read_text(encoding="utf-8"))
    assert written == result.to_dict()
    assert set(written) == {
        *("accuracy", "correct", "total", "unanswered", "interval_95", "metrics", "groups", "samples"),
        *("settings", "versions", "data_fingerprint", "task_fingerprint", "seconds", "machine"),
    }
    assert set(written["samples"][0]) == {"id", "prompt", "output", "predicted", "answer", "correct"}
    assert written["settings"] == asdict(options)
    assert set(written["versions"]) - {"numba", "triton"} == {"mola", "torch", "transformers", "peft", "python"}
    assert set(written["machine"]) == {"cpu", "gpu", "threads"}
    assert set(written["groups"]) == {"subject", "topic", "grade"}
    assert set(written["groups"]["subject"]["physics"]) == {"accuracy", "correct", "total", "interval_95"}
    assert written["metrics"] == {}
    assert written["data_fingerprint"] == data_fingerprint(examples)
    assert written["total"] == 11
    assert written["seconds"] > 0
    assert not AnswersFile(options.output, {}).path.exists()


def test_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(options, interrupt_after, tmp_path, caplog):
    whole = evaluate(EvaluateOptions(**asdict(options) | {"output": str(tmp_path / "whole.json")}))
    interrupt_after(options, num_batches=2)
    partial = AnswersFile(options.output, {}).path
    with open(partial, "a") as file:
        file.write('{"index": 0, "sam')  # killed while writing
    num_lines = len(partial.read_text().splitlines())
    assert num_lines == 1 + 8 + 1
    with caplog.at_level(logging.WARNING, logger="mola"):
        resumed = evaluate(options)
    assert "8 finished samples" in caplog.text
    assert resumed.samples == whole.samples
    assert resumed.accuracy == whole.accuracy
    assert not partial.exists()


def test_finished_samples_are_not_asked_again(tiny_model, tiny_tokenizer, task, examples):
    records = []
    evaluate_examples(tiny_model, tiny_tokenizer, task, examples, on_batch=records.extend, show_progress=False)
    marked = [record | {"sample": record["sample"] | {"output": "kept"}} for record in records[:9]]
    again = []
    result = evaluate_examples(
        tiny_model,
        tiny_tokenizer,
        task,
        examples,
        finished_records=marked,
        on_batch=again.extend,
        show_progress=False,
    )
    assert {record["index"] for record in again} == {record["index"] for record in records[9:]}
    assert sum(sample["output"] == "kept" for sample in result.samples) == 9


def test_unfinished_run_with_other_settings_is_refused_or_discarded(options, interrupt_after):
    interrupt_after(options)
    changed = EvaluateOptions(**asdict(options) | {"max_new_tokens": 6})
    with pytest.raises(MolaError, match=r"4 samples.*max_new_tokens 5 there, 6 now.*`overwrite`"):
        evaluate(changed)
    changed.overwrite = True
    assert evaluate(changed).total == 11


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [("question", "Something else?", "data_fingerprint"), ("answer", 0, "answers_fingerprint")],
)
def test_unfinished_run_on_other_data_is_refused(column, value, named, options, interrupt_after, data):
    interrupt_after(options)
    rows = json.loads(data.read_text())
    assert rows[3][column] != value
    rows[3][column] = value
    data.write_text(json.dumps(rows))
    with pytest.raises(MolaError, match=named):
        evaluate(options)


def test_unfinished_run_with_another_rule_for_answers_is_refused(options, monkeypatch, interrupt_after, tmp_path):
    text = (resources.files("mola.data.tasks") / "scienceqa.yaml").read_text(encoding="utf-8")
    own = tmp_path / "own.yaml"
    own.write_text(text.replace("name: scienceqa", "name: own"))
    options = replace(options, task=str(own))
    interrupt_after(options)
    own.write_text(own.read_text().replace("answer_pattern: '", "answer_pattern: '(?i)"))
    with pytest.raises(MolaError, match="task_fingerprint"):
        evaluate(options)


def test_unfinished_run_of_an_adapter_trained_again_is_refused(options, interrupt_after, tiny_model, tmp_path):
    model = get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    options.adapter = str(tmp_path / "adapter")
    interrupt_after(options)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MolaError, match="weights"):
        evaluate(options)


def test_damaged_answers_are_refused(tmp_path):
    partial = AnswersFile(tmp_path / "result.json", {"a": 1})
    partial.path.write_text('{"a": 1}\nnot json\n')
    with pytest.raises(MolaError, match="cannot be read"):
        partial.read()


@given(st.lists(st.text(), max_size=5))
def test_answers_keep_any_text(tmp_path_factory, texts):
    partial = AnswersFile(tmp_path_factory.mktemp("partial") / "result.json", {"pair": (1, 2)})
    records = [{"index": index, "sample": {"output": text}} for index, text in enumerate(texts)]
    for record in records:
        partial.append([record])
    assert partial.read() == records


def test_existing_result_is_kept_unless_overwrite(options, tmp_path):
    options.output = str(tmp_path / "result.json")
    (tmp_path / "result.json").write_text("precious")
    with pytest.raises(MolaError, match="exists"):
        evaluate(options)
    assert (tmp_path / "result.json").read_text() == "precious"
    options.overwrite = True
    assert evaluate(options).total == 11
