"""The suite `curve`: real text, loss curves beside those of the loop."""

import json
from dataclasses import replace

import pytest
import torch
from benchmarks.command import main
from benchmarks.curve import LAST, compare
from benchmarks.text import text_batches, text_blocks
from transformers import AutoTokenizer

from benchmarks import models


@pytest.fixture(scope="module")
def case(case):
    return replace(case, batch_size=4, seq_len=32, num_experts="2248", optimizer=True)


def run(folder, output, *arguments):
    return main(["--model", str(folder), "--output", str(output), "--num_experts", "2248", "--r", "4", *arguments])


def test_batches_are_the_sample_questions_in_an_order_that_the_seed_decides(case):
    text = AutoTokenizer.from_pretrained(case.folder).decode(text_blocks(case.folder, 512)[0])
    assert "Question:" in text
    assert "Answer: The answer is" in text
    first, again, other = (
        torch.stack([batch["input_ids"] for batch in text_batches(replace(case, seed=seed), 3)]) for seed in (0, 0, 1)
    )
    assert first.shape == (3, 4, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_blocks_come_again_when_all_were_used(case):
    long = replace(case, seq_len=1024, batch_size=16)
    blocks = text_blocks(case.folder, 1024)
    steps = 2 * len(blocks) // 16
    rows = torch.cat([batch["input_ids"] for batch in text_batches(long, steps)])
    assert len(rows.unique(dim=0)) == len(blocks) < len(rows)


@pytest.mark.slow
def test_mola_and_the_loop_have_the_same_curve(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    small = ("--curve_steps", "5", "--curve_seq_len", "48", "--providers", "loop", "mola")
    assert run(tiny_model_dir, output, "--suite", "curve", *small) == 0
    printed = capsys.readouterr().out
    rows = json.loads(output.read_text())["results"]["curve"]
    by_case = {(row["dtype"], row["provider"]): row for row in rows}
    names = ("mola", "loop", "mola, rounded", "mola, other weights")
    assert list(by_case) == [(dtype, name) for dtype in ("float32", "bfloat16") for name in names]
    _, loop, rounded, other = (by_case["float32", name] for name in names)
    # Losses of 6: ten roundings. A router without gradients would make a difference of 3e-5.
    assert loop["idle_experts"] == 0
    assert loop["max_difference"] < 5e-6
    assert rounded["max_difference"] < other["max_difference"]  # in so few steps perhaps none at all
    assert by_case["bfloat16", "mola, rounded"]["max_difference"] > 0
    assert loop["max_difference"] < other["max_difference"]
    assert "curve: model" in printed


def test_curves_are_compared_by_steps_and_by_their_ends():
    reference = [3.0] * LAST + [1.0] * LAST
    row = compare([3.5] + [3.0] * (LAST - 1) + [1.25] * LAST, reference)
    assert row["final_loss"] == 1.25
    assert row["final_difference"] == 0.25
    assert row["max_difference"] == 0.5
    assert row["mean_difference"] == pytest.approx((0.5 + 0.25 * LAST) / (2 * LAST))
    assert compare([1.0, 2.0], None) == {"first_loss": 1.0, "final_loss": 1.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--curve_steps", "0"], "`curve_steps` must be at least 1: got 0"),
        (["--curve_seq_len", "1"], "`curve_seq_len` must be at least 2"),
        (["--curve_seq_len", "2048"], "`curve_seq_len` must fit the model: got 2048"),
        (["--providers", "frozen"], "`providers` must hold one of loop, mola for the suite curve"),
    ],
)
def test_wrong_input_ends_in_one_line_before_the_work(arguments, message, tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert run(tiny_model_dir, output, "--suite", "curve", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_model_without_a_tokenizer_is_refused_before_the_work(tiny_model, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "results.json", "--suite", "curve") == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_the_random_model_has_no_text_and_says_so(tiny_model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(models, "save_random_model", lambda folder, seed: tiny_model.save_pretrained(folder))
    output = tmp_path / "results.json"
    assert run("random12", output, "--suite", "curve") == 0
    assert "random12 is left out" in caplog.text
    assert json.loads(output.read_text())["results"] == {"curve": []}
