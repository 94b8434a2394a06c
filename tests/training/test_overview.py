"""What a run says before its first step: one table, and kernels only if they are asked for."""

import json
import re
import shlex

import pytest

from mola.architecture.picture import picture, picture_of_modules
from mola.cli import main
from mola.data.prepare import PrepareOptions, prepare
from mola.options.parsing import parse
from mola.serving.options import ServeOptions
from tests.reporting.pages import Page
from tests.training.runs import NO_EVALUATION, read_record

SECTIONS = {"accuracy": "accuracy", "loss": "free-text"}  # of a report's page, by what is measured


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([2, 2, 4, 4], "2244"),
        ([2, None, 9], "2.9"),
        ([8, 8, 16, None], "layers 0-1: 8, 2: 16, 3: none"),
    ],
)
def test_a_picture_has_one_digit_per_layer_or_names_the_layers(numbers, text):
    assert picture(numbers) == text


def test_modules_with_equal_numbers_share_a_line():
    numbers = {("q", 0): 2, ("k", 0): 2, ("q", 1): 4, ("k", 1): 4}
    assert picture_of_modules(numbers, 2) == ["24"]
    assert picture_of_modules({**numbers, ("up", 1): 12}, 2) == ["q, k: 24", "up: layers 0: none, 1: 12"]


@pytest.fixture
def table(flags, caplog):
    """Runs one step, returns the rows of the table as name -> text, and the whole output."""

    def run(**options):
        assert main(flags(**{"max_steps": 1, "warmup_steps": 0, **NO_EVALUATION, **options})) == 0
        text = caplog.text
        rows = re.findall(r"^  (\S.*?) {2,}(.*)$", text, re.MULTILINE)
        return dict(rows), text

    return run


def test_a_run_begins_with_its_table(table, tmp_path):
    rows, text = table(num_experts="1224", r="2", target_modules="q_proj,up_proj")
    assert rows["experts per layer"] == "1224"
    assert rows["r, top_k"] == "2, 2"
    assert rows["target modules"] == "q_proj, up_proj"
    trainable = read_record(tmp_path / "run")["trainable_parameters"]
    assert re.fullmatch(rf"{trainable:,} parameters, \d+\.\d{{3}}% of the base model's", rows["trainable"])
    report = read_record(tmp_path / "run")["data"]["train"]
    share = report["trained_tokens"] / report["tokens"]
    assert rows["tokens per epoch"] == f"{report['tokens']:,}, {share:.0%} of them contribute to the loss"
    assert (rows["steps"], rows["effective batch"], rows["dtype"]) == ("1", "4 samples", "float32")
    assert re.match(r"up to [\d,]+ MiB with the longest samples \(weights \d", rows["memory"])
    assert "Kernels" not in text


def test_numbers_that_differ_by_module_and_large_ones_can_be_read(table):
    pattern = json.dumps({"up_proj": 12})
    rows, text = table(
        num_experts="2",
        target_modules="q_proj,v_proj,up_proj",
        num_experts_pattern=pattern,
        gradient_accumulation_steps=2,
    )
    assert rows["experts per layer"] == "self_attn.q_proj, self_attn.v_proj: 2222"
    assert "mlp.up_proj: layers 0-3: 12\n" in text
    assert rows["effective batch"] == "8 samples (4 x 2 accumulated)"


def test_dtype_auto_says_why_and_kernels_are_for_verbose(table):
    rows, text = table(dtype="auto", verbose="true", num_experts="2")
    assert re.match(r"(bfloat16|float32): ", rows["dtype"])
    assert "requested" not in text
    assert "Kernels: training: " in text


def prepared_questions(folder):
    prepare(PrepareOptions("sample", str(folder), train_size=8, validation_size=4, test_size=4))
    return {"data": folder / "dataset.hf", "task": "sample"}


def write_pairs(path, count):
    rows = [{"question": f"Count to {index}.", "answer": f"{index}"} for index in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def files_without_a_test(folder):
    write_pairs(folder / "train.jsonl", 8)
    write_pairs(folder / "validation.jsonl", 4)
    return {"data": folder}


def one_file_and_one_for_evaluation(folder):
    write_pairs(folder / "mine.jsonl", 8)
    write_pairs(folder / "other.jsonl", 4)
    return {"data": folder / "mine.jsonl", "eval_data": folder / "other.jsonl"}


@pytest.mark.parametrize("made", [prepared_questions, files_without_a_test, one_file_and_one_for_evaluation])
def test_a_run_ends_with_commands_that_run_as_they_are(made, flags, tmp_path, capsys):
    data = made(tmp_path / "my data")
    assert main(flags(tmp_path / "my run", **data, max_steps=1, warmup_steps=0, template=None)) == 0
    printed = capsys.readouterr().err
    commands = [shlex.split(line) for line in printed[printed.index("Next:") :].splitlines()[1:]]
    assert [words[:2] for words in commands] == [["mola", name] for name in ("evaluate", "report", "serve")]
    assert "s, mean training loss " in printed
    evaluate, report, serve = (words[1:] for words in commands)
    assert main(evaluate) == main(report) == 0
    result = json.loads((tmp_path / "my run" / "after.json").read_text())
    measured = "accuracy" if "task" in data else "loss"
    assert (result["total"], measured in result) == (4, True)
    section = Page((tmp_path / "my run" / "report.html").read_text(encoding="utf-8")).section(SECTIONS[measured])
    assert " without the adapter has not been measured" in section.text
    assert " with the adapter has not been measured" not in section.text
    served = parse(ServeOptions, serve[1:], prog="mola serve", positional="adapter")
    assert served.adapter == [str(tmp_path / "my run")]
