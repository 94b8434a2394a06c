"""The suites on real text: loss curves beside the loop's, and large channels with the counts that go with them."""

import json
from dataclasses import replace

import pytest
import torch
from benchmarks.command import main
from benchmarks.curve import LAST, compare
from benchmarks.models import load_base
from benchmarks.outliers import channel_ratios, count_small, error_left
from benchmarks.providers import build, make_forward
from benchmarks.subnormal import Numbers
from benchmarks.text import text_batches, text_blocks
from transformers import AutoTokenizer

from benchmarks import models
from mola.tuner.layer import ExpertSettings, MolaLinear


@pytest.fixture(scope="module")
def case(case):
    return replace(case, batch_size=4, seq_len=32, num_experts="2248", optimizer=True)


def run(folder, output, *arguments):
    return main(["--model", str(folder), "--output", str(output), "--num_experts", "2248", "--r", "4", *arguments])


def layers_of(model):
    return {name: each for name, each in model.named_modules() if isinstance(each, MolaLinear)}


# ------------------------------------------------------------------ text


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


# ------------------------------------------------------------------ curves


@pytest.mark.slow
def test_mola_and_the_loop_have_the_same_curve(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    small = ("--curve_steps", "5", "--curve_seq_len", "48", "--curve_seeds", "2", "--providers", "loop", "mola")
    assert run(tiny_model_dir, output, "--suite", "curve", "--dropout", "0", "0.2", *small) == 0
    printed = capsys.readouterr().out
    rows = json.loads(output.read_text())["results"]["curve"]
    by_case = {(row["dtype"], row["dropout"], row["provider"]): row for row in rows}
    exact = ("mola", "loop", "mola, rounded", "mola, other weights")
    assert list(by_case) == (
        [("float32", 0.0, name) for name in exact]
        + [("float32", 0.2, name) for name in ("mola", "loop")]
        + [("bfloat16", 0.0, name) for name in exact]
    )
    _, loop, rounded, other = (by_case["float32", 0.0, name] for name in exact)
    # Losses of 6: ten roundings. A router without gradients would make a difference of 3e-5.
    assert loop["idle_experts"] == 0
    assert loop["max_difference"] < 5e-6
    assert rounded["max_difference"] < other["max_difference"]  # in so few steps perhaps none at all
    assert by_case["bfloat16", 0.0, "mola, rounded"]["max_difference"] > 0
    assert loop["max_difference"] < other["max_difference"]
    dropped = by_case["float32", 0.2, "loop"]
    assert dropped["seeds"] == [0, 1]
    assert [len(each) for each in dropped["losses"]] == [5, 5]
    assert dropped["max_difference"] > 1e-4  # other masks
    assert abs(dropped["final_difference"]) < 0.1
    assert "curve: model" in printed


def test_curves_are_compared_by_steps_and_by_their_ends():
    reference = [[3.0] * LAST + [1.0] * LAST, [3.0] * LAST + [2.0] * LAST]
    shifted = [[3.5] + [3.0] * (LAST - 1) + [1.0] * LAST, [3.0] * LAST + [2.25] * LAST]
    row = compare(shifted, reference)
    assert row["final_loss"] == 1.625
    assert row["final_loss_std"] == pytest.approx(1.25 / 2**0.5)
    assert row["final_difference"] == 0.125
    assert row["final_difference_std"] == pytest.approx(0.25 / 2**0.5)
    assert row["max_difference"] == 0.5
    assert row["mean_difference"] == pytest.approx((0.5 + 0.25 * LAST) / (4 * LAST))
    assert compare([[1.0, 2.0]], None) == {"first_loss": 1.0, "final_loss": 1.5, "final_loss_std": None}


# ------------------------------------------------------------------ large channels


@pytest.mark.slow
def test_the_suite_outliers_from_end_to_end(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    small = ("--seq_len", "16", "--repeats", "2", "--warmup", "0", "--dropout", "0.1")
    assert run(tiny_model_dir, output, "--suite", "outliers", *small) == 0
    assert "outliers: model" in capsys.readouterr().out
    rows = json.loads(output.read_text())["results"]["outliers"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["channel_ratio"] >= row["median_channel_ratio"] > 1
        assert row["linear"].startswith("model.layers.")
        assert row["gradient_numbers"] == row["trainable_parameters"]
        assert row["finite_gradients"] is True
        assert len(row["real_over_gaussian"]["samples"]) == 2
        for kind in ("real", "gaussian"):
            assert 0 < row[f"error_left_{kind}"] < 1


def test_a_large_channel_is_found(case):
    model = build("mola", load_base(case), case).model
    layers = layers_of(model)
    forward = make_forward(model, text_batches(case, 1)[0], case)
    before = channel_ratios(layers, forward)
    with torch.no_grad():
        model.get_base_model().model.layers[2].mlp.up_proj.base_layer.weight[5] *= 1000
    after = channel_ratios(layers, forward)
    largest = max(after, key=after.get)
    assert largest.endswith("layers.2.mlp.down_proj")
    assert after[largest] > 100 * before[largest]


def test_subnormal_numbers_are_counted_forward_and_backward(case):
    model = build("mola", load_base(case), case).model
    layers = layers_of(model)
    forward = make_forward(model, text_batches(case, 1)[0], case)
    ordinary, pairs = count_small(model, layers, layers, forward)
    tokens = case.batch_size * case.seq_len
    # At the least hidden values, gates and the gradients of both, E (r + 1) for each token.
    assert ordinary["rank_space_numbers"] >= 2 * 7 * (2 + 2 + 4 + 8) * (case.r + 1) * tokens
    assert ordinary["rank_space_subnormal"] == ordinary["gradient_subnormal"] == 0
    assert [x.shape[-1] for x, _ in pairs] == [layer.in_features for layer in layers.values()]
    name = next(iter(layers))
    with torch.no_grad():
        layers[name].mola_A["default"] *= 1e-38  # hidden values below the normal range, and so the gradients of B
    model.zero_grad()
    small, _ = count_small(model, layers, {}, forward)
    assert small["rank_space_subnormal"] > 0
    assert small["gradient_subnormal"] > 0
    with torch.no_grad():
        layers[name].mola_A["default"].zero_()
        layers[name].mola_B["default"] *= 1e-38  # now only in the backward pass
    model.zero_grad()
    assert count_small(model, layers, {}, forward)[0]["rank_space_subnormal"] > 0


def test_subnormal_numbers_are_those_between_zero_and_the_smallest_normal_one():
    numbers = Numbers()
    for dtype in (torch.float32, torch.bfloat16):
        numbers.add(torch.tensor([0.0, 1e-39, -1e-39, 2e-38, 1.0, float("inf"), float("nan")], dtype=dtype))
    assert numbers.row("x") == {"x_numbers": 14, "x_subnormal": 4, "x_subnormal_share": 4 / 14}


def test_experts_learn_beside_a_channel_a_hundred_times_as_large():
    torch.manual_seed(0)
    layer = MolaLinear(torch.nn.Linear(16, 12), "default", ExpertSettings(4, 4, 2, 8.0, init_lora_weights=False))
    layer.base_layer.requires_grad_(False)
    x = torch.randn(64, 16)
    ordinary = error_left(layer, x)
    x[:, 3] *= 100
    assert 0 < error_left(layer, x) < 1
    assert 0 < ordinary < 1


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "curve", "--curve_steps", "0"], "`curve_steps` must be at least 1: got 0"),
        (["--suite", "curve", "--curve_seeds", "0"], "`curve_seeds` must be at least 1: got 0"),
        (["--suite", "curve", "--curve_seq_len", "1"], "`curve_seq_len` must be at least 2"),
        (["--suite", "curve", "--curve_seq_len", "2048"], "`curve_seq_len` must fit the model: got 2048"),
        (
            ["--suite", "curve", "--providers", "frozen"],
            "`providers` must hold one of loop, mola for the suite curve",
        ),
        (
            ["--suite", "outliers", "--providers", "loop"],
            "`providers` must hold one of mola for the suite outliers",
        ),
    ],
)
def test_wrong_input_ends_in_one_line_before_the_work(arguments, message, tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert run(tiny_model_dir, output, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not output.exists()


def test_a_model_without_a_tokenizer_is_refused_before_the_work(tiny_model, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "results.json", "--suite", "curve") == 2
    assert "has no tokenizer that loads" in capsys.readouterr().err


def test_the_random_model_has_no_text_and_says_so(tiny_model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(models, "save_random_model", lambda folder, seed: tiny_model.save_pretrained(folder))
    output = tmp_path / "results.json"
    assert run("random12", output, "--suite", "curve", "outliers") == 0
    assert "random12 is left out" in caplog.text
    assert json.loads(output.read_text())["results"] == {"curve": [], "outliers": []}
